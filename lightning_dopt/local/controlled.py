"""SCAFFOLD: control variates that take the drift out of local steps."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lightning_dopt._checks import check_choice
from lightning_dopt.local.base import BoundCorrection, Context, Correction
from lightning_dopt.local.control_variate import fields, gradients, index, zeros
from lightning_dopt.local.rounds import Displaced, one_change
from lightning_dopt.slots import Lane

if TYPE_CHECKING:
    from lightning_dopt.plan import Plan

Option = Literal["I", "II", "mean"]


_ADVICE = "ControlVariate(option='II'): use option='mean', or SGD without momentum"


class ControlVariate(Correction):
    """Local steps with ``g - c_i + c``, where ``c_i`` estimates rank ``i``'s gradient and ``c`` that of all.

    After a round a rank that takes part has a new ``c_i`` and sends the change beside its weights, in the slot ``"tracker"``;
    ``c <- c + share * mean_S (c_i+ - c_i)``, which keeps ``c`` the mean of all ``c_i``, whoever takes part (up to what a
    lossy codec adds). With full gradients any number of local steps then ends in the optimum.

    Args:
        option: Where the new ``c_i`` comes from. ``"II"``: from the displacement, ``c_i - c + (anchor - x) / (sum of learning
            rates)``, for SGD without momentum. ``"I"``: the gradient at the anchor, which is that of the round's first
            step (the paper takes a pass over all data of the client). ``"mean"``: the mean of the round's gradients, the same
            as ``"II"`` with SGD at a constant rate, and right with any inner optimizer. The last two keep one more vector.

    Raises:
        ValueError: an unknown option; from the plan, syncs that do not suit; at the start under Lightning, or
            else at the first round, ``"II"`` with an inner
            optimizer that has momentum or adapts.

    Source: Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", arXiv 1910.06378,
    algorithm 1.
    """

    slots = frozenset({"parameters", "tracker"})

    def __init__(self, option: Option = "II") -> None:
        check_choice("ControlVariate", "option", option, ("I", "II", "mean"))
        self.option = option

    def check(self, plan: Plan) -> None:
        """See :meth:`Correction.check`."""
        mixing = one_change("ControlVariate", plan)
        trackers = [s for s in plan if s.what.slot == "tracker"]
        same = len(trackers) == 1 and (trackers[0].when, trackers[0].peers) == (mixing.when, mixing.peers)
        if not same or plan.syncs.index(trackers[0]) < plan.syncs.index(mixing):
            raise ValueError(
                "ControlVariate: needs one sync of what='tracker' with the same when and peers, after that of the parameters"
            )

    def suits(self, momentum: bool, adaptive: bool) -> str | None:
        """See :meth:`Correction.suits`."""
        return _ADVICE if self.option == "II" and (momentum or adaptive) else None

    def bind(self, context: Context) -> BoundCorrection:
        """See :meth:`Correction.bind`."""
        return _BoundControlVariate(self.option, context)


class Controlled(Displaced):
    """Keeps ``c_i`` and ``c`` and puts them into every gradient.

    Args:
        context: The replica.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.own, self.common = zeros(context.lanes), zeros(context.lanes)

    def on_gradient(self, names: Collection[str]) -> None:
        """``g - c_i + c``."""
        commons = fields(self.context.lanes, self.common, names)
        for (gradient, own), (_, common) in zip(gradients(self.context, self.own, names), commons, strict=True):
            gradient.sub_(own).add_(common)

    def state(self) -> dict[str, Tensor]:
        """See :class:`BoundCorrection`."""
        kept = {f"own{k}": t for k, t in enumerate(self.own)} | {f"common{k}": t for k, t in enumerate(self.common)}
        return kept | {"rates": self.rates}


class _BoundControlVariate(Controlled):
    slots = frozenset({"parameters", "tracker"})

    def __init__(self, option: Option, context: Context) -> None:
        super().__init__(context)
        self.option = option
        self.seen = zeros(context.lanes) if option != "II" else []
        self.steps = torch.zeros(1, dtype=torch.int64)
        self.messages: list[Lane] = []

    def prepare(self, slot: str, lanes: list[Lane]) -> None:
        if slot == "tracker":
            self.messages = lanes

    def on_gradient(self, names: Collection[str]) -> None:
        if self.seen and (self.option == "mean" or int(self.steps) == 0):
            for gradient, seen in gradients(self.context, self.seen, names):
                seen.add_(gradient)
        super().on_gradient(names)

    def on_stepped(self) -> None:
        super().on_stepped()
        self.steps += 1

    def publish(self, slot: str, lane: Lane, message: Tensor) -> None:
        if slot != "parameters" or not self.speaks:
            return
        k = index(self.context.lanes, lane)
        change = self.messages[index(self.messages, lane)].live
        if self.option == "II":
            self.refuse_moments(_ADVICE)
            self.per_rate(lane, change.copy_(message)).sub_(self.common[k])
        else:
            count = int(self.steps) if self.option == "mean" else 1
            torch.div(self.seen[k], count, out=change).sub_(self.own[k])

    def on_applied(self, slot: str, lane: Lane, sent: Tensor, new: Tensor, steps: int) -> None:
        k = index(self.context.lanes, lane)
        if slot == "parameters":
            self.end_round(lane)
            return
        self.common[k].add_(new, alpha=self.share)
        if self.speaks:
            self.own[k].add_(sent)
        if self.seen:
            self.seen[k].zero_()
        self.steps.zero_()

    def state(self) -> dict[str, Tensor]:
        return super().state() | {f"seen{k}": t for k, t in enumerate(self.seen)} | {"steps": self.steps}
