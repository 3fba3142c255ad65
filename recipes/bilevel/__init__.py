"""Bilevel recipes: data hyper-cleaning and a weight decay for every weight."""

from recipes.bilevel.data import TwoLevelData
from recipes.bilevel.model import DecayTuning, HyperCleaning

__all__ = ["DecayTuning", "HyperCleaning", "TwoLevelData"]
