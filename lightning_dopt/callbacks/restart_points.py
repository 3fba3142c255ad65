"""RestartPoints: every replica saved after every round, for runs that something starts again when a worker dies."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import lightning
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from lightning_dopt._checks import check_int
from lightning_dopt.engine import Engine
from lightning_dopt.strategies import replica_files
from lightning_dopt.strategies.replica import ReplicaStrategy


class RestartPoints(ModelCheckpoint):
    """Saves all replicas after a round, each by itself and in the background, so that a killed run goes on from there.

    With ``trainer.fit(..., ckpt_path="last")`` and a launcher that starts all workers again when one is gone, such as
    ``torchrun --max-restarts``, a run goes on bit for bit from the last round that all workers have written: one that was
    complete when the worker died is lost only if the death falls into the time that writing takes. No worker waits for
    others or sends anything. Each copies its state into host memory and writes ``last.ckpt.replicas/<step>/<rank>``; when all
    of a step are there rank 0 names them in ``last.ckpt`` and removes older ones. A round that ends before the previous
    one is written waits for it.

    ``last.ckpt`` holds no model of its own. Where one is needed, such as for validation or with another number of workers,
    the mean is made from the replicas when it is read. For models to keep use ``ModelCheckpoint``.

    Args:
        dirpath: A folder that all workers share. One run, one folder: its ``last.ckpt`` is replaced.
        every_n_rounds: Rounds from one save to the next. Where messages go out in every step these are steps.

    Raises:
        ValueError: an option out of range; when training starts, a strategy without replicas, or a plan without rounds.
    """

    def __init__(self, dirpath: str, every_n_rounds: int = 1) -> None:
        if not dirpath:
            raise ValueError(f"RestartPoints(dirpath={dirpath!r}): must be a folder that all workers share")
        super().__init__(dirpath=dirpath, filename="last", enable_version_counter=False)
        self.every_n_rounds = check_int("RestartPoints", "every_n_rounds", every_n_rounds, 1)
        self.waited_s = 0.0
        """Seconds that training has waited for earlier saves to be written."""
        self._seen = 0
        self._run = ""
        self._writer: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None
        self._stop = threading.Event()

    @property
    def path(self) -> str:
        """Of the file that names the replicas."""
        return f"{self.dirpath}/last.ckpt"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what has no rounds."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if not isinstance(trainer.strategy, ReplicaStrategy):
            raise ValueError(
                f"RestartPoints: needs a strategy with replicas, such as ReplicaStrategy, got {type(trainer.strategy).__name__}"
            )
        if all(sync.when.at_end for sync in trainer.strategy.plan):
            raise ValueError(
                f"RestartPoints: {trainer.strategy.plan!r} has no rounds before its end; use "
                'ModelCheckpoint(filename="last", every_n_train_steps=...)'
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A name for the saves of this fit, the same on all ranks."""
        self._run = trainer.strategy.broadcast(replica_files.new_run())
        self._seen = _engine(trainer).sent_rounds
        self._stop.clear()
        self._writer = ThreadPoolExecutor(1, "dopt-restart-points")

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Save, if a round is complete: with messages that travel while training goes on, when the last has arrived."""
        engine = _engine(trainer)
        over = engine.sent_rounds - self._seen - self.every_n_rounds
        if over > 0 or (over == 0 and engine.at_rest):
            self._seen = engine.sent_rounds
            if _strategy(trainer).writes:
                self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the last save."""
        self._written()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The fit is over, in whatever way: a save that others do not complete is given up."""
        self._stop.set()
        if self._writer is not None:
            self._writer.shutdown(wait=False)
        self._writer = self._writing = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: rounds decide."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: rounds decide."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Nothing: rounds decide."""

    # ------------------------------------------------------------------ writing

    def _written(self) -> None:
        """Wait until the save in work is written.

        Raises:
            OSError: it could not be, or another rank's was not within the strategy's ``timeout``.
        """
        start = time.perf_counter()
        if self._writing is not None:
            self._writing.result()
        self._writing = None
        self.waited_s += time.perf_counter() - start

    def _save(self, trainer: Trainer) -> None:
        self._written()
        strategy = _strategy(trainer)
        tag = replica_files.new_tag(trainer.global_step, self._run)
        state = strategy.own_checkpoint()
        assert self._writer is not None
        self._writing = self._writer.submit(self._write, strategy, tag, state)

    def _write(self, strategy: ReplicaStrategy, tag: str, state: dict[str, Any]) -> None:
        """In the background: this replica's file; on rank 0, when all are there, the file that names them."""
        io, size = strategy.checkpoint_io, strategy.world_size
        io = io.checkpoint_io if isinstance(io, AsyncCheckpointIO) and io.checkpoint_io is not None else io
        mine = replica_files.file(self.path, tag, strategy.global_rank, size)
        replica_files.replace(mine, lambda part: io.save_checkpoint(state, part))
        if strategy.global_rank != 0:
            return
        deadline = time.monotonic() + strategy.timeout.total_seconds()
        while absent := replica_files.missing(self.path, tag, size):
            if self._stop.wait(0.02):
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"RestartPoints: rank(s) {', '.join(map(str, absent))} did not write {tag} in time")
        names = replica_files.pointer(tag, size, repr(strategy.plan), strategy.plan.means(size))
        main = {"pytorch-lightning_version": lightning.__version__, replica_files.KEY: names}
        replica_files.replace(self.path, lambda part: io.save_checkpoint(main, part))
        replica_files.prune_before(self.path, tag)


def _strategy(trainer: Trainer) -> ReplicaStrategy:
    assert isinstance(trainer.strategy, ReplicaStrategy)
    return trainer.strategy


def _engine(trainer: Trainer) -> Engine:
    engine = _strategy(trainer).engine
    assert engine is not None
    return engine
