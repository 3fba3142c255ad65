"""A moving average of the gradient: what single-loop bilevel methods step with at the upper level."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from lightning_dopt._checks import check_float
from lightning_dopt.local.base import BoundCorrection, Context, Correction
from lightning_dopt.local.control_variate import gradients, zeros


class MovingAverage(Correction):
    """``r <- (1 - theta) r + theta g``, and everything after it sees ``r`` as the gradient; ``r`` is zero at the start.

    Corrections that follow in the plan (exact diffusion, gradient tracking) work on ``r``. With plain SGD this is momentum
    ``1 - theta`` with dampening of the same size.

    Args:
        theta: Weight of the new gradient, in (0, 1]; 1 leaves gradients as they are.

    Raises:
        ValueError: ``theta`` outside (0, 1].
    """

    def __init__(self, theta: float = 0.1) -> None:
        self.theta = check_float("MovingAverage", "theta", theta, 0.0, 1.0, open_low=True)

    def bind(self, context: Context) -> BoundCorrection:
        """See :meth:`Correction.bind`."""
        return _BoundMovingAverage(self.theta, context)


class _BoundMovingAverage(BoundCorrection):
    def __init__(self, theta: float, context: Context) -> None:
        self.theta, self.context = theta, context
        self.r = zeros(context.lanes)

    def on_gradient(self, names: Collection[str]) -> None:
        for gradient, r in gradients(self.context, self.r, names):
            r.lerp_(gradient.to(r.dtype), self.theta)
            gradient.copy_(r)

    def state(self) -> dict[str, Tensor]:
        return {f"r{k}": r for k, r in enumerate(self.r)}
