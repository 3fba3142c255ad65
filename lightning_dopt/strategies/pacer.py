"""Workers of unequal speed that meet at the ends of rounds: a slow one leaves some of the round's steps out."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_dopt.comm.world import Pending, Talk
from lightning_dopt.engine import Engine
from lightning_dopt.pace import LocalSteps, Turns
from lightning_dopt.plan import Plan


def check_pace(owner: str, pace: LocalSteps | None, plan: Plan, n: int | None = None) -> None:
    """Refuse a pace that cannot work with a plan and a number of ranks, if that is known.

    Raises:
        ValueError: the plan has corrections, or speeds are given for another number of ranks.
    """
    if pace is None:
        return
    if not isinstance(pace, LocalSteps):
        raise ValueError(f"{owner}(pace={pace!r}): must be None or LocalSteps(...)")
    if n is not None and pace.speeds is not None and len(pace.speeds) != n:
        raise ValueError(f"{owner}(pace={pace!r}): must have {n} speeds, one per rank")
    if plan.corrections:
        raise ValueError(
            f"{owner}(pace={pace!r}): slow ranks leave steps out, and {plan.corrections[0]!r} counts every step"
        )


class Pacer:
    """Says which steps of a round this rank takes, and measures how fast it is.

    In a round of ``H`` steps a rank of speed ``v`` takes ``H_i = floor(v / v_max * H)`` of them: those at which ranks talk, and
    others spread evenly (:class:`~lightning_dopt.pace.Turns`). Step numbers, batches, schedules and epochs stay the same on
    all ranks. The largest speed is agreed on at the end of each round, by a maximum over one number (8 bytes of
    overhead); where the plan's messages travel while training goes on it is heard a round later, so that nobody waits.

    Args:
        pace: Steps per round, and whether they follow the speed.
        engine: The rank's engine.

    Source: dynamic local updates (DyLU) of Liu et al., arXiv 2401.09135, with a common end of the round.
    """

    def __init__(self, pace: LocalSteps, engine: Engine) -> None:
        self.pace, self.engine = pace, engine
        self.round_steps = pace.steps
        """Steps that this rank takes in the present round."""
        if pace.dynamic and pace.speeds is not None:
            self.round_steps = pace.of(pace.speeds[engine.world.rank], max(pace.speeds))
        self.taken = 0
        """Optimizer steps that this rank has taken."""
        self._turns = Turns(pace.steps)
        self._speed, self._seconds, self._steps = 1.0, 0.0, 0
        self._since: tuple[float, float] | None = None
        self._asked: tuple[float, Pending] | None = None

    @property
    def takes_part(self) -> bool:
        """Whether this rank takes the coming step."""
        step = self.engine.step + 1
        return self._turns.takes(step, self.round_steps, self.engine.communicates(step))

    def begin(self) -> None:
        """A step begins; what went before counts as well (loading of data), unless :meth:`rest` was called."""
        if self._since is None:
            self.resume()

    def computed(self) -> None:
        """The step's computing is done; what follows until :meth:`resume` is communication."""
        self.begin()
        assert self._since is not None
        began, stalled = self._since
        self._seconds += time.perf_counter() - began - (self.engine.world.ledger.stall_s - stalled)
        self._steps += 1
        self.taken += 1

    def resume(self) -> None:
        """Communication is done."""
        self._since = (time.perf_counter(), self.engine.world.ledger.stall_s)

    def rest(self) -> None:
        """What comes now is no training."""
        self._since = None

    def meet(self) -> Talk[None]:
        """After a step: at the end of a round, agree on how many steps this rank takes in the next one."""
        if self.engine.step % self.pace.steps or not self.pace.dynamic:
            return
        if self._seconds > 0.0:
            self._speed = self._steps / self._seconds
        self._seconds, self._steps = 0.0, 0
        world, device = self.engine.world, self.engine.flat.lanes[0].live.device
        earlier = self._asked
        own = torch.tensor([self._speed], dtype=torch.float64, device=device)
        self._asked = (self._speed, world.all_reduce_max(own, "pace"))
        heard = earlier if self.engine.plan.overlaps else self._asked
        if heard is not None:
            speed, pending = heard
            self.round_steps = self.pace.of(speed, float((yield pending).item()))

    def state_dict(self) -> dict[str, Any]:
        """What the rest of a round needs."""
        turns = self._turns.state_dict()
        return {"pace": repr(self.pace), "round_steps": self.round_steps, "taken": self.taken, "turns": turns}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken; the time of the round's first part is lost.

        Raises:
            ValueError: the state was saved with another pace.
        """
        if state["pace"] != repr(self.pace):
            raise ValueError(f"pace={self.pace!r}: the checkpoint was written with {state['pace']}")
        self.round_steps, self.taken = int(state["round_steps"]), int(state["taken"])
        self._turns.load_state_dict(state["turns"])


def check_trainer(pace: LocalSteps, module: LightningModule, trainer: Trainer) -> None:
    """Refuse a module whose steps cannot be left out.

    Raises:
        ValueError: manual optimization.
    """
    if not module.automatic_optimization:
        raise ValueError(f"pace={pace!r}: leaves calls of training_step out, which needs automatic optimization")


def nothing_to_learn(device: torch.device) -> Tensor:
    """The loss of a step that is left out: zero, and of no parameter. Lightning refuses ``None`` on several ranks."""
    return torch.zeros((), device=device, requires_grad=True)
