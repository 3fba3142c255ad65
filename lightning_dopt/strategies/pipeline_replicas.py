"""Several pipelines beside one another: replicas of one model, with a plan between the ranks that hold the same stages."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import Optimizer

from lightning_dopt.comm import ProcessGroupWorld
from lightning_dopt.comm.ledger import Ledger
from lightning_dopt.engine import Engine
from lightning_dopt.pipeline.mail import backends
from lightning_dopt.plan import Plan, Sync
from lightning_dopt.strategies import start
from lightning_dopt.strategies.checkpoints import copied
from lightning_dopt.strategies.consensus import ConsensusModel
from lightning_dopt.strategies.optimizers import OptimizerIndex

MEAN_GRADIENT = Plan([Sync(what="gradients")])
"""The plan between pipelines if none is given: one model, trained on the batches of all."""


class Islands:
    """The layout of the processes: pipelines one after the other, their ranks side by side. Making it is collective.

    Args:
        size: Ranks of one pipeline.
        timeout: How long a rank waits for another one.
        backend: Of what replicas send to each other; ``None`` takes the default group's.
    """

    def __init__(self, size: int, timeout: timedelta, backend: str | None) -> None:
        self.size, self.count = size, dist.get_world_size() // size
        self.island, self.place = divmod(dist.get_rank(), size)
        pipelines = [self.ranks(k) for k in range(self.count)]
        same = [list(range(j, self.count * size, size)) for j in range(size)]
        self.pipeline = _own_group(pipelines, timeout, backends(dist.get_backend()))
        """The processes of this rank's pipeline."""
        self.replicas = _own_group(same, timeout, backend)
        """The processes with the same stages, one of each pipeline; for their world alone."""
        self.metrics = _own_group(same, timeout, None)
        """The same, for all else."""

    def ranks(self, island: int) -> list[int]:
        """The ranks of a pipeline among all processes."""
        return list(range(island * self.size, (island + 1) * self.size))


def _own_group(rows: list[list[int]], timeout: timedelta, backend: str | None) -> dist.ProcessGroup:
    """Make a group of each row; the one that this rank belongs to."""
    made = [dist.new_group(row, timeout, backend) for row in rows]
    own = made[next(k for k, row in enumerate(rows) if dist.get_rank() in row)]
    assert isinstance(own, dist.ProcessGroup)
    return own


class PipelineReplicas:
    """The plan between pipelines, as far as this rank's stages go. Its steps are those of all engines of the run.

    Args:
        plan: What to do.
        world: The ranks with the same stages.
        ledger: Counts what is sent, beside the messages within the pipeline.
    """

    def __init__(self, plan: Plan, world: ProcessGroupWorld, ledger: Ledger) -> None:
        self.plan, self.world = plan, world
        world.ledger = ledger
        self._last = False
        self._engine: Engine | None = None
        self._consensus: ConsensusModel | None = None

    @property
    def engine(self) -> Engine:
        """The engine, once :meth:`begin` has made it."""
        assert self._engine is not None
        return self._engine

    @property
    def consensus(self) -> ConsensusModel:
        """The mean of all replicas, once :meth:`begin` has been called."""
        assert self._consensus is not None
        return self._consensus

    def begin(
        self, module: LightningModule, foreign: Collection[str], optimizers: list[Optimizer], schedulers: list[Any]
    ) -> None:
        """Make the engine of what is trained here.

        Raises:
            ValueError: An optimizer, a scheduler or the plan does not suit the others.
        """
        start.refuse_metric_schedulers(self.plan, schedulers)
        start.check_momentum(self.plan, optimizers)
        start.refuse_optimizers(self.plan, optimizers)
        index = OptimizerIndex(module, optimizers, 0)
        away = set(foreign)
        mine = {name: p for name, p in index.trainable.items() if name not in away}
        saved = module.state_dict(keep_vars=True)
        buffers = {n: b for n, b in module.named_buffers() if n in saved and n not in away}
        self._engine = Engine(
            self.plan, mine, self.world, buffers=buffers, lr=index.lr, optimizer_state=index.state, sync_buffers=True
        )
        if self._engine.passes == 2:
            raise ValueError("PipelineStrategy(plan=...): SAM and Extragradient take two passes, stages take one")
        self._consensus = ConsensusModel(self._engine)

    def before_step(self) -> None:
        """Before the forward pass."""
        self.engine.run(self.engine.before_step())

    def before_backward(self) -> None:
        """The gradients of a batch are there and will be added, for the last time before the step, or not."""
        if self._last:
            self.engine.watch_gradients(0)
        self._last = False

    def with_gradients(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, with what is done to gradients behind it."""

        def closure_and_sync() -> Any:
            self._last = True
            out = closure()
            self.engine.run(self.engine.on_gradients(None, 0))
            return out

        return closure_and_sync

    def after_step(self) -> None:
        """After the optimizer's step."""
        self.engine.run(self.engine.after_step())

    def finish(self) -> None:
        """Training has ended: apply what is in flight, and leave the mean of all replicas in the module."""
        self.engine.run(self.engine.finish())
        self.consensus.model().toggle()

    def own_state(self, module: nn.Module, foreign: Collection[str]) -> dict[str, Any]:
        """What this replica needs beyond the mean of all: its own weights, and the engine's state."""
        self.engine.run(self.engine.land())
        away = set(foreign)
        with self.consensus.own():
            weights = copied({name: value for name, value in module.state_dict().items() if name not in away})
        return {"weights": weights, "engine": copied(self.engine.state_dict())}

    def close(self) -> None:
        """The fit is over, in whatever way."""
        if self._consensus is not None:
            self._consensus.hide()
        if self._engine is not None:
            self._engine.close()


def check_plan(plan: Plan | None, pipelines: int, pipes: int) -> None:
    """Refuse a plan that stages cannot follow.

    Args:
        plan: The plan, if there is one.
        pipelines: How many there are.
        pipes: Directions of the schedule.

    Raises:
        ValueError: With the reason.
    """
    if plan is None:
        return
    if pipelines == 1:
        raise ValueError("PipelineStrategy(plan=...): there is one pipeline only; give pipeline_size as well")
    if pipes > 1:
        raise ValueError("PipelineStrategy(plan=...): needs a schedule with one direction, such as '1f1b'")
    if any(sync.when.measured or sync.when.reads_size or sync.when.reads_lr for sync in plan):
        raise ValueError(
            "PipelineStrategy(plan=...): stages would measure, and sync, each for itself; use a schedule of steps"
        )
    plan.check(pipelines)


def refuse_ties(count: int, names: Sequence[str]) -> None:
    """Refuse parameters that several ranks of a pipeline hold, beside replicas: a plan would move each copy by itself.

    Raises:
        ValueError: There are some.
    """
    if count > 1 and names:
        raise ValueError(
            f"PipelineStrategy(pipeline_size=...): '{names[0]}' is in two stages, and replicas would be mixed for each by itself; "
            "untie it, or cut such that it is in one stage"
        )
