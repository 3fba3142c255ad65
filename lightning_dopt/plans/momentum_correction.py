"""Deep Gradient Compression and global momentum fusion: few elements of accumulated momentum in every step."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_dopt._checks import check_int
from lightning_dopt.compress import DGC, GMF, Compressor, Phases, TopK
from lightning_dopt.local import ClipLocal
from lightning_dopt.plan import Plan, Sync
from lightning_dopt.plans._dense import large_only


def dgc(
    ratio: float = 0.001,
    momentum: float = 0.9,
    nesterov: bool = False,
    masking: bool = True,
    clip: float | None = None,
    warmup: Sequence[float] = (0.25, 0.0625, 0.015625, 0.004),
    warmup_steps: int = 100,
    dense_below: int | None = 0,
) -> Plan:
    """Deep Gradient Compression: the largest elements of accumulated momentum, fewer and fewer at the start.

    The inner optimizer must be SGD without momentum, which is here; bring weight decay there. ``ratio=1`` without masking and
    warm-up is SGD with momentum.

    Args:
        ratio: Share of the elements sent in the long run.
        momentum: Of each rank, before the compressor.
        nesterov: Whether it looks ahead.
        masking: Whether momentum of what was sent is cleared.
        clip: Norm of the sum of all gradients to clip to, each rank its own to ``clip / sqrt(n)``; ``None`` does not clip.
        warmup: Shares during the warm-up, those above ``ratio``; empty for none.
        warmup_steps: Steps for which each of them is used; an epoch in the paper.
        dense_below: Tensors of fewer elements, and vectors, travel whole, with plain momentum; ``None`` chooses from all. The
            authors' code leaves vectors dense.

    Raises:
        ValueError: an option out of range.

    Source: Lin, Han, Mao, Wang, Dally, "Deep Gradient Compression", arXiv 1712.01887.
    """
    memory = DGC(warming(ratio, warmup, warmup_steps, dense_below), momentum, nesterov, masking)
    return Plan([Sync(what="gradients", codec=memory)], [] if clip is None else [ClipLocal(clip, spread=True)])


def warming(ratio: float, warmup: Sequence[float], steps: int, dense_below: int | None = None) -> Compressor:
    """``TopK(ratio)``, after ``steps`` rounds with each of the larger shares in ``warmup``."""
    check_int("dgc", "warmup_steps", steps, 1)
    codecs = [large_only(TopK(share), dense_below) for share in [*(s for s in warmup if s > ratio), ratio]]
    return Phases(codecs, [steps] * (len(codecs) - 1)) if len(codecs) > 1 else codecs[0]


def gmf(
    ratio: float = 0.1,
    momentum: float = 0.9,
    fusion: float | Sequence[float] = 0.3,
    global_momentum: float = 0.9,
    codec: Compressor | None = None,
    fusion_steps: int = 100,
    dense_below: int | None = None,
) -> Plan:
    """Global momentum fusion: ranks choose what matters to them or to the momentum of all; on unequal data they agree more.

    Args:
        ratio: Share of the elements sent.
        momentum: Of each rank, before the compressor; the inner optimizer should have none.
        fusion: Weight of the shared momentum in the choice, from 0 (DGC) to below 1. Several are used one after the other,
            the last from then on; the authors' code raises it from 0 to 0.6 in ten equal steps over the training.
        global_momentum: Decay of the shared momentum.
        codec: What to choose with instead of ``TopK(ratio)``.
        fusion_steps: Steps for which each of several ``fusion`` is used.
        dense_below: Tensors of fewer elements, and vectors, travel whole; ``None`` packs all of them.

    Raises:
        ValueError: an option out of range, or a codec that does not choose.

    Source: Kuo, Kuo, Lin, "Improving Federated Learning Communication Efficiency with Global Momentum Fusion", arXiv
    2211.09320, on gradients.
    """
    check_int("gmf", "fusion_steps", fusion_steps, 1)
    wire = large_only(codec or TopK(ratio), dense_below)
    if isinstance(fusion, Sequence):
        wire = Phases([wire] * len(fusion), [fusion_steps] * (len(fusion) - 1))
    return Plan([Sync(what="gradients", codec=GMF(wire, momentum, fusion, global_momentum))])
