"""ReplicaStrategy: replicas that are not wrapped in DDP and talk to each other as a plan says."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import CheckpointIO, ClusterEnvironment, Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_dopt._checks import check_choice, check_int
from lightning_dopt.comm import Link, ProcessGroupWorld, SyncError
from lightning_dopt.comm.ledger import Ledger
from lightning_dopt.comm.link import LinkClock
from lightning_dopt.comm.process_group import no_answer
from lightning_dopt.engine import Engine
from lightning_dopt.plan import Plan, Sync
from lightning_dopt.strategies import _private, optimizers, replica_files
from lightning_dopt.strategies.resume import ExactResume, ordinary
from lightning_dopt.strategies.stop_signal import StopSignal
from lightning_dopt.strategies.watch import Watch
from lightning_dopt.strategies.weights import WeightSwap

T = TypeVar("T")
StartMethod = Literal["popen", "spawn", "fork", "forkserver"]


class ReplicaStrategy(DDPStrategy):
    """Trains one replica per process; replicas exchange what the plan says, when it says so.

    Automatic and manual optimization, gradient accumulation, clipping, mixed precision, schedulers, compiled modules and
    all launchers of ``DDPStrategy`` work as they do there. Steps are optimizer steps.

    Args:
        *syncs: The syncs of the plan, in order. With none (and no ``plan``) replicas train on their own.
        plan: A whole plan instead, for example ``plans.diloco(sync_every=100)``.
        evaluate: Which model validation measures: ``"consensus"`` swaps the mean of all replicas in for the time of
            validation and leaves it in the module after ``fit``; ``"local"`` keeps each rank's own weights.
        buffers: ``"average"`` averages floating point buffers (BatchNorm statistics, by the law of total variance) whenever
            the plan's first sync runs, ``"local"`` never does; the consensus model always holds their average.
        clock: Which optimizer's steps count, if there are several (index as in ``configure_optimizers``).
        measure_every: Optimizer steps between measurements of ``consensus/distance`` during training, at the price of an
            all-reduce of the model each; 0 measures at validation only.
        link: Also keep a virtual clock as if all ranks were connected by such links: ``comm/link_s`` is the time the run
            would have taken so far (measured computing, modelled messages), ``comm/link_stall_s`` how much of it is waiting.
        timeout: How long a rank waits for others before it gives up.
        process_group_backend: ``"gloo"``, ``"nccl"``; ``None`` picks by device.
        start_method: How Lightning starts the processes.
        accelerator: See ``DDPStrategy``.
        parallel_devices: See ``DDPStrategy``.
        cluster_environment: See ``DDPStrategy``.
        checkpoint_io: See ``DDPStrategy``.
        precision_plugin: See ``DDPStrategy``.

    Raises:
        ValueError: an argument or a plan that cannot work, when the strategy or the Trainer is made.
    """

    def __init__(
        self,
        *syncs: Sync,
        plan: Plan | None = None,
        evaluate: Literal["consensus", "local"] = "consensus",
        buffers: Literal["average", "local"] = "average",
        clock: int = 0,
        measure_every: int = 0,
        link: Link | None = None,
        timeout: timedelta = timedelta(minutes=30),
        process_group_backend: str | None = None,
        start_method: StartMethod = "popen",
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        name = type(self).__name__
        if syncs and plan is not None:
            raise ValueError(f"{name}(plan=...): give the syncs either one by one or as a plan, not both")
        self.plan = plan if plan is not None else Plan(syncs)
        self.evaluate = check_choice(name, "evaluate", evaluate, ("consensus", "local"))
        self.buffer_policy = check_choice(name, "buffers", buffers, ("average", "local"))
        self.clock_index = check_int(name, "clock", clock, 0)
        self.measure_every = check_int(name, "measure_every", measure_every, 0)
        check_choice(name, "start_method", start_method, ("popen", "spawn", "fork", "forkserver"))
        if timeout <= timedelta(0):
            raise ValueError(f"{name}(timeout={timeout!r}): must be longer than zero")
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )
        self.link = link
        self.timeout = timeout
        self.engine: Engine | None = None
        self.world: ProcessGroupWorld | None = None
        self._watch: Watch | None = None
        self._swap: WeightSwap | None = None
        self._distance: float | None = None
        self._told: tuple[float, float] | None = None
        self._resume = ExactResume()
        self._restored: dict[str, Any] | None = None
        self._final: dict[str, Any] | None = None
        self._running = False
        self._undo_quiet: Callable[[], None] = _nothing

    # ------------------------------------------------------------------ start

    def set_world_ranks(self) -> None:
        """Called while the Trainer is made, before any process starts: the place to refuse what cannot work."""
        super().set_world_ranks()
        if _private.layer_sync(self) is not None:
            raise ValueError(
                "Trainer(sync_batchnorm=True): makes every forward pass communicate; use buffers='average'"
            )
        if self._start_method == "popen" and hasattr(
            sys, "ps1"
        ):  # as Lightning asks, which would advise another strategy
            raise ValueError(
                f"{type(self).__name__}(start_method='popen'): a notebook cannot be started again as a script; use "
                "start_method='fork', or a name such as strategy='diloco_notebook'"
            )
        self.plan.check(self.num_nodes * self.num_processes)

    def setup_environment(self) -> None:
        """Make the process groups (again for each ``fit`` or ``validate``, but only once in a process).

        Raises:
            SyncError: not all processes came within ``timeout``.
        """
        try:
            super().setup_environment()
            if self.world is None:
                self.world = ProcessGroupWorld(timeout=self.timeout, backend=self._process_group_backend)
        except (RuntimeError, dist.DistError) as error:
            if not _private.is_lost_connection(error):
                raise
            raise SyncError(self._nobody_came(error)) from error
        if self._trainer.state.fn == TrainerFn.FITTING:
            self._watch = Watch(_private.default_store(), self.global_rank, self.world_size)
            self.world.diagnose = self._watch.diagnose
            self._watch.start()

    def _nobody_came(self, error: Exception) -> str:
        environment = self.cluster_environment
        assert environment is not None
        first = (str(error).splitlines() or [type(error).__name__])[0]
        return (
            f"rank {self.global_rank} of {self.world_size} could not meet the others at {environment.main_address}:"
            f"{environment.main_port} within {self.timeout.total_seconds():g} s: start all processes with the same "
            f"address, port and numbers of nodes and devices ({first})"
        )

    def configure_ddp(self) -> None:
        """Nothing is wrapped."""

    def setup(self, trainer: Any) -> None:
        """Make the engine once the module, its optimizers and the precision plugin are ready."""
        super().setup(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        assert self.world is not None
        assert self.lightning_module is not None
        self.world.ledger = Ledger()
        self.world.clock = LinkClock(self.link) if self.link is not None else None
        if self._restored is None:
            with self._answers("broadcast of the start"):
                self._share_start()
        self.engine = self._make_engine()
        self._final, self._swap, self._running, self._told = None, None, True, None
        self._restore_engine()
        self._undo_quiet = StopSignal(trainer, self.engine.meets, self._answers).undo
        if self.evaluate == "consensus" and any(_private.averages_weights(c) for c in trainer.callbacks):
            self._warn_of_averages()

    def _share_start(self) -> None:
        """All replicas start from rank 0's weights and buffers."""
        assert self.lightning_module is not None
        with torch.no_grad():
            for tensor in (*self.lightning_module.parameters(), *self.lightning_module.buffers()):
                dist.broadcast(tensor.data, 0)

    def _warn_of_averages(self) -> None:
        shared = any(s.what.slot == "gradients" and s.peers.is_mean(self.world_size) for s in self.plan)
        if self.world_size > 1 and not shared:
            rank_zero_warn(
                "WeightAveraging averages each rank's own replica over time: validation measures other weights on every rank "
                "and the main checkpoint holds rank 0's average; after fit all ranks hold the mean of their averages"
            )

    def _make_engine(self) -> Engine:
        module, world = self.lightning_module, self.world
        assert module is not None
        assert world is not None
        index = optimizers.OptimizerIndex(
            module, [_private.unwrap_optimizer(o) for o in self.optimizers], self.clock_index
        )
        self._index = index
        saved = module.state_dict(
            keep_vars=True
        )  # buffers that no checkpoint holds are constants, such as rotary tables
        return Engine(
            self.plan,
            index.trainable,
            world,
            buffers={n: b for n, b in module.named_buffers() if n in saved},
            lr=index.lr,
            optimizer_state=index.state,
            gradient_groups=index.groups if index.several else None,
            sync_buffers=self.buffer_policy == "average",
        )

    # ------------------------------------------------------------------ the step

    def on_train_start(self) -> None:
        """Refuse unequal numbers of batches before they can hang, and restore random states."""
        super().on_train_start()
        trainer = self.lightning_module.trainer  # type: ignore[union-attr]
        batches: list[Any] = [None] * self.world_size
        with self._answers("comparison of loaders"):
            dist.all_gather_object(batches, trainer.num_training_batches)
        if len(set(batches)) > 1:
            raise ValueError(
                f"ranks have unequal numbers of training batches, {batches}: ranks with more would wait for ever"
            )
        self._resume.on_train_start(trainer)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's training step, after syncs that belong before the forward pass."""
        assert self.engine is not None
        self._computed()
        self.engine.run(self.engine.before_step())
        return super().training_step(*args, **kwargs)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """One optimizer step: gradient syncs at the end of the closure, the tick after the update."""
        engine, index = self.engine, self._index.position(_private.unwrap_optimizer(optimizer))
        assert engine is not None
        assert self.lightning_module is not None
        if index == self.clock_index and not self.lightning_module.automatic_optimization and not engine.begun:
            raise ValueError(
                "Blocking(order='cta' or 'awc'): needs one step of the clock optimizer per training_step; use order='atc'"
            )

        def closure_and_sync() -> Any:
            out = closure()
            self._computed()
            engine.run(engine.on_gradients(self._loss_scale(), index if self._index.several else 0))
            return out

        out = super().optimizer_step(optimizer, closure_and_sync, model, **kwargs)
        if index == self.clock_index:
            self._computed()
            engine.run(engine.after_step())
            if self.measure_every and engine.step % self.measure_every == 0:
                self._distance = float(engine.run(engine.consensus())[0])
            self._log()
        return out

    def _loss_scale(self) -> float | None:
        scaler = getattr(self.precision_plugin, "scaler", None)
        return float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else None

    def _computed(self) -> None:
        """Tell the virtual clock how long this rank has been busy since it was last told: wall time without waiting."""
        assert self.world is not None
        now, stalled = time.perf_counter(), self.world.ledger.stall_s
        if self.world.clock is not None and self._told is not None:
            self.world.clock.compute(max(0.0, now - self._told[0] - (stalled - self._told[1])))
        self._told = (now, stalled)

    def _log(self) -> None:
        module, world, engine = self.lightning_module, self.world, self.engine
        assert module is not None
        assert world is not None
        assert engine is not None
        ledger = world.ledger
        shown: dict[str, float] = {"comm/bytes": ledger.bytes, "comm/stall_s": ledger.stall_s}
        if self._distance is not None:
            shown["consensus/distance"] = self._distance
        quiet: dict[str, float] = {}
        if engine.step % max(1, getattr(module.trainer, "log_every_n_steps", 1)) == 0:
            quiet = {"comm/bytes_per_step": ledger.bytes / engine.step, "comm/overhead_bytes": ledger.overhead}
            quiet |= {f"comm/bytes/{label}": entry.bytes for label, entry in ledger.entries.items() if entry.bytes}
        if world.clock is not None:
            quiet |= {"comm/link_s": world.clock.now, "comm/link_stall_s": world.clock.stall_s}
        for name, value in (shown | quiet).items():  # float64: single precision cannot count beyond 16 million bytes
            number = torch.tensor(value, dtype=torch.float64)
            module.log(name, number, prog_bar=name in shown, on_step=True, on_epoch=False)

    # ------------------------------------------------------------------ evaluation

    @property
    def _fitting(self) -> bool:
        module = self.lightning_module
        return self.engine is not None and module is not None and module.trainer.state.fn == TrainerFn.FITTING

    @property
    def _interrupted(self) -> bool:
        module = self.lightning_module
        trainer = getattr(module, "_trainer", None)
        return trainer is not None and trainer.state.status == TrainerStatus.INTERRUPTED

    def _consensus(self) -> WeightSwap:
        assert self.engine is not None
        distance, means = self.engine.run(self.engine.consensus())
        self._distance = float(distance)
        with torch.no_grad():
            return WeightSwap(self.engine, means)

    def on_validation_start(self) -> None:
        """Swap the consensus model in."""
        super().on_validation_start()
        self._resume.on_validation_start(self.lightning_module.trainer)  # type: ignore[union-attr]
        if self._fitting and self.evaluate == "consensus":
            self._swap = self._consensus()
            self._swap.toggle()

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's validation step; logs how far replicas are apart beside it."""
        if self._fitting and self._distance is not None:
            assert self.lightning_module is not None
            distance = torch.tensor(self._distance, dtype=torch.float64)
            self.lightning_module.log(
                "consensus/distance",
                distance,
                on_step=False,
                on_epoch=True,
                sync_dist=True,
                add_dataloader_idx=False,
                batch_size=1,
            )
        return super().validation_step(*args, **kwargs)

    def on_validation_end(self) -> None:
        """Swap the replica's own weights back in."""
        if self._swap is not None:
            self._swap.toggle()
            self._swap = None
        self._resume.on_validation_end()
        super().on_validation_end()

    def on_train_end(self) -> None:
        """Apply what is in flight, run final syncs, and leave the consensus model in every rank's module."""
        engine = self.engine
        if engine is not None and not self._interrupted:
            self._resume.on_train_end(self.lightning_module.trainer)  # type: ignore[union-attr]
            self._final = self._own_state()
            engine.run(engine.finish())
            consensus = self._consensus()
            consensus.toggle()
            if self.evaluate == "local":
                self._final["consensus"] = _copied(super().lightning_module_state_dict())
                consensus.toggle()
        super().on_train_end()

    # ------------------------------------------------------------------ checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The consensus model (an ordinary state dict). Collective during ``fit``."""
        if self._final is not None and "consensus" in self._final:
            return dict(self._final["consensus"])
        if not self._fitting or self._interrupted or self._final is not None or self._swap is not None:
            return super().lightning_module_state_dict()
        with self._consensus():
            return _copied(super().lightning_module_state_dict())

    def _own_state(self) -> dict[str, Any]:
        """What this replica needs beyond an ordinary checkpoint, as of now."""
        engine = self.engine
        assert engine is not None
        engine.run(engine.land())
        if self._swap is not None:
            self._swap.toggle()
        own = _copied(super().lightning_module_state_dict())
        if self._swap is not None:
            self._swap.toggle()
        return {
            "state_dict": own,
            "engine": _copied(engine.state_dict()),
            "resume": self._resume.save_state(self._trainer),
        }

    @property
    def _trainer(self) -> Any:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """One complete file per replica, then the main file with the consensus model, then removal of older replicas."""
        if not self._interrupted:
            filepath = self.broadcast(filepath)  # names may contain metrics that differ between ranks
        if (self._fitting or self._final is not None) and "optimizer_states" in checkpoint:
            tag = replica_files.new_tag(int(checkpoint["global_step"]))
            tag = tag if self._interrupted else self.broadcast(tag)
            own = self._final if self._final is not None else self._own_state()
            mine = _private.with_weights(checkpoint, own["state_dict"])
            mine[replica_files.KEY] = {"engine": own["engine"], "resume": own["resume"]}
            self.checkpoint_io.save_checkpoint(
                mine,
                replica_files.file(filepath, tag, self.global_rank, self.world_size),
                storage_options=storage_options,
            )
            self.barrier("replicas saved")
            checkpoint = ordinary(checkpoint)
            checkpoint[replica_files.KEY] = replica_files.pointer(tag, self.world_size, repr(self.plan))
        super().save_checkpoint(checkpoint, filepath, storage_options)
        if self.is_global_zero and replica_files.KEY in checkpoint and not self._interrupted:
            replica_files.prune(filepath, keep=checkpoint[replica_files.KEY]["replicas"])

    def load_checkpoint(self, checkpoint_path: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """This replica's own checkpoint when training is resumed; the consensus model otherwise.

        Raises:
            ValueError: the file cannot be read, in one line.
        """
        main = self._read(checkpoint_path, **kwargs)
        pointer = main.pop(replica_files.KEY, None)
        fitting = self.lightning_module is not None and self._trainer.state.fn == TrainerFn.FITTING
        if not fitting:
            self._final = None  # the module will no longer hold what training ended with
            return main
        if pointer is None:
            return main
        tag, size = str(pointer["replicas"]), int(pointer["world_size"])
        if size != self.world_size:
            rank_zero_warn(
                f"{checkpoint_path} was written by {size} workers, this run has {self.world_size}: all start from the consensus "
                "model with rank 0's optimizer state; anchors, memories, corrections, random states and data position start anew"
            )
            return main
        absent = replica_files.missing(checkpoint_path, tag, size)
        if absent:
            rank_zero_warn(
                f"{checkpoint_path}: replicas of rank(s) {', '.join(map(str, absent))} are missing (saved by a failing run?); all "
                "start from the consensus model with rank 0's optimizer state, the plan's state starts anew"
            )
            return main
        mine = self._read(replica_files.file(checkpoint_path, tag, self.global_rank, size), **kwargs)
        self._restored = mine.pop(replica_files.KEY)
        self._resume.load_state(self._restored["resume"], mine)
        if self._running:  # tuners save and restore in the middle of a fit
            self._restore_engine()
        return mine

    def _read(self, path: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return super().load_checkpoint(path, **kwargs)
        except FileNotFoundError:
            raise
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"cannot read the checkpoint {path}: {reason}") from error

    def _restore_engine(self) -> None:
        if self._restored is not None:
            assert self.engine is not None
            self.engine.load_state_dict(self._restored["engine"])
            self._restored = None

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove a checkpoint and its replicas."""
        super().remove_checkpoint(filepath)
        if self.is_global_zero:
            replica_files.remove(filepath)

    def process_dataloader(self, dataloader: object) -> object:
        """Make the loader resumable in the middle of an epoch."""
        return self._resume.wrap(super().process_dataloader(dataloader), self._trainer)

    # ------------------------------------------------------------------ failure and end

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all ranks, except in a failed run, where peers may be gone."""
        if not self._interrupted:
            with self._answers(f"barrier {args[0]!r}" if args else "barrier"):
                super().barrier(*args, **kwargs)

    def broadcast(self, obj: T, src: int = 0) -> T:
        """One rank's object for all."""
        with self._answers("broadcast"):
            return super().broadcast(obj, src)

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        """The mean (or what is asked for) over all ranks, as for ``self.log(..., sync_dist=True)``."""
        with self._answers("reduction of a metric"):
            return super().reduce(tensor, *args, **kwargs)

    def all_gather(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Every rank's tensor, stacked."""
        with self._answers("all_gather"):
            return super().all_gather(tensor, *args, **kwargs)

    @contextmanager
    def _answers(self, where: str) -> Iterator[None]:
        """Say who is missing if communication outside the plan fails."""
        start = time.perf_counter()
        try:
            yield
        except (RuntimeError, dist.DistError) as error:
            if not _private.is_lost_connection(error):
                raise
            waited, step = time.perf_counter() - start, self.engine.step + 1 if self.engine is not None else 0
            who = self._watch.diagnose(where, step) if self._watch is not None else ""
            raise SyncError(no_answer(self.global_rank, step, where, who or "some rank", waited, error)) from error

    def on_exception(self, exception: BaseException) -> None:
        """Tell the other ranks."""
        super().on_exception(exception)
        if self._watch is not None:
            self._watch.failed(exception, self.engine.step + 1 if self.engine is not None else 0)

    def teardown(self) -> None:
        """Undo everything local; nothing here waits for other ranks."""
        self._undo_quiet()
        self._undo_quiet, self._running = _nothing, False
        if self._watch is not None:
            self._watch.stop()
        if self._swap is not None:
            self._swap.toggle()
            self._swap = None
        self._resume.teardown()
        super().teardown()

    def __getstate__(self) -> dict[str, Any]:
        """Without what cannot be pickled (the launcher may start fresh interpreters)."""
        state = super().__getstate__()
        state.update(_undo_quiet=_nothing)
        return state


def _nothing() -> None:
    pass


def _copied(value: Any) -> Any:
    """A deep copy of tensors in nested dictionaries and lists, everything else as it is."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_copied(v) for v in value]
    return value
