"""Workers of unequal speed and a hub on the virtual clock: every event in the order of its time, the same on any machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_dopt._checks import check_choice, check_float, check_int
from lightning_dopt.asynchronous.clock import EventClock
from lightning_dopt.asynchronous.hub import Hub, Push
from lightning_dopt.asynchronous.hub_rules import HubRule
from lightning_dopt.asynchronous.virtual import Backward, Replica, VirtualNode, seconds_of
from lightning_dopt.pace import LocalSteps


class HubSimulation:
    """``n`` workers that are given the reference, take some steps at their own speed, push, and are given the next one.

    Workers start together from the hub's reference, that of rank 0. Pushes that arrive at the same moment are taken in the
    order in which their phases began, at first by rank.

    Args:
        rule: What the hub does.
        n: Number of workers.
        init: Makes the parameters of a rank, ``{name: tensor}``, of one dtype and device.
        backward: Called with (rank, parameters, number of the rank's gradient from 1 on), sets ``grad`` of the parameters.
        optimizer: Makes the inner optimizer of a list of parameters.
        local_steps: Steps of a phase; a number means ``LocalSteps(number)``.
        seconds: Virtual seconds per step, one number or one per worker; :attr:`seconds` may be changed between runs.
        link_seconds: How long a message is under way, either direction.
        inner_state: Whether workers keep the state of their optimizer from phase to phase, or begin each with a new one.

    Raises:
        ValueError: an argument outside its range.

    Source: Liu et al., arXiv 2401.09135; Fraboni et al., arXiv 2206.10189.
    """

    def __init__(
        self,
        rule: HubRule,
        n: int,
        init: Callable[[int], Mapping[str, Tensor]],
        backward: Backward,
        optimizer: Callable[[list[Tensor]], Optimizer],
        local_steps: LocalSteps | int,
        seconds: float | Sequence[float] = 1.0,
        link_seconds: float = 0.0,
        inner_state: Literal["keep", "reset"] = "keep",
    ) -> None:
        self.n = check_int("HubSimulation", "n", n, 1)
        self.seconds = seconds_of("HubSimulation", seconds, n)
        self.link_seconds = check_float("HubSimulation", "link_seconds", link_seconds, 0.0)
        self.inner_state = check_choice("HubSimulation", "inner_state", inner_state, ("keep", "reset"))
        self.backward, self.rule = backward, rule
        self.nodes = [VirtualNode(rank, init(rank), optimizer) for rank in range(n)]
        steps = LocalSteps(local_steps) if isinstance(local_steps, int) else local_steps
        self.hub = Hub(rule, [self.nodes[0].x], n, steps)
        self.clock = EventClock()
        self.bytes = [0] * n
        """Payload bytes between the hub and each worker, both directions."""
        self._stepped = 0
        for rank in range(n):
            self._give(rank)
        if rule.when.period is not None:  # what arrives at the moment of a step belongs to it
            self.clock.every(rule.when.period, lambda: self.clock.after(0.0, self._step), rule.when.period)

    def run(self, seconds: float) -> HubSimulation:
        """Let virtual time pass."""
        self.clock.run(seconds)
        return self

    def kill(self, rank: int) -> HubSimulation:
        """``rank`` takes part in nothing from now on; what it has pushed still counts."""
        self._plan_step(self.hub.leave(check_int("HubSimulation.kill", "rank", rank, 0)))
        return self

    @property
    def reference(self) -> Replica:
        """The hub's parameters by name: views, which change as it steps."""
        return {f.name: f.of(self.hub.reference[0]) for f in self.nodes[0].fields}

    # ------------------------------------------------------------------ a phase of a worker

    def _give(self, rank: int) -> None:
        if rank not in self.hub.alive:
            return
        reference, version, steps = self.hub.reference[0].clone(), self.hub.version, self.hub.steps_of(rank)
        if version:  # all have the first reference anyway
            self.bytes[rank] += reference.nbytes
        down = self.link_seconds if version else 0.0
        duration = steps * self.seconds[rank]
        self.clock.after(down + duration, lambda: self._work(rank, reference, version, steps, duration))

    def _work(self, rank: int, base: Tensor, version: int, steps: int, seconds: float) -> None:
        """All steps of a phase, at the moment at which it ends."""
        if rank not in self.hub.alive:
            return
        node = self.nodes[rank]
        node.x.copy_(base)
        if self.inner_state == "reset":
            node.optimizer.state.clear()
        for _ in range(steps):
            node.optimizer.zero_grad()
            self.backward(rank, node.parameters, node.gradients + 1)
            node.optimizer.step()
            node.gradients += 1
        with torch.no_grad():
            message = base.sub_(node.x) if self.rule.signal == "delta" else node.x.clone()
        self.bytes[rank] += message.nbytes
        push = Push(rank, [message], version, steps, seconds)
        if self.link_seconds:
            self.clock.after(self.link_seconds, lambda: self._arrive(push))
        else:
            self._arrive(push)

    # ------------------------------------------------------------------ the hub

    def _arrive(self, push: Push) -> None:
        self._plan_step(self.hub.receive(push))
        if not self.rule.when.waits:
            self._give(push.worker)

    def _plan_step(self, delay: float | None) -> None:
        if delay == 0.0:
            self._step()
        elif delay is not None:
            stepped = self._stepped
            self.clock.after(delay, lambda: self._step() if self._stepped == stepped else None)

    def _step(self) -> None:
        self._stepped += 1
        workers = self.hub.step()
        if self.rule.when.waits:
            for rank in workers:
                self._give(rank)

    @property
    def gradients(self) -> list[int]:
        """Gradients that each worker has taken."""
        return [node.gradients for node in self.nodes]
