"""Combine: how the messages of several ranks become one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lightning_dopt._part import Part


class Decode(Protocol):
    """Adds ``weight`` times one rank's decoded message to ``out``."""

    def __call__(self, out: Tensor, weight: float) -> None:
        """Accumulate into ``out`` in place."""


class Combine(Part, ABC):
    """A rule that turns weighted messages into one tensor.

    Messages come in ascending order of their rank, the same on all ranks that get the same messages, so that results
    are reproducible to the last bit.
    """

    linear: bool = True
    """Whether the result is a weighted sum: sums may then be formed on the way (all-reduce, shift memories)."""

    @abstractmethod
    def __call__(self, messages: Sequence[tuple[float, Decode]], out: Tensor) -> None:
        """Combine ``(weight, decode)`` pairs into ``out``, which holds zeros."""


class Mixing(Combine):
    """The weighted sum with the weights of the topology: ``sum_j W[i, j] m_j``."""

    def __init__(self) -> None:
        pass

    def __call__(self, messages: Sequence[tuple[float, Decode]], out: Tensor) -> None:
        """See :class:`Combine`."""
        for weight, decode in messages:
            decode(out, weight)


class Median(Combine):
    """The coordinate-wise median of all messages heard, this rank's own included; weights are ignored.

    Robust against a minority of arbitrary messages. With an even number of messages the mean of the two middle values.
    Costs one dense copy per message.
    """

    linear = False

    def __init__(self) -> None:
        pass

    def __call__(self, messages: Sequence[tuple[float, Decode]], out: Tensor) -> None:
        """See :class:`Combine`."""
        stack = torch.zeros((len(messages), *out.shape), dtype=out.dtype, device=out.device)
        for row, (_, decode) in zip(stack, messages, strict=True):
            decode(row, 1.0)
        ordered = stack.sort(dim=0).values
        low, high = ordered[(len(messages) - 1) // 2], ordered[len(messages) // 2]
        out.copy_(low).add_(high).mul_(0.5)
