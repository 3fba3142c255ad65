"""CR-Net: every linear layer adds a low-rank term to the scaled output of the same layer one block earlier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_dopt._checks import check_choice, check_flag, check_float, check_int
from lightning_dopt.lowrank.cross_layer import (
    Carried,
    CrossLinear,
    FirstFactors,
    FirstLinear,
    Frame,
    Outputs,
    attach,
    detach,
    run,
)
from lightning_dopt.lowrank.method import Method
from lightning_dopt.lowrank.recompute import Replay, Tape, checkpoints

_CACHES = ("past_key_value", "past_key_values", "layer_past")


class CRNet(Method):
    """Cross-layer low-rank residuals: ``Y_1 = X_1 W_1`` and, for every later block, ``Y_l = c(beta_l) Y_(l-1) + X_l A_l B_l``.

    ``Y_l`` is the output of one linear layer of block ``l``, before rotary positions, non-linearities and residuals; each of
    these layers has a scalar ``beta`` of its own, and ``c(beta)`` is ``beta + epsilon`` for ``beta >= 0``, else
    ``beta - epsilon``. Biases stay with their layers. Norms, embeddings and heads are left as they are.

    ``W_1`` keeps the weights it has. ``A`` and ``B`` are normal with variance ``1 / (sqrt(rank) sqrt(in + out))``, and
    ``beta`` starts at 1; the paper's own initial values are not known to us.

    Recomputation trades computing for the memory of activations:

    ================  ===========================================================  ==========================
    ``recompute``     kept for backward, per token and block                       done again
    ================  ===========================================================  ==========================
    ``"none"``        everything autograd keeps                                    nothing
    ``"checkpoint"``  the input and the outputs of all layers                      every block
    ``"inverse"``     the input and ``rank`` numbers per layer, and the outputs    every block, less the products
                      of every ``segment``-th block                                with ``A``; outputs backwards
    ``"forward"``     the same                                                     the same, outputs forwards
    ================  ===========================================================  ==========================

    ``"inverse"`` is the paper's scheme; it refuses segments in which rounding would make the recovered outputs useless, and
    goes ``"forward"`` there, with a warning. All modes act in training only. Gradients are those of plain autograd, up to
    rounding.

    Args:
        beta: Start of all ``beta``.
        learn_beta: Train them; otherwise they are buffers.
        epsilon: Keeps ``c`` away from zero.
        first_dense: Without, the first block is of low rank, too, which the paper advises against.
        recompute: See above.
        segment: Blocks from one stored output to the next.
        tolerance: Largest relative error that recovered outputs may be expected to have under ``"inverse"``.

    Raises:
        ValueError: an argument out of range; in ``convert``, fewer than one block.

    Source: Kong, Liang, Liu, Deng, Yuan, "CR-Net: Scaling Parameter-Efficient Training with Cross-Layer Low-Rank Structure",
    arXiv 2509.18993.
    """

    def __init__(
        self,
        beta: float = 1.0,
        learn_beta: bool = True,
        epsilon: float = 1e-6,
        first_dense: bool = True,
        recompute: Literal["none", "checkpoint", "inverse", "forward"] = "none",
        segment: int = 8,
        tolerance: float = 0.05,
    ) -> None:
        self.beta = check_float("CRNet", "beta", beta, -float("inf"))
        self.learn_beta = check_flag("CRNet", "learn_beta", learn_beta)
        self.epsilon = check_float("CRNet", "epsilon", epsilon, 0.0)
        self.first_dense = check_flag("CRNet", "first_dense", first_dense)
        check_choice("CRNet", "recompute", recompute, ("none", "checkpoint", "inverse", "forward"))
        self.recompute = recompute
        self.segment = check_int("CRNet", "segment", segment, 1)
        self.tolerance = check_float("CRNet", "tolerance", tolerance, 0.0)

    def layer(self, linear: nn.Linear, rank: int, name: str, first: bool) -> nn.Module:
        """See :meth:`Method.layer`."""
        if first:
            return FirstLinear(linear, name) if self.first_dense else FirstFactors(linear, rank, name)
        return CrossLinear(linear, rank, name, self.beta, self.learn_beta, self.epsilon)

    def cost(self, linear: nn.Linear, rank: int, first: bool) -> int:
        """See :meth:`Method.cost`; a fixed ``beta`` is no parameter."""
        return super().cost(linear, rank, first) + (self.learn_beta and not first)

    def stack(self, blocks: Sequence[nn.Module], names: Sequence[str]) -> list[nn.Module]:
        """See :meth:`Method.stack`."""
        return [CrossBlock(block, k, len(blocks), list(names), self) for k, block in enumerate(blocks)]


class CrossBlock(nn.Module):
    """A block of a CR-Net: hands the outputs of its layers to the next block, on the tensor it returns.

    Other attributes than its own are those of the block inside.
    """

    def __init__(self, block: nn.Module, index: int, count: int, names: list[str], method: CRNet) -> None:
        super().__init__()
        self.block, self.index, self.names, self.method = block, index, names, method
        self.is_last, self.stored = index == count - 1, checkpoints(count, method.segment)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block inside returns.

        Raises:
            RuntimeError: the input is not what the block before returned.
            ValueError: recomputation cannot work with these arguments.
        """
        recompute = self.method.recompute != "none" and self.training and torch.is_grad_enabled()
        if self.index and not recompute:
            carried = detach(_hidden(args, kwargs), self.index, keep=True)
            frame = Frame(carried.outputs)
            return self._send(run(frame, self.block, *args, **kwargs), frame.outgoing)
        if recompute:
            return self._recomputed(args, kwargs)
        frame = Frame(None)
        return self._send(run(frame, self.block, *args, **kwargs), frame.outgoing)

    def _send(self, out: Any, outputs: Outputs, tape: Tape | None = None) -> Any:
        if not self.is_last:
            attach(out if isinstance(out, Tensor) else out[0], Carried(self.index, outputs, tape))
        return out

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _recomputed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mode, hidden = self.method.recompute, _hidden(args, kwargs)
        _check_arguments(hidden, args, kwargs, mode)
        packed: list[type] = []

        def call(x: Tensor) -> Tensor:
            out = self.block(x, *args[1:], **kwargs) if args else self.block(**{**kwargs, _key(kwargs): x})
            if isinstance(out, Tensor):
                return out
            if len(out) != 1:
                raise ValueError(f"CRNet(recompute={mode!r}): blocks must return one tensor")
            packed.append(type(out))
            return out[0]

        carried = detach(hidden, self.index, keep=False) if self.index else None
        if carried is None or mode == "checkpoint":
            out, outputs = _checkpointed(call, hidden, None if carried is None else carried.outputs)
            tape = Tape(outputs) if carried is None else carried.tape
        else:
            tape = carried.tape
            layers = {n: m for n in self.names if isinstance(m := self.block.get_submodule(n), CrossLinear)}
            replay = Replay(self.block, layers, self.index, self.stored, mode, self.method.tolerance, call)
            out, outputs = replay(hidden, carried.outputs, tape)
        return self._send((out,) if packed else out, outputs, tape)


def _checkpointed(call: Callable[[Tensor], Tensor], hidden: Tensor, incoming: Outputs | None) -> tuple[Tensor, Outputs]:
    """Activation checkpointing with the outputs of the block before as explicit inputs."""
    names: list[str] = []
    given = {} if incoming is None else incoming

    def again(x: Tensor, *before: Tensor) -> tuple[Tensor, ...]:
        frame = Frame(None if incoming is None else dict(zip(given, before, strict=True)))
        out = run(frame, call, x)
        names[:] = frame.outgoing
        return (out, *frame.outgoing.values())

    out, *outputs = checkpoint(again, hidden, *given.values(), use_reentrant=False)
    return out, dict(zip(names, outputs, strict=True))


def _key(kwargs: dict[str, Any]) -> str:
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            return name
    raise ValueError("CRNet: blocks must get a tensor, the stream of hidden states, as their first argument")


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The stream of hidden states: the first argument, or the first tensor among named ones."""
    if args:
        if not isinstance(args[0], Tensor):
            raise ValueError("CRNet: blocks must get a tensor, the stream of hidden states, as their first argument")
        return args[0]
    return kwargs[_key(kwargs)]


def _check_arguments(hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], recompute: str) -> None:
    for name in _CACHES:
        if kwargs.get(name) is not None:
            raise ValueError(f"CRNet(recompute={recompute!r}): cannot fill {name} twice; train with use_cache=False")
    others = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v is not hidden]
    if any(v.requires_grad for v in others):
        raise ValueError(f"CRNet(recompute={recompute!r}): only the first argument of a block may need gradients")
