"""Callbacks beside the strategies."""

from lightning_dopt.callbacks.mergeability import Mergeability

__all__ = ["Mergeability"]
