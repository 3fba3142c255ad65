"""Decentralized and communication-efficient training for PyTorch Lightning."""

__version__ = "0.1.0.dev0"
