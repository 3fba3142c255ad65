"""Pipelines that ``torch.distributed.pipelining`` runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_dopt.comm import SyncError
from lightning_dopt.comm.process_group import no_answer
from lightning_dopt.pipeline.mail import ProcessMail, Talk
from lightning_dopt.pipeline.pipeline import Pipeline, first_of
from lightning_dopt.pipeline.program import Program
from lightning_dopt.pipeline.runner import Context, Loss, Runner, _Pass
from lightning_dopt.pipeline.torch_schedules import ONE_STAGE, TORCH_SCHEDULES, torch_program, torch_schedule

KEPT = 4
"""For how many shapes of batches torch's buffers are kept."""


class TorchPipeline(Pipeline):
    """A :class:`Pipeline` whose training steps ``torch.distributed.pipelining`` runs. It has no links.

    The contract of :meth:`step` is the same, and so are losses, gradients, masks of dropout, evaluation and clipping. torch's
    own table of the schedule is checked, not the program that is given, which names it. torch wants micro-batches of
    one size: batches that cannot be cut evenly go through the runtime of :class:`Pipeline`, in the same order of computations.

    Args:
        stages: As for :class:`Pipeline`, like all that follows.
        program: The schedule, one of ``"gpipe"``, ``"1f1b"``, ``"interleaved"``, ``"looped_bfs"``, ``"interleaved_zero_bubble"``,
            ``"zbv"`` and ``"dualpipev"`` (see :func:`~lightning_dopt.pipeline.make_program`).
        loss: ``loss(output, part)``.
        inputs: ``inputs(part)``.
        seed: Seed of dropout.
        timeout: How long a rank waits for another one.
        group: The processes of this pipeline.
        context: Entered for every forward.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialized.
        ValueError: As for :class:`Pipeline`; or torch, or this torch, does not have the schedule.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        program: Program,
        loss: Loss,
        inputs: Callable[[Any], Tensor] = first_of,
        seed: int = 0,
        timeout: timedelta = timedelta(minutes=30),
        group: dist.ProcessGroup | None = None,
        context: Context = nullcontext,
    ) -> None:
        if program.name not in TORCH_SCHEDULES:
            raise ValueError(f"TorchPipeline(program='{program.name}'): torch has {', '.join(TORCH_SCHEDULES)}")
        torch_schedule(program.name)
        if program.name not in ONE_STAGE:
            program = torch_program(program.name, program.ranks, program.microbatches, program.stages // program.ranks)
        super().__init__(stages, program, loss, inputs, None, None, seed, timeout, group, context)


class _TorchRunner(Runner):
    """A rank whose training passes torch's schedule runs."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._engines: dict[str, _Engine] = {}

    def _walk(self, run: _Pass) -> Talk[None]:
        if not run.train or len(run.parts) < self.program.microbatches or len(set(run.signatures)) > 1:
            yield from super()._walk(run)
            return
        engine = self._engines.get(run.signatures[0])
        if engine is None:
            if len(self._engines) == KEPT:
                del self._engines[next(iter(self._engines))]
            with self._shapes() as seen:
                yield from super()._walk(self._first_part(run))
            self.mail.finish()
            engine = self._engines[run.signatures[0]] = _Engine(self, seen)
        engine.step(run)

    def _first_part(self, run: _Pass) -> _Pass:
        """Only as far as the output of the last stage."""
        first = self.program.rank_of(0, 0) == self.mail.rank
        given = [self._input(0, run)] if first else run.parts[:1]
        return _Pass(given, run.weights[:1], run.notes[:1], run.signatures[:1], False, None)

    @contextmanager
    def _shapes(self) -> Iterator[dict[int, tuple[Any, Any]]]:
        """Collects input and output of each stage of this rank; statistics and modes stay as they are."""
        seen: dict[int, tuple[Any, Any]] = {}
        modes = [(module, module.training) for stage in self.stages.values() for module in stage.modules()]

        def watch(number: int) -> Callable[[nn.Module, Any, Any], None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                seen[number] = args[0], output

            return hook

        handles = [stage.register_forward_hook(watch(number)) for (_, number), stage in self.stages.items()]
        try:
            for module, _ in modes:
                module.training = False
            yield seen
        finally:
            for handle in handles:
                handle.remove()
            for module, was in modes:
                module.training = was


TorchPipeline._runner = _TorchRunner


class _Engine:
    """torch's stages and schedule for batches of one shape."""

    def __init__(self, runner: _TorchRunner, seen: dict[int, tuple[Any, Any]]) -> None:
        from torch.distributed.pipelining import PipelineStage

        self.runner = runner
        self.run: _Pass | None = None
        self.output: Tensor | None = None
        """Of the last stage, until its loss is taken."""
        self.error: BaseException | None = None
        """Of the model, which torch would wrap."""
        assert isinstance(runner.mail, ProcessMail)
        program, last = runner.program, runner.program.stages - 1
        index = torch.zeros(1, dtype=torch.int64)
        made = []
        for _, number in program.held(runner.mail.rank):
            given, output = seen[number]
            x = index if number == 0 else torch.empty_like(given).requires_grad_()
            y = torch.zeros(1) if number == last else torch.empty_like(output).requires_grad_()
            part = _Part(self, number)
            made.append(PipelineStage(part, number, last + 1, given.device, x, y, group=runner.mail.group))
        kind = torch_schedule(program.name)
        options = {"scale_grads": False} if "scale_grads" in inspect.signature(kind.__init__).parameters else {}
        stages = made[0] if program.name in ONE_STAGE else made
        self.schedule = kind(stages, program.microbatches, loss_fn=self._loss, **options)
        here, n = sorted(seen), program.microbatches
        self.sent = {
            "activations": n * sum(seen[s][1].nbytes for s in here if s < last and not program.local(0, s)),
            "gradients": n * sum(seen[s][0].nbytes for s in here if s > 0 and not program.local(0, s - 1)),
        }
        self.first, self.last = (program.rank_of(0, s) == runner.mail.rank for s in (0, last))

    def step(self, run: _Pass) -> None:
        """Forward and backward of all micro-batches, in torch's order."""
        self.run, self.error = run, None
        numbers = torch.arange(len(run.parts))
        target = numbers if self.last else None
        try:
            self.schedule.step(*([numbers] if self.first else []), target=target, microbatch=numbers)
        except Exception as error:
            if self.error is not None:
                raise self.error from None
            raise self._gave_up(error) from error
        finally:
            self.run = self.output = None
        for label, nbytes in self.sent.items():  # torch's own transport does not count
            if nbytes:
                self.runner.mail.ledger.sent(label, nbytes)

    def computed(self, number: int, x: Tensor, m: int) -> Tensor:
        """What torch is given as the output of a stage."""
        assert self.run is not None
        try:
            if number == 0:
                x = self.runner._input(m, self.run)
            y = self.runner._computed(0, number, m, x)
        except BaseException as error:
            self.error = error
            raise
        if number < self.runner.program.stages - 1:
            out: Tensor = y
            out = out.clone() if out is x or out._is_view() else out  # torch detaches it in place
            return out if out.requires_grad else out.requires_grad_()  # torch wants it of a frozen stage, too
        self.output = y  # the loss is taken right after
        return torch.zeros(1)

    def _loss(self, _: Tensor, number: Tensor) -> Tensor:
        assert self.run is not None
        assert self.output is not None
        try:
            loss = self.runner._loss_of(self.output, int(number), self.run)
        except BaseException as error:
            self.error = error
            raise
        self.run.losses[0] = self.run.losses.get(0, torch.zeros((), dtype=torch.float64)) + loss.detach().double().cpu()
        return loss

    def _gave_up(self, error: Exception) -> Exception:
        """The error itself, or one that says who is missing."""
        words = str(error).lower()
        if not isinstance(error, dist.DistError) and not any(
            w in words for w in ("gloo", "nccl", "timed out", "connection", "peer")
        ):
            return error
        mail = self.runner.mail
        assert isinstance(mail, ProcessMail)
        label = f"pipeline, {self.runner.program.name}"
        who = mail.diagnose(label, mail.step) or "a rank beside this one"
        return SyncError(no_answer(mail.ranks[mail.rank], mail.step, label, who, 0.0, error))


class _Part(nn.Module):
    """A stage as torch sees it: told which micro-batch it is."""

    def __init__(self, engine: _Engine, number: int) -> None:
        super().__init__()
        self.number = number
        self.stage = engine.runner.stages[0, number]
        self.__dict__["engine"] = engine

    def forward(self, x: Tensor, microbatch: Tensor) -> Tensor:
        """The output of the stage; of the last one a stand-in."""
        engine: _Engine = self.__dict__["engine"]
        return engine.computed(self.number, x, int(microbatch))
