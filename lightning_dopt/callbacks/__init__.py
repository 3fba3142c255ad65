"""Callbacks beside the strategies."""

from lightning_dopt.callbacks.low_rank import LowRank
from lightning_dopt.callbacks.mergeability import Mergeability

__all__ = ["LowRank", "Mergeability"]
