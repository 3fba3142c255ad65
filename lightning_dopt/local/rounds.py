"""What corrections of federated rounds share: they look at the change of a round, and at who takes part."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_dopt.apply import Blocking
from lightning_dopt.local.base import BoundCorrection, Context
from lightning_dopt.local.control_variate import index
from lightning_dopt.slots import Lane

if TYPE_CHECKING:
    from lightning_dopt.plan import Plan, Sync

MOMENTS = ("momentum_buffer", "exp_avg", "exp_avg_sq", "exp_inf", "square_avg", "grad_avg", "acc_delta", "sum", "step")
"""States of the optimizers of ``torch.optim`` that remember gradients; ``step`` is what their bias corrections count."""


def one_change(owner: str, plan: Plan) -> Sync:
    """The plan's one sync of parameters, which must send changes since a shared anchor and take the result at once.

    Raises:
        ValueError: there is none or more than one, or it sends values or is delayed.
    """
    mixing = [s for s in plan if s.what.slot == "parameters"]
    if len(mixing) != 1 or mixing[0].signal != "delta" or mixing[0].apply != Blocking() or mixing[0].when.at_end:
        raise ValueError(
            f"{owner}: needs one sync of the parameters with signal='delta', peers that share an anchor (Complete(), Sample(...)) "
            "and apply=Blocking()"
        )
    return mixing[0]


class Displaced(BoundCorrection):
    """Knows how far the learning rates of a round could carry a parameter, and whether this rank takes part.

    Args:
        context: The replica.
    """

    slots = frozenset({"parameters"})

    def __init__(self, context: Context) -> None:
        self.context = context
        self.speaks, self.share = True, 1.0
        self._names = [f.name for lane in context.lanes for f in lane.fields]
        self.rates = torch.zeros(len(self._names), dtype=torch.float64)
        """The sum of the learning rates of the round so far, of every parameter."""

    def on_stepped(self) -> None:
        """See :class:`BoundCorrection`."""
        self.rates += torch.tensor([self.context.lr(name) for name in self._names], dtype=torch.float64)

    def on_round(self, slot: str, lane: Lane, speaks: bool, share: float) -> None:
        """See :class:`BoundCorrection`."""
        self.speaks, self.share = speaks, share

    def span(self, lane: Lane) -> list[float]:
        """The summed learning rates of the lane's parameters."""
        return self._rates_of(lane).tolist()

    def _rates_of(self, lane: Lane) -> Tensor:
        k = index(self.context.lanes, lane)
        start = sum(len(other.fields) for other in self.context.lanes[:k])
        return self.rates[start : start + len(lane.fields)]

    def per_rate(self, lane: Lane, change: Tensor) -> Tensor:
        """``change`` divided in place by the summed learning rates: the mean step per unit; zero where nothing could move."""
        for part, rate in zip(lane.views(change), self.span(lane), strict=True):
            part.mul_(1.0 / rate if rate > 0 else 0.0)
        return change

    def times_rate(self, lane: Lane, mean: Tensor) -> None:
        """The way back from :meth:`per_rate`, in place."""
        for part, rate in zip(lane.views(mean), self.span(lane), strict=True):
            part.mul_(rate)

    def end_round(self, lane: Lane) -> None:
        """The lane's round is over: learning rates are summed anew."""
        self._rates_of(lane).zero_()

    def refuse_moments(self, message: str) -> None:
        """Refuse inner optimizers that remember gradients, whose displacement is no mean gradient.

        Raises:
            ValueError: the optimizer has such a state.
        """
        refuse_moments(self.context, self._names[0], message)


def refuse_moments(context: Context, name: str, message: str) -> None:
    """Refuse inner optimizers that remember gradients of the parameter ``name``.

    Raises:
        ValueError: the optimizer has such a state.
    """
    for key in MOMENTS[:-1]:
        if moment(context, name, key) is not None:
            raise ValueError(f"{message}: the inner optimizer keeps {key!r}")


def moment(context: Context, name: str, key: str) -> Tensor | None:
    """The inner optimizer's state of that name for a parameter, ``None`` if it has none or is not known."""
    try:
        found: object = context.state(name, key)
    except (KeyError, ValueError, RuntimeError):  # as different engines say it
        return None
    return found if isinstance(found, Tensor) else None
