"""One rank's part of a pipeline: it walks through its program."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dopt._random import key
from lightning_dopt.compress._wire import as_bytes
from lightning_dopt.pipeline.batches import cut_batch, samples, tensors
from lightning_dopt.pipeline.checker import message_of
from lightning_dopt.pipeline.links import Link, Memory, Note, Plain, Spec
from lightning_dopt.pipeline.mail import Mail, Talk
from lightning_dopt.pipeline.messages import DIMENSIONS, DTYPES, KINDS, header_of, read_header, tag
from lightning_dopt.pipeline.program import Action, Program
from lightning_dopt.pipeline.sums import Sums

Loss = Callable[[Tensor, Any], Tensor]
Context = Callable[[], AbstractContextManager[Any]]


@dataclass
class _Pass:
    """One walk through the program: the parts of the batch, and what is held between forward and backward."""

    parts: list[Any]
    weights: list[float]
    notes: list[Note]
    signatures: list[str]
    train: bool
    loss: Loss | None
    inputs: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    outputs: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    gradients: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    losses: dict[int, Tensor] = field(default_factory=dict)
    results: dict[int, Tensor] = field(default_factory=dict)
    learnt: dict[tuple[int, int, str], Spec] = field(default_factory=dict)


class Runner:
    """Runs the program of one rank.

    Args:
        program: A program that :func:`~lightning_dopt.pipeline.check` has proved.
        stages: The modules of this rank by ``(pipe, stage)``.
        loss: ``loss(output of the model, part of the batch)``, a mean over the samples of the part.
        inputs: ``inputs(part of the batch)``, what the model is given.
        mail: The way to the other ranks.
        activation_link: What happens to activations; ``None`` sends them as they are.
        gradient_link: What happens to the gradients of activations.
        seed: Seed of dropout and of codecs that draw random numbers, the same on all ranks.
        context: Entered for every forward of a stage, with the input and the loss, such as ``torch.autocast``.
    """

    def __init__(
        self,
        program: Program,
        stages: Mapping[tuple[int, int], nn.Module],
        loss: Loss,
        inputs: Callable[[Any], Tensor],
        mail: Mail,
        activation_link: Link | None,
        gradient_link: Link | None,
        seed: int,
        context: Context = nullcontext,
    ) -> None:
        self.context = context
        self.program, self.stages, self.loss, self.inputs, self.mail = program, dict(stages), loss, inputs, mail
        self.links: dict[str, Link] = {"activation": activation_link or Plain(), "gradient": gradient_link or Plain()}
        self.seed = seed
        self.sums = Sums(program, self.stages, mail)
        self.finish: Callable[[Tensor], Any] = _as_it_is
        """What the model returns, made of the output of its last stage."""
        self.step = 0
        self.draws = 0
        """How many new batches there were."""
        self.memories: dict[tuple[str, int, int], Memory] = {}
        self.specs: dict[tuple[int, int, str], Spec] = {}

    def parameters(self) -> list[nn.Parameter]:
        """The parameters of this rank, each once."""
        return self.sums.parameters()

    def train(self, batch: Any, fresh: bool, samples: Tensor | None) -> Talk[Tensor]:
        """Forward and backward of all micro-batches; adds to the gradients of the parameters. Result: the loss."""
        self.mail.step = self.step
        self.draws += fresh
        run = self._begin(batch, fresh, samples, True, self.loss)
        parameters = [p for p in self.parameters() if p.requires_grad]
        held = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        yield from self._walk(run)
        if len(self.program.placement) > 1:
            yield from self.sums.over_copies()
        yield from self.sums.over_ties()
        for p, before in zip(parameters, held, strict=True):
            if before is not None:
                p.grad = before if p.grad is None else before.add_(p.grad)
        total = yield from self._end(run)
        self.step += 1
        return total

    def evaluate(self, batch: Any) -> Talk[Tensor]:
        """Forward of all micro-batches past the links. Result: the loss."""
        run = self._begin(batch, True, None, False, self.loss)
        yield from self._walk(run)
        return (yield from self._end(run))

    def forward(self, x: Tensor, to: int | None = None) -> Talk[Any]:
        """The model's output for ``x``, without gradients and past the links. Result: the whole output, on one rank or on all."""
        run = self._begin(x, True, None, False, None)
        yield from self._walk(run)
        pipes = {a.microbatch: a.pipe for actions in self.program.actions for a in actions}
        for m in range(len(run.parts)):
            owner = self.program.rank_of(pipes[m], self.program.stages - 1)
            found = yield from self._output(owner, to, run.results.get(m), m, x.device)
            if found is not None:
                run.results[m] = found
        self.mail.finish()
        if to not in (None, self.mail.rank):
            return None
        return self.finish(torch.cat([run.results[m] for m in range(len(run.parts))]))

    def share(self, owner: int, tensor: Tensor, label: str) -> Talk[Tensor]:
        """A tensor of the rank ``owner``; on the others ``tensor`` is a box of the same shape and dtype."""
        tag = self._tag("shared", 0, 0, 0)
        if owner != self.mail.rank:
            return (yield self.mail.expect(owner, tag, tensor, label))
        self._post_to_all(tag, tensor, label)
        self.mail.finish()
        return tensor

    def _begin(self, batch: Any, fresh: bool, numbers: Tensor | None, train: bool, loss: Loss | None) -> _Pass:
        count = min(self.program.microbatches, samples(batch))  # a short batch has fewer micro-batches
        parts, weights = cut_batch(batch, count)
        ids = cut_batch(numbers, count)[0] if numbers is not None else [None] * count
        notes = [Note(m, fresh, ids[m], key(self.seed, self.step, m)) for m in range(count)]
        signatures = [repr([tuple(t.shape) for t in tensors(part)]) + str(train) for part in parts]
        return _Pass(parts, weights, notes, signatures, train, loss)

    def _walk(self, run: _Pass) -> Talk[None]:
        """Do what the program says of the micro-batches that there are."""
        for action in self.program.actions[self.mail.rank]:
            forward = action.kind in ("forward", "send_activation", "recv_activation")
            if action.microbatch < len(run.parts) and (run.train or forward):
                yield from self._do(action, run)

    def _output(
        self, owner: int, to: int | None, mine: Tensor | None, m: int, device: torch.device
    ) -> Talk[Tensor | None]:
        """The output of a micro-batch, for one rank or for all."""
        tags = self._tag("shape", 0, 0, m), self._tag("output", 0, 0, m)
        if mine is not None:
            spec = Spec(tuple(mine.shape), mine.dtype, mine.device)
            for peer in range(self.mail.size) if to is None else {to}:
                if peer != owner:
                    self.mail.post(peer, tags[0], header_of(spec), "shapes")
                    self.mail.post(peer, tags[1], as_bytes(mine), "outputs")
            return mine
        if to not in (None, self.mail.rank):
            return None
        header = yield self.mail.expect(owner, tags[0], torch.zeros(DIMENSIONS + 2, dtype=torch.int64), "shapes")
        spec = read_header(header, device)
        box = torch.empty(spec.nbytes, dtype=torch.uint8, device=device)
        return Plain().decode((yield self.mail.expect(owner, tags[1], box, "outputs")), spec, {}, Note(m))

    def _post_to_all(self, tag: int, tensor: Tensor, label: str) -> None:
        for peer in range(self.mail.size):
            if peer != self.mail.rank:
                self.mail.post(peer, tag, tensor, label)

    def _end(self, run: _Pass) -> Talk[Tensor]:
        """All ranks learn the loss, and nothing stays under way."""
        last = self.program.stages - 1
        total = torch.zeros((), dtype=torch.float64)
        for pipe in range(len(self.program.placement)):
            owner = self.program.rank_of(pipe, last)
            tag = self._tag("loss", pipe, 0, 0)
            if owner == self.mail.rank:
                mine = run.losses.get(pipe, torch.zeros((), dtype=torch.float64))
                self._post_to_all(tag, mine.view(1), "loss")
            else:
                mine = (yield self.mail.expect(owner, tag, torch.zeros(1, dtype=torch.float64), "loss")).view(())
            total = total + mine
        self.mail.finish()
        if run.train:
            self.specs.update(run.learnt)
        return total

    def _do(self, action: Action, run: _Pass) -> Talk[None]:
        if action.kind == "forward":
            with torch.set_grad_enabled(run.train):  # never around a yield: other ranks may share this thread
                self._forward(action, run)
        elif action.kind in ("backward", "backward_input"):  # of a backward in two parts all is done in the first
            self._backward(action, run)
        elif action.kind == "backward_weight":
            pass
        elif action.kind == "send_activation":
            self._send(action, run, run.outputs[action.cell] if run.train else run.outputs.pop(action.cell))
        elif action.kind == "send_gradient":
            self._send(action, run, run.gradients.pop((action.pipe, action.stage - 1, action.microbatch)))
        elif action.kind == "recv_activation":
            run.inputs[action.cell] = yield from self._receive(action, run)
        else:
            run.gradients[action.cell] = yield from self._receive(action, run)

    def _forward(self, action: Action, run: _Pass) -> None:
        pipe, stage, m = action.cell
        last = self.program.stages - 1
        x = self._input(m, run) if stage == 0 else run.inputs.pop(action.cell)
        if stage > 0 and run.train:
            x = run.inputs[action.cell] = x.requires_grad_()
        y = self._computed(pipe, stage, m, x)
        if stage == last and run.loss is None:
            run.results[m] = y
            return
        if stage == last:
            y = self._loss_of(y, m, run)
            run.losses[pipe] = run.losses.get(pipe, torch.zeros((), dtype=torch.float64)) + y.detach().double().cpu()
        elif not isinstance(y, Tensor) or y.dtype not in DTYPES:
            kind = y.dtype if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"stage {stage}: its output must be one floating point tensor, not {kind}")
        elif self.program.local(pipe, stage):
            run.inputs[pipe, stage + 1, m] = y.detach()
        if run.train or (stage < last and not self.program.local(pipe, stage)):
            run.outputs[action.cell] = y

    def _computed(self, pipe: int, stage: int, m: int, x: Tensor) -> Any:
        """The output of a stage."""
        with self.context(), _random(self.seed, self.draws, stage, m, x.device):
            return self.stages[pipe, stage](x)

    def _loss_of(self, y: Tensor, m: int, run: _Pass) -> Tensor:
        """The share of a micro-batch in the loss."""
        assert run.loss is not None
        device = next(tensors(run.parts[m])).device
        with self.context(), _random(self.seed, self.draws, self.program.stages, m, device):
            return run.loss(self.finish(y), run.parts[m]) * run.weights[m]

    def _input(self, m: int, run: _Pass) -> Tensor:
        """What the model is given; what is drawn for it, and again on the way to the loss, is the same."""
        if run.loss is None:
            whole: Tensor = run.parts[m]
            return whole
        device = next(tensors(run.parts[m])).device
        with self.context(), _random(self.seed, self.draws, self.program.stages, m, device):
            return self.inputs(run.parts[m])

    def _backward(self, action: Action, run: _Pass) -> None:
        pipe, stage, m = action.cell
        y = run.outputs.pop(action.cell)
        gradient = run.gradients.pop(action.cell, None)
        if y.requires_grad:
            torch.autograd.backward(y, gradient)
        if stage > 0:
            x = run.inputs.pop(action.cell)
            run.gradients[pipe, stage - 1, m] = x.grad if x.grad is not None else torch.zeros_like(x)

    def _send(self, action: Action, run: _Pass, tensor: Tensor) -> None:
        message = message_of(action)
        assert message is not None
        what, pipe, boundary, m = message
        peer = self.program.peer(action)
        place = (pipe, boundary, run.signatures[m])
        spec = Spec(tuple(tensor.shape), tensor.dtype, tensor.device)
        if what == "activation":
            known = self.specs.get(place) if run.train else None  # dtypes may differ in evaluation
            if known is None:
                run.learnt[place] = spec
                self.mail.post(peer, self._tag("shape of activation", pipe, boundary, m), header_of(spec), "shapes")
            elif known != spec:
                raise ValueError(
                    f"stage {boundary}: its output has shape {tuple(spec.shape)} and {spec.dtype}, before it had "
                    f"{tuple(known.shape)} and {known.dtype} for a batch of the same shape"
                )
        link, memory, note = self._link(what, pipe, boundary, m, run)
        payload = link.encode(tensor.detach(), memory, note)
        self.mail.post(peer, self._tag(what, pipe, boundary, m), payload, f"{what}s" if run.train else "evaluation")

    def _receive(self, action: Action, run: _Pass) -> Talk[Tensor]:
        message = message_of(action)
        assert message is not None
        what, pipe, boundary, m = message
        peer = self.program.peer(action)
        place = (pipe, boundary, run.signatures[m])
        known = self.specs.get(place) if run.train else None
        spec = known or run.learnt.get(place) if what == "gradient" else known
        if spec is None:  # both ends decide by what was known before this step, so in any order of micro-batches
            box = torch.zeros(DIMENSIONS + 2, dtype=torch.int64)
            tag = self._tag("shape of activation", pipe, boundary, m)
            header = yield self.mail.expect(peer, tag, box, "shapes")
            device = next(tensors(run.parts[m])).device  # where the batch lies, all stages do
            spec = run.learnt[place] = read_header(header, device)
        link, memory, note = self._link(what, pipe, boundary, m, run)
        box = torch.empty(link.payload_bytes(spec, memory, note), dtype=torch.uint8, device=spec.device)
        payload = yield self.mail.expect(
            peer, self._tag(what, pipe, boundary, m), box, f"{what}s" if run.train else "evaluation"
        )
        return link.decode(payload, spec, memory, note)

    def _link(self, what: str, pipe: int, boundary: int, m: int, run: _Pass) -> tuple[Link, Memory, Note]:
        if not run.train:
            return Plain(), {}, run.notes[m]
        memory = self.memories.setdefault((what, pipe, boundary), {})
        note = run.notes[m]
        seed = key(note.seed, pipe, boundary, KINDS.index(what))
        return self.links[what], memory, Note(m, note.fresh, note.samples, seed)

    def _tag(self, kind: str, pipe: int, place: int, m: int) -> int:
        return tag(self.program, kind, pipe, place, m)


def _as_it_is(output: Tensor) -> Any:
    return output


@contextmanager
def _random(seed: int, draws: int, stage: int, m: int, device: torch.device) -> Iterator[None]:
    """Dropout and its kin draw by batch, stage and micro-batch: alike in every schedule, and while a batch is repeated."""
    number = key(seed, draws, stage, m)
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(number)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(number)
        yield


def stages_of(program: Program, rank: int, stages: Sequence[nn.Module]) -> dict[tuple[int, int], nn.Module]:
    """The modules of a rank by pipe and stage."""
    return {(pipe, stage): stages[stage] for pipe, stage in program.held(rank)}
