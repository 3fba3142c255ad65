"""Local steps that stay near the last agreement: FedProx, and with duals FedSpeed and ADMM."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lightning_dopt._checks import check_choice, check_float
from lightning_dopt.local.base import BoundCorrection, Context, Correction
from lightning_dopt.local.control_variate import fields, index, zeros
from lightning_dopt.local.rounds import one_change
from lightning_dopt.slots import Lane

if TYPE_CHECKING:
    from lightning_dopt.plan import Plan


class Proximal(Correction):
    """FedProx: adds ``mu / 2 |x - x_agreed|^2`` to the loss, with the weights of the last result.

    Args:
        mu: How strongly, at least 0; 0.001 to 1 in the paper.

    Raises:
        ValueError: ``mu < 0``; from the plan, no sync of parameters.

    Source: Li et al., "Federated Optimization in Heterogeneous Networks" (FedProx), arXiv 1812.06127, algorithm 2.
    """

    slots = frozenset({"parameters"})

    def __init__(self, mu: float = 0.01) -> None:
        self.mu = check_float("Proximal", "mu", mu, 0.0)

    def check(self, plan: Plan) -> None:
        """See :meth:`Correction.check`."""
        if not any(s.what.slot == "parameters" for s in plan):
            raise ValueError("Proximal: needs a sync of the parameters, whose results it stays near")

    def bind(self, context: Context) -> BoundCorrection:
        """See :meth:`Correction.bind`."""
        return _BoundProximal(self.mu, context)


class _BoundProximal(BoundCorrection):
    slots = frozenset({"parameters"})

    def __init__(self, mu: float, context: Context) -> None:
        self.mu, self.context = mu, context
        self.agreed = [lane.live.detach().to(lane.message_dtype, copy=True) for lane in context.lanes]
        self.speaks, self.share = True, 1.0

    def on_gradient(self, names: Collection[str]) -> None:
        for field, agreed in fields(self.context.lanes, self.agreed, names):
            p = self.context.parameters[field.name]
            if p.grad is not None:
                p.grad.add_(p.detach() - agreed, alpha=self.mu)

    def on_round(self, slot: str, lane: Lane, speaks: bool, share: float) -> None:
        self.speaks, self.share = speaks, share

    def on_applied(self, slot: str, lane: Lane, sent: Tensor, new: Tensor, steps: int) -> None:
        self.agreed[index(self.context.lanes, lane)].copy_(new)

    def state(self) -> dict[str, Tensor]:
        return {f"agreed{k}": t for k, t in enumerate(self.agreed)}


class DualProximal(Correction):
    """FedSpeed's proximal term with a dual variable, which makes local steps exact on unlike data.

    Local steps use ``g - d_i + weight (x - x_agreed)``. A rank that takes part then updates ``d_i <- d_i - weight (x - x_agreed)``
    and sends ``x - d_i / weight`` in place of ``x``. ``d_i`` tends to rank ``i``'s gradient at the optimum.

    Args:
        weight: Of the proximal term (``1 / lambda`` in the paper), above 0.
        dual_mean: Over whom the duals are averaged. ``"all"`` counts those of absent ranks, too, as the authors' code does,
            and needs one more vector. ``"participants"`` takes what is sent: the same if everybody takes part, but not
            exact on unlike data with a :class:`~lightning_dopt.topology.Sample`.

    Raises:
        ValueError: an argument out of range; from the plan, a sync that does not suit.

    Source: Sun et al., "FedSpeed: Larger Local Interval, Less Communication Round, and Higher Generalization Accuracy",
    arXiv 2302.10429, algorithm 1.
    """

    slots = frozenset({"parameters"})

    def __init__(self, weight: float = 0.1, dual_mean: Literal["participants", "all"] = "all") -> None:
        self.weight = check_float("DualProximal", "weight", weight, 0.0, open_low=True)
        check_choice("DualProximal", "dual_mean", dual_mean, ("participants", "all"))
        self.dual_mean = dual_mean

    def check(self, plan: Plan) -> None:
        """See :meth:`Correction.check`."""
        one_change("DualProximal", plan)

    def bind(self, context: Context) -> BoundCorrection:
        """See :meth:`Correction.bind`."""
        return _BoundDualProximal(self.weight, self.dual_mean == "all", context)


class _BoundDualProximal(_BoundProximal):
    """``h = d / weight``, so that messages are ``anchor - x + h``."""

    def __init__(self, weight: float, everybody: bool, context: Context) -> None:
        super().__init__(weight, context)
        self.h = zeros(context.lanes)
        self.mean = zeros(context.lanes) if everybody else []
        self.needs_own = everybody

    def on_gradient(self, names: Collection[str]) -> None:
        for (field, agreed), (_, h) in zip(
            fields(self.context.lanes, self.agreed, names), fields(self.context.lanes, self.h, names), strict=True
        ):
            p = self.context.parameters[field.name]
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            p.grad.add_(p.detach() - agreed - h, alpha=self.mu)

    def publish(self, slot: str, lane: Lane, message: Tensor) -> None:
        if self.speaks:
            h = self.h[index(self.context.lanes, lane)].add_(message)
            if not self.mean:
                message.add_(h)

    def on_received(self, slot: str, lane: Lane, own: Tensor | None, result: Tensor) -> None:
        if self.mean:
            mean = self.mean[index(self.context.lanes, lane)].add_(result, alpha=self.share)
            result.add_(mean)

    def state(self) -> dict[str, Tensor]:
        kept = {f"h{k}": t for k, t in enumerate(self.h)} | {f"mean{k}": t for k, t in enumerate(self.mean)}
        return super().state() | kept


class ConsensusADMM(Correction):
    """ADMM with local steps in place of exact local solutions.

    Local steps minimise ``f_i(x) + <z_i, x - w> + rho / 2 |x - w|^2``; a rank sends ``x + z_i / rho``, ``w`` is the mean of
    all, and ``z_i <- z_i + rho (x - w)`` with the new ``w``. From the first round on the ``z_i`` sum to zero. Noise on the
    messages that all ranks decode alike, as they do here, does not add up: a round's ``z_i`` sum to its noise alone.

    Args:
        rho: Penalty, above 0; large for many local steps.

    Raises:
        ValueError: ``rho <= 0``; from the plan, a sync that does not suit.

    Source: Boyd et al., "Distributed Optimization and Statistical Learning via the Alternating Direction Method of
    Multipliers" (2011), section 7.1. The form with one broadcast of arXiv 2409.13451 could not be checked and is not here.
    """

    slots = frozenset({"parameters"})

    def __init__(self, rho: float = 1.0) -> None:
        self.rho = check_float("ConsensusADMM", "rho", rho, 0.0, open_low=True)

    def check(self, plan: Plan) -> None:
        """See :meth:`Correction.check`."""
        if one_change("ConsensusADMM", plan).peers.partial:
            raise ValueError(
                "ConsensusADMM: multipliers of absent ranks would be missing in the mean, use peers=Complete()"
            )

    def bind(self, context: Context) -> BoundCorrection:
        """See :meth:`Correction.bind`."""
        return _BoundADMM(self.rho, context)


class _BoundADMM(_BoundProximal):
    """``u = z / rho``, the scaled form."""

    def __init__(self, rho: float, context: Context) -> None:
        super().__init__(rho, context)
        self.u = zeros(context.lanes)

    def on_gradient(self, names: Collection[str]) -> None:
        for (field, agreed), (_, u) in zip(
            fields(self.context.lanes, self.agreed, names), fields(self.context.lanes, self.u, names), strict=True
        ):
            p = self.context.parameters[field.name]
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            p.grad.add_(p.detach() - agreed + u, alpha=self.mu)

    def publish(self, slot: str, lane: Lane, message: Tensor) -> None:
        message.sub_(self.u[index(self.context.lanes, lane)])

    def on_applied(self, slot: str, lane: Lane, sent: Tensor, new: Tensor, steps: int) -> None:
        self.u[index(self.context.lanes, lane)].add_(sent).sub_(new)
        super().on_applied(slot, lane, sent, new, steps)

    def state(self) -> dict[str, Tensor]:
        return super().state() | {f"u{k}": t for k, t in enumerate(self.u)}
