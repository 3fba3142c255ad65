"""Gradients clipped coordinate by coordinate."""

from __future__ import annotations

from collections.abc import Collection

from lightning_dopt._checks import check_float
from lightning_dopt.local.base import BoundCorrection, Context, Correction


class CoordinateClip(Correction):
    """``g <- clamp(g, -bound, bound)`` in every coordinate, after backward and before anything else sees ``g``.

    With it first and second moments of Adam drift by at most ``2 bound (1 - beta1^K)`` and ``bound^2 (1 - beta2^K)`` in ``K``
    steps, which is what lets DES-LOC average them rarely.

    Args:
        bound: Largest magnitude of a coordinate, above 0.

    Raises:
        ValueError: ``bound <= 0``.

    Source: Iacob et al., "DES-LOC: Desynced Low Communication Adaptive Optimizers", arXiv 2505.22549.
    """

    def __init__(self, bound: float) -> None:
        self.bound = check_float("CoordinateClip", "bound", bound, 0.0, open_low=True)

    def bind(self, context: Context) -> BoundCorrection:
        """See :meth:`Correction.bind`."""
        return _BoundClip(self.bound, context)


class _BoundClip(BoundCorrection):
    def __init__(self, bound: float, context: Context) -> None:
        self.bound, self.parameters = bound, context.parameters

    def on_gradient(self, names: Collection[str]) -> None:
        for name in names:
            grad = self.parameters[name].grad
            if grad is not None:
                grad.clamp_(-self.bound, self.bound)
