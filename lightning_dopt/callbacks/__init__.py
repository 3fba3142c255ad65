"""Callbacks beside the strategies."""

from lightning_dopt.callbacks.adaptive_batch import AdaptiveBatch
from lightning_dopt.callbacks.client_errors import ClientErrors
from lightning_dopt.callbacks.low_rank import LowRank
from lightning_dopt.callbacks.mergeability import Mergeability
from lightning_dopt.callbacks.restart_points import RestartPoints

__all__ = ["AdaptiveBatch", "ClientErrors", "LowRank", "Mergeability", "RestartPoints"]
