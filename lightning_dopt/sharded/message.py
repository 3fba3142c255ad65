"""What one rank's share of a group of parameters looks like on the wire."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_dopt.compress._wire import as_bytes, section
from lightning_dopt.compress.base import Compressor

Parts = Sequence[tuple[int, bool]]
"""How a share is put together: elements of each parameter, and whether they travel as they are."""


class Message:
    """Packs a share: first the elements that travel as they are, then all others as one message of the compressor.

    Args:
        compressor: Of the elements that do not travel as they are.
        parts: See :data:`Parts`.
        dtype: Of the share; elements that travel as they are keep it.
    """

    def __init__(self, compressor: Compressor, parts: Parts, dtype: torch.dtype) -> None:
        self.compressor, self.dtype = compressor, dtype
        self.exact = sum(n for n, exact in parts if exact)
        self.packed = sum(n for n, exact in parts if not exact)
        self._runs = list(_merged(parts))

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return self.exact * self.dtype.itemsize + (self.compressor.payload_bytes((self.packed,)) if self.packed else 0)

    def pack(self, share: Tensor, seed: int) -> Tensor:
        """A share (1-D, contiguous) as bytes."""
        pieces = [as_bytes(v) for v in self._pieces(share, exact=True)]
        if self.packed:
            values = self._pieces(share, exact=False)
            pieces.append(self.compressor.encode(values[0] if len(values) == 1 else torch.cat(values), seed))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def unpack_add(self, payload: Tensor, out: Tensor, seed: int) -> None:
        """Add the decoded share to ``out`` (1-D, contiguous, any floating point type)."""
        place = 0
        for target in self._pieces(out, exact=True):
            target.add_(section(payload, place * self.dtype.itemsize, target.numel(), self.dtype))
            place += target.numel()
        if not self.packed:
            return
        body, targets = payload[self.exact * self.dtype.itemsize :], self._pieces(out, exact=False)
        if len(targets) == 1:
            self.compressor.decode_add(body, targets[0], 1.0, seed)
            return
        values = self.compressor.decode(body, (self.packed,), torch.promote_types(out.dtype, torch.float32), seed)
        for target, value in zip(targets, torch.split(values, [t.numel() for t in targets]), strict=True):
            target.add_(value)

    def _pieces(self, share: Tensor, exact: bool) -> list[Tensor]:
        return [share[first:last] for first, last, as_is in self._runs if as_is == exact]


def _merged(parts: Parts) -> Iterator[tuple[int, int, bool]]:
    """Neighbours of one kind as one run ``(first, last, exact)``."""
    first = last = 0
    kind: bool | None = None
    for count, exact in parts:
        if exact != kind and last > first and kind is not None:
            yield first, last, kind
            first = last
        kind, last = exact, last + count
    if last > first and kind is not None:
        yield first, last, kind
