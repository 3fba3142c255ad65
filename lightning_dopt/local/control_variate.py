"""The shape that most corrections share: the inner optimizer steps with ``g - h``, where the ``h`` of all ranks cancel."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from lightning_dopt.local.base import BoundCorrection, Context
from lightning_dopt.slots import Field, Lane


class BoundControlVariate(BoundCorrection):
    """Keeps ``h`` per parameter, zero at the start, and subtracts it from every gradient.

    A parameter without a gradient in this step gets ``-h``: it takes part all the same.

    Args:
        context: The replica.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self.h = zeros(context.lanes)

    def on_gradient(self, names: Collection[str]) -> None:
        """See :class:`BoundCorrection`."""
        for gradient, h in gradients(self.context, self.h, names):
            gradient.sub_(h)

    def learn(self, lane: Lane, change: Tensor, factor: float, steps: int) -> None:
        """``h <- h + factor * change / (lr * steps)``, with each parameter's own learning rate."""
        h = self.h[index(self.context.lanes, lane)]
        for field, part, moved in zip(lane.fields, lane.views(h), lane.views(change), strict=True):
            rate = self.context.lr(field.name) * steps
            if rate > 0:  # a learning rate of zero (first warm-up step) moved nothing
                part.add_(moved, alpha=factor / rate)

    def state(self) -> dict[str, Tensor]:
        """See :class:`BoundCorrection`."""
        return {f"h{k}": h for k, h in enumerate(self.h)}


def zeros(lanes: Collection[Lane]) -> list[Tensor]:
    """One flat tensor of zeros per lane, in the type of its messages."""
    return [torch.zeros(lane.numel, dtype=lane.message_dtype, device=lane.live.device) for lane in lanes]


def index(lanes: Collection[Lane], lane: Lane) -> int:
    """Which of the lanes that hold all parameters this one is, or lies in the same tensors as."""
    first = lane.fields[0].name
    return next(k for k, other in enumerate(lanes) if other is lane or other.fields[0].name == first)


def fields(
    lanes: Collection[Lane], flats: Collection[Tensor], names: Collection[str]
) -> Iterator[tuple[Field, Tensor]]:
    """The named tensors and their stretches of flat buffers that are laid out like the lanes."""
    for lane, flat in zip(lanes, flats, strict=True):
        for field, part in zip(lane.fields, lane.views(flat), strict=True):
            if field.name in names:
                yield field, part


def gradients(context: Context, flats: Collection[Tensor], names: Collection[str]) -> Iterator[tuple[Tensor, Tensor]]:
    """The gradients of the named parameters, made if absent, beside their stretches of ``flats``."""
    for field, part in fields(context.lanes, flats, names):
        p = context.parameters[field.name]
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        yield p.grad, part
