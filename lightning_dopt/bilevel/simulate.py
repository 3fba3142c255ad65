"""Many workers of a bilevel problem in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_dopt._checks import check_float, check_int
from lightning_dopt.bilevel.engine import BilevelEngine
from lightning_dopt.bilevel.losses import Losses
from lightning_dopt.bilevel.plan import BilevelPlan
from lightning_dopt.comm.link import Link
from lightning_dopt.comm.simulated import SimulatedWorld, lockstep
from lightning_dopt.comm.world import Talk

Replica = dict[str, Tensor]
Evaluate = Callable[[int, Replica, Replica, int], Tensor]


class BilevelSimulation:
    """``n`` replicas that follow a bilevel plan in lockstep, with the engine that real processes run.

    Args:
        plan: What to do.
        n: Number of workers.
        lower: Makes the lower parameters of a rank, ``{name: tensor}``; the same values on all ranks.
        upper: Makes the upper parameters.
        lower_loss: Evaluated with (rank, lower, upper, step).
        upper_loss: Evaluated with (rank, lower, upper, step).
        lower_optimizer: Makes the lower optimizer of a list of parameters.
        upper_optimizer: Makes the upper optimizer.
        link: Speed of each worker's link, for virtual time; ``None`` measures no time.
        step_seconds: Virtual seconds of computing per step.

    Raises:
        ValueError: ``n < 1``, or a plan that does not suit ``n``.
    """

    def __init__(
        self,
        plan: BilevelPlan,
        n: int,
        lower: Callable[[int], Mapping[str, Tensor]],
        upper: Callable[[int], Mapping[str, Tensor]],
        lower_loss: Evaluate,
        upper_loss: Evaluate,
        lower_optimizer: Callable[[list[Tensor]], Optimizer],
        upper_optimizer: Callable[[list[Tensor]], Optimizer],
        link: Link | None = None,
        step_seconds: float = 0.0,
    ) -> None:
        check_int("BilevelSimulation", "n", n, 1)
        self.seconds = check_float("BilevelSimulation", "step_seconds", step_seconds, 0.0)
        self.lower_loss, self.upper_loss = lower_loss, upper_loss
        self.worlds = SimulatedWorld.create(n, link)
        self.lower = [_leaves(lower(rank)) for rank in range(n)]
        self.upper = [_leaves(upper(rank)) for rank in range(n)]
        self.lower_optimizers = [lower_optimizer(list(r.values())) for r in self.lower]
        self.upper_optimizers = [upper_optimizer(list(r.values())) for r in self.upper]
        self.engines = [
            BilevelEngine(plan, self.lower[k], self.upper[k], world, self._lr(k)) for k, world in enumerate(self.worlds)
        ]

    def _lr(self, rank: int) -> Callable[[str], float]:
        def lr(name: str) -> float:
            optimizers = self.lower_optimizers if name in self.lower[rank] else self.upper_optimizers
            return float(optimizers[rank].param_groups[0]["lr"])

        return lr

    def run(self, steps: int) -> BilevelSimulation:
        """Take ``steps`` steps of the upper level."""
        for _ in range(steps):
            self._all([e.before_step() for e in self.engines])
            for world in self.worlds:
                if world.clock is not None:
                    world.clock.compute(self.seconds)
            self._all(
                [e.descend(self.losses(k), self.lower_optimizers[k].step) for k, e in enumerate(self.engines)],
            )
            for optimizer in self.upper_optimizers:
                optimizer.step()
            self._all([e.after_step() for e in self.engines])
        return self

    def losses(self, rank: int) -> Losses:
        """Both losses of a rank at the coming step."""
        lower, upper, step = self.lower[rank], self.upper[rank], self.engines[rank].step + 1
        return Losses(
            lambda: self.lower_loss(rank, lower, upper, step),
            lambda: self.upper_loss(rank, lower, upper, step),
            lower,
            upper,
        )

    def finish(self) -> BilevelSimulation:
        """End of training."""
        self._all([e.finish() for e in self.engines])
        return self

    def _all(self, talks: list[Talk[None]]) -> None:
        with torch.no_grad():
            lockstep(talks)

    def stacked(self, level: str, name: str) -> Tensor:
        """One tensor of all ranks, shape (n, ...); ``level`` is ``"lower"``, ``"auxiliary"`` or ``"upper"``."""
        return torch.stack([e.levels[level].parameters[name].detach() for e in self.engines])

    @property
    def bytes(self) -> list[int]:
        """Payload bytes sent by each rank."""
        return [w.ledger.bytes for w in self.worlds]


def _leaves(tensors: Mapping[str, Tensor]) -> Replica:
    return {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
