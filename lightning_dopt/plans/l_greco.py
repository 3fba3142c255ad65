"""Data parallel training with compressed gradients, every layer at its own ratio."""

from lightning_dopt.compress import LowRank
from lightning_dopt.compress.base import Compressor
from lightning_dopt.compress.budget import LGreCo
from lightning_dopt.compress.memory import ErrorFeedback
from lightning_dopt.plan import Plan, Sync


def l_greco(codec: Compressor | None = None, every: int = 1000, alpha: float = 1.0) -> Plan:
    """:func:`compressed_ddp` whose rank, ratio or levels are chosen per tensor: the fewest bytes at the uniform error.

    Args:
        codec: The uniform setting that defines the error; ``None`` means ``LowRank(4)``, PowerSGD as in the paper. Also
            ``TopK(...)``, ``QSGD(...)`` and whatever :class:`~lightning_dopt.compress.LGreCo` can vary.
        every: Steps between choices; the paper chooses once per epoch.
        alpha: Error allowed, relative to that of ``codec`` for all tensors.

    Source: Alimohammadi et al., "L-GreCo: Layerwise-Adaptive Gradient Compression for Efficient and Accurate Deep
    Learning", arXiv 2210.17357.
    """
    wire = ErrorFeedback(LGreCo(codec if codec is not None else LowRank(4), every=every, alpha=alpha))
    return Plan([Sync(what="gradients", codec=wire)])
