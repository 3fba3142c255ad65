"""Blockwise integer quantization: few bits per element and one scale per block."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_dopt._checks import check_flag, check_int
from lightning_dopt._random import key
from lightning_dopt.compress import _fused as fused
from lightning_dopt.compress._wire import (
    FlatCompressor,
    add_scaled,
    block_count,
    pack_nibbles,
    peaks,
    section,
    tile_of,
    tiles,
    unpack_nibbles,
)
from lightning_dopt.compress.base import Shape, numel

SMALLEST_STEP = 2.0**-126
"""Steps are normal float32 numbers, so that a block of zeros or subnormal numbers divides by no zero."""


class Blockwise(FlatCompressor):
    """``C(x) = s * code`` with the step ``s = max|x| / L`` of each block and integer codes from ``-L`` to ``L``.

    The message is the float32 steps followed by the codes. The largest element of a block arrives exactly (but for
    float32 rounding), and the bounds below rest on that: with ``m = max|x|`` and ``n = b - 1`` other elements in a
    block,

    - rounding to nearest errs by at most ``min(s/2, |x_i|)``, since zero is a level. So the errors sum to some
      ``E <= n s^2 / 4`` while ``||x||^2 >= m^2 + E``, and ``E / (m^2 + E)`` is largest at the largest ``E``:
      ``||C(x) - x||^2 <= n / (4 L^2 + n) ||x||^2``.
    - stochastic rounding of ``x_i = (j + f) s`` has variance ``f (1 - f) s^2``. The ratio of the summed variances to
      ``||x||^2 >= L^2 s^2 + sum f^2 s^2`` is at most ``omega`` iff ``sum (f - (1 + omega) f^2) <= omega L^2``; each
      term is at most ``1 / (4 (1 + omega))``, which gives ``omega (1 + omega) = n / (4 L^2)``.

    Both are attained, and both hold for the whole vector because they hold for each block.
    """

    _levels: int

    def __init__(self, block: int, stochastic: bool = False) -> None:
        name = type(self).__name__
        self.block = check_int(name, "block", block, 1)
        self.stochastic = check_flag(name, "stochastic", stochastic)

    @property
    def private(self) -> bool:  # type: ignore[override]
        """Stochastic rounding errors must be independent on the ranks, else they do not average out."""
        return self.stochastic

    def floats_at(self, shape: Shape) -> tuple[int, int]:
        """The steps, one per block."""
        return 0, block_count(shape, self.block)

    def _others(self, shape: Shape) -> int:
        return max(0, min(self.block, numel(shape)) - 1)

    def contraction(self, shape: Shape) -> float | None:
        """To nearest ``4 L^2 / (4 L^2 + b - 1)``; stochastic ``1 - omega`` where that is positive, else ``None``."""
        omega = self.variance(shape)
        if omega is None:
            return 4 * self._levels**2 / (4 * self._levels**2 + self._others(shape))
        return 1.0 - omega if omega < 1.0 else None

    def variance(self, shape: Shape) -> float | None:
        """Stochastic ``(sqrt(1 + (b - 1) / L^2) - 1) / 2`` with ``b = min(block, d)``; to nearest is biased."""
        if not self.stochastic:
            return None
        return (math.sqrt(1.0 + self._others(shape) / self._levels**2) - 1.0) / 2.0

    @property
    def _spills(self) -> bool:
        """Whether what is rounded may lie beyond a byte, so that it must be cut before it becomes one."""
        return self._levels == 127

    def _steps(self, x: Tensor, step: Tensor, scratch: Tensor | None) -> None:
        """Compute the steps of the rows of ``x``; the scratch has the shape of ``x``, none of it is for compiled loops."""
        peaks(x, step, scratch).div_(self._levels).clamp_(min=SMALLEST_STEP)

    def _quantize(self, flat: Tensor, steps: Tensor, codes: Tensor, seed: int) -> None:
        """Fill the ``steps`` (float32, one per block) and the ``codes`` (int8, one per element)."""
        scratch = torch.empty(0, device=flat.device)
        dither = Dither(seed, flat.device) if self.stochastic else None
        row = self._quantize_compiled(flat, steps, codes, dither)
        for first, last, width in tiles(flat.numel(), self.block, flat.device, row * self.block):
            rows = (last - first) // width
            x, step = flat[first:last].view(rows, width), steps[row : row + rows]
            values = scratch.resize_(last - first).view(rows, width)
            self._steps(x, step, values)
            torch.mul(x, step.reciprocal()[:, None], out=values)
            if dither is not None:
                dither.add_to(values.view(-1))
                if self._spills:
                    values.clamp_(-self._levels, self._levels)
            part = codes[first:last].copy_(values.round_().view(-1))
            if dither is not None and not self._spills:
                part.clamp_(-self._levels, self._levels)  # a quarter of the work that it is for float32
            row += rows

    def _quantize_compiled(self, flat: Tensor, steps: Tensor, codes: Tensor, dither: Dither | None) -> int:
        """The same for the first blocks; answers how many."""
        tile = tile_of(self.block)
        rows = fused.rows_of(flat, tile if dither is not None else self.block) * (tile // self.block if dither else 1)
        if rows:
            x = flat[: rows * self.block].view(rows, self.block)
            self._steps(x, steps[:rows], None)
            factors, codes = steps[:rows].reciprocal(), codes[: x.numel()].view_as(x)
            if dither is None:
                fused.run(fused.rounded, x, factors, codes)
            else:
                noise, turns = dither.tiles(x.numel() // tile, tile, torch.float32)
                shape = (len(turns), tile // self.block, self.block)
                top = torch.tensor(float(self._levels))
                fused.run(
                    fused.dithered,
                    x.view(shape),
                    factors.view(shape[:2]),
                    noise.view(1, *shape[1:]),
                    turns,
                    top,
                    codes.view(shape),
                )
        return rows


class Dither:
    """A stream of random numbers for rounding, uniform on the 2^15 middles of equal parts of (-1/2, 1/2).

    Rounded to nearest, ``y + u`` is ``y`` in the mean but for ``2^-16`` at most, and a whole number stays what it is.
    The numbers of the first call are independent. Those of a later call are the same, all turned by one new random
    amount (added and wrapped around): drawing them costs more than the rest of a compressor. Any two numbers of a stream, even
    any three, are still independent, so means, variances and ``E||C(x) - x||^2`` are those of independent rounding;
    only for four numbers, two places in two calls each, one follows from the others. A GPU gets them all in one call.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed, self._calls = seed, 0
        self._base = torch.empty(0, dtype=torch.int16, device=device)
        self._turned, self._noise = torch.empty_like(self._base), torch.empty(0, device=device)
        self._whole = torch.empty(0, dtype=torch.int32, device=device)

    def add_to(self, values: Tensor, steps: Tensor | None = None) -> None:
        """Add the next numbers to a float32 vector, in units of 1 or of the ``steps`` of its elements."""
        noise = self._noise.resize_(values.numel()).copy_(self.next(values.numel()))
        if steps is None:
            values.add_(noise, alpha=2.0**-16)
        else:
            values.addcmul_(noise, steps, value=2.0**-16)

    def carry(self, bits: Tensor) -> Tensor:
        """Round float32 numbers, given as int32, to a power of two: add to the mantissas, where an excess is a carry."""
        noise = self._whole.resize_(bits.numel()).copy_(self.next(bits.numel()))
        return bits.add_(noise.add_(2**15), alpha=2**7)

    def next(self, count: int) -> Tensor:
        """The next numbers times 2^16: odd int16, valid until the next call."""
        self._calls += 1
        if count > self._base.numel():
            self._base = self._draw(count)
            return self._base
        turn = (key(self._seed, self._calls) & 0xFFFE) - 2**15
        return torch.add(self._base[:count], turn, out=self._turned.resize_(count))

    def tiles(self, count: int, tile: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What the next ``count`` calls for ``tile`` numbers give, for compiled loops: numbers and turns, one for each call.

        As float32 in units of 1, to be added and wrapped around to (-1/2, 1/2); as int32 from 0 to 2^16, to be added and cut.
        The numbers are one row, the turns a vector.
        """
        base = self.next(tile)[None]
        later = [(key(self._seed, self._calls + k) & 0xFFFE) - 2**15 for k in range(1, count)]
        self._calls += count - 1
        turns = torch.tensor([0, *later], dtype=dtype)
        if dtype == torch.int32:
            return base.to(dtype).add_(2**15), turns
        return base.to(dtype).mul_(2.0**-16), turns.mul_(2.0**-16)

    def _draw(self, count: int) -> Tensor:
        generator = torch.Generator(self._base.device).manual_seed(key(self._seed, self._calls))
        words = torch.empty(-(-count // 4), dtype=torch.int64, device=self._base.device)
        words.random_(-(2**63), None, generator=generator)  # four numbers to a draw
        return words.view(torch.int16)[:count].bitwise_or_(1)


class Int8(Blockwise):
    """One byte per element with a float32 scale per ``block`` elements: ``d + 4 ceil(d / block)`` bytes.

    Codes from -127 to 127. With the default block an element errs by less than 0.4 % of the largest of its block.

    Args:
        block: elements that share one scale, in row-major order; at least 1.
        stochastic: round up or down at random so that the mean is exact (unbiased), instead of to nearest.

    Raises:
        ValueError: ``block`` below 1 or ``stochastic`` not a bool.
    """

    _levels = 127

    def __init__(self, block: int = 256, stochastic: bool = False) -> None:
        super().__init__(block, stochastic)

    def payload_bytes(self, shape: Shape) -> int:
        """``4 ceil(d / block) + d``."""
        return 4 * block_count(shape, self.block) + numel(shape)

    def pack(self, flat: Tensor, seed: int) -> Tensor:
        """Steps, then codes."""
        blocks = block_count(flat.shape, self.block)
        payload = torch.empty(4 * blocks + flat.numel(), dtype=torch.uint8, device=flat.device)
        codes = payload[4 * blocks :].view(torch.int8)
        self._quantize(flat, section(payload, 0, blocks, torch.float32), codes, seed)
        return payload

    def unpack_add(self, payload: Tensor, flat: Tensor, weight: float, seed: int) -> None:
        """Add step times code."""
        blocks = block_count(flat.shape, self.block)
        steps = section(payload, 0, blocks, torch.float32)
        add_scaled(flat, payload[4 * blocks :].view(torch.int8), steps, self.block, weight)


class Int4(Blockwise):
    """Half a byte per element with a float32 scale per ``block`` elements: ``ceil(d / 2) + 4 ceil(d / block)`` bytes.

    Codes from -7 to 7, two to a byte: the first half of the vector in the low nibbles, the second in the high ones.

    Args:
        block: elements that share one scale, in row-major order; at least 1. The default costs 1/32 byte per element.
        stochastic: round up or down at random so that the mean is exact (unbiased), instead of to nearest.

    Raises:
        ValueError: ``block`` below 1 or ``stochastic`` not a bool.
    """

    _levels = 7

    def __init__(self, block: int = 128, stochastic: bool = False) -> None:
        super().__init__(block, stochastic)

    def payload_bytes(self, shape: Shape) -> int:
        """``4 ceil(d / block) + ceil(d / 2)``."""
        return 4 * block_count(shape, self.block) + (numel(shape) + 1) // 2

    def pack(self, flat: Tensor, seed: int) -> Tensor:
        """Steps, then nibbles."""
        blocks = block_count(flat.shape, self.block)
        payload = torch.empty(self.payload_bytes(flat.shape), dtype=torch.uint8, device=flat.device)
        codes = torch.empty(flat.numel(), dtype=torch.int8, device=flat.device)
        self._quantize(flat, section(payload, 0, blocks, torch.float32), codes, seed)
        pack_nibbles(codes, payload[4 * blocks :])
        return payload

    def unpack_add(self, payload: Tensor, flat: Tensor, weight: float, seed: int) -> None:
        """Add step times code."""
        blocks = block_count(flat.shape, self.block)
        steps = section(payload, 0, blocks, torch.float32)
        add_scaled(flat, unpack_nibbles(payload[4 * blocks :], flat.numel()), steps, self.block, weight)
