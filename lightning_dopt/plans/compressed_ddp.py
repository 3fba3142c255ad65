"""Data parallel training with compressed gradients."""

from lightning_dopt.compress import Int8
from lightning_dopt.compress.base import Codec, Compressor
from lightning_dopt.compress.memory import ErrorFeedback
from lightning_dopt.plan import Plan, Sync, is_exact


def compressed_ddp(codec: Codec | None = None) -> Plan:
    """Every step the mean of compressed gradients takes the place of the local gradient; replicas stay equal.

    Args:
        codec: What is on the wire; ``None`` means ``Int8()``. A lossy compressor without a memory is wrapped in
            ``ErrorFeedback``; pass a memory to choose another one. ``LowRank(r)`` gives PowerSGD.

    Source: Karimireddy et al., "Error Feedback Fixes SignSGD", arXiv 1901.09847; Vogels et al., "PowerSGD",
    arXiv 1905.13727.
    """
    wire = codec or Int8()
    if isinstance(wire, Compressor) and not is_exact(wire):
        wire = ErrorFeedback(wire)
    return Plan([Sync(what="gradients", codec=wire)])
