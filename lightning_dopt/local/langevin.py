"""Sampling in place of optimising: noise on every step, and gradients that make up for where a chain is."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_dopt._checks import check_float, check_int
from lightning_dopt._random import key
from lightning_dopt.local.base import BoundCorrection, Context, Correction
from lightning_dopt.local.control_variate import index
from lightning_dopt.slots import Lane

if TYPE_CHECKING:
    from lightning_dopt.plan import Plan


class Langevin(Correction):
    """Adds ``N(0, 2 lr temperature)`` to every parameter after each step: with plain SGD, Langevin dynamics.

    If the loss is ``U(x) = -log p(x)`` up to a constant, weights are in the end samples of ``p`` (of ``p^(1 / temperature)``), up
    to what a finite learning rate adds: along a direction of curvature ``a`` the variance is ``T / (a (1 - lr a / 2))``. Noise
    is independent on all ranks and a function of seed, rank and step.

    Args:
        temperature: At least 0; 0 optimises.
        seed: Of the noise.

    Raises:
        ValueError: an option out of range.

    Source: Welling, Teh, "Bayesian Learning via Stochastic Gradient Langevin Dynamics", 2011.
    """

    def __init__(self, temperature: float = 1.0, seed: int = 0) -> None:
        self.temperature = check_float("Langevin", "temperature", temperature, 0.0)
        self.seed = check_int("Langevin", "seed", seed, 0)

    def suits(self, momentum: bool, adaptive: bool) -> str | None:
        """See :meth:`Correction.suits`."""
        return "Langevin: the noise is that of plain steps; use SGD without momentum" if momentum or adaptive else None

    def bind(self, context: Context) -> BoundCorrection:
        """See :meth:`Correction.bind`."""
        return _BoundLangevin(self.temperature, self.seed, context)


class _BoundLangevin(BoundCorrection):
    def __init__(self, temperature: float, seed: int, context: Context) -> None:
        self.temperature, self.seed, self.context = temperature, seed, context
        self.steps = torch.zeros(1, dtype=torch.int64)

    def on_stepped(self) -> None:
        self.steps += 1
        for k, lane in enumerate(self.context.lanes):
            seed = key(self.seed, self.context.rank, int(self.steps), k)
            generator = torch.Generator(lane.live.device).manual_seed(seed)
            noise = torch.randn(lane.numel, generator=generator, dtype=lane.message_dtype, device=lane.live.device)
            for field, part, p in zip(lane.fields, lane.views(noise), lane.views(lane.live), strict=True):
                p.add_(part, alpha=math.sqrt(2.0 * self.context.lr(field.name) * self.temperature))

    def state(self) -> dict[str, Tensor]:
        return {"steps": self.steps}


class ConduciveGradient(Correction):
    """Takes out of local gradients what a Gaussian knows of how this rank's data differ from all.

    With ``q_s`` an approximation of the likelihood of rank ``s``'s data and ``q`` their product, gradients of
    ``-log p`` get ``-g_s = n grad log q_s - grad log q``. These sum to zero over the ranks whatever ``q_s`` are, and if they
    are exact every rank pulls a chain the same way, so that chains may stay on a rank for many steps.

    ``q_s`` has one precision for each tensor, from the variance of its elements over the steps ``fit / 2`` to ``fit`` of the
    rank's own chain, and their mean. Both are exchanged once, as two messages of the slot ``"tracker"``. Steps that are too few for
    a chain to forget look like too narrow a ``q_s``, and where ranks are very unlike that can push chains away: give it many.
    Keeps two vectors. In a plan it stands after :class:`Langevin`, so that it sees chains with their noise.

    Args:
        fit: Optimizer steps until then, at least 4.

    Raises:
        ValueError: ``fit < 4``; from the plan, no :class:`Langevin` before it, or anything but two syncs of the tracker at
            step ``fit`` over everybody.

    Source: El Mekkaoui, Mesquita, Blomstedt, Kaski, "Federated Stochastic Gradient Langevin Dynamics" (FSGLD), UAI 2021; that
    ``q_s`` comes from the chain itself is ours.
    """

    slots = frozenset({"tracker"})

    def __init__(self, fit: int) -> None:
        self.fit = check_int("ConduciveGradient", "fit", fit, 4)

    def check(self, plan: Plan) -> None:
        """See :meth:`Correction.check`."""
        kinds = [type(c) for c in plan.corrections]
        if Langevin not in kinds[: kinds.index(ConduciveGradient)]:
            raise ValueError("ConduciveGradient: fits the samples of Langevin(), which must stand before it")
        trackers = [sync for sync in plan if sync.what.slot == "tracker"]
        due = [[step for step in range(1, 2 * self.fit + 1) if sync.when.due(step)] for sync in trackers]
        if due != [[self.fit], [self.fit]]:
            raise ValueError(
                f"ConduciveGradient(fit={self.fit}): needs two syncs of what='tracker' that are due at step {self.fit} alone"
            )

    def check_size(self, plan: Plan, n: int) -> None:
        """See :meth:`Correction.check_size`."""
        for sync in plan:
            if sync.what.slot == "tracker" and not sync.peers.is_mean(n):
                raise ValueError(f"Sync(what='tracker', peers={sync.peers!r}): all ranks must hear all, use Complete()")

    def bind(self, context: Context) -> BoundCorrection:
        """See :meth:`Correction.bind`."""
        return _BoundConducive(self.fit, context)


class _BoundConducive(BoundCorrection):
    """Until step ``fit`` the two trackers hold running mean and sum of squares; then ``sum_j Q_j - n Q_s`` and the same of
    ``Q m``, with the precision ``Q`` and the mean ``m`` of each rank's ``q``."""

    slots = frozenset({"tracker"})

    def __init__(self, fit: int, context: Context) -> None:
        self.fit, self.context = fit, context
        self.trackers: list[list[Lane]] = []
        self.steps = torch.zeros(1, dtype=torch.int64)

    def prepare(self, slot: str, lanes: list[Lane]) -> None:
        self.trackers.append(lanes)

    def on_gradient(self, names: Collection[str]) -> None:
        if int(self.steps) < self.fit:
            return
        for precision, shift in zip(*self.trackers, strict=True):
            for field, q, b in zip(
                precision.fields, precision.views(precision.live), shift.views(shift.live), strict=True
            ):
                p = self.context.parameters[field.name]
                if field.name in names and p.grad is not None:
                    p.grad.add_(q * p.detach() - b)

    def on_stepped(self) -> None:
        self.steps += 1
        step, first = int(self.steps), self.fit // 2
        if not first < step <= self.fit:
            return
        for squares, mean in zip(*self.trackers, strict=True):
            live = self.context.lanes[index(self.context.lanes, mean)].live
            away = live - mean.live
            mean.live.add_(away, alpha=1.0 / (step - first))
            squares.live.add_(away.mul_(live - mean.live))
            if step == self.fit:
                self._fit(squares, mean, self.fit - first)

    def _fit(self, squares: Lane, mean: Lane, count: int) -> None:
        """The chain's loss holds the data of this rank ``n`` times, so the precision of ``q`` is an ``n``-th of its own."""
        for field, q, b in zip(squares.fields, squares.views(squares.live), mean.views(mean.live), strict=True):
            least = max(self.context.lr(field.name), torch.finfo(q.dtype).tiny)  # what the noise of one step makes
            q.fill_(1.0 / (max(float(q.mean()) / count, least) * self.context.size))
            b.mul_(q)

    def on_applied(self, slot: str, lane: Lane, sent: Tensor, new: Tensor, steps: int) -> None:
        torch.sub(new, sent, out=lane.live).mul_(self.context.size)

    def state(self) -> dict[str, Tensor]:
        kept = {f"{kind}{k}": lane.live for kind, lanes in enumerate(self.trackers) for k, lane in enumerate(lanes)}
        return kept | {"steps": self.steps}
