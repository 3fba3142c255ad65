"""Min-max problems with compressed messages: a bilinear game and a small GAN."""
