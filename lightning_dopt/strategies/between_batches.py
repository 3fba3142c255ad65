"""What an elastic run does between two batches, and the model that its workers share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule

from lightning_dopt.elastic import ElasticEngine
from lightning_dopt.strategies.consensus import ConsensusModel
from lightning_dopt.strategies.weights import WeightSwap

if TYPE_CHECKING:
    from lightning_dopt.strategies.elastic import ElasticStrategy


class AnchorModel(ConsensusModel):
    """The anchors as one model: what all members share between rounds. Nothing is sent for it."""

    def measure(self) -> None:
        """Nothing: who would be asked?"""

    def model(self) -> WeightSwap:
        """The anchors, to be swapped in."""
        assert isinstance(self.engine, ElasticEngine)
        with torch.no_grad():
            return WeightSwap(self.engine, self.engine.anchors())


class BetweenBatches(Callback):
    """Lets the strategy work where a batch has ended and its counters are settled, before all other callbacks."""

    def __init__(self, strategy: ElasticStrategy) -> None:
        self.strategy = strategy
        self.ticked = 0
        self.total = math.inf

    def begin(self, trainer: Any) -> None:
        """Training starts."""
        assert self.strategy.engine is not None
        self.ticked = self.strategy.engine.step
        if len(trainer.optimizers) == 1:
            self.total = trainer.max_steps if trainer.max_steps > 0 else trainer.estimated_stepping_batches

    def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, *_: Any) -> None:
        """A tick, if the batch ended with an optimizer step."""
        strategy, rounds = self.strategy, self.strategy.rounds
        engine = rounds.engine
        if engine.step == self.ticked:
            return
        if engine.step > self.ticked + 1:
            raise ValueError(
                f"{type(strategy).__name__}: needs at most one step of the clock optimizer per training_step, for rounds are "
                "between batches"
            )
        rounds.tick()
        self.ticked = engine.step
        if engine.step >= self.total and trainer.global_step < engine.step:  # it was late, and the others are done
            trainer.should_stop = True
        members = float(rounds.world.size)
        pl_module.log("comm/workers", members, on_step=True, on_epoch=False)
        pl_module.log("comm/lost_rounds", float(rounds.lost), on_step=True, on_epoch=False)
