"""A loss whose gradients are there already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class _HandOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf: Tensor, value: Tensor, gradients: list[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients, factor = ctx.gradients, float(upstream)
        ctx.gradients = [None] * len(gradients)  # a second backward would add them twice
        return None, None, None, *(g if g is None or factor == 1.0 else g * factor for g in gradients)


def loss_with_gradients(value: Tensor, parameters: Sequence[nn.Parameter], gradients: list[Tensor | None]) -> Tensor:
    """A tensor like ``value`` whose ``backward()`` adds the given gradients to the parameters' own.

    Autograd treats it as any loss: its gradients scale with what is done to it, such as the division by the number of
    accumulated batches.

    Args:
        value: The loss, a number.
        parameters: What it depends on.
        gradients: Its gradient for each of them; ``None`` if it does not depend on one.
    """
    leaf = torch.zeros((), dtype=value.dtype, device=value.device, requires_grad=True)  # there may be no parameters
    result: Tensor = _HandOver.apply(leaf, value, gradients, *parameters)
    return result


def take_gradients(
    parameters: Sequence[nn.Parameter], to: Sequence[Tensor | None] | None = None
) -> list[Tensor | None]:
    """The gradients of parameters, which are given others instead (by default none)."""
    held = [p.grad for p in parameters]
    for p, gradient in zip(parameters, to if to is not None else [None] * len(held), strict=True):
        p.grad = gradient
    return held
