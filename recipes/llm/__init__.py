"""Byte-level language modelling: a small decoder-only transformer and a folder of text."""

from recipes.llm.data import TextFolder
from recipes.llm.model import ByteGPT

__all__ = ["ByteGPT", "TextFolder"]
