"""AdaptiveBatch: gradients are accumulated over more batches as their noise outgrows what is left of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_dopt._checks import check_float, check_int
from lightning_dopt._random import key
from lightning_dopt.distance import gathered_sketches
from lightning_dopt.engine import Engine
from lightning_dopt.noise_test import largest_ratio
from lightning_dopt.strategies.replica import ReplicaStrategy

_SEED = 0x5EED


class AdaptiveBatch(Callback):
    """Raises ``accumulate_grad_batches`` when the norm test asks for a larger batch; it never falls.

    At each step at which ranks talk anyway they compare the gradients ``g_m`` they are about to step with, by sketches of 256
    numbers each: with ``M`` ranks at a batch of ``b`` each, ``b <- max(b, b sum_m |g_m - g|^2 / ((M - 1) M eta^2 |g|^2))``, so that
    the noise of the mean gradient ``g`` stays below ``eta`` times its length. Where only groups of ranks share a model the group
    that asks for most decides. All ranks take the same: it changes where the optimizer step and the window of batches end
    together, an optimizer step stays a step, and the plan's rounds keep their number of steps.

    The batch of the loader is what fits into memory and the smallest batch there is; growing the loader's own batch first
    is left out. Learning rates stay as they are. Logs ``batch/accumulate`` and ``batch/requested``, in batches of the loader.

    Args:
        eta: Noise to put up with, relative to the mean gradient, above 0.
        largest: The most batches to accumulate.
        threshold: Accumulate only once more than so many batches are asked for; the authors' code takes 2.

    Raises:
        ValueError: an option out of range; when training starts, another strategy than :class:`ReplicaStrategy`, a plan that
            averages gradients (which leaves no noise to see), manual optimization, two passes per step, or unequal paces.

    Source: "AdLoCo", arXiv 2508.18182, its adaptive batches and switch mode; merging is ``plans.adloco``.
    """

    def __init__(self, eta: float = 0.8, largest: int = 64, threshold: float = 1.0) -> None:
        self.eta = check_float("AdaptiveBatch", "eta", eta, 0.0, open_low=True, open_high=True)
        self.largest = check_int("AdaptiveBatch", "largest", largest, 1)
        self.threshold = check_float("AdaptiveBatch", "threshold", threshold, 1.0)
        self.requested = 1.0
        self._first = 1
        self._now: int | None = None

    @property
    def accumulate(self) -> int:
        """Batches per optimizer step that the tests so far ask for."""
        asked = math.ceil(self.requested) if self.requested > self.threshold else 1
        return max(self._first, min(self.largest, asked))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what it cannot work with; go on where a checkpoint left off."""
        engine = _engine(trainer)
        if not pl_module.automatic_optimization:
            raise ValueError("AdaptiveBatch: accumulates gradients, which needs automatic optimization")
        if any(sync.what.slot == "gradients" for sync in engine.plan):
            raise ValueError(
                "AdaptiveBatch: the plan averages gradients, which leaves no noise to see; use local updates"
            )
        if engine.passes > 1:
            raise ValueError(
                "AdaptiveBatch: a correction of the plan takes two passes on one batch, which cannot accumulate"
            )
        pace = getattr(trainer.strategy, "pace", None)
        if pace is not None:
            raise ValueError(f"ReplicaStrategy(pace={pace!r}): AdaptiveBatch needs every rank at every step")
        if self._now is None:
            self._first = self._now = trainer.accumulate_grad_batches
            self.requested = max(self.requested, float(self._first))
        trainer.accumulate_grad_batches = self._now

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """The test, at steps at which ranks talk."""
        engine = _engine(trainer)
        taken = trainer.accumulate_grad_batches
        whole = trainer.fit_loop.epoch_loop.batch_progress.current.ready % taken == 0  # the last window may be short
        if not whole or not engine.communicates():
            return
        rows = engine.run(
            gathered_sketches(_gradients(engine), engine.world, key(_SEED, engine.step), "adaptive batch")
        )
        self.requested = max(self.requested, taken * largest_ratio(rows, _groups(engine), self.eta))
        pl_module.log_dict({"batch/requested": self.requested, "batch/accumulate": float(self.accumulate)})

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Take the new number where windows of the old and of the new end."""
        ready, now = trainer.fit_loop.epoch_loop.batch_progress.current.ready, trainer.accumulate_grad_batches
        if self.accumulate != now and ready % now == 0 and ready % self.accumulate == 0:
            self._take(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An epoch begins with a new window."""
        progress = trainer.fit_loop.epoch_loop.batch_progress
        if progress.is_last_batch or progress.current.ready == 0:  # else a run goes on in the middle
            self._take(trainer)

    def _take(self, trainer: Trainer) -> None:
        trainer.accumulate_grad_batches = self._now = self.accumulate

    def state_dict(self) -> dict[str, Any]:
        """What was asked for so far."""
        return {"requested": self.requested, "first": self._first, "now": self._now}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from there."""
        self.requested, self._first = float(state_dict["requested"]), int(state_dict["first"])
        self._now = state_dict["now"]


def _engine(trainer: Trainer) -> Engine:
    strategy = trainer.strategy
    if not isinstance(strategy, ReplicaStrategy) or strategy.engine is None:
        raise ValueError(f"AdaptiveBatch: needs replicas with gradients of their own, not {type(strategy).__name__}")
    return strategy.engine


def _gradients(engine: Engine) -> list[Tensor]:
    """One vector per buffer of parameters; zeros where there is no gradient."""
    return [
        torch.cat(
            [
                torch.zeros_like(p).reshape(-1) if p.grad is None else p.grad.reshape(-1)
                for p in (engine.parameters[field.name] for field in lane.fields)
            ]
        )
        for lane in engine.flat.lanes
    ]


def _groups(engine: Engine) -> list[list[int]]:
    """The ranks that share a model: who hears whom in the coming round of the parameters; all, if there is no such sync."""
    n = engine.world.size
    runner = next((r for r in engine.runners if r.sync.what.slot == "parameters"), None)
    if runner is None:
        return [list(range(n))]
    peers = runner.sync.peers
    meetings = {tuple(sorted({rank, *peers.row(n, rank, runner.rounds)})) for rank in range(n)}
    return [list(group) for group in sorted(meetings)]
