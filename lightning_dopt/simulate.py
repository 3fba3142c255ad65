"""Many workers in one process: run a plan exactly, without processes, and read off bytes and virtual time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_dopt._checks import check_int
from lightning_dopt.comm.link import Link
from lightning_dopt.comm.links import REST, OnLostPeer
from lightning_dopt.comm.simulated import SimulatedWorld, lockstep
from lightning_dopt.comm.world import Talk
from lightning_dopt.engine import Engine
from lightning_dopt.pace import LocalSteps, Turns
from lightning_dopt.plan import Plan

Replica = dict[str, Tensor]


class Simulation:
    """``n`` replicas that follow a plan in lockstep, each with its own parameters, optimizer and engine.

    The engine is the one that real processes run; only the world differs. Equal seeds give equal numbers in both.

    Args:
        plan: What to do.
        n: Number of workers.
        init: Makes the parameters of a rank, ``{name: tensor}``.
        backward: Called with (rank, parameters, step) before each step; sets ``grad`` of the parameters.
        optimizer: Makes the inner optimizer of a list of parameters, such as ``lambda ps: torch.optim.SGD(ps, lr=0.1)``.
        link: Speed of the workers' links, for virtual time, one for all or one per rank; ``None`` measures no time.
            ``Sync(transport="auto")`` takes what is faster over it.
        step_seconds: Virtual seconds that one inner step takes, one number or one per rank.
        on_lost_peer: What happens after :meth:`kill`: ``"continue"`` goes on without the rank, ``"end"`` raises.
        patience: Virtual seconds to wait for a neighbour before its link is to rest; see :class:`ProcessGroupWorld`.
        rest: Optimizer steps with a meeting of the pair that a link rests.
        offload: See :class:`Engine`.
        pace: Unequal numbers of steps: in every round of ``pace.steps`` slow ranks take ``pace.of(...)`` of them and
            :meth:`Engine.skip` the others, never one at which ranks talk (:class:`~lightning_dopt.pace.Turns`). Speeds are those of
            ``pace``, or follow from ``step_seconds``.

    Raises:
        ValueError: ``n < 1``, a plan that does not suit ``n``, or the wrong number of step times or speeds.
    """

    def __init__(
        self,
        plan: Plan,
        n: int,
        init: Callable[[int], Mapping[str, Tensor]],
        backward: Callable[[int, Replica, int], None],
        optimizer: Callable[[list[Tensor]], Optimizer],
        link: Link | Sequence[Link] | None = None,
        step_seconds: float | Sequence[float] = 0.0,
        on_lost_peer: OnLostPeer = "end",
        patience: float | None = None,
        rest: int = REST,
        offload: bool = False,
        pace: LocalSteps | None = None,
    ) -> None:
        check_int("Simulation", "n", n, 1)
        self.seconds = [step_seconds] * n if isinstance(step_seconds, (int, float)) else list(step_seconds)
        if len(self.seconds) != n:
            raise ValueError(f"Simulation(step_seconds={step_seconds!r}): must be one number or {n} numbers")
        self.pace = pace
        self.round_steps = _round_steps(pace, self.seconds)
        """Steps that each rank takes in a round of ``pace.steps``; empty without a pace."""
        self._turns = [Turns(pace.steps) for _ in range(n)] if pace is not None else []
        self.backward = backward
        self.worlds = SimulatedWorld.create(n, link, on_lost_peer, patience, rest)
        self.alive = list(range(n))
        """The ranks that have not been killed."""
        self.replicas: list[Replica] = [
            {k: t.detach().clone().requires_grad_() for k, t in init(i).items()} for i in range(n)
        ]
        self.optimizers = [optimizer(list(r.values())) for r in self.replicas]
        self.engines = [
            Engine(plan, replica, world, lr=_lr_of(opt), optimizer_state=_state_of(opt, replica), offload=offload)
            for replica, world, opt in zip(self.replicas, self.worlds, self.optimizers, strict=True)
        ]

    def run(self, steps: int) -> Simulation:
        """Train for ``steps`` optimizer steps, of the fastest rank if there is a pace."""
        for _ in range(steps):
            ranks = self._stepping()
            self._all(Engine.before_step, ranks)
            self._pass(ranks)
            if self.engines[ranks[0]].passes == 2:
                self._all(Engine.perturb, ranks)
                self._pass(ranks)
            for rank in ranks:
                clock = self.worlds[rank].clock
                if clock is not None:
                    clock.compute(self.seconds[rank])
            self._all(Engine.on_gradients, ranks)
            for rank in ranks:
                self.optimizers[rank].step()
            self._all(Engine.after_step, ranks)
        return self

    def _stepping(self) -> list[int]:
        """The ranks that take the coming step; the others skip it."""
        if self.pace is None:
            return self.alive
        step = self.engines[self.alive[0]].step + 1
        shares, turns = self.round_steps, self._turns
        ranks = [r for r in self.alive if turns[r].takes(step, shares[r], self.engines[r].communicates(step))]
        for rank in self.alive:
            if rank not in ranks:
                self.engines[rank].skip(1)
        return ranks

    def _pass(self, ranks: list[int]) -> None:
        """One forward and backward pass of some ranks."""
        for rank in ranks:
            replica = self.replicas[rank]
            self.optimizers[rank].zero_grad()
            self.backward(rank, replica, self.engines[rank].step + 1)

    def finish(self) -> Simulation:
        """End of training: apply what is in flight and run the syncs that are due at the end."""
        self._all(Engine.finish, self.alive)
        return self

    def kill(self, rank: int) -> Simulation:
        """``rank`` takes part in nothing from now on; its parameters stay as they are."""
        self.worlds[rank].die()
        self.alive.remove(rank)
        return self

    def _all(self, part: Callable[[Engine], Talk[None]], ranks: list[int]) -> None:
        with torch.no_grad():
            lockstep([part(self.engines[rank]) for rank in ranks])

    def stacked(self, name: str = "x") -> Tensor:
        """One parameter of all ranks, shape (n, ...)."""
        return torch.stack([r[name].detach() for r in self.replicas])

    def distance(self) -> float:
        """Consensus distance ``sqrt(mean_i ||x_i - mean||^2)``."""
        with torch.no_grad():
            return float(lockstep([self.engines[rank].consensus() for rank in self.alive])[0][0])

    @property
    def bytes(self) -> list[int]:
        """Payload bytes sent by each rank."""
        return [w.ledger.bytes for w in self.worlds]


def _round_steps(pace: LocalSteps | None, seconds: list[float]) -> list[int]:
    """Steps per round of every rank; none without a pace."""
    if pace is None:
        return []
    if not pace.dynamic:
        return [pace.steps] * len(seconds)
    if pace.speeds is None and min(seconds) <= 0.0:
        raise ValueError(f"Simulation(pace={pace!r}): needs speeds, or step_seconds above 0")
    speeds = pace.speeds if pace.speeds is not None else [1.0 / s for s in seconds]
    if len(speeds) != len(seconds):
        raise ValueError(f"Simulation(pace={pace!r}): must have {len(seconds)} speeds, one per worker")
    return [pace.of(v, max(speeds)) for v in speeds]


def _lr_of(optimizer: Optimizer) -> Callable[[str], float]:
    return lambda name: float(optimizer.param_groups[0]["lr"])


def _state_of(optimizer: Optimizer, replica: Replica) -> Callable[[str, str], Tensor]:
    return lambda name, key: optimizer.state[replica[name]][key]
