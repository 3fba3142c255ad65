"""Few coefficients of a cosine transform are sent instead of few elements (DeMo)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_dopt._checks import check_float, check_int
from lightning_dopt.compress._wire import TILE, check_length
from lightning_dopt.compress.base import Compressor, Shape, numel
from lightning_dopt.compress.sparse_blocks import BlockTopK


class DCTTopK(Compressor):
    """The ``k`` largest coefficients of the two-dimensional cosine transform of every chunk: DeMo's compression.

    A tensor of two or more dimensions counts as the matrix ``(shape[0], rest)``, a vector as one row. It is cut into
    chunks of equal shape ``h x w``, at most ``chunk`` each way; where ``chunk`` does not divide a side, the chunks are
    smaller and a few zeros fill up the last ones (DeMo takes divisors, which for a prime side means chunks of one
    element). The orthonormal transform keeps lengths, so the contraction of :class:`BlockTopK` carries over.

    The message is that of :class:`BlockTopK` with one block per chunk: float32 values, and positions of 12 bits for
    64 x 64. Values are coefficients divided by a power of two, so that none leaves float32; ``Compose(DCTTopK(0.01), Int8())``
    sends them in fewer bytes. Biased: use it inside an error memory, where DeMo decays the memory (its momentum).

    Source: Peng, Quesnelle, Kingma, "DeMo: Decoupled Momentum Optimization", arXiv 2411.19870, whose default is 32 of
    64 x 64.

    Args:
        ratio: share of the coefficients to send, in (0, 1]; ``k`` is ``ratio h w`` rounded half up, at least 1.
        chunk: longest side of a chunk, 1 to 256.

    Raises:
        ValueError: ``ratio`` outside (0, 1] or ``chunk`` outside 1 to 256; in decoding, a position outside its chunk.
    """

    layerwise = True

    def __init__(self, ratio: float, chunk: int = 64) -> None:
        self.ratio = check_float("DCTTopK", "ratio", ratio, 0.0, 1.0, open_low=True)
        self.chunk = check_int("DCTTopK", "chunk", chunk, 1)
        if chunk > 256:
            raise ValueError(f"DCTTopK(chunk={chunk!r}): must be at most 256, so that positions take 16 bits")

    def grid(self, shape: Shape) -> tuple[int, int, int, int]:
        """``(rows, columns, h, w)``: how many chunks each way, and their shape."""
        a, b = _matrix(shape)
        rows, columns = -(-a // self.chunk), -(-b // self.chunk)
        return rows, columns, -(-a // max(1, rows)), -(-b // max(1, columns))

    def payload_bytes(self, shape: Shape) -> int:
        """That of :class:`BlockTopK` for as many blocks of ``h w`` as there are chunks."""
        selection, count = self._selection(shape)
        return selection.payload_bytes((count,))

    def values_at(self, shape: Shape) -> tuple[int, int]:
        """All values from the first byte on."""
        selection, count = self._selection(shape)
        return selection.values_at((count,))

    def contraction(self, shape: Shape) -> float:
        """``k / (h w)``, attained by a chunk whose coefficients are all equal."""
        selection, count = self._selection(shape)
        return selection.contraction((count,))

    def encode(self, x: Tensor, seed: int = 0) -> Tensor:
        """See :meth:`Compressor.encode`; the values are rounded to float32 first."""
        if not x.numel():
            return torch.empty(0, dtype=torch.uint8, device=x.device)
        rows, columns, h, w = self.grid(x.shape)
        matrix = x.detach().to(torch.float32).reshape(_matrix(x.shape)).contiguous()
        left, right = _cosines(h, matrix) * _unit(h), (_cosines(w, matrix) * _unit(w)).T
        z = matrix.new_empty(rows, columns, h, w)
        for first, last in self._strips(x.shape, x.device):
            part = matrix[first * h : last * h]
            gap = ((last - first) * h - len(part), columns * w - part.shape[1])
            part = pad(part, (0, gap[1], 0, gap[0])) if any(gap) else part
            part = left @ (part.reshape(-1, w) @ right).view(last - first, h, columns * w)
            z[first:last] = part.view(last - first, h, columns, w).transpose(1, 2)
        return self._selection(x.shape)[0].encode(z)

    def decode_add(self, payload: Tensor, out: Tensor, weight: float = 1.0, seed: int = 0) -> None:
        """See :meth:`Compressor.decode_add`.

        Raises:
            ValueError: the message does not have the length that the shape of ``out`` calls for, or is damaged.
        """
        check_length(self, payload, out.shape)
        if not out.numel():
            return
        rows, columns, h, w = self.grid(out.shape)
        selection, count = self._selection(out.shape)
        z = torch.zeros(count, dtype=torch.promote_types(out.dtype, torch.float32), device=out.device)
        selection.decode_add(payload, z, weight)
        left, right = (_cosines(h, z) / _unit(h)).T, _cosines(w, z) / _unit(w)
        z = z.view(rows, columns, h, w)
        a, b = _matrix(out.shape)
        target = out.detach()
        dense = target.view(a, b) if target.is_contiguous() else torch.zeros(a, b, dtype=z.dtype, device=z.device)
        for first, last in self._strips(out.shape, out.device):
            part = left @ z[first:last].transpose(1, 2).reshape(last - first, h, columns * w)
            part = (part.view(-1, w) @ right).view(-1, columns * w)
            lines = dense[first * h : last * h]
            lines.add_(part[: len(lines), :b])
        if not target.is_contiguous():
            target.add_(dense.view(out.shape))

    def _strips(self, shape: Shape, device: torch.device) -> list[tuple[int, int]]:
        """Rows of chunks that are transformed at a time; on a CPU few enough to stay in cache."""
        rows, columns, h, w = self.grid(shape)
        step = max(1, TILE // (columns * h * w)) if device.type == "cpu" else rows
        return [(first, min(first + step, rows)) for first in range(0, rows, step)]

    def _selection(self, shape: Shape) -> tuple[BlockTopK, int]:
        rows, columns, h, w = self.grid(shape)
        return BlockTopK(self.ratio, max(1, h * w)), rows * columns * h * w


def _matrix(shape: Shape) -> tuple[int, int]:
    """The matrix that a tensor counts as."""
    return (int(shape[0]), numel(shape[1:])) if len(shape) > 1 else (1, numel(shape))


def _unit(n: int) -> float:
    """A power of two that keeps the coefficients of ``n`` finite numbers, and all sums on the way, inside float32."""
    return 2.0 ** -(math.ceil(math.log2(math.sqrt(n))) + 1)


def _cosines(n: int, like: Tensor) -> Tensor:
    """The orthonormal matrix of the cosine transform (DCT-II): row ``i`` holds ``cos(pi i (2 j + 1) / (2 n))``, scaled."""
    i = torch.arange(n, dtype=torch.float64, device=like.device)
    matrix = torch.cos(math.pi / (2 * n) * i[:, None] * (2 * i + 1)) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix.to(like.dtype)
