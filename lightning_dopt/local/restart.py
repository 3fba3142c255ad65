"""Clients without a memory: what the inner optimizer remembers ends with the round."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lightning_dopt.local.base import BoundCorrection, Context, Correction
from lightning_dopt.local.rounds import MOMENTS, moment
from lightning_dopt.slots import Lane

if TYPE_CHECKING:
    from lightning_dopt.plan import Plan


class Restart(Correction):
    """The inner optimizer starts every round afresh: its moments and step counts are set to zero when a result is taken.

    That is what clients do which keep nothing between rounds. Learning rate schedules go on. Without moments (plain SGD) it
    changes nothing.

    Raises:
        ValueError: from the plan, no sync of parameters.

    Source: McMahan et al., arXiv 1602.05629 (FedAvg), whose clients start from the server's model alone.
    """

    slots = frozenset({"parameters"})

    def __init__(self) -> None:
        pass

    def check(self, plan: Plan) -> None:
        """See :meth:`Correction.check`."""
        if not any(s.what.slot == "parameters" for s in plan):
            raise ValueError("Restart: needs a sync of the parameters, which ends its rounds")

    def bind(self, context: Context) -> BoundCorrection:
        """See :meth:`Correction.bind`."""
        return _BoundRestart(context)


class _BoundRestart(BoundCorrection):
    slots = frozenset({"parameters"})

    def __init__(self, context: Context) -> None:
        self.context = context

    def on_applied(self, slot: str, lane: Lane, sent: Tensor, new: Tensor, steps: int) -> None:
        for field in lane.fields:
            for key in MOMENTS:
                kept = moment(self.context, field.name, key)
                if kept is not None:
                    kept.zero_()
