"""One exchange: the weighted sum, or the median."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_dopt.combine.base import Combine, Decode, WeightedSum

if TYPE_CHECKING:
    from lightning_dopt.plan import Sync


class Mixing(WeightedSum):
    """The weighted sum with the weights of the topology: ``sum_j W[i, j] m_j``."""

    def __init__(self) -> None:
        pass


class Median(Combine):
    """The coordinate-wise median of all messages heard, this rank's own included; weights are ignored.

    Robust against a minority of arbitrary messages. With an even number of messages the mean of the two middle values.
    Costs one dense copy per message.
    """

    linear = False

    def __init__(self) -> None:
        pass

    def check(self, sync: Sync) -> None:
        """See :meth:`Combine.check`."""
        if getattr(sync.codec, "needs_sum", False):
            raise ValueError(f"Sync(codec={sync.codec!r}, combine={self!r}): this memory needs a weighted sum")

    def __call__(self, messages: Sequence[tuple[float, Decode]], out: Tensor) -> None:
        """See :class:`Combine`."""
        stack = torch.zeros((len(messages), *out.shape), dtype=out.dtype, device=out.device)
        for row, (_, decode) in zip(stack, messages, strict=True):
            decode(row, 1.0)
        ordered = stack.sort(dim=0).values
        low, high = ordered[(len(messages) - 1) // 2], ordered[len(messages) // 2]
        out.copy_(low).add_(high).mul_(0.5)
