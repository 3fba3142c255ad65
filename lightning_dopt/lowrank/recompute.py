"""CR-Net's activation recomputation: few outputs are stored, the others are recovered along the chain of blocks.

A block's backward needs its input ``X_l`` (stored), the outputs ``Y_(l-1)`` of the block before, and then runs the block once
more. Storing all ``Y`` would cost more than the ``X`` do; so only those of a checkpoint set ``A`` are stored, every
``segment``-th block counted back from the last, and the thin products ``A_l X_l``. In between

* ``inverse`` goes back from the end of a segment, ``Y_(l-1) = (Y_l - B_l A_l X_l) / c(beta_l)``, the paper's rule;
* ``forward`` goes on from its start, ``Y_l = c(beta_l) Y_(l-1) + B_l A_l X_l``, once, when backward enters the segment.

Going back multiplies rounding errors by ``1 / |c|`` at every block, so each segment is judged before its outputs are thrown
away (:func:`predicted_error`); one where the inverse is of no use goes forward.

Source: Kong et al., "CR-Net: Scaling Parameter-Efficient Training with Cross-Layer Low-Rank Structure", arXiv 2509.18993;
the rule "forward" and the guard are this package's.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dopt.lowrank.cross_layer import CrossLinear, Frame, Outputs, run


def checkpoints(count: int, segment: int) -> list[int]:
    """The blocks whose outputs are stored, of ``count`` blocks numbered from 0: the last, and every ``segment``-th before.

    The dense block 0 is not among them.
    """
    return list(range(count - 1, 0, -segment))[::-1]


def predicted_error(coefficients: Sequence[float], dtype: torch.dtype) -> float:
    """Expected relative error of the last output that the inverse recovers, going back through ``coefficients``.

    Each step back adds a rounding error of half a unit in the last place, which every later step divides by its
    coefficient: ``u sqrt(sum over k of prod(j <= k) 1 / c_j^2)``, for independent errors and outputs of equal size.
    """
    gain, total = 1.0, 0.0
    for c in coefficients:
        gain = min(gain / (c * c), 1e300)
        total += gain
    return torch.finfo(dtype).eps / 2 * math.sqrt(total)


class Tape:
    """What blocks of one forward pass tell each other for its backward pass.

    In the forward pass it gathers the layers and products of the segment that is being run. In the backward pass it carries
    recovered outputs from each block to the one before.
    """

    def __init__(self, start: Outputs) -> None:
        self.begin(start)
        self.outputs: dict[int, Outputs] = {}

    def begin(self, start: Outputs) -> None:
        """A segment begins after these outputs."""
        self.start = {name: y.detach() for name, y in start.items()}
        self.layers: list[dict[str, CrossLinear]] = []
        self.products: list[Outputs] = []

    def end(self) -> None:
        """No block follows."""
        self.start, self.layers, self.products = {}, [], []


class Replay:
    """How one call of one block is run, and run again in the backward pass.

    Args:
        block: The block.
        layers: Its low-rank layers by name.
        index: Its number in the stack.
        stored: Numbers of the blocks whose outputs are stored (:func:`checkpoints`).
        mode: ``"inverse"`` or ``"forward"``.
        tolerance: Largest :func:`predicted_error` for which the inverse is used.
        call: Calls the block with an input, with all its other arguments.
    """

    def __init__(
        self,
        block: nn.Module,
        layers: dict[str, CrossLinear],
        index: int,
        stored: list[int],
        mode: str,
        tolerance: float,
        call: Callable[[Tensor], Any],
    ) -> None:
        self.layers, self.index, self.mode, self.tolerance, self.call = layers, index, mode, tolerance, call
        self.ends_segment, self.last = index in stored, index == stored[-1]
        self.after_stored = index - 1 in stored
        self.parameters = [p for p in block.parameters() if p.requires_grad]
        self.names: list[str] = []

    def __call__(self, hidden: Tensor, incoming: Outputs, tape: Tape) -> tuple[Tensor, Outputs]:
        """The block's output and the outputs of its layers."""
        names = list(incoming)
        out, *outputs = _Replayed.apply(self, tape, names, hidden, *incoming.values(), *self.parameters)
        return out, dict(zip(self.names, outputs, strict=True))

    def judge(self, tape: Tape) -> bool:
        """Whether the segment that ends here is recovered by the inverse."""
        if self.mode == "forward":
            return False
        names = [name for name in self.layers if name in tape.start]
        steps = (
            tape.layers if self.index == len(tape.layers) else tape.layers[1:]
        )  # the first begins at a stored output
        if not steps:
            return True
        values = torch.stack([torch.cat([block[n].coefficient().detach() for n in names]) for block in steps])
        dtypes = [tape.start[n].dtype for n in names]
        errors = [predicted_error(c[::-1], d) for c, d in zip(values.t().tolist(), dtypes, strict=True)]
        worst = max(range(len(names)), key=errors.__getitem__)
        if errors[worst] <= self.tolerance:
            return True
        warnings.warn(
            f"CR-Net: blocks {self.index - len(steps) + 1} to {self.index} are recovered forward: going back through "
            f"{names[worst]}, with coefficients down to {values[:, worst].abs().min():.2g}, would lose {errors[worst]:.1g} of "
            f"the outputs in {dtypes[worst]}, more than tolerance={self.tolerance:g}",
            stacklevel=2,
        )
        return False


class Surroundings:
    """Random states and autocast settings, so that a replay draws the same dropout and computes in the same dtypes."""

    def __init__(self, hidden: Tensor) -> None:
        self.kinds = ("cpu",) if hidden.device.type in ("cpu", "meta") else ("cpu", hidden.device.type)
        self.autocast = [
            (k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k), torch.is_autocast_cache_enabled())
            for k in self.kinds
        ]
        self.random = torch.get_rng_state()
        self.device = hidden.device if len(self.kinds) == 2 else None
        if self.device is not None:
            self.device_random = torch.get_device_module(self.device).get_rng_state(self.device)

    def run(self, function: Callable[[], Any]) -> Any:
        """Call a function there; the states of now come back afterwards."""
        devices = [] if self.device is None else [self.device]
        kind = self.kinds[-1] if devices else "cuda"
        with torch.random.fork_rng(devices, device_type=kind):
            torch.set_rng_state(self.random)
            if self.device is not None:
                torch.get_device_module(self.device).set_rng_state(self.device_random, self.device)
            with self.settings():
                return function()

    @contextmanager
    def settings(self) -> Iterator[None]:
        """Autocast as it was."""
        with ExitStack() as stack:
            for kind, on, dtype, cached in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=on, cache_enabled=cached))
            yield


class _Replayed(torch.autograd.Function):
    """One block, of which only the input, the thin products and, at the ends of segments, outputs are kept."""

    @staticmethod
    def forward(ctx: Any, replay: Replay, tape: Tape, names: list[str], hidden: Tensor, *rest: Tensor) -> Any:
        before = dict(zip(names, rest, strict=False))
        ctx.surroundings = Surroundings(hidden)
        frame = Frame(before, keep=True)
        out = run(frame, replay.call, hidden)
        assert frame.products is not None
        tape.layers.append(replay.layers)
        tape.products.append(frame.products)
        replay.names = list(frame.outgoing)
        ctx.replay, ctx.tape, ctx.names, ctx.outgoing = replay, tape, names, list(frame.outgoing)
        ctx.set_materialize_grads(False)
        keep = _Keep(ctx)
        keep.add("hidden", [hidden])
        keep.add("products", frame.products)
        if replay.after_stored:
            keep.add("before", before)
        if replay.ends_segment:
            ctx.inverse = replay.judge(tape)
            ctx.segment = tape.layers
            if ctx.inverse:
                keep.add("outputs", frame.outgoing if replay.last else {})
            else:
                keep.add("start", tape.start)
                for k, products in enumerate(tape.products[:-1]):
                    keep.add(f"products{k}", products)
            tape.end() if replay.last else tape.begin(frame.outgoing)
        keep.save()
        return (out, *frame.outgoing.values())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        replay, tape = ctx.replay, ctx.tape
        kept = _Keep.restore(ctx)
        with ctx.surroundings.settings():
            before = _recovered(ctx, kept)
        tape.outputs = {k: y for k, y in tape.outputs.items() if k < replay.index - 1}
        tape.outputs[replay.index - 1] = before
        if replay.index == 1:
            tape.outputs = {}

        hidden = kept["hidden"][0].detach().requires_grad_(ctx.needs_input_grad[3])
        entering = {name: before[name].detach().requires_grad_() for name in ctx.names}
        frame = Frame(entering, known=kept["products"])
        with torch.enable_grad():
            out = ctx.surroundings.run(lambda: run(frame, replay.call, hidden))
        results = [out, *(frame.outgoing[name] for name in ctx.outgoing)]
        pairs = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None and r.requires_grad]
        wanted = [hidden, *entering.values(), *replay.parameters]
        found = torch.autograd.grad(
            [r for r, _ in pairs],
            [w for w in wanted if w.requires_grad],
            [g for _, g in pairs],
            allow_unused=True,
        )
        answers = iter(found)
        return (None, None, None, *(next(answers) if w.requires_grad else None for w in wanted))


def _recovered(ctx: Any, kept: dict[str, Any]) -> Outputs:
    """``Y_(l-1)``, stored or recovered.

    Raises:
        RuntimeError: the backward pass did not come through the block that follows.
    """
    replay, tape = ctx.replay, ctx.tape
    if replay.ends_segment and not ctx.inverse:
        return _forward(ctx, kept)
    if "before" in kept:
        return dict(kept["before"])
    if replay.index - 1 in tape.outputs:
        return dict(tape.outputs[replay.index - 1])
    y = kept["outputs"] if kept.get("outputs") else tape.outputs.get(replay.index)
    if y is None:
        raise RuntimeError(
            f"CR-Net: outputs of block {replay.index} are lost, as the blocks after it took no part; use recompute='none'"
        )
    return {n: replay.layers[n].inverse(kept["products"][n], y[n]) for n in ctx.names}


def _forward(ctx: Any, kept: dict[str, Any]) -> Outputs:
    """Recover a whole segment from its start; leaves the earlier outputs on the tape, returns the last."""
    first = ctx.replay.index - len(ctx.segment)
    y: Outputs = kept["start"]
    ctx.tape.outputs = {first: y}
    for k, layers in enumerate(ctx.segment[:-1]):
        y = {n: layers[n].step(kept[f"products{k}"][n], y[n]) for n in layers if n in y}
        ctx.tape.outputs[first + k + 1] = y
    return dict(y)


class _Keep:
    """Tensors by name in ``save_for_backward``, so that hooks on saved tensors and checks of versions see them."""

    def __init__(self, ctx: Any) -> None:
        self.ctx = ctx
        self.tensors: list[Tensor] = []
        self.plan: list[tuple[str, list[str] | int]] = []

    def add(self, name: str, tensors: Outputs | list[Tensor]) -> None:
        self.tensors += tensors.values() if isinstance(tensors, dict) else tensors
        self.plan.append((name, list(tensors) if isinstance(tensors, dict) else len(tensors)))

    def save(self) -> None:
        self.ctx.save_for_backward(*self.tensors)
        self.ctx.plan = self.plan

    @staticmethod
    def restore(ctx: Any) -> dict[str, Any]:
        """What was added, by name."""
        tensors = iter(ctx.saved_tensors)
        found: dict[str, Any] = {}
        for name, keys in ctx.plan:
            if isinstance(keys, int):
                found[name] = [next(tensors) for _ in range(keys)]
            else:
                found[name] = {key: next(tensors) for key in keys}
        return found
