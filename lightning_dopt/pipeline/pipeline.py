"""Pipelines to train with: one rank of real processes, or all ranks in one process."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from lightning_dopt._checks import check_float
from lightning_dopt.comm import Ledger
from lightning_dopt.pipeline.checker import Report, check
from lightning_dopt.pipeline.links import Link
from lightning_dopt.pipeline.mail import LocalMail, Mail, ProcessMail, run, take_turns
from lightning_dopt.pipeline.program import Program
from lightning_dopt.pipeline.runner import Context, Loss, Runner, stages_of
from lightning_dopt.pipeline.stage import Stage
from lightning_dopt.pipeline.tied import separate, ties


def first_of(part: Any) -> Tensor:
    """The first entry of a part of the batch, such as ``x`` of ``(x, y)``."""
    first: Tensor = part[0]
    return first


class _Pipeline(ABC):
    """What all kinds of pipelines have in common."""

    _runner: type[Runner] = Runner

    def __init__(
        self,
        stages: Sequence[nn.Module],
        program: Program,
        loss: Loss,
        inputs: Callable[[Any], Tensor],
        activation_link: Link | None,
        gradient_link: Link | None,
        seed: int,
        mails: Sequence[Mail],
        context: Context = nullcontext,
    ) -> None:
        owner = type(self).__name__
        if len(stages) != program.stages:
            raise ValueError(f"{owner}(stages=<{len(stages)}>): '{program.name}' has {program.stages} stages")
        for name, link in (("activation_link", activation_link), ("gradient_link", gradient_link)):
            if link is not None and not isinstance(link, Link):
                raise ValueError(f"{owner}({name}={link!r}): must be a link such as Direct(codec), or None")
        self.links = [link for link in (activation_link, gradient_link) if link is not None]
        self.program = program
        self.report: Report = check(program)
        found = ties(stages, program)
        self.runners = [
            self._runner(
                program,
                self._held(mail.rank, stages),
                loss,
                inputs,
                mail,
                activation_link,
                gradient_link,
                seed,
                context,
            )
            for mail in mails
        ]
        for runner in self.runners:
            runner.sums.ties = found
            if isinstance(stages[-1], Stage):
                runner.finish = stages[-1].finish

    @abstractmethod
    def _held(self, rank: int, stages: Sequence[nn.Module]) -> Mapping[tuple[int, int], nn.Module]:
        """The modules of a rank by pipe and stage."""

    @abstractmethod
    def step(self, batch: Any, fresh: bool = True, samples: Tensor | None = None) -> Tensor:
        """Forward and backward of one batch; adds to the gradients of the parameters, as ``loss.backward()`` does.

        Args:
            batch: The batch, the same on all ranks: tensors with one first dimension, nested in tuples, lists and
                dictionaries. Micro-batches of unequal size count by their samples; a batch with fewer samples than
                micro-batches has as many micro-batches as samples.
            fresh: Whether it is a new batch, and not that of the last step again (for ``Clapping``).
            samples: The number in the data set of each sample, for ``AQSGD``, shape (batch,).

        Returns:
            The mean loss of the batch, float64, on all ranks.

        Raises:
            ValueError: The batch has tensors of several lengths, or ``samples`` are missing.
            SyncError: Another rank is gone; the line says which one.
        """

    @abstractmethod
    def evaluate(self, batch: Any) -> Tensor:
        """The mean loss of a batch without gradients; links are passed by, and their memories stay as they are.

        Modules are used in the mode that they are in: call ``eval()`` on the model before.
        """

    @abstractmethod
    def forward(self, x: Tensor, to: int | None = None) -> Any:
        """The output of the whole model for ``x``; collective, as :meth:`step` is.

        Without gradients, past the links; the last stage sends it in full. ``x`` has a sample in each row, and so has the
        output; a model of Hugging Face returns it as its own model does.

        Args:
            x: The input, the same on all ranks.
            to: The rank that gets the output, the others get ``None``; by default all do.
        """

    @abstractmethod
    def clip_grad_norm_(self, max_norm: float, parameters: Collection[nn.Parameter] | None = None) -> Tensor:
        """Scale the gradients of all stages such that their common Euclidean norm is at most ``max_norm``.

        The same on the unsplit model is ``torch.nn.utils.clip_grad_norm_``; collective, as :meth:`step` is.

        Args:
            max_norm: The largest norm, above 0.
            parameters: Those of this rank that take part; ``None``: all.

        Returns:
            The norm before, float64, on all ranks.

        Raises:
            ValueError: ``max_norm`` is not above 0.
        """

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that are trained here, in one process every copy that a rank would have of them."""
        for runner in self.runners:
            yield from runner.parameters()

    def _check_samples(self, samples: Tensor | None) -> None:
        if samples is None and any(link.by_sample for link in self.links):
            raise ValueError("AQSGD: needs the number in the data set of every sample, step(..., samples=...)")

    def state_dict(self) -> dict[str, Any]:
        """Steps taken and the memories of the links, of every rank that is here."""
        return {
            str(r.mail.rank): {
                "step": r.step,
                "draws": r.draws,
                "memories": {k: {i: t.clone() for i, t in memory.items()} for k, memory in r.memories.items()},
                "specs": dict(r.specs),
            }
            for r in self.runners
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict` of the same rank."""
        for runner in self.runners:
            mine = state[str(runner.mail.rank)]
            runner.step, runner.draws = mine["step"], mine["draws"]
            device = next((p.device for p in runner.parameters()), None)  # files are read to the host
            runner.memories = {
                k: {i: t.to(device, copy=True) for i, t in memory.items()} for k, memory in mine["memories"].items()
            }
            runner.specs = dict(mine["specs"])


class Pipeline(_Pipeline):
    """A pipeline over the processes of ``torch.distributed``, one rank in each. Making it is collective.

    Messages go over gloo, through the host's memory if stages are on GPUs (where nothing of this has run yet).

    Args:
        stages: All stages of the model (see :func:`~lightning_dopt.pipeline.cut`), with equal weights on all ranks. Those
            of this rank are trained, the others not used.
        program: What every rank does; it is checked.
        loss: ``loss(output, part)``: the mean loss over the samples of a part of the batch.
        inputs: ``inputs(part)``: what the model is given; by default the first entry of the part.
        activation_link: What happens to activations on their way; ``None`` sends them as they are.
        gradient_link: What happens to the gradients of activations.
        seed: Seed of dropout and of codecs that draw random numbers, the same on all ranks.
        timeout: How long a rank waits for another one before it gives up; with a ``group`` its own timeout holds.
        group: The processes of this pipeline, whose order is that of the program's ranks, over gloo or
            ``"cpu:gloo,cuda:nccl"``; ``None``: all. So several pipelines may run beside one another.
        context: Entered for every forward of a stage, with the input and the loss, such as ``torch.autocast``.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialized.
        ValueError: The number of stages or ranks does not fit the program, the program is wrong, gloo is not among the
            backends, or this process is not in ``group``.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        program: Program,
        loss: Loss,
        inputs: Callable[[Any], Tensor] = first_of,
        activation_link: Link | None = None,
        gradient_link: Link | None = None,
        seed: int = 0,
        timeout: timedelta = timedelta(minutes=30),
        group: dist.ProcessGroup | None = None,
        context: Context = nullcontext,
    ) -> None:
        mail = self.mail = ProcessMail(timeout, group)
        if mail.size != program.ranks:
            raise ValueError(f"Pipeline(program=<'{program.name}' on {program.ranks} ranks>): there are {mail.size}")
        super().__init__(stages, program, loss, inputs, activation_link, gradient_link, seed, [mail], context)

    def _held(self, rank: int, stages: Sequence[nn.Module]) -> Mapping[tuple[int, int], nn.Module]:
        return stages_of(self.program, rank, stages)

    @property
    def rank(self) -> int:
        """The rank of this process in the pipeline."""
        return self.mail.rank

    @property
    def ledger(self) -> Ledger:
        """Bytes that this rank sent, and seconds that it waited."""
        return self.runners[0].mail.ledger

    def step(self, batch: Any, fresh: bool = True, samples: Tensor | None = None) -> Tensor:
        """See :meth:`SimulatedPipeline.step`."""
        self._check_samples(samples)
        return run(self.runners[0].train(batch, fresh, samples))

    def evaluate(self, batch: Any) -> Tensor:
        """See :meth:`SimulatedPipeline.evaluate`."""
        return run(self.runners[0].evaluate(batch))

    def forward(self, x: Tensor, to: int | None = None) -> Any:
        """See :meth:`SimulatedPipeline.forward`."""
        return run(self.runners[0].forward(x, to))

    def share(self, owner: int, tensor: Tensor, label: str) -> Tensor:
        """One rank's tensor for all; collective.

        Args:
            owner: The rank.
            tensor: There what is sent, elsewhere a box of the same shape and dtype.
            label: What it is, for the ledger.
        """
        return run(self.runners[0].share(owner, tensor, label))

    def clip_grad_norm_(self, max_norm: float, parameters: Collection[nn.Parameter] | None = None) -> Tensor:
        """See :meth:`SimulatedPipeline.clip_grad_norm_`."""
        check_float("clip_grad_norm_", "max_norm", max_norm, 0.0, open_low=True)
        return run(self.runners[0].sums.clip(max_norm, parameters))


class SimulatedPipeline(_Pipeline):
    """All ranks of a pipeline in one process, with the runtime and the messages of real ones.

    For tests and for studies of accuracy: what a link does to training does not depend on where the ranks are. The
    arguments are those of :class:`Pipeline`. The stages are trained themselves; the second pipe of a bidirectional
    schedule has a copy of them, a parameter that stages of several ranks share has a copy for each further rank, and all
    copies get equal gradients.

    Args:
        stages: All stages of the model.
        program: What every rank does; it is checked.
        loss: ``loss(output, part)``: the mean loss over the samples of a part of the batch.
        inputs: ``inputs(part)``: what the model is given; by default the first entry of the part.
        activation_link: What happens to activations on their way; ``None`` sends them as they are.
        gradient_link: What happens to the gradients of activations.
        seed: Seed of dropout and of codecs that draw random numbers.

    Raises:
        ValueError: The number of stages does not fit the program, the program is wrong.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        program: Program,
        loss: Loss,
        inputs: Callable[[Any], Tensor] = first_of,
        activation_link: Link | None = None,
        gradient_link: Link | None = None,
        seed: int = 0,
    ) -> None:
        self._copies = [copy.deepcopy(stage) for stage in stages] if len(program.placement) > 1 else []
        mails = LocalMail.create(program.ranks)
        self._ranks_own = separate(stages, program) if len(stages) == program.stages else list(stages)
        super().__init__(stages, program, loss, inputs, activation_link, gradient_link, seed, mails)

    def _held(self, rank: int, stages: Sequence[nn.Module]) -> Mapping[tuple[int, int], nn.Module]:
        return {held: (self._copies if held[0] else self._ranks_own)[held[1]] for held in self.program.held(rank)}

    @property
    def ledgers(self) -> list[Ledger]:
        """Bytes that each rank sent."""
        return [runner.mail.ledger for runner in self.runners]

    def step(self, batch: Any, fresh: bool = True, samples: Tensor | None = None) -> Tensor:
        """See :meth:`Pipeline.step`."""
        self._check_samples(samples)
        return take_turns([runner.train(batch, fresh, samples) for runner in self.runners])[0]

    def evaluate(self, batch: Any) -> Tensor:
        """See :meth:`Pipeline.evaluate`."""
        return take_turns([runner.evaluate(batch) for runner in self.runners])[0]

    def forward(self, x: Tensor, to: int | None = None) -> Any:
        """See :meth:`Pipeline.forward`."""
        return take_turns([runner.forward(x, to) for runner in self.runners])[to or 0]

    def clip_grad_norm_(self, max_norm: float, parameters: Collection[nn.Parameter] | None = None) -> Tensor:
        """See :meth:`Pipeline.clip_grad_norm_`."""
        check_float("clip_grad_norm_", "max_norm", max_norm, 0.0, open_low=True)
        return take_turns([runner.sums.clip(max_norm, parameters) for runner in self.runners])[0]
