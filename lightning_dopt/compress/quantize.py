"""Blockwise integer quantization: few bits per element and one scale per block."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_dopt._checks import check_flag, check_int
from lightning_dopt.compress._wire import (
    FlatCompressor,
    add_scaled,
    block_count,
    pack_nibbles,
    section,
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

    def _steps(self, x: Tensor, step: Tensor, scratch: Tensor) -> None:
        """Turn ``step``, which holds the largest magnitude of each row of ``x``, into the steps of the rows."""
        step.div_(self._levels).clamp_(min=SMALLEST_STEP)

    def _quantize(self, flat: Tensor, steps: Tensor, codes: Tensor, seed: int) -> None:
        """Fill the ``steps`` (float32, one per block) and the ``codes`` (int8, one per element)."""
        scratch = torch.empty(0, device=flat.device)
        dither = Dither(seed, flat.device) if self.stochastic else None
        row = 0
        for first, last, width in tiles(flat.numel(), self.block, flat.device):
            rows = (last - first) // width
            x, step = flat[first:last].view(rows, width), steps[row : row + rows]
            values = scratch.resize_(last - first).view(rows, width)
            torch.amax(torch.abs(x, out=values), dim=1, out=step)
            self._steps(x, step, values)
            torch.mul(x, step.reciprocal()[:, None], out=values)
            if dither is None:
                values.round_()
            else:
                dither.add_to(values.view(-1))
                values.floor_().clamp_(-self._levels, self._levels)
            codes[first:last] = values.view(-1)
            row += rows


class Dither:
    """A stream of uniform numbers from (0, 1), 16 bits each: four to one draw of the generator."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)
        self._words = torch.empty(0, dtype=torch.int64, device=device)
        self._noise = torch.empty(0, device=device)

    def add_to(self, values: Tensor) -> None:
        """Add the next numbers to a vector."""
        words = self._words.resize_(-(-values.numel() // 4)).random_(-(2**63), None, generator=self._generator)
        noise = self._noise.resize_(values.numel()).copy_(words.view(torch.int16)[: values.numel()])
        # The middles of the 2^16 intervals: their mean is one half exactly, so rounding down is unbiased.
        values.add_(noise.add_(2.0**15 + 0.5).mul_(2.0**-16))


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
        payload[4 * blocks :] = pack_nibbles(codes)
        return payload

    def unpack_add(self, payload: Tensor, flat: Tensor, weight: float, seed: int) -> None:
        """Add step times code."""
        blocks = block_count(flat.shape, self.block)
        steps = section(payload, 0, blocks, torch.float32)
        add_scaled(flat, unpack_nibbles(payload[4 * blocks :], flat.numel()), steps, self.block, weight)
