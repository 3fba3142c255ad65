"""Momentum that is mixed together with the weights: gossip whose bias momentum does not multiply as much."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_dopt._checks import check_float
from lightning_dopt.local.base import BoundCorrection, Context, Correction
from lightning_dopt.slots import Lane

if TYPE_CHECKING:
    from lightning_dopt.plan import Plan


class MixedMomentum(Correction):
    """DmSGD with mixed momentum: ``m <- W (momentum m + g)``, and the inner optimizer steps with ``m``.

    What a plan sends as gradients becomes the momentum, so the inner optimizer should be plain SGD. Twice the bytes of
    gossip with local momentum, for less bias under heterogeneous data.

    Args:
        momentum: Share of the old momentum that stays, in [0, 1).

    Raises:
        ValueError: ``momentum`` outside [0, 1), or a plan without a sync of the gradients and one of the parameters.

    Source: Yu, Jin, Yang, "On the Linear Speedup Analysis of Communication Efficient Momentum SGD for Distributed
    Non-Convex Optimization", arXiv 1905.03817.
    """

    slots = frozenset({"gradients"})

    def __init__(self, momentum: float = 0.9) -> None:
        self.momentum = check_float("MixedMomentum", "momentum", momentum, 0.0, 1.0, open_high=True)

    def check(self, plan: Plan) -> None:
        """See :meth:`Correction.check`."""
        slots = [s.what.slot for s in plan if not s.when.at_end]
        if slots.count("gradients") != 1 or "parameters" not in slots:
            raise ValueError("MixedMomentum: needs a plan with one sync of the gradients and one of the parameters")

    def bind(self, context: Context) -> BoundCorrection:
        """See :meth:`Correction.bind`."""
        return _BoundMixedMomentum(self.momentum)


class _BoundMixedMomentum(BoundCorrection):
    slots = frozenset({"gradients"})

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self.buffers: dict[str, Tensor] = {}

    def prepare(self, slot: str, lanes: list[Lane]) -> None:
        for lane in lanes:
            zero = torch.zeros(lane.numel, dtype=lane.message_dtype, device=lane.live.device)
            self.buffers[lane.fields[0].name] = zero

    def publish(self, slot: str, lane: Lane, message: Tensor) -> None:
        message.add_(self.buffers[lane.fields[0].name], alpha=self.momentum)

    def on_applied(self, slot: str, lane: Lane, sent: Tensor, new: Tensor, steps: int) -> None:
        self.buffers[lane.fields[0].name].copy_(lane.live)

    def state(self) -> dict[str, Tensor]:
        return {f"m.{name}": m for name, m in self.buffers.items()}
