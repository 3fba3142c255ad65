"""CR-Net's linear layers, and how the outputs of one block reach the next.

Nothing of a call stays on a module. Between two blocks the outputs ride on the tensor that the host model passes on
anyway (:class:`Carried`); within a block its layers find them in a :class:`Frame` that lives for one call and one thread.
So calls may nest, run in several threads and end in exceptions, blocks may be replayed by activation checkpointing around
them, ``torch.compile`` sees plain tensors, and modules copy and pickle as ever.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_dopt.lowrank.method import Factors

Outputs = dict[str, Tensor]

_RIDER = "_cross_layer_outputs"
_here = threading.local()


class Frame:
    """What the layers of one block take and give during one call.

    Attributes:
        incoming: Outputs of the same layers one block earlier; ``None`` in the first block.
        outgoing: Outputs of this block.
        products: ``a x`` of each low-rank layer; filled where asked for, else ``None``.
        known: Products that need not be computed again.
    """

    def __init__(self, incoming: Outputs | None, keep: bool = False, known: Outputs | None = None) -> None:
        self.incoming, self.outgoing = incoming, {}  # type: tuple[Outputs | None, Outputs]
        self.products: Outputs | None = {} if keep else None
        self.known: Outputs = {} if known is None else known

    def give(self, name: str, y: Tensor) -> None:
        """Note the output of a layer.

        Raises:
            RuntimeError: the layer ran twice in one call of its block.
        """
        if name in self.outgoing:
            raise RuntimeError(f"CR-Net: {name} ran twice in one call of its block; leave it out of targets")
        self.outgoing[name] = y

    def take(self, name: str) -> Tensor:
        """The output of the layer one block earlier.

        Raises:
            RuntimeError: it did not run there.
        """
        if self.incoming is None or name not in self.incoming:
            raise RuntimeError(f"CR-Net: {name} did not run in the block before; leave it out of targets")
        return self.incoming[name]


def run(frame: Frame, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a block whose layers shall find ``frame``; what they found before is put back, whatever happens."""
    before = getattr(_here, "frame", None)
    _here.frame = frame
    try:
        return block(*args, **kwargs)
    finally:
        _here.frame = before


def current(name: str) -> Frame:
    """The frame of the call that is running in this thread.

    Raises:
        RuntimeError: no block is running.
    """
    frame: Frame | None = getattr(_here, "frame", None)
    if frame is None:
        raise RuntimeError(
            f"CR-Net: {name} ran outside of its block, as under activation checkpointing within blocks; use recompute= instead"
        )
    return frame


class Carried:
    """The outputs of block ``index``, on their way to the next one, and what recomputation keeps between blocks."""

    def __init__(self, index: int, outputs: Outputs, tape: Any = None) -> None:
        self.index, self.outputs, self.tape = index, outputs, tape


def attach(hidden: Tensor, carried: Carried) -> None:
    """Let outputs ride on the tensor that goes to the next block."""
    setattr(hidden, _RIDER, carried)


def detach(hidden: Tensor, index: int, keep: bool) -> Carried:
    """What rides on the input of block ``index``.

    Args:
        hidden: The input.
        index: Number of the block that asks, at least 1.
        keep: Leave it there, for a replay of the block; else the tensor forgets it, so that it does not keep memory alive.

    Raises:
        RuntimeError: the tensor is not the output of the block before.
    """
    carried: Carried | None = getattr(hidden, _RIDER, None)
    if carried is None or carried.index != index - 1:
        found = "carries nothing" if carried is None else f"comes from block {carried.index}"
        raise RuntimeError(
            f"CR-Net: block {index} must get the very tensor that block {index - 1} returned, but its input {found}; "
            "blocks must follow one another with nothing between them"
        )
    if not keep:
        delattr(hidden, _RIDER)
    return carried


def coefficient(beta: Tensor, epsilon: float) -> Tensor:
    """``beta + epsilon`` where ``beta >= 0``, else ``beta - epsilon``: never nearer to zero than ``epsilon``."""
    return torch.where(beta >= 0, beta + epsilon, beta - epsilon)


class FirstLinear(nn.Linear):
    """A dense layer of the first block, which tells its output to the frame. Shares the tensors of the layer it replaces."""

    def __init__(self, linear: nn.Linear, name: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.name = linear.in_features, linear.out_features, name
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """From (..., in) to (..., out)."""
        y = functional.linear(x, self.weight, self.bias)
        current(self.name).give(self.name, y)
        return y


class FirstFactors(Factors):
    """A low-rank layer of the first block, where that is not dense."""

    def __init__(self, linear: nn.Linear, rank: int, name: str) -> None:
        super().__init__(linear, rank)
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """From (..., in) to (..., out)."""
        y = functional.linear(functional.linear(x, self.a), self.b, self.bias)
        current(self.name).give(self.name, y)
        return y


class CrossLinear(Factors):
    """``Y_l = c(beta) Y_(l-1) + B (A x) + bias`` with a scalar ``beta`` of the layer's own.

    ``beta`` keeps float32 where the module is cast to fewer bits: its changes would be lost.
    """

    beta: Tensor

    def __init__(self, linear: nn.Linear, rank: int, name: str, beta: float, learn_beta: bool, epsilon: float) -> None:
        super().__init__(linear, rank)
        self.name, self.epsilon = name, epsilon
        start = torch.full((1,), beta, device=linear.weight.device, dtype=_at_least_single(linear.weight.dtype))
        if learn_beta:
            self.beta = nn.Parameter(start)
        else:
            self.register_buffer("beta", start)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> CrossLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.beta.data = self.beta.data.to(_at_least_single(self.beta.dtype))
        return self

    def coefficient(self) -> Tensor:
        """``c(beta)``, of shape (1,)."""
        return coefficient(self.beta, self.epsilon)

    def step(self, product: Tensor, before: Tensor) -> Tensor:
        """``Y_l`` from ``A x`` and ``Y_(l-1)``: one thin product and one pass over the output."""
        low = functional.linear(product, self.b, self.bias)
        return low.addcmul_(before.to(low.dtype), self.coefficient().to(low.dtype))  # nobody else holds it

    def inverse(self, product: Tensor, y: Tensor) -> Tensor:
        """``Y_(l-1)`` from ``A x`` and ``Y_l``."""
        low = functional.linear(product, self.b, self.bias)
        return (y - low.to(y.dtype)) / self.coefficient().to(y.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """From (..., in) to (..., out)."""
        frame = current(self.name)
        if self.name in frame.known:
            product: Tensor = KnownProduct.apply(x, self.a, frame.known[self.name])
        else:
            product = functional.linear(x, self.a)
        if frame.products is not None:
            frame.products[self.name] = product
        y = self.step(product, frame.take(self.name))
        frame.give(self.name, y)
        return y


def _at_least_single(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


class KnownProduct(torch.autograd.Function):
    """``a x`` whose value is known already: only its gradients are computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, product: Tensor) -> Tensor:
        """The product as it is."""
        ctx.save_for_backward(x, a)
        return product.view_as(product)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """The gradients of ``x`` and ``a``, each in its own dtype."""
        x, a = ctx.saved_tensors
        gx = (grad @ a.to(grad.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        ga = None
        if ctx.needs_input_grad[1]:
            ga = (grad.flatten(0, -2).t() @ x.flatten(0, -2).to(grad.dtype)).to(a.dtype)
        return gx, ga, None
