"""Gradients as changes of an estimate that all ranks share: EF21, EControl, DIANA."""

from __future__ import annotations

from lightning_dopt.compress import DIANA, EF21, QSGD, Compressor, EControl, TopK
from lightning_dopt.plan import Plan, Sync
from lightning_dopt.plans._dense import large_only

_SHAPE = (1024, 1024)


def ef21(codec: Compressor | None = None, dense_below: int | None = None) -> Plan:
    """EF21: compressed changes of gradients; exact on unequal data with full gradients at a constant learning rate.

    Weights per worker by smoothness (EF21-W) change nothing here: with a compressor for which ``C(a x) = a C(x)``, as
    all that scale by block or choose by size, scaling the gradient by ``1 / (n w_i)`` before and the messages by ``w_i``
    after gives the same steps. Its better bound, by the mean of the smoothness constants, holds for this plan.

    Args:
        codec: A contractive compressor; ``None`` means ``TopK(0.01)``.
        dense_below: Tensors of fewer elements, and vectors, travel whole; ``None`` packs all of them.

    Raises:
        ValueError: ``dense_below`` is negative.

    Source: Richtarik, Sokolov, Fatkhullin, "EF21", arXiv 2106.05203; Richtarik, Gasanov, Burlachenko, "Error Feedback Reloaded"
    (EF21-W), arXiv 2402.10774.
    """
    return Plan([Sync(what="gradients", codec=EF21(large_only(codec or TopK(0.01), dense_below)))])


def econtrol(codec: Compressor | None = None, eta: float | None = None, dense_below: int | None = None) -> Plan:
    """EControl: EF21 that feeds back what its estimates have missed, which averages the noise of small batches.

    Args:
        codec: A contractive compressor; ``None`` means ``TopK(0.01)``.
        eta: Gain of the feedback, at most the ``delta`` of the compressor; ``None`` means a third of it.
        dense_below: Tensors of fewer elements, and vectors, travel whole; ``None`` packs all of them.

    Raises:
        ValueError: an option out of range.

    Source: Gao, Islamov, Stich, "EControl", arXiv 2311.05645.
    """
    wire = codec or TopK(0.01)
    gain = eta if eta is not None else (wire.contraction(_SHAPE) or 1.0 / (1.0 + (wire.variance(_SHAPE) or 0.0))) / 3.0
    return Plan([Sync(what="gradients", codec=EControl(large_only(wire, dense_below), gain))])


def diana(codec: Compressor | None = None, alpha: float | None = None, dense_below: int | None = None) -> Plan:
    """DIANA: unbiased messages around a shift that learns the gradients; the noise of the compressor fades.

    Args:
        codec: An unbiased compressor; ``None`` means ``QSGD()``.
        alpha: Share of the message that the shift takes; ``None`` means ``1 / (1 + omega)``.
        dense_below: Tensors of fewer elements, and vectors, travel whole; ``None`` packs all of them.

    Raises:
        ValueError: a biased codec, or an option out of range.

    Source: Mishchenko, Gorbunov, Takac, Richtarik, "Distributed Learning with Compressed Gradient Differences", arXiv
    1901.09269.
    """
    return Plan([Sync(what="gradients", codec=DIANA(large_only(codec or QSGD(), dense_below), alpha))])
