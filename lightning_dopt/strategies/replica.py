"""ReplicaStrategy: replicas that are not wrapped in DDP and talk to each other as a plan says."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import CheckpointIO, ClusterEnvironment, Precision
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer

from lightning_dopt._checks import check_choice, check_flag, check_float, check_int
from lightning_dopt.comm import Link, ProcessGroupWorld
from lightning_dopt.comm.ledger import Ledger
from lightning_dopt.comm.link import LinkClock
from lightning_dopt.comm.links import REST, OnLostPeer, make_links
from lightning_dopt.engine import Engine
from lightning_dopt.lost_peers import check_links
from lightning_dopt.pace import LocalSteps
from lightning_dopt.plan import Plan, Sync
from lightning_dopt.strategies import _private, replica_files, start
from lightning_dopt.strategies.checkpoints import ReplicaCheckpoints
from lightning_dopt.strategies.collectives import Collectives, StartMethod
from lightning_dopt.strategies.consensus import ConsensusModel
from lightning_dopt.strategies.meter import Meter, exact
from lightning_dopt.strategies.optimizers import OptimizerIndex
from lightning_dopt.strategies.pacer import Pacer, check_pace, check_trainer, nothing_to_learn
from lightning_dopt.strategies.stop_signal import StopSignal
from lightning_dopt.strategies.survivors import warn_of_launcher
from lightning_dopt.strategies.two_passes import check_two_passes, second_pass


class ReplicaStrategy(Collectives):
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
        offload: Keep anchors and outer optimizers in the memory of the host (pinned for CUDA) instead of the parameters' device:
            two vectors like the parameters with DiLoCo, at the price of two copies of what is sent per sync.
        clock: Which optimizer's steps count, if there are several (index as in ``configure_optimizers``).
        pace: ``LocalSteps(H, dynamic=True)`` lets slow ranks take fewer steps per round of ``H``, so that nobody waits for them
            for long. They take all steps at which ranks talk, so these must be few. A batch whose step a rank leaves out is not
            trained on. See :class:`~lightning_dopt.strategies.pacer.Pacer`.
        measure_every: Optimizer steps between measurements of ``consensus/distance`` during training, at the price of an
            all-reduce of the model each; 0 measures at validation only.
        link: Also keep a virtual clock as if all ranks were connected by such links: ``comm/link_s`` is the time the run
            would have taken so far (measured computing, modelled messages), ``comm/link_stall_s`` how much of it is waiting.
            ``Sync(transport="auto")`` takes what is faster over it.
            A rank's clock knows its own messages only: where ranks are equally fast and send equally much in each round it
            gives the time of ``Simulation``, elsewhere it does not wait for a late peer. Syncs with ``transport="auto"`` take the
            way that is faster over this link.
        link_step_seconds: Seconds of computing per optimizer step for that clock, as ``step_seconds`` of ``Simulation``;
            then ``comm/link_s`` depends on the plan and the model only. ``None`` measures them.
        timeout: How long a rank waits for others before it gives up.
        on_lost_peer: ``"end"``: a rank that is gone ends the run on all others, with an error that names it. ``"continue"``:
            they go on without it; for plans that talk to neighbours with symmetric weights, on gloo, with processes that
            are started one by one. Without rank 0 the run ends. See the page on failures.
        patience: Seconds to wait for a neighbour before both let their link rest; ``None``: as long as it takes.
        rest: Optimizer steps with a meeting of the pair that a link rests.
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
        offload: bool = False,
        clock: int = 0,
        pace: LocalSteps | None = None,
        measure_every: int = 0,
        link: Link | None = None,
        link_step_seconds: float | None = None,
        timeout: timedelta = timedelta(minutes=30),
        on_lost_peer: OnLostPeer = "end",
        patience: float | None = None,
        rest: int = REST,
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
        self.offload = check_flag(name, "offload", offload)
        self.clock_index = check_int(name, "clock", clock, 0)
        self.pace = pace
        check_pace(name, pace, self.plan)
        self.measure_every = check_int(name, "measure_every", measure_every, 0)
        self.link_step_seconds = _seconds(name, link_step_seconds, link)
        make_links(0, 1, on_lost_peer, patience, rest, name)
        self.patience, self.rest = patience, rest
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
        self.on_lost_peer = on_lost_peer
        self.link = link
        self.consensus: ConsensusModel | None = None
        self.pacer: Pacer | None = None
        self._meter: Meter | None = None
        self._checkpoints = ReplicaCheckpoints(self)
        self._undo_quiet: Callable[[], None] = _nothing

    consensus_class: type[ConsensusModel] = ConsensusModel
    writes = True
    """Whether this rank writes checkpoints (with the others, if there are any)."""

    # ------------------------------------------------------------------ start

    def set_world_ranks(self) -> None:
        """Called while the Trainer is made, before any process starts: the place to refuse what cannot work."""
        super().set_world_ranks()
        if _private.layer_sync(self) is not None:
            raise ValueError(
                "Trainer(sync_batchnorm=True): makes every forward pass communicate; use buffers='average'"
            )
        size = self.num_nodes * self.num_processes
        self.plan.check(size)
        check_pace(type(self).__name__, self.pace, self.plan, size)
        links = make_links(0, size, self.on_lost_peer, self.patience, self.rest, type(self).__name__)
        if links is not None:
            check_links(self.plan, size, links)

    def setup_environment(self) -> None:
        """Make the process groups (again for each ``fit`` or ``validate``, but only once in a process).

        Raises:
            SyncError: not all processes came within ``timeout``.
        """
        super().setup_environment()
        if self.goes_on:
            environment = self.cluster_environment
            starts = environment is not None and not environment.creates_processes_externally
            warn_of_launcher(starts and self.num_processes > 1)
        if self._watch is not None and self.world is not None:
            self.world.diagnose = self._watch.diagnose

    def _make_groups(self) -> None:
        if self.world is None:
            self.world = self._make_world()

    def _make_world(self) -> ProcessGroupWorld:
        return ProcessGroupWorld(
            timeout=self.timeout,
            backend=self._process_group_backend,
            on_lost_peer=self.on_lost_peer,
            patience=self.patience,
            rest=self.rest,
        )

    def setup(self, trainer: Any) -> None:
        """Make the engine once the module, its optimizers and the precision plugin are ready."""
        super().setup(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        module, world = self.lightning_module, self.world
        assert module is not None
        assert world is not None
        world.ledger = Ledger()
        world.clock = LinkClock(self.link) if self.link is not None else None
        start.refuse_metric_schedulers(self.plan, self.lr_scheduler_configs)
        if not self._checkpoints.restored:
            self._share_start(module)
        inner = [_private.unwrap_optimizer(o) for o in self.optimizers]
        self._index = OptimizerIndex(module, inner, self.clock_index)
        self.engine = self._make_engine()
        self.consensus, self._meter = self.consensus_class(self.engine), Meter(world, self.link_step_seconds)
        if self.pace is not None:
            check_trainer(self.pace, module, trainer)
            self.pacer = Pacer(self.pace, self.engine)
        check_two_passes(self.engine, module, trainer)
        start.refuse_unmeasured_errors(self.plan, trainer.callbacks)
        start.check_momentum(self.plan, inner)
        start.refuse_optimizers(self.plan, inner)
        start.warn_of_lost_weights(self.plan, inner, trainer.gradient_clip_val)
        self._checkpoints.begin()
        self._undo_quiet = StopSignal(trainer, self.engine.meets, self._ask_zero, self.plan.overlaps).undo
        if self.evaluate == "consensus":
            start.warn_of_averages(self.plan, self.world_size, trainer.callbacks)

    def _make_engine(self) -> Engine:
        """The engine of the module and its optimizers."""
        assert self.lightning_module is not None
        assert self.world is not None
        average = self.buffer_policy == "average"
        return start.make_engine(self.plan, self.lightning_module, self._index, self.world, average, self.offload)

    def _share_start(self, module: LightningModule) -> None:
        with self._answers("broadcast of the start"):
            start.share_start(module)

    # ------------------------------------------------------------------ the step

    def on_train_start(self) -> None:
        """Refuse unequal numbers of batches before they can hang, and restore random states."""
        super().on_train_start()
        with self._answers("comparison of loaders"):
            start.refuse_unequal_loaders(self._trainer.num_training_batches, self.world_size)
        self._checkpoints.resume.on_train_start(self._trainer)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's training step, after syncs that belong before the forward pass."""
        assert self.engine is not None
        assert self._meter is not None
        if self.pacer is not None:
            self.pacer.begin()
            if not self.pacer.takes_part:
                return nothing_to_learn(self.root_device)
        self._meter.computed()
        self.engine.run(self.engine.before_step())
        return super().training_step(*args, **kwargs)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """One optimizer step: gradient syncs at the end of the closure, the tick after the update."""
        engine, meter, index = self.engine, self._meter, self._index.position(_private.unwrap_optimizer(optimizer))
        assert engine is not None
        assert meter is not None
        module = self.lightning_module
        assert module is not None
        clock = index == self.clock_index
        if self.pacer is not None and not self.pacer.takes_part:
            closure()
            engine.skip(1)
            engine.run(self.pacer.meet())
            self._measure()
            return None
        if clock and not module.automatic_optimization and not engine.begun:
            raise ValueError(
                "Blocking(order='cta' or 'awc'): needs one step of the clock optimizer per training_step; use order='atc'"
            )

        def closure_and_sync() -> Any:
            if self._loss_scale() is None:
                engine.watch_gradients(index if self._index.several else 0)
            out = closure()
            if engine.passes == 2:
                second_pass(engine, closure, module, index if self._index.several else 0)
            meter.computed_gradients() if clock else meter.computed()
            engine.run(engine.on_gradients(self._loss_scale(), index if self._index.several else 0))
            return out

        out = super().optimizer_step(optimizer, closure_and_sync, model, **kwargs)
        if clock:
            meter.computed()
            if self.pacer is not None:
                self.pacer.computed()
            engine.run(engine.after_step())
            if self.pacer is not None:
                engine.run(self.pacer.meet())
            self._measure()
            if self.pacer is not None:
                self.pacer.resume()
        return out

    def _loss_scale(self) -> float | None:
        scaler = getattr(self.precision_plugin, "scaler", None)
        return float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else None

    def _measure(self) -> None:
        assert self.engine is not None
        assert self._meter is not None
        assert self.consensus is not None
        assert self.lightning_module is not None
        if self.measure_every and self.engine.step % self.measure_every == 0:
            self.consensus.measure()
        self._meter.log(self.lightning_module, self.engine, self.consensus.distance)

    # ------------------------------------------------------------------ evaluation

    @property
    def fitting(self) -> bool:
        """Whether a fit is in work that has an engine."""
        module = self.lightning_module
        return self.engine is not None and module is not None and module.trainer.state.fn == TrainerFn.FITTING

    def on_validation_start(self) -> None:
        """Swap the consensus model in."""
        super().on_validation_start()
        if self.pacer is not None:
            self.pacer.rest()
        self._checkpoints.resume.on_validation_start(self._trainer)
        if self.consensus is not None and self.fitting and self.evaluate == "consensus":
            self.consensus.show()

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's validation step; logs how far replicas are apart beside it."""
        distance = self.consensus.distance if self.consensus is not None and self.fitting else None
        loader = kwargs.get("dataloader_idx", args[2] if len(args) > 2 else 0)
        if distance is not None and loader == 0:  # one number, which cannot be logged again beside the next loader's
            assert self.lightning_module is not None
            self.lightning_module.log(
                "consensus/distance",
                exact(distance),
                on_step=False,
                on_epoch=True,
                sync_dist=True,
                add_dataloader_idx=False,
                batch_size=1,
            )
        return super().validation_step(*args, **kwargs)

    def on_validation_end(self) -> None:
        """Swap the replica's own weights back in."""
        if self.consensus is not None:
            self.consensus.hide()
        self._checkpoints.resume.on_validation_end()
        super().on_validation_end()

    def on_train_end(self) -> None:
        """Apply what is in flight, run final syncs, and leave the consensus model in every rank's module."""
        if self.engine is not None and self.consensus is not None and not self.interrupted:
            self._checkpoints.end()
            self.engine.run(self.engine.finish())
            model = self.consensus.model()
            model.toggle()
            if self.evaluate == "local":
                self._checkpoints.keep_consensus()
                model.toggle()
        super().on_train_end()

    # ------------------------------------------------------------------ checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The consensus model (an ordinary state dict). Collective during ``fit``."""
        return self._checkpoints.state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """One complete file per replica, then the main file with the consensus model, then removal of older replicas."""
        write = super().save_checkpoint
        self._checkpoints.save(checkpoint, filepath, lambda c, p: write(c, p, storage_options), storage_options)

    def own_checkpoint(self) -> dict[str, Any]:
        """This replica's whole checkpoint within ``fit``, in host memory, made without talking to anybody."""
        return self._checkpoints.own_checkpoint()

    def load_checkpoint(self, checkpoint_path: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """This replica's own checkpoint when training is resumed; the consensus model otherwise.

        Raises:
            ValueError: the file cannot be read, in one line.
        """
        read = super().load_checkpoint
        return self._checkpoints.load(checkpoint_path, lambda path: read(path, **kwargs))

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove a checkpoint and its replicas."""
        super().remove_checkpoint(filepath)
        if self.is_global_zero:
            replica_files.remove(filepath)

    def process_dataloader(self, dataloader: object) -> object:
        """Make the loader resumable in the middle of an epoch."""
        return self._checkpoints.resume.wrap(super().process_dataloader(dataloader), self._trainer)

    # ------------------------------------------------------------------ failure and end

    def on_exception(self, exception: BaseException) -> None:
        """Tell the other ranks."""
        super().on_exception(exception)
        if self._watch is not None:
            self._watch.failed(exception, self._step)

    def teardown(self) -> None:
        """Undo everything local; nothing here waits for other ranks."""
        self._undo_quiet()
        if self.engine is not None:
            self.engine.close()
        self._undo_quiet = _nothing
        if self._watch is not None:
            self._watch.stop()
        if self.consensus is not None:
            self.consensus.hide()
        self._checkpoints.teardown()
        super().teardown()

    def __getstate__(self) -> dict[str, Any]:
        """Without what cannot be pickled (the launcher may start fresh interpreters)."""
        state = super().__getstate__()
        state.update(_undo_quiet=_nothing)
        return state


def _nothing() -> None:
    pass


def _seconds(name: str, seconds: float | None, link: Link | None) -> float | None:
    if seconds is None:
        return None
    if link is None:
        raise ValueError(f"{name}(link_step_seconds={seconds!r}): sets a clock that only link=Link(...) starts")
    return check_float(name, "link_step_seconds", seconds, 0.0)
