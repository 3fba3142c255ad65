"""The hub of asynchronous local updates: a reference, an outer optimizer, a version. Knows neither time nor transport."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_dopt._checks import check_int
from lightning_dopt.asynchronous.hub_rules import Arrival, HubRule
from lightning_dopt.outer import SGD
from lightning_dopt.pace import LocalSteps


@dataclass
class Push:
    """What a worker sends at the end of a phase.

    Args:
        worker: Its number.
        message: One vector per lane: ``base - x`` or ``x``, as the rule's signal says. The hub may change it.
        base: Version of the reference that the phase began with.
        steps: Optimizer steps of the phase.
        seconds: How long these took.
    """

    worker: int
    message: list[Tensor]
    base: int
    steps: int
    seconds: float


class Hub:
    """Takes in pushes and moves the reference, as a rule says.

    Whoever owns it (:class:`HubSimulation`, or a process) asks ``rule.when`` when to call :meth:`step`.

    Args:
        rule: What to do.
        start: The first reference, one vector per lane; copied.
        n: Number of workers.
        local_steps: How many steps a worker is to take before it pushes.

    Raises:
        ValueError: ``n < 1``, or shares or speeds for another number of workers.
    """

    def __init__(self, rule: HubRule, start: Sequence[Tensor], n: int, local_steps: LocalSteps) -> None:
        self.rule, self.n, self.local_steps = rule, check_int("Hub", "n", n, 1), local_steps
        check_hub(rule, n, local_steps)
        _warn_of_momentum(rule, n)
        self.reference = [t.detach().clone() for t in start]
        self.optimizer = rule.outer.build(self.reference)
        self.version = 0
        """Steps of the hub; for a rule that takes pushes one by one this is their number."""
        self.pushes = [0] * n
        """Pushes taken from each worker."""
        self.steps = [0] * n
        """Optimizer steps that the taken pushes of each worker stand for."""
        self.staleness: Counter[int] = Counter()
        """How many pushes were how many versions old."""
        self.alive = set(range(n))
        """Workers that have not left."""
        self._gathered: list[Push] = []
        self._taken = [0] * n
        self._speeds: dict[int, float] = dict(enumerate(local_steps.speeds or []))

    @property
    def gathered(self) -> list[Push]:
        """Pushes that the next step takes."""
        return list(self._gathered)

    def steps_of(self, worker: int) -> int:
        """How many optimizer steps the coming phase of ``worker`` has."""
        speeds = {j: v for j, v in self._speeds.items() if j in self.alive}
        return self.local_steps.of(speeds[worker], max(speeds.values())) if worker in speeds else self.local_steps.steps

    def receive(self, push: Push) -> float | None:
        """Take in a push. Returns in how many seconds to step because of it; ``None``: nothing changes."""
        self._gathered.append(push)
        if push.seconds > 0.0:
            self._speeds[push.worker] = push.steps / push.seconds
        return self.rule.when.delay(len(self._gathered), len(self.alive))

    def leave(self, worker: int) -> float | None:
        """``worker`` is gone; what it has pushed stays. Returns what :meth:`receive` returns."""
        self.alive.discard(worker)
        return self.rule.when.delay(len(self._gathered), len(self.alive)) if self._gathered else None

    @torch.no_grad()
    def step(self) -> list[int]:
        """Step with what has gathered: one by one in the order of arrival, or together, summed in the order of the workers.

        Returns:
            The workers whose pushes were taken, each once, in the order of arrival.
        """
        gathered, self._gathered = self._gathered, []
        together = sorted(gathered, key=lambda push: push.worker)  # the same sum whoever came first
        for pushes in [[push] for push in gathered] if self.rule.when.apart else [together]:
            self._move(pushes)
        return list(dict.fromkeys(push.worker for push in gathered))

    def _move(self, pushes: list[Push]) -> None:
        repeats = Counter(push.worker for push in pushes)
        arrivals = [
            Arrival(
                p.worker, self.version - p.base, self.version + 1 - self._taken[p.worker], repeats[p.worker], p.steps
            )
            for p in pushes
        ]
        self.version += 1
        if not pushes:
            return
        sums: list[Tensor] = []
        for push, weight in zip(pushes, self.rule.weights.weights(arrivals, self.n), strict=True):
            changes = self._changes(push)
            sums = [g.mul_(weight) for g in changes] if not sums else _add(sums, changes, weight)
            self.pushes[push.worker] += 1
            self.steps[push.worker] += push.steps
            self._taken[push.worker] = self.version
        self.staleness.update(a.staleness for a in arrivals)
        for reference, gradient in zip(self.reference, sums, strict=True):
            reference.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _changes(self, push: Push) -> list[Tensor]:
        if self.rule.signal == "delta":
            return push.message
        return [x.neg_().add_(a) for x, a in zip(push.message, self.reference, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Everything that outlives a step. What has gathered is part of it, so nothing that was received gets lost."""
        return {
            "rule": repr(self.rule),
            "local_steps": repr(self.local_steps),
            "reference": [t.clone() for t in self.reference],
            "optimizer": deepcopy(self.optimizer.state_dict()),
            "version": self.version,
            "pushes": list(self.pushes),
            "steps": list(self.steps),
            "staleness": dict(self.staleness),
            "alive": sorted(self.alive),
            "gathered": [vars(push) | {"message": [t.clone() for t in push.message]} for push in self._gathered],
            "taken": list(self._taken),
            "speeds": dict(self._speeds),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken.

        Raises:
            ValueError: the state belongs to another rule, other local steps or another number of workers.
        """
        for name, part in (("rule", self.rule), ("local_steps", self.local_steps)):
            if state[name] != repr(part):
                raise ValueError(f"Hub({name}={part!r}): the state was saved with {state[name]}")
        if len(state["pushes"]) != self.n:
            raise ValueError(f"Hub(n={self.n}): the state was saved with {len(state['pushes'])} workers")
        for own, saved in zip(self.reference, state["reference"], strict=True):
            own.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.version = int(state["version"])
        self.pushes, self.steps, self._taken = list(state["pushes"]), list(state["steps"]), list(state["taken"])
        self.staleness, self.alive = Counter(state["staleness"]), set(state["alive"])
        self._gathered = [Push(**push) for push in state["gathered"]]
        self._speeds = dict(state["speeds"])


def _warn_of_momentum(rule: HubRule, n: int) -> None:
    """Momentum that moves with every single arrival is in effect ``n`` times as strong, along changes that are old."""
    if rule.when.apart and n > 1 and isinstance(rule.outer, SGD) and rule.outer.momentum:
        warnings.warn(
            f"HubRule(outer={rule.outer!r}): momentum moves with every one of the stale changes of {n} workers, which amplifies "
            f"them; use outer=DelayedNesterov(delay={n})",
            stacklevel=4,
        )


def _add(sums: list[Tensor], changes: list[Tensor], weight: float) -> list[Tensor]:
    return [s.add_(g, alpha=weight) for s, g in zip(sums, changes, strict=True)]


def check_hub(rule: HubRule, n: int, local_steps: LocalSteps) -> None:
    """Check that a rule and local steps suit ``n`` workers.

    Raises:
        ValueError: shares or speeds for another number of workers.
    """
    rule.weights.check(n)
    if local_steps.speeds is not None and len(local_steps.speeds) != n:
        raise ValueError(f"LocalSteps(speeds={local_steps.speeds!r}): must be {n} numbers, one per worker")
