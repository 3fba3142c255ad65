"""Products of large matrices with thin ones, in the forms that are fast on a CPU.

One thread reads a matrix of 1024 x 1024 as fast as memory gives it only if the thin factor lies the right way round: with
MKL on an AMD processor ``M^T P`` takes ten times as long as ``(P^T M)^T``, and a batch of small products as long as its slowest
form. So matrices go one by one, with the thin factors laid out for them. Other devices get one batched product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ROWS = 1 << 18
"""Elements of the result that are worked on at a time when columns are added one after another."""
_FEW = 4
"""Up to so many columns a product with a matrix is fastest column by column."""


def times(matrices: Sequence[Tensor], q: Tensor) -> Tensor:
    """``M_i Q_i`` for matrices (a, b) and ``q`` (count, b, r): (count, a, r)."""
    if q.device.type != "cpu":
        return torch.stack(list(matrices)) @ q
    rows = q.mT.contiguous()
    if q.shape[-1] <= _FEW:
        return torch.stack([m @ row.T for m, row in zip(matrices, rows, strict=True)])
    return torch.stack([row @ m.T for m, row in zip(matrices, rows, strict=True)]).mT.contiguous()


def transposed_times(matrices: Sequence[Tensor], p: Tensor) -> Tensor:
    """``M_i^T P_i`` for matrices (a, b) and ``p`` (count, a, r): (count, b, r)."""
    if p.device.type != "cpu":
        return torch.stack(list(matrices)).mT @ p
    return torch.stack([row @ m for m, row in zip(matrices, p.mT.contiguous(), strict=True)]).mT.contiguous()


def add_products(results: Sequence[Tensor], p: Tensor, q: Tensor, factor: float, clear: bool = False) -> None:
    """``R_i += factor P_i Q_i^T`` in place for ``p`` (count, a, r), ``q`` (count, b, r) and matrices ``R`` (a, b).

    With ``clear`` their contents are ignored, which must not be numbers then.
    """
    for result, left, right in zip(results, p if factor == 1.0 else p * factor, q.mT.contiguous(), strict=True):
        if left.device.type == "cpu" and left.shape[1] <= _FEW:
            _add_columns(result, left, right, clear)
        elif clear:
            torch.mm(left, right, out=result)
        else:
            result.addmm_(left, right)


def _add_columns(result: Tensor, left: Tensor, right: Tensor, clear: bool) -> None:
    step = max(1, _ROWS // right.shape[1])
    for first in range(0, len(result), step):
        rows, part = left[first : first + step], result[first : first + step]
        for k in range(left.shape[1]):
            if clear and not k:
                torch.mm(rows[:, :1], right[:1], out=part)
            else:
                part.addmm_(rows[:, k : k + 1], right[k : k + 1])
