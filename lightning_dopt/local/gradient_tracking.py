"""Gradient tracking: every rank follows the mean gradient, with a second message."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lightning_dopt._checks import check_choice
from lightning_dopt.local.base import BoundCorrection, Context, Correction
from lightning_dopt.slots import Lane
from lightning_dopt.topology.base import Topology

if TYPE_CHECKING:
    from lightning_dopt.plan import Plan

Form = Literal["atc", "semi"]


class GradientTracking(Correction):
    """Gradient tracking (DSGT, NEXT, DIGing): the inner optimizer sees a tracker ``y`` of the mean gradient.

    Where a plan sends gradients, this correction publishes from its tracker instead, and what comes back becomes the
    gradient that the inner optimizer sees, whichever it is:

    * ``"atc"``: ``y <- W (y + g - g_previous)``; steps as large as centralized SGD's remain stable (DSGT, NEXT);
    * ``"semi"``: ``y <- W y + g - g_previous``. With ``order="awc"`` for the parameters this is DIGing, which needs
      smaller steps; with ``Difference`` codecs on both syncs as well, BEER.

    ``sum_i y_i = sum_i g_i`` always holds (with stationary weights ``lambda``: ``sum_i lambda_i y_i = sum_i lambda_i g_i``),
    so ranks converge to the optimum of the (weighted) mean loss under heterogeneous data, also with Adam. The plan needs
    a sync of the gradients and one of the parameters over the same topology, with columns that sum to one in every round,
    or one fixed matrix. Over a matrix whose columns alone sum to one the parameters need ``combine=PushSum()``: Push-DIGing.

    Args:
        form: See above.

    Raises:
        ValueError: an unknown form, a plan that lacks one of the two syncs, or syncs with different or unsuitable peers.

    Source: Di Lorenzo, Scutari, "NEXT", arXiv 1602.00591; Nedic, Olshevsky, Shi, "DIGing", arXiv 1607.03218.
    """

    slots = frozenset({"gradients"})

    def __init__(self, form: Form = "atc") -> None:
        check_choice("GradientTracking", "form", form, ("atc", "semi"))
        self.form: Form = form

    def check(self, plan: Plan) -> None:
        """See :meth:`Correction.check`."""
        by_slot = {
            slot: [s for s in plan if s.what.slot == slot and not s.when.at_end] for slot in ("gradients", "parameters")
        }
        if any(len(syncs) != 1 for syncs in by_slot.values()):
            raise ValueError("GradientTracking: needs a plan with one sync of the gradients and one of the parameters")
        if by_slot["gradients"][0].peers != by_slot["parameters"][0].peers:
            raise ValueError("GradientTracking: gradients and parameters need the same peers")

    def check_size(self, plan: Plan, n: int) -> None:
        """See :meth:`Correction.check_size`."""
        for sync in plan:
            if sync.what.slot == "gradients":
                check_sums("GradientTracking", sync.peers, n)

    def bind(self, context: Context) -> BoundCorrection:
        """See :meth:`Correction.bind`."""
        return _BoundTracking(self.form)


def check_sums(owner: str, peers: Topology, n: int) -> None:
    """Refuse a matrix that keeps no weighted sum of what it mixes.

    Raises:
        ValueError: columns do not sum to one, and the matrix changes, so that there are no stationary weights.
    """
    peers.check(n)
    fixed = peers.period(n) == 1 and peers.row_stochastic(n)
    if not peers.column_stochastic(n) and not fixed:
        raise ValueError(
            f"{owner}: {peers!r} with {n} workers does not preserve the mean (columns of its matrix do not "
            "sum to one); use a doubly stochastic topology"
        )


class _BoundTracking(BoundCorrection):
    slots = frozenset({"gradients"})

    def __init__(self, form: Form) -> None:
        self.form = form
        self.trackers: dict[str, tuple[Tensor, Tensor]] = {}
        self.changes: dict[str, Tensor] = {}

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
        change = message - previous
        previous.copy_(message)
        if self.form == "atc":
            message.copy_(y).add_(change)
        else:
            message.copy_(y)
            self.changes[lane.fields[0].name] = change

    def on_applied(self, slot: str, lane: Lane, sent: Tensor, new: Tensor, steps: int) -> None:
        y = self._of(lane)[0].copy_(lane.live)
        if self.form == "semi":
            lane.live.copy_(y.add_(self.changes.pop(lane.fields[0].name)))

    def state(self) -> dict[str, Tensor]:
        return {f"{kind}.{name}": t for name, pair in self.trackers.items() for kind, t in zip("yg", pair, strict=True)}
