"""K-GT: gradient tracking that stays exact with several local steps per mixing."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_dopt.local.base import BoundCorrection, Context, Correction
from lightning_dopt.local.control_variate import fields, gradients, index, zeros
from lightning_dopt.local.exact_diffusion import one_mixing
from lightning_dopt.local.gradient_tracking import check_sums
from lightning_dopt.slots import Lane

if TYPE_CHECKING:
    from lightning_dopt.plan import Plan


class LocalTracking(Correction):
    """K-GT: each rank steps with ``g + c`` and corrects ``c`` once per round.

    With ``z`` the mean over the round of ``g + c``, ``c <- c - z + W z``. The ``c`` of all ranks sum to zero, and ``c_i``
    tends to the mean gradient minus rank ``i``'s own, so that any number of local steps leaves no bias, with any inner
    optimizer. The plan needs a sync of ``what="tracker"`` (the message ``z``) and one of the parameters with the same
    schedule and peers: twice the bytes of plain local SGD.

    Raises:
        ValueError: the plan lacks one of the two syncs, they differ in schedule or peers, or the matrix does not preserve
            a mean.

    Source: Liu, Lin, Koloskova, Stich, "Decentralized Gradient Tracking with Local Steps" (K-GT), arXiv 2301.01313.
    """

    slots = frozenset({"tracker"})

    def __init__(self) -> None:
        pass

    def check(self, plan: Plan) -> None:
        """See :meth:`Correction.check`."""
        trackers, mixing = [s for s in plan if s.what.slot == "tracker"], one_mixing("LocalTracking", plan)
        if len(trackers) != 1 or (trackers[0].when, trackers[0].peers) != (mixing.when, mixing.peers):
            raise ValueError(
                "LocalTracking: needs one sync of what='tracker' with the same when and peers as that of the parameters"
            )

    def check_size(self, plan: Plan, n: int) -> None:
        """See :meth:`Correction.check_size`."""
        check_sums("LocalTracking", one_mixing("LocalTracking", plan).peers, n)

    def bind(self, context: Context) -> BoundCorrection:
        """See :meth:`Correction.bind`."""
        return _BoundLocalTracking(context)


class _BoundLocalTracking(BoundCorrection):
    slots = frozenset({"tracker"})

    def __init__(self, context: Context) -> None:
        self.context = context
        self.c, self.total = zeros(context.lanes), zeros(context.lanes)
        self.steps = torch.zeros(1, dtype=torch.int64)

    def on_gradient(self, names: Collection[str]) -> None:
        for (gradient, c), (_, total) in zip(
            gradients(self.context, self.c, names), fields(self.context.lanes, self.total, names), strict=True
        ):
            total.add_(gradient)
            gradient.add_(c)

    def on_stepped(self) -> None:
        self.steps += 1

    def publish(self, slot: str, lane: Lane, message: Tensor) -> None:
        k = index(self.context.lanes, lane)
        torch.div(self.total[k], int(self.steps), out=message).add_(self.c[k])

    def on_applied(self, slot: str, lane: Lane, sent: Tensor, new: Tensor, steps: int) -> None:
        k = index(self.context.lanes, lane)
        self.c[k].copy_(lane.live).sub_(self.total[k].div_(int(self.steps)))
        self.total[k].zero_()
        if k == len(self.c) - 1:
            self.steps.zero_()

    def state(self) -> dict[str, Tensor]:
        return {f"{kind}{k}": t for kind, ts in (("c", self.c), ("g", self.total)) for k, t in enumerate(ts)} | {
            "steps": self.steps
        }
