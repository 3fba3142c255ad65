"""One exchange: every coordinate goes the way that most messages point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_dopt.combine.base import Combine, Decode

if TYPE_CHECKING:
    from lightning_dopt.plan import Sync


class MajorityVote(Combine):
    """``sign(sum_j W[i, j] sign(m_j))`` in every coordinate: +1, -1, or 0 for a tie or where no message has a sign.

    What an optimizer is given are signs alone, so that one loud rank counts as much as a quiet one, and a minority of
    arbitrary ones cannot turn a clear majority. With ``codec=Sign(block=...)`` messages take one bit per element, and
    zeros vote +1; their scales have no effect here. Not a contraction, as it has no scale: it is for gradients and an
    optimizer whose learning rate is meant for signs. Costs one dense copy.

    Source: Bernstein et al., "signSGD with Majority Vote is Communication Efficient And Fault Tolerant", ICLR 2019,
    algorithm 1; ties, which it leaves open, do not move.
    """

    linear = False

    def __init__(self) -> None:
        pass

    def check(self, sync: Sync) -> None:
        """See :meth:`Combine.check`."""
        if getattr(sync.codec, "needs_sum", False):
            raise ValueError(f"Sync(codec={sync.codec!r}, combine={self!r}): this memory needs a weighted sum")
        if sync.what.slot != "gradients":
            raise ValueError(f"Sync(what={sync.what!r}, combine={self!r}): votes are signs alone, use what='gradients'")

    def __call__(self, messages: Sequence[tuple[float, Decode]], out: Tensor) -> None:
        """See :class:`Combine`."""
        voice = torch.zeros_like(out)
        for weight, decode in messages:
            decode(voice.zero_(), 1.0)
            out.add_(voice.sign_(), alpha=weight)
        # Weights such as 1/6 sum to a tie only up to rounding.
        slack = len(messages) * torch.finfo(out.dtype).eps * sum(abs(weight) for weight, _ in messages)
        out.masked_fill_(out.abs() <= slack, 0.0).sign_()
