"""A grid that is shifted at random before rounding to nearest: unbiased, with a third of stochastic rounding's variance."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dopt._checks import check_int
from lightning_dopt.compress._wire import FlatCompressor, block_count, pack_nibbles, section, tiles, unpack_nibbles
from lightning_dopt.compress.base import Shape, numel
from lightning_dopt.compress.quantize import SMALLEST_STEP


class RandomShift(FlatCompressor):
    """``C(x) = s (round(x / s - r) + r)`` with one ``r`` from ``U(-1/2, 1/2)`` and ``s = max|x| / (L - 1/2)`` per block.

    The message is the float32 steps, then codes from ``-L`` to ``L``, with ``L = 127`` for 8 bits and 7 for 4. The shifts
    are drawn from the seed, by sender and receivers alike. The error of every element is uniform in ``(-s/2, s/2)``
    whatever its value, so the mean is ``x`` and the variance ``s^2 / 12``, where stochastic rounding has up to
    ``s^2 / 4``. With ``b`` elements in a block ``omega = b / (12 (L - 1/2)^2)``, attained by one element that is not zero.
    Errors within a block are not independent of each other. Made for the weights of sharded training.

    Source: Markov et al., "Quantized Distributed Training of Large Models with Convergence Guarantees", ICML 2023
    (arXiv:2302.02390), definition 1; symmetric steps instead of the range of a bucket, so that zero blocks cost nothing.

    Args:
        bits: 4 or 8.
        block: elements that share one step and one shift, in row-major order; at least 1.

    Raises:
        ValueError: other ``bits``, or ``block`` below 1.
    """

    def __init__(self, bits: int = 8, block: int = 1024) -> None:
        if bits not in (4, 8) or isinstance(bits, bool):
            raise ValueError(f"RandomShift(bits={bits!r}): must be 4 or 8")
        self.bits = bits
        self.block = check_int("RandomShift", "block", block, 1)

    @property
    def _top(self) -> float:
        """``L - 1/2``: a shift moves the largest element by up to half a step."""
        return 2.0 ** (self.bits - 1) - 1.5

    def payload_bytes(self, shape: Shape) -> int:
        """``4 ceil(d / block)`` and ``d`` or ``ceil(d / 2)``."""
        return 4 * block_count(shape, self.block) + (numel(shape) * self.bits + 7) // 8

    def floats_at(self, shape: Shape) -> tuple[int, int]:
        """The steps, one per block."""
        return 0, block_count(shape, self.block)

    def variance(self, shape: Shape) -> float:
        """``b / (12 (L - 1/2)^2)`` with ``b = min(block, d)``."""
        return min(self.block, numel(shape)) / (12.0 * self._top**2)

    def contraction(self, shape: Shape) -> float | None:
        """``1 - omega`` where that is positive, else ``None``."""
        omega = self.variance(shape)
        return 1.0 - omega if omega < 1.0 else None

    def pack(self, flat: Tensor, seed: int) -> Tensor:
        """Steps, then codes."""
        blocks = block_count(flat.shape, self.block)
        payload = torch.empty(self.payload_bytes(flat.shape), dtype=torch.uint8, device=flat.device)
        steps, shifts = section(payload, 0, blocks, torch.float32), self._shifts(blocks, seed, flat.device)
        whole = payload[4 * blocks :].view(torch.int8)
        codes = whole if self.bits == 8 else torch.empty(flat.numel(), dtype=torch.int8, device=flat.device)
        scratch = torch.empty(0, device=flat.device)
        row = 0
        for first, last, width in tiles(flat.numel(), self.block, flat.device):
            rows = (last - first) // width
            x, step = flat[first:last].view(rows, width), steps[row : row + rows]
            values = scratch.resize_(last - first).view(rows, width)
            torch.amax(torch.abs(x, out=values), dim=1, out=step)
            empty = step == 0
            step.div_(self._top).clamp_(min=SMALLEST_STEP)
            torch.mul(x, step.reciprocal()[:, None], out=values)
            values.sub_(shifts[row : row + rows, None]).round_().clamp_(-self._top - 0.5, self._top + 0.5)
            codes[first:last] = values.view(-1)
            step.masked_fill_(empty, 0.0)  # a block of zeros decodes to zeros, not to its shift
            row += rows
        if self.bits == 4:
            payload[4 * blocks :] = pack_nibbles(codes)
        return payload

    def unpack_add(self, payload: Tensor, flat: Tensor, weight: float, seed: int) -> None:
        """Add step times code plus shift."""
        blocks = block_count(flat.shape, self.block)
        steps, shifts = section(payload, 0, blocks, torch.float32), self._shifts(blocks, seed, flat.device)
        packed = payload[4 * blocks :]
        codes = packed.view(torch.int8) if self.bits == 8 else unpack_nibbles(packed, flat.numel())
        factors = steps * weight
        scratch = torch.empty(0, dtype=torch.promote_types(flat.dtype, torch.float32), device=flat.device)
        row = 0
        for first, last, width in tiles(flat.numel(), self.block, flat.device):
            rows = (last - first) // width
            values = scratch.resize_(last - first).copy_(codes[first:last])
            values.view(rows, width).add_(shifts[row : row + rows, None]).mul_(factors[row : row + rows, None])
            flat[first:last].add_(values)
            row += rows

    def _shifts(self, blocks: int, seed: int, device: torch.device) -> Tensor:
        """One number from (-1/2, 1/2) for each block. Drawn on the CPU: all devices must agree."""
        generator = torch.Generator().manual_seed(seed % (1 << 63))
        return torch.rand(blocks, generator=generator).sub_(0.5).to(device)
