"""Image classification: any timm model, and four small data sets."""

from recipes.vision.data import ImageData
from recipes.vision.model import TimmClassifier

__all__ = ["ImageData", "TimmClassifier"]
