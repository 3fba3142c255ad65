"""A batch cut into micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from torch import Tensor


def cut_batch(batch: Any, microbatches: int) -> tuple[list[Any], list[float]]:
    """The parts of a batch, and the share of the samples in each.

    Every tensor in the batch, however nested in tuples, lists and dictionaries, is cut along its first dimension into
    parts whose sizes differ by at most one; all else goes into every part.

    Raises:
        ValueError: The batch has no tensor with a first dimension, tensors of several lengths, or fewer samples than
            micro-batches.
    """
    total = samples(batch)
    if total < microbatches:
        raise ValueError(f"a batch of {total} samples cannot be cut into {microbatches} micro-batches")
    ends = [total * k // microbatches for k in range(microbatches + 1)]
    spans = list(pairwise(ends))
    return [_part(batch, first, last) for first, last in spans], [(last - first) / total for first, last in spans]


def samples(batch: Any) -> int:
    """How many samples a batch has.

    Raises:
        ValueError: The batch has no tensor with a first dimension, or tensors of several lengths.
    """
    sizes = sorted({len(t) for t in tensors(batch) if t.dim()})
    if len(sizes) != 1:
        raise ValueError(f"a batch must have tensors of one length along their first dimension, not {sizes}")
    return sizes[0]


def tensors(batch: Any) -> Iterator[Tensor]:
    """All tensors in a batch."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, dict):
        for value in batch.values():
            yield from tensors(value)
    elif isinstance(batch, (tuple, list)):
        for value in batch:
            yield from tensors(value)


def _part(batch: Any, first: int, last: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[first:last] if batch.dim() else batch
    if isinstance(batch, dict):
        return type(batch)({name: _part(value, first, last) for name, value in batch.items()})
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_part(value, first, last) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(_part(value, first, last) for value in batch)
    return batch
