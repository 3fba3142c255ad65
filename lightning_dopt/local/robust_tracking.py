"""Gradient tracking that noise on the messages does not throw off."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_dopt.local.base import BoundCorrection, Context, Correction
from lightning_dopt.local.control_variate import gradients, index, zeros
from lightning_dopt.local.exact_diffusion import one_mixing
from lightning_dopt.local.gradient_tracking import check_sums
from lightning_dopt.schedules import Every
from lightning_dopt.slots import Lane

if TYPE_CHECKING:
    from lightning_dopt.plan import Plan


class RobustTracking(Correction):
    """Cumulative gradient tracking, for quantised or noisy messages.

    Each rank keeps ``s``, the sum of its gradients times their learning rates, and mixes it:
    ``s+ = s + b_t (W s - s) + lr_t g`` with the gain ``b_t`` of ``combine=Damped(...)``; the inner optimizer sees
    ``(s+ - s) / lr_t``. What noise adds to ``s`` enters each step once and fades with ``b_t``, while the tracker of
    :class:`GradientTracking` sums up all noise for ever and diverges, if slowly. With ``lr_t`` and ``b_t`` both falling
    like ``1 / t`` the mean square error falls like ``1 / t``.

    The plan needs a sync of ``what="tracker"`` and one of the parameters with ``order="awc"``, the same peers, in every
    step. Parameters must not be clipped between.

    Raises:
        ValueError: the plan lacks one of the two syncs, or they do not suit.

    Source: Pu, "A Robust Gradient Tracking Method for Distributed Optimization over Directed Networks", arXiv 2003.13980,
    on undirected graphs; the idea of VRA-DGT and VRA-DSGT without their estimator of what neighbours sent.
    """

    slots = frozenset({"tracker"})

    def __init__(self) -> None:
        pass

    def check(self, plan: Plan) -> None:
        """See :meth:`Correction.check`."""
        trackers, mixing = [s for s in plan if s.what.slot == "tracker"], one_mixing("RobustTracking", plan)
        if len(trackers) != 1 or trackers[0].peers != mixing.peers:
            raise ValueError("RobustTracking: needs one sync of what='tracker' with the same peers as the parameters")
        if any(s.when != Every(1) for s in (trackers[0], mixing)):
            raise ValueError("RobustTracking: needs both syncs in every step, when=Every(1)")
        if getattr(mixing.apply, "order", "") != "awc":
            raise ValueError(
                f"RobustTracking: needs apply=Blocking(order='awc') for the parameters, got {mixing.apply!r}"
            )

    def check_size(self, plan: Plan, n: int) -> None:
        """See :meth:`Correction.check_size`."""
        check_sums("RobustTracking", one_mixing("RobustTracking", plan).peers, n)

    def bind(self, context: Context) -> BoundCorrection:
        """See :meth:`Correction.bind`."""
        return _BoundRobustTracking(context)


class _BoundRobustTracking(BoundCorrection):
    slots = frozenset({"tracker"})

    def __init__(self, context: Context) -> None:
        self.context = context
        self.s, self.mixed = zeros(context.lanes), zeros(context.lanes)

    def on_gradient(self, names: Collection[str]) -> None:
        for k, lane in enumerate(self.context.lanes):
            chosen = [field for field in lane.fields if field.name in names]
            for field in chosen:
                s, mixed = field.of(self.s[k]), field.of(self.mixed[k])
                rate = self.context.lr(field.name)
                for gradient, _ in gradients(self.context, self.s, [field.name]):
                    new = mixed.add(gradient, alpha=rate)
                    if rate > 0:  # a learning rate of zero moves nothing
                        gradient.copy_(new.sub(s).div_(rate))
                    s.copy_(new)

    def publish(self, slot: str, lane: Lane, message: Tensor) -> None:
        message.copy_(self.s[index(self.context.lanes, lane)])

    def on_applied(self, slot: str, lane: Lane, sent: Tensor, new: Tensor, steps: int) -> None:
        self.mixed[index(self.context.lanes, lane)].copy_(lane.live)

    def state(self) -> dict[str, Tensor]:
        return {f"{kind}{k}": t for kind, ts in (("s", self.s), ("m", self.mixed)) for k, t in enumerate(ts)}
