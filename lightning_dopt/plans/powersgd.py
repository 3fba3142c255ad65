"""PowerSGD: gradients as two thin factors, summed on the way."""

from __future__ import annotations

from lightning_dopt._checks import check_int
from lightning_dopt.compress import ErrorFeedback, Identity, LowRank, Phases
from lightning_dopt.plan import Plan, Sync


def powersgd(rank: int = 4, dense_steps: int = 0, min_ratio: float = 2.0) -> Plan:
    """PowerSGD: gradients as two thin factors with error feedback; bytes do not grow with the number of workers.

    Vectors, and matrices where it would not save a factor ``min_ratio``, travel whole. Any inner optimizer; momentum and
    weight decay come after the mean, as in the paper.

    Args:
        rank: Of the factors.
        dense_steps: Steps at the start in which everything is sent; a tenth of the training is PyTorch's advice.
        min_ratio: Smallest worthwhile saving for one matrix.

    Raises:
        ValueError: an option out of range.

    Source: Vogels, Karimireddy, Jaggi, "PowerSGD", arXiv 1905.13727, algorithms 1 and 2; the residual is each rank's own.
    """
    check_int("powersgd", "dense_steps", dense_steps, 0)
    thin = LowRank(rank, min_ratio)
    codec = ErrorFeedback(Phases([Identity(), thin], [dense_steps]) if dense_steps else thin)
    return Plan([Sync(what="gradients", codec=codec)])
