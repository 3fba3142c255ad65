"""Exact diffusion: removes the bias of gossip under heterogeneous data without a second message."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_dopt._checks import check_float
from lightning_dopt.local.base import BoundCorrection, Context, Correction
from lightning_dopt.slots import Lane

if TYPE_CHECKING:
    from lightning_dopt.plan import Plan


class ExactDiffusion(Correction):
    """Exact Diffusion (also NIDS, D2) in gradient units.

    Each rank keeps ``h`` with ``sum_i h_i = 0``. The inner optimizer steps with ``g - h``; after mixing ``psi`` (the
    value sent) into ``x``, ``h <- h + kappa (x - psi) / (lr K)``, ``K`` steps after the last mixing. At a fixed point all
    ranks agree and ``h_i`` is rank ``i``'s own gradient, so heterogeneous data leave no bias. Being in gradient units, it
    survives changes of the learning rate.

    The mixing matrix must be symmetric, and should be lazy (:class:`~lightning_dopt.topology.Lazy`): with
    ``lambda_min(W) <= -1/3`` the recursion can diverge. Clip gradients with care: clipping acts on ``g - h``.

    Args:
        kappa: 1 for plain SGD, ``1 - momentum`` for heavy-ball, at most 0.1 for Adam.

    Raises:
        ValueError: ``kappa`` outside (0, 1], or a plan without exactly one sync of the parameters by value.

    Source: Yuan, Ying, Zhao, Sayed, "Exact Diffusion for Distributed Optimization and Learning".
    """

    slots = frozenset({"parameters"})

    def __init__(self, kappa: float = 1.0) -> None:
        self.kappa = check_float("ExactDiffusion", "kappa", kappa, 0.0, 1.0, open_low=True)

    def check(self, plan: Plan) -> None:
        """See :meth:`Correction.check`."""
        syncs = [s for s in plan if s.what.slot == "parameters" and not s.when.at_end]
        if len(syncs) != 1 or syncs[0].signal != "value" or syncs[0].outer is not None:
            raise ValueError(
                "ExactDiffusion: needs a plan with exactly one sync of the parameters, by value, without outer"
            )
        if syncs[0].apply.delay or getattr(syncs[0].apply, "order", "atc") != "atc":
            raise ValueError(f"ExactDiffusion: needs apply=Blocking(order='atc'), got {syncs[0].apply!r}")

    def check_size(self, plan: Plan, n: int) -> None:
        """See :meth:`Correction.check_size`."""
        for sync in plan:
            if sync.what.slot == "parameters" and not sync.when.at_end and not sync.peers.symmetric(n):
                raise ValueError(
                    f"ExactDiffusion: needs symmetric mixing weights, {sync.peers!r} with {n} workers has none; use an undirected "
                    "topology such as Ring() or OnePeerHypercube(), or GradientTracking"
                )

    def bind(self, context: Context) -> BoundCorrection:
        """See :meth:`Correction.bind`."""
        return _BoundExactDiffusion(self.kappa, context)


class _BoundExactDiffusion(BoundCorrection):
    slots = frozenset({"parameters"})

    def __init__(self, kappa: float, context: Context) -> None:
        self.kappa, self.lanes = kappa, context.lanes
        self.parameters, self.lr = context.parameters, context.lr
        self.h = [torch.zeros(lane.numel, dtype=lane.message_dtype, device=lane.live.device) for lane in context.lanes]

    def on_gradient(self, names: Collection[str]) -> None:
        for lane, h in zip(self.lanes, self.h, strict=True):
            for field, part in zip(lane.fields, lane.views(h), strict=True):
                if field.name not in names:
                    continue
                p = self.parameters[field.name]
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                p.grad.sub_(part)

    def on_applied(self, slot: str, lane: Lane, sent: Tensor, new: Tensor, steps: int) -> None:
        h = self.h[next(k for k, other in enumerate(self.lanes) if other is lane)]
        moved = lane.live.to(h.dtype) - sent
        for field, part, change in zip(lane.fields, lane.views(h), lane.views(moved), strict=True):
            rate = self.lr(field.name) * steps
            if rate > 0:  # a learning rate of zero (first warm-up step) moved nothing
                part.add_(change, alpha=self.kappa / rate)

    def state(self) -> dict[str, Tensor]:
        return {f"h{k}": h for k, h in enumerate(self.h)}
