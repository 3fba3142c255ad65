"""CoLA and SLTrain: low rank with a non-linearity between the factors, and low rank plus a sparse matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_dopt._checks import check_choice, check_flag, check_float
from lightning_dopt.lowrank.method import Factors, Method

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "relu": functional.relu,
}


class CoLA(Method):
    """Low-rank activations: ``y = B s(A x) + bias`` with a non-linearity ``s`` of its own in every layer.

    The non-linearities of the model stay, too.

    Args:
        activation: ``s``: ``"silu"``, ``"gelu"`` or ``"relu"``.
        first_dense: Leave the first block dense.

    Raises:
        ValueError: an argument out of range.

    Source: Liu et al., "CoLA: Compute-Efficient Pre-Training of LLMs via Low-Rank Activation", arXiv 2502.10940.
    """

    def __init__(self, activation: Literal["silu", "gelu", "relu"] = "silu", first_dense: bool = False) -> None:
        check_choice("CoLA", "activation", activation, _ACTIVATIONS)
        self.activation = activation
        self.first_dense = check_flag("CoLA", "first_dense", first_dense)

    def layer(self, linear: nn.Linear, rank: int, name: str, first: bool) -> nn.Module:
        """See :meth:`Method.layer`."""
        return linear if first and self.first_dense else CoLALinear(linear, rank, self.activation)


class CoLALinear(Factors):
    """``y = b s(a x) + bias``."""

    def __init__(self, linear: nn.Linear, rank: int, activation: str) -> None:
        super().__init__(linear, rank)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """From (..., in) to (..., out)."""
        return functional.linear(_ACTIVATIONS[self.activation](functional.linear(x, self.a)), self.b, self.bias)


class SLTrain(Method):
    """Sparse plus low rank: ``W = (alpha / rank) B A + S``; ``S`` is zero outside of a random support that never changes.

    ``W`` is made for every use and again in the backward pass, so that only the factors, the values and the support are kept.
    ``A`` starts as a linear layer does (uniform), ``B`` at zero, the values uniform in ``+-1 / sqrt(in)``.

    Args:
        density: Share of the elements in the support, in (0, 1).
        alpha: Scale of the low-rank part, times the rank.
        first_dense: Leave the first block dense.

    Raises:
        ValueError: an argument out of range.

    Source: Han et al., "SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining",
    arXiv 2406.02214; initial values as in its published code.
    """

    def __init__(self, density: float = 0.03, alpha: float = 32.0, first_dense: bool = False) -> None:
        self.density = check_float("SLTrain", "density", density, 0.0, 1.0, open_low=True, open_high=True)
        self.alpha = check_float("SLTrain", "alpha", alpha, 0.0, open_low=True)
        self.first_dense = check_flag("SLTrain", "first_dense", first_dense)

    def layer(self, linear: nn.Linear, rank: int, name: str, first: bool) -> nn.Module:
        """See :meth:`Method.layer`."""
        return linear if first and self.first_dense else SparseLinear(linear, rank, self.density, self.alpha / rank)

    def cost(self, linear: nn.Linear, rank: int, first: bool) -> int:
        """See :meth:`Method.cost`."""
        sparse = 0 if first and self.first_dense else _support(linear, self.density)
        return super().cost(linear, rank, first) + sparse


def _support(linear: nn.Linear, density: float) -> int:
    return max(1, int(density * linear.weight.numel()))


class SparseLinear(Factors):
    """``y = (scale b a + S) x + bias``; ``values`` are those of ``S`` at the flat positions ``support``."""

    support: Tensor

    def __init__(self, linear: nn.Linear, rank: int, density: float, scale: float) -> None:
        super().__init__(linear, rank)
        self.scale, like = scale, linear.weight
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        nn.init.zeros_(self.b)
        count = _support(linear, density)
        bound = 1 / math.sqrt(self.in_features)
        self.values = nn.Parameter(torch.empty(count, device=like.device, dtype=like.dtype).uniform_(-bound, bound))
        chosen = torch.randperm(like.numel(), device=like.device)[:count]
        self.register_buffer("support", chosen.sort().values)

    def weight(self) -> Tensor:
        """``W``, of shape (out, in)."""
        return _weight(self.a, self.b, self.values, self.support, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """From (..., in) to (..., out)."""
        y: Tensor = _SparsePlusLowRank.apply(x, self.a, self.b, self.values, self.support, self.scale)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def _weight(a: Tensor, b: Tensor, values: Tensor, support: Tensor, scale: float) -> Tensor:
    weight = (b * scale) @ a
    weight.view(-1).index_add_(0, support, values.to(weight.dtype))
    return weight


class _SparsePlusLowRank(torch.autograd.Function):
    """``W x`` without keeping ``W`` for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, values: Tensor, support: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, a, b, values, support)
        ctx.scale = scale
        return functional.linear(x, _weight(a, b, values, support, scale))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, values, support = ctx.saved_tensors
        kind = grad.dtype
        gx = None
        if ctx.needs_input_grad[0]:
            gx = (grad @ _weight(a.to(kind), b.to(kind), values, support, ctx.scale)).to(x.dtype)
        whole = grad.flatten(0, -2).t() @ x.flatten(0, -2).to(kind)
        ga = ctx.scale * (b.to(kind).t() @ whole)
        gb = ctx.scale * (whole @ a.to(kind).t())
        return gx, ga.to(a.dtype), gb.to(b.dtype), whole.view(-1)[support].to(values.dtype), None, None
