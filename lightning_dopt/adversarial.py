"""Adversarial training: batches moved, within a radius, to where the loss is larger."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_dopt._checks import check_choice, check_float, check_int

Norm = Literal["linf", "l2"]


def attacked(
    loss: Callable[[Tensor], Tensor],
    x: Tensor,
    radius: float,
    steps: int = 7,
    step_size: float | None = None,
    norm: Norm = "linf",
    module: nn.Module | None = None,
) -> Tensor:
    """``x`` after projected gradient ascent on the loss: what each step of federated adversarial learning trains on.

    ``x <- project(x + step_size direction)``, ``steps`` times, onto the ball of ``radius`` around the start; the direction is the
    sign of the gradient, or with ``"l2"`` the gradient of each sample divided by its norm. Call it in ``training_step`` and
    return the loss at the result::

        x = attacked(lambda x: self.loss(x, y), x, radius=8 / 255, module=self)
        return self.loss(x, y)

    Parameters get no gradient from it, whatever the plan; federated adversarial learning is this with ``plans.fedavg``.

    Args:
        loss: The loss as a function of the inputs alone.
        x: Inputs of floating point, shape (samples, ...).
        radius: At least 0; 0 gives ``x`` back.
        steps: Ascent steps, at least 1.
        step_size: Length of a step; ``None`` means ``2.5 radius / steps``, which reaches the rim and can go along it.
        norm: What the radius bounds: every element, or the Euclidean norm of each sample.
        module: Its buffers (BatchNorm statistics) are as before afterwards.

    Raises:
        ValueError: an option out of range.

    Source: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", arXiv 1706.06083; Li, Song, Yang,
    "Federated Adversarial Learning", arXiv 2208.03635.
    """
    check_float("attacked", "radius", radius, 0.0)
    check_int("attacked", "steps", steps, 1)
    check_choice("attacked", "norm", norm, ("linf", "l2"))
    length = 2.5 * radius / steps if step_size is None else check_float("attacked", "step_size", step_size, 0.0)
    start = x.detach()
    if radius == 0.0:
        return start
    kept = [] if module is None else [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    moved = torch.zeros_like(start)
    for _ in range(steps):
        with torch.enable_grad():
            at = (start + moved).requires_grad_()
            (gradient,) = torch.autograd.grad(loss(at), at)
        moved = _within(moved + length * _direction(gradient, norm), radius, norm)
    with torch.no_grad():
        for buffer, before in kept:
            buffer.copy_(before)
    return start + moved


def _direction(gradient: Tensor, norm: Norm) -> Tensor:
    return (
        gradient.sign() if norm == "linf" else gradient / _norms(gradient).clamp_(min=torch.finfo(gradient.dtype).tiny)
    )


def _within(moved: Tensor, radius: float, norm: Norm) -> Tensor:
    if norm == "linf":
        return moved.clamp_(-radius, radius)
    return moved.mul_((radius / _norms(moved).clamp_(min=torch.finfo(moved.dtype).tiny)).clamp_(max=1.0))


def _norms(x: Tensor) -> Tensor:
    """Of every sample, in a shape that divides ``x``."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1).view(-1, *[1] * (x.dim() - 1))
