"""PipelineStrategy: one model in stages, one or more on each rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import CheckpointIO, ClusterEnvironment, Precision
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import Metric

from lightning_dopt._checks import check_choice, check_flag, check_int
from lightning_dopt._random import key
from lightning_dopt.pipeline import Link, Program, Schedule, Stage, cut, make_pipeline
from lightning_dopt.pipeline.cut import Balance
from lightning_dopt.pipeline.engines import Engine as PipelineEngine
from lightning_dopt.plan import Plan
from lightning_dopt.strategies import _private, replica_files, start
from lightning_dopt.strategies import _private_loops as loops
from lightning_dopt.strategies import pipeline_checks as checks
from lightning_dopt.strategies.collectives import StartMethod
from lightning_dopt.strategies.meter import log_ledger
from lightning_dopt.strategies.pipeline_checkpoints import PipelineCheckpoints, forget
from lightning_dopt.strategies.pipeline_lazy import LazyBatches
from lightning_dopt.strategies.pipeline_ranks import PipelineRanks
from lightning_dopt.strategies.pipeline_replicas import (
    MEAN_GRADIENT,
    PipelineReplicas,
    check_plan,
    refuse_ties,
)
from lightning_dopt.strategies.pipeline_stages import StagesOfModule
from lightning_dopt.strategies.pipeline_step import StagedStep, Undo
from lightning_dopt.strategies.resumable_loader import is_stateful
from lightning_dopt.strategies.stop_signal import StopSignal


class PipelineStrategy(PipelineRanks):
    """Trains one model in stages: every rank holds some of its layers, and micro-batches go through them in turn.

    The module stays as it is: its ``training_step`` is run in two halves, what comes before its network on the rank of the
    first stage and what follows on that of the last (see :class:`~lightning_dopt.pipeline.Replay`). All ranks read the same
    batches and log the same values. Steps of validation, test and prediction run on all ranks, with the network's output sent
    to all of them.

    Args:
        split: Before which modules of the network stages begin: their indices or names, in order; ``None`` makes even ones.
            See :func:`~lightning_dopt.pipeline.cut`; the module's ``example_input_array`` is its ``example``, if there is one.
        schedule: The name of a schedule, see :func:`~lightning_dopt.pipeline.make_program`.
        num_microbatches: Parts that a batch is cut into. Of unequal size they count by their samples; a shorter batch has
            as many as samples.
        activation_link: What happens to activations on their way, such as ``Clapping("FU", 0.5, Int4())``; ``None`` sends
            them as they are.
        gradient_link: What happens to the gradients of activations.
        chunks: Stages per rank with schedules that can have any number, such as ``"interleaved"``; ``None`` means 2.
        engine: ``"torch"``: ``torch.distributed.pipelining`` runs the steps, ``"native"``: the runtime of this package does,
            ``"auto"``: torch where there are no links and it has the schedule.
        balance: What is made even: ``"parameters"``, or the ``"time"`` that the ``example_input_array`` takes.
        network: The name in the module of the network that is cut; ``""`` for the module itself, which its step then calls.
        samples: The entry of a batch (key or index) with the number in the data set of each sample, for ``AQSGD``.
        pipeline_size: Ranks of one pipeline; ``None``: all. With fewer than there are, several pipelines train replicas of the
            model, each on its own share of the data.
        plan: What goes on between these replicas, stage by stage, such as ``plans.diloco(100)``; ``None`` averages gradients in
            every step.
        outputs: Who gets the network's output in steps of validation and test: ``"all"`` ranks, which all run the step, or the
            ``"last"`` stage's, which runs it alone and tells the others what it logs. Prediction always takes the first.
        whole_at_end: After ``fit`` give every rank the weights of all stages. ``False``: those of other stages stay away.
        seed: Seed of dropout, lazy sampling and codecs that draw random numbers.
        timeout: How long a rank waits for another one before it gives up.
        process_group_backend: Of Lightning's own messages, and on GPUs of torch's engine, which needs ``"nccl"`` there; the
            runtime of this package sends over gloo.
        start_method: How Lightning starts the processes.
        accelerator: See ``DDPStrategy``.
        parallel_devices: See ``DDPStrategy``.
        cluster_environment: See ``DDPStrategy``.
        checkpoint_io: See ``DDPStrategy``.
        precision_plugin: See ``DDPStrategy``.

    Raises:
        ValueError: an argument that cannot work, when the strategy or the Trainer is made; a module that cannot be cut or
            replayed, when a fit starts.
    """

    def __init__(
        self,
        split: Sequence[int | str] | None = None,
        schedule: Schedule = "1f1b",
        num_microbatches: int = 4,
        activation_link: Link | None = None,
        gradient_link: Link | None = None,
        chunks: int | None = None,
        engine: PipelineEngine = "auto",
        balance: Balance = "parameters",
        network: str = "model",
        samples: int | str | None = None,
        pipeline_size: int | None = None,
        plan: Plan | None = None,
        outputs: Literal["all", "last"] = "all",
        whole_at_end: bool = True,
        seed: int = 0,
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
        check_choice(name, "schedule", schedule, get_args(Schedule))
        check_choice(name, "engine", engine, get_args(PipelineEngine))
        self.balance: Balance = balance
        check_choice(name, "balance", balance, get_args(Balance))
        if balance == "time" and split is not None:
            raise ValueError(f"{name}(balance='time', split={split!r}): only split=None makes stages even")
        if isinstance(split, str) or not all(isinstance(entry, (int, str)) for entry in split or ()):
            raise ValueError(f"{name}(split={split!r}): must be a list of indices or names, or None")
        for option, link in (("activation_link", activation_link), ("gradient_link", gradient_link)):
            if link is not None and not isinstance(link, Link):
                raise ValueError(f"{name}({option}={link!r}): must be a link such as Direct(codec), or None")
        self.split = list(split) if split is not None else None
        self.pipeline_engine = engine
        self.schedule, self.chunks, self.network, self.samples = schedule, chunks, network, samples
        self.num_microbatches = check_int(name, "num_microbatches", num_microbatches, 1)
        self.activation_link, self.gradient_link = activation_link, gradient_link
        self.links = [link for link in (activation_link, gradient_link) if link is not None]
        self.probability = checks.check_links(self.links, samples)
        checks.check_engine(engine, schedule, self.links)
        self.pipeline_size = check_int(name, "pipeline_size", pipeline_size, 1) if pipeline_size is not None else None
        if plan is not None and not isinstance(plan, Plan):
            raise ValueError(f"{name}(plan={plan!r}): must be a Plan, such as plans.diloco()")
        self.plan = plan
        self.outputs = check_choice(name, "outputs", outputs, ("all", "last"))
        self.whole_at_end = check_flag(name, "whole_at_end", whole_at_end)
        self.seed = check_int(name, "seed", seed, 0)
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
        self.steps = 0
        """Optimizer steps taken."""
        self.parts: StagesOfModule | None = None
        self.staged: StagedStep | None = None
        self.replicas: PipelineReplicas | None = None
        """The plan between pipelines, if there are several."""
        self._checkpoints = PipelineCheckpoints(self)
        self._lazy: LazyBatches | None = None
        self._names: list[Sequence[str]] = []
        self._undo: list[Undo] = []

    # ------------------------------------------------------------------ start

    def set_world_ranks(self) -> None:
        """Called while the Trainer is made, before any process starts: the place to refuse what cannot work."""
        super().set_world_ranks()
        name = type(self).__name__
        if _private.layer_sync(self) is not None:
            raise ValueError("Trainer(sync_batchnorm=True): every rank has layers of its own; leave it out")
        checks.check_devices(self.parallel_devices, self.precision_plugin)
        size = self.num_nodes * self.num_processes
        if size % (self.pipeline_size or size):
            raise ValueError(
                f"{name}(pipeline_size={self.pipeline_size!r}): must divide the number of processes, {size}"
            )
        program = self._program()
        check_plan(self.plan, self._pipelines, len(program.placement))
        if self.split is not None and len(self.split) + 1 != program.stages:
            raise ValueError(
                f"{name}(split={self.split!r}): makes {len(self.split) + 1} stages, but {self.schedule!r} on {program.ranks} "
                f"processes has {program.stages}"
            )

    def _program(self) -> Program:
        size = self.num_nodes * self.num_processes // self._pipelines
        return checks.program_for(self.schedule, size, self.num_microbatches, self.chunks)

    def setup(self, trainer: Any) -> None:
        """Cut the module, and make the pipeline and the optimizers of this rank's stages.

        Raises:
            ValueError: a module that cannot be cut or replayed, a callback or an optimizer that needs the whole model.
        """
        module, fitting = self.lightning_module, trainer.state.fn == TrainerFn.FITTING
        assert module is not None
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        if fitting:
            checks.check_module(module, trainer.callbacks)
        self.model = self.precision_plugin.convert_module(module)
        self.model_to_device()
        self._cut(module, fitting)
        if fitting:
            self._share_random_numbers()
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        self._patch(module, trainer, fitting)

    def _cut(self, module: LightningModule, fitting: bool) -> None:
        """Make stages of the network, and a pipeline of them."""
        program, islands = self._program(), self._islands
        assert islands is not None
        stages = self._stages(module, program.stages)
        holders = [
            [islands.ranks(k)[row[stage]] for k in range(islands.count) for row in program.placement]
            for stage in range(program.stages)
        ]
        self.parts = StagesOfModule(module, stages, holders, self.global_rank, islands.ranks(0))
        refuse_ties(islands.count, self.parts.tied)
        if not self.parts.freed and not self._checkpoints.restored:
            with self._answers("start of the stages"):
                self.parts.spread()
        if self.parts.missing():
            raise ValueError(
                f"{type(self).__name__}: '{self.parts.missing()[0]}' is on another rank since an earlier fit; load a checkpoint "
                "into a new module"
            )
        with checks.own_names():
            self.staged = StagedStep(module, self.network, self.parts, self.samples, fitting)
        if fitting:
            self.parts.free()
        self._names = [stage.names for stage in stages]
        before = self.pipeline
        self.pipeline = make_pipeline(
            stages,
            program,
            self.staged.loss,
            self.staged.inputs,
            self.activation_link,
            self.gradient_link,
            key(self.seed, islands.island) if islands.island else self.seed,  # dropout differs between replicas
            self.timeout,
            islands.pipeline,
            self.precision_plugin.train_step_context,
            self.pipeline_engine,
        )
        self.pipeline.mail.diagnose = self._diagnose
        if before is not None and not fitting:  # an evaluation between two fits
            self.pipeline.load_state_dict(before.state_dict())
        self.staged.connect(self.pipeline)

    def _stages(self, module: LightningModule, count: int) -> list[Stage]:
        example = module.example_input_array
        example = example[0] if isinstance(example, tuple) and len(example) == 1 else example
        example = example.to(self.root_device) if isinstance(example, Tensor) else None
        if self.balance == "time" and example is None:
            raise ValueError(
                f"{type(self).__name__}(balance='time'): needs {type(module).__name__}.example_input_array, an input of the network"
            )
        with checks.own_names():
            network = dict(module.named_modules()).get(self.network)
            if network is None:
                raise ValueError(f"Replay(network={self.network!r}): {type(module).__name__} has no such module")
            if self.split is not None:
                return cut(network, at=self.split, example=example)
            return cut(network, count, balance=self.balance, example=example)

    def setup_optimizers(self, trainer: Any) -> None:
        """Make the optimizers as for the whole model; those of other ranks' parameters never get a gradient."""
        super().setup_optimizers(trainer)
        module, parts = self.lightning_module, self.parts
        assert module is not None
        assert parts is not None
        checks.check_optimizers(self.optimizers, list(module.parameters()))
        for optimizer in self.optimizers:
            forget(optimizer, parts.own)

    def _begin_replicas(self, module: LightningModule) -> None:
        """Make the engine of the plan between pipelines, if there are several."""
        if self.world is None:
            return
        assert self.parts is not None
        assert self.pipeline is not None
        inner = [_private.unwrap_optimizer(o) for o in self.optimizers]
        self.replicas = PipelineReplicas(self.plan or MEAN_GRADIENT, self.world, self.pipeline.ledger)
        self.replicas.begin(module, self.parts.foreign, inner, self.lr_scheduler_configs)

    def _patch(self, module: LightningModule, trainer: Any, fitting: bool) -> None:
        """Put what runs over all stages in the place of what would run here alone, until :meth:`teardown`."""
        staged, islands = self.staged, self._islands
        assert staged is not None
        assert islands is not None
        several = islands.metrics if islands.count > 1 else None
        self._undo.append(staged.stand_in())
        self._undo += [staged.let_apart(m, several) for m in module.modules() if isinstance(m, Metric)]
        if not fitting:
            return
        self.precision_plugin = self.precision_plugin  # without one the property makes another each time
        self._undo.append(staged.clip_for(self.precision_plugin))
        self.steps = 0
        self._checkpoints.begin()
        self._begin_replicas(module)
        self._checkpoints.restore()
        if self.probability is not None:
            checks.warn_of_repeats(module, trainer.accumulate_grad_batches, self.probability)
        meets, late = (lambda: True), True
        if self.replicas is not None:
            meets, late = self.replicas.engine.meets, self.replicas.plan.overlaps
        self._undo.append(StopSignal(trainer, meets, self._ask_zero, late).undo)

    # ------------------------------------------------------------------ the step

    def on_train_start(self) -> None:
        """Refuse loaders that cannot work, and restore random states."""
        super().on_train_start()
        if self.probability is not None and len(loops.training_loaders(self._trainer) or ()) > 1:
            raise ValueError("Clapping: repeats the batches of one training loader, not of several")
        with self._answers("comparison of loaders"):
            start.refuse_unequal_loaders(self._trainer.num_training_batches, self.world_size)
        self._checkpoints.resume.on_train_start(self._trainer)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Forward and backward of a batch through all stages; its loss, with the gradients of this rank's stages."""
        assert self.staged is not None
        batch, number = args[0] if args else kwargs["batch"], self._trainer.fit_loop.batch_idx
        if number == 0:
            with self._answers("comparison of batches"):
                self.staged.compare(batch)
        fresh = self._lazy is None or self._lazy.fresh(self._trainer.current_epoch, number)
        if self.replicas is not None:
            self.replicas.before_step()
        return self.staged.train(batch, number, fresh)

    def pre_backward(self, closure_loss: Tensor) -> None:
        """What the stages have computed is added to the gradients next."""
        super().pre_backward(closure_loss)
        if self.replicas is not None:
            self.replicas.before_backward()

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """One optimizer step of this rank's stages."""
        assert self.pipeline is not None
        assert self.lightning_module is not None
        if self.replicas is not None:
            closure = self.replicas.with_gradients(closure)
        out = super().optimizer_step(optimizer, closure, model, **kwargs)
        if self.replicas is not None:
            self.replicas.after_step()
        self.steps += 1
        idle = self.staged.idle if self.staged is not None else None
        shares = {"pipeline/idle": idle} if idle is not None else {}
        log_ledger(self.lightning_module, self.pipeline.ledger, self.steps, quiet=shares)
        return out

    # ------------------------------------------------------------------ evaluation

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's step, on all ranks or on the last stage's."""
        step = super().validation_step
        return self._evaluated(lambda: step(*args, **kwargs))

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's step, on all ranks or on the last stage's."""
        step = super().test_step
        return self._evaluated(lambda: step(*args, **kwargs))

    def _evaluated(self, step: Callable[[], Any]) -> Any:
        assert self.staged is not None
        return self.staged.evaluate_on_last(step) if self.outputs == "last" else step()

    def on_validation_start(self) -> None:
        """Hold the random generators; the mean of all replicas is what is measured."""
        super().on_validation_start()
        self._checkpoints.resume.on_validation_start(self._trainer)
        if self.replicas is not None and self._trainer.state.fn == TrainerFn.FITTING:
            self.replicas.consensus.show()

    def on_validation_end(self) -> None:
        """Put the random generators, and the replica's own weights, back."""
        if self.replicas is not None and self._trainer.state.fn == TrainerFn.FITTING:
            self.replicas.consensus.hide()
        self._checkpoints.resume.on_validation_end()
        super().on_validation_end()

    def on_train_end(self) -> None:
        """Make the module whole again, with the mean of all replicas."""
        if self.parts is not None and not self.interrupted:
            self._checkpoints.end()
            if self.replicas is not None:
                self.replicas.finish()
            if self.whole_at_end:
                with self._answers("weights of all stages"):
                    self.parts.fill()
        super().on_train_end()

    # ------------------------------------------------------------------ checkpoints

    @property
    def layout(self) -> str:
        """How many ranks there are, in how many pipelines."""
        pipelines = f" in {self._pipelines} pipelines, {self.plan!r}" if self._pipelines > 1 else ""
        return f"{self.world_size} rank{'s' if self.world_size > 1 else ''}{pipelines}"

    @property
    def signature(self) -> str:
        """What the memories of links depend on."""
        cuts = ", ".join("+".join(names) for names in self._names)
        return (
            f"{self.schedule} with {self.num_microbatches} micro-batches, stages ({cuts}), activation_link="
            f"{self.activation_link!r}, gradient_link={self.gradient_link!r}, seed={self.seed}"
        )

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """That of the whole model, the mean of all replicas, on the rank that writes it. Collective."""
        if self.parts is None or self.interrupted:
            return super().lightning_module_state_dict()
        with self._answers("weights for a checkpoint"):
            return self._checkpoints.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """That of the whole model on the rank that writes it. Collective."""
        inner = _private.unwrap_optimizer(optimizer)
        if self.parts is None or self.interrupted:
            return super().optimizer_state(inner)
        with self._answers("optimizer states for a checkpoint"):
            return self._checkpoints.optimizer_state(inner)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """One small file per rank, then the main file with the whole model."""
        write = super().save_checkpoint
        self._checkpoints.save(checkpoint, filepath, lambda c, p: write(c, p, storage_options), storage_options)

    def load_checkpoint(self, checkpoint_path: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The whole model, with this rank's own state if training is resumed."""
        read = super().load_checkpoint
        return self._checkpoints.load(checkpoint_path, lambda path: read(path, **kwargs))

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """The weights that this rank holds."""
        if self.parts is not None and self.parts.freed:
            self.parts.load_state_dict(checkpoint["state_dict"], strict)
        else:
            super().load_model_state_dict(checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """The states of the parameters that this rank holds."""
        self._checkpoints.load_optimizers(checkpoint)

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove a checkpoint and the ranks' files."""
        super().remove_checkpoint(filepath)
        if self.is_global_zero:
            replica_files.remove(filepath)

    def process_dataloader(self, dataloader: object) -> object:
        """Repeat batches, if a link wants lazy sampling, and make the loader resumable in the middle of an epoch."""
        loader = super().process_dataloader(dataloader)
        trainer = self._trainer
        if self.probability is not None and trainer.state.fn == TrainerFn.FITTING and trainer.training:
            if is_stateful(loader):
                raise ValueError(
                    f"Clapping: {type(loader).__name__} keeps its own position; use an ordinary DataLoader"
                )
            loader = self._lazy = LazyBatches(loader, self.probability, self.seed, lambda: trainer.current_epoch)
        return self._checkpoints.resume.wrap(loader, trainer)

    # ------------------------------------------------------------------ end

    def teardown(self) -> None:
        """Undo everything local; nothing here waits for other ranks."""
        while self._undo:
            self._undo.pop()()
        if self.replicas is not None:
            self.replicas.close()
        self._lazy = None
        self._checkpoints.resume.teardown()
        super().teardown()
