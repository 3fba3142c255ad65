"""Gradient tracking: every rank follows the mean gradient, with a second message."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_dopt.local.base import BoundCorrection, Context, Correction
from lightning_dopt.slots import Lane

if TYPE_CHECKING:
    from lightning_dopt.plan import Plan


class GradientTracking(Correction):
    """Gradient tracking (DSGT, NEXT; the form in which both messages are mixed after adapting).

    Each rank keeps a tracker ``y``. Where a plan sends gradients, this correction publishes ``y + g - g_previous``
    instead, and what comes back becomes the new ``y`` and the gradient that the inner optimizer sees, whichever it is.
    ``sum_i y_i = sum_i g_i`` always holds, so ranks converge to the optimum of the mean loss under heterogeneous data,
    also with Adam. The plan needs a sync of the gradients and one of the parameters over the same doubly stochastic
    topology.

    Raises:
        ValueError: the plan lacks one of the two syncs, or they differ in their topology.

    Source: Di Lorenzo, Scutari, "NEXT"; Nedic, Olshevsky, Shi, "DIGing".
    """

    slots = frozenset({"gradients"})

    def __init__(self) -> None:
        pass

    def check(self, plan: Plan) -> None:
        """See :meth:`Correction.check`."""
        by_slot = {slot: [s for s in plan if s.what.slot == slot] for slot in ("gradients", "parameters")}
        if any(len(syncs) != 1 for syncs in by_slot.values()):
            raise ValueError("GradientTracking: needs a plan with one sync of the gradients and one of the parameters")
        if by_slot["gradients"][0].peers != by_slot["parameters"][0].peers:
            raise ValueError("GradientTracking: gradients and parameters need the same peers")

    def check_size(self, plan: Plan, n: int) -> None:
        """See :meth:`Correction.check_size`."""
        for sync in plan:
            if sync.what.slot == "gradients" and not sync.peers.doubly_stochastic(n):
                raise ValueError(
                    f"GradientTracking: {sync.peers!r} with {n} workers does not preserve the mean (columns of its matrix do not "
                    "sum to one); use a doubly stochastic topology"
                )

    def bind(self, context: Context) -> BoundCorrection:
        """See :meth:`Correction.bind`."""
        return _BoundTracking()


class _BoundTracking(BoundCorrection):
    slots = frozenset({"gradients"})

    def __init__(self) -> None:
        self.trackers: dict[str, tuple[Tensor, Tensor]] = {}

    def _of(self, lane: Lane) -> tuple[Tensor, Tensor]:
        """Tracker and previous gradient of a lane, zero at the start."""
        name = lane.fields[0].name
        if name not in self.trackers:
            zero = torch.zeros(lane.numel, dtype=lane.message_dtype, device=lane.live.device)
            self.trackers[name] = (zero, zero.clone())
        return self.trackers[name]

    def prepare(self, slot: str, lanes: list[Lane]) -> None:
        for lane in lanes:
            self._of(lane)

    def publish(self, slot: str, lane: Lane, message: Tensor) -> None:
        y, previous = self._of(lane)
        gradient = message.clone()
        message.add_(y).sub_(previous)
        previous.copy_(gradient)

    def on_applied(self, slot: str, lane: Lane, sent: Tensor, new: Tensor, steps: int) -> None:
        self._of(lane)[0].copy_(lane.live)

    def state(self) -> dict[str, Tensor]:
        return {f"{kind}.{name}": t for name, pair in self.trackers.items() for kind, t in zip("yg", pair, strict=True)}
