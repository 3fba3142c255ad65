"""A training step in stages, and what stands for the module's own calls meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import Precision
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import Metric

from lightning_dopt.comm.seal import digest
from lightning_dopt.compress._wire import as_bytes
from lightning_dopt.pipeline import Pipeline, Replay, TorchPipeline
from lightning_dopt.pipeline.batches import tensors
from lightning_dopt.pipeline.replay import stand_in
from lightning_dopt.strategies.pipeline_checks import NAME, number_of
from lightning_dopt.strategies.pipeline_logs import StepLogs
from lightning_dopt.strategies.pipeline_loss import loss_with_gradients, take_gradients
from lightning_dopt.strategies.pipeline_stages import StagesOfModule

Undo = Callable[[], object]


class _GotNothing(BaseException):
    """Ends a step on a rank that the network's output is not sent to."""


class StagedStep:
    """Runs a module's steps through a pipeline, on one rank of it.

    Args:
        module: The module.
        network: The name of the network in it.
        parts: Its parameters, by rank.
        samples: The entry of a batch with the numbers of its samples, if a link needs them.
        fitting: Whether it is trained, and not evaluated only.

    Raises:
        ValueError: The ``training_step`` cannot be run in two halves.
    """

    pipeline: Pipeline
    logs: StepLogs
    last: int
    """The rank that evaluates, where one does for all."""
    last_logs: StepLogs

    def __init__(
        self, module: LightningModule, network: str, parts: StagesOfModule, samples: int | str | None, fitting: bool
    ) -> None:
        self.module, self.network, self.parts, self.samples = module, network, parts, samples
        self.replay = Replay(module, network) if fitting else None
        self.apart: set[int] = set()
        """Metrics (by ``id``) whose states differ between ranks."""
        self.idle: float | None = None
        """The share of the last step in which this rank waited for messages, if the engine tells."""

    def connect(self, pipeline: Pipeline) -> None:
        """Take the pipeline, which was given :meth:`loss` and :meth:`inputs`."""
        self.pipeline, program = pipeline, pipeline.program
        owners = sorted({program.rank_of(pipe, program.stages - 1) for pipe in range(len(program.placement))})
        self.logs = StepLogs(self.module, pipeline, owners, self.apart)
        self.last = owners[-1]
        self.last_logs = StepLogs(self.module, pipeline, [self.last], self.apart)

    # ------------------------------------------------------------------ training

    def train(self, batch: Any, number: int, fresh: bool) -> Tensor:
        """Forward and backward of a batch; its loss, which has the gradients of this rank's stages. Collective.

        Args:
            batch: The batch.
            number: Its number in the epoch.
            fresh: Whether it is a new one.
        """
        assert self.replay is not None
        self.replay.batch_idx = number
        own = self.parts.own
        held = take_gradients(own)
        self.logs.begin(batch)
        began, waited = time.perf_counter(), self.pipeline.ledger.stall_s
        value = self.pipeline.step(batch, fresh, number_of(batch, self.samples))
        if not isinstance(self.pipeline, TorchPipeline):
            self.idle = (self.pipeline.ledger.stall_s - waited) / (time.perf_counter() - began)
        gradients = take_gradients(own, held)
        self.logs.share()
        dtype = next((p.dtype for p in self.module.parameters()), torch.float32)
        value = value.to(self.module.device, torch.promote_types(dtype, torch.float32))
        return loss_with_gradients(value, own, gradients)

    def loss(self, output: Tensor, part: Any) -> Tensor:
        """The loss of a micro-batch; what is logged for it is recorded."""
        assert self.replay is not None
        self.replay.on_log = self.logs.log
        self.logs.microbatch(part)
        return self.replay.loss(output, part)

    def inputs(self, part: Any) -> Tensor:
        """What the network is given for a micro-batch."""
        assert self.replay is not None
        return self.replay.inputs(part)

    def compare(self, batch: Any) -> None:
        """Refuse batches that differ between the ranks of the pipeline. Collective.

        Raises:
            ValueError: They do.
        """
        sums = [int(digest(as_bytes(t.detach()), 0)) for t in tensors(batch)]
        found: list[Any] = [None] * self.pipeline.mail.size
        dist.all_gather_object(found, sums, group=self.pipeline.mail.group)
        if any(other != found[0] for other in found):
            raise ValueError(
                f"{NAME}: ranks read different batches; all stages work on the same one, so load the same data in the same "
                "order on all ranks"
            )

    # ------------------------------------------------------------------ evaluation

    def evaluate_on_last(self, step: Callable[[], Any]) -> Any:
        """Run a step on the last stage's rank only, from the network's output on, and log on all ranks what it logs there.

        Args:
            step: The step, which calls the network once.

        Returns:
            What it returns there, elsewhere ``None``.

        Raises:
            ValueError: It calls the network more than once, or not with one tensor.
        """
        here, calls = self.pipeline.rank == self.last, 0

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > 1:
                raise ValueError(f"{NAME}(outputs='last'): a step must call {self.network!r} once; take outputs='all'")
            output = self._forward(*args, to=self.last, **kwargs)
            if not here:
                raise _GotNothing
            return output

        def log(*args: Any, **kwargs: Any) -> None:
            if here:
                self.last_logs.log(*args, **kwargs)

        self.last_logs.begin()
        result = None
        with stand_in(self.module, self.module.get_submodule(self.network), forward, log), suppress(_GotNothing):
            result = step()
        self.last_logs.share()
        return result if here else None

    # ------------------------------------------------------------------ in the place of the module's own calls

    def stand_in(self) -> Undo:
        """Let every call of the network go through all stages, on all ranks together; returns what undoes it."""
        owner = vars(self.module.get_submodule(self.network))
        owner["forward"] = self._forward
        return lambda: owner.pop("forward")

    def _forward(self, *args: Any, to: int | None = None, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        if len(given) != 1 or not isinstance(given[0], Tensor):
            raise ValueError(f"{NAME}(network={self.network!r}): must be called with one tensor and nothing else")
        return self.pipeline.forward(given[0], to)

    def clip_for(self, plugin: Precision) -> Undo:
        """Let a precision plugin clip by the norm over the stages of all ranks; returns what undoes it."""
        vars(plugin)["clip_grad_by_norm"] = self._clip_by_norm
        return lambda: vars(plugin).pop("clip_grad_by_norm")

    def _clip_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        chosen = [p for group in optimizer.param_groups for p in group["params"]]
        self.pipeline.clip_grad_norm_(float(clip_val), chosen)

    def let_apart(self, metric: Metric, replicas: dist.ProcessGroup | None) -> Undo:
        """Let a metric be summed over ranks as it is updated; returns what undoes it.

        Evaluation updates it alike on all ranks of a pipeline, a training step on one of them only.

        Args:
            metric: The metric.
            replicas: The ranks with the same stages, if there are several pipelines.
        """
        available, group, apart = metric.distributed_available_fn, metric.process_group, self.apart
        metric.distributed_available_fn = lambda: (replicas is not None or id(metric) in apart) and available()
        metric.process_group = group if group is not None else replicas

        def undo() -> None:
            metric.distributed_available_fn, metric.process_group = available, group

        return undo
