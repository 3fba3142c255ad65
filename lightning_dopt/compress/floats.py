"""Small floating point numbers: a byte with a mantissa, or powers of two alone."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_dopt._checks import check_choice, check_flag, check_int
from lightning_dopt.compress import _fused as fused
from lightning_dopt.compress._wire import (
    TILE,
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
from lightning_dopt.compress.quantize import SMALLEST_STEP, Dither


class FP8(FlatCompressor):
    """One byte per element in an 8-bit floating point format, with a scale per ``block`` elements.

    The largest element of a block is scaled to the upper end of the format, where nothing overflows. An element errs by at
    most 1/17 (``e4m3``) or 1/9 (``e5m2``) of itself, or if it is tiny by half the smallest step, which is ``2^-9 / 448``
    or ``2^-16 / 57344`` of the largest of its block. So ``e4m3`` beats :class:`Int8` where magnitudes within a block
    differ much, and loses where they do not. The message is the scales followed by the elements.

    *Bound.* With the relative error ``r``, half the smallest step ``h`` and the largest element ``t`` of a block, all in
    units of the format, the error of ``b - 1`` tiny elements sums to ``E <= (b - 1) h^2``, of the others to at most
    ``r^2`` times their energy, which is at least ``t^2``. Then ``(r^2 t^2 + E) / (t^2 + E)`` bounds the ratio.

    Source: Micikevicius et al., "FP8 formats for deep learning", arXiv 2209.05433; powers of two as scales: the OCP
    microscaling formats, which round them down and saturate instead.

    Args:
        format: ``"e4m3"`` (4 bits of exponent, 3 of mantissa) or ``"e5m2"``.
        block: elements that share one scale, in row-major order; at least 1.
        scale: ``"amax"``: float32, so that the largest element is exact; ``"power"``: the smallest power of two without
            overflow, one byte, so that what the format can represent is exact.

    Raises:
        ValueError: an unknown ``format`` or ``scale``, or ``block`` below 1.
    """

    def __init__(
        self, format: Literal["e4m3", "e5m2"] = "e4m3", block: int = 256, scale: Literal["amax", "power"] = "amax"
    ) -> None:
        self.format = check_choice("FP8", "format", format, ("e4m3", "e5m2"))
        self.block = check_int("FP8", "block", block, 1)
        self.scale = check_choice("FP8", "scale", scale, ("amax", "power"))

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn if self.format == "e4m3" else torch.float8_e5m2

    @property
    def _scale_bytes(self) -> int:
        return 4 if self.scale == "amax" else 1

    def payload_bytes(self, shape: Shape) -> int:
        """``d + 4 ceil(d / block)``, or ``d + ceil(d / block)`` with powers of two."""
        return numel(shape) + self._scale_bytes * block_count(shape, self.block)

    def floats_at(self, shape: Shape) -> tuple[int, int] | None:
        """The scales, one per block, unless they are powers of two in a byte."""
        return (0, block_count(shape, self.block)) if self.scale == "amax" else None

    def contraction(self, shape: Shape) -> float:
        """``(1 - r^2) t^2 / (t^2 + E)`` as above: 0.9965 for ``e4m3`` and 0.9877 for ``e5m2`` at any usual block."""
        relative, half, top = (1 / 17, 2.0**-10, 448.0) if self.format == "e4m3" else (1 / 9, 2.0**-17, 57344.0)
        energy = (top if self.scale == "amax" else top / 2) ** 2
        lost = max(0, min(self.block, numel(shape)) - 1) * half**2
        return (1 - relative**2) * energy / (energy + lost)

    def pack(self, flat: Tensor, seed: int) -> Tensor:
        """Scales, then elements."""
        blocks, top = block_count(flat.shape, self.block), torch.finfo(self._dtype).max
        payload = torch.empty(self.payload_bytes(flat.shape), dtype=torch.uint8, device=flat.device)
        scales, codes = torch.empty(blocks, device=flat.device), payload[self._scale_bytes * blocks :].view(self._dtype)
        scratch = torch.empty(0, device=flat.device)
        row = fused.rows_of(flat, self.block)
        start = row * self.block
        if row:
            x, scale = flat[:start].view(row, self.block), scales[:row]
            scale.copy_(self._scales(peaks(x, scale, None), top))
            fused.run(fused.cast, x, scale.reciprocal(), codes[:start].view_as(x))
        for first, last, width in tiles(flat.numel(), self.block, flat.device, start):
            rows = (last - first) // width
            x, scale = flat[first:last].view(rows, width), scales[row : row + rows]
            values = scratch.resize_(last - first).view(rows, width)
            scale.copy_(self._scales(peaks(x, scale, values), top))
            # The largest is at most a rounding error above the top, and becomes the top.
            codes[first:last] = torch.mul(x, scale.reciprocal()[:, None], out=values).view(-1)
            row += rows
        payload[: self._scale_bytes * blocks] = self._scales_to_bytes(scales)
        return payload

    def unpack_add(self, payload: Tensor, flat: Tensor, weight: float, seed: int) -> None:
        """Add scale times element."""
        blocks = block_count(flat.shape, self.block)
        codes = payload[self._scale_bytes * blocks :].view(torch.int8)
        if self.scale == "amax":
            scales = section(payload, 0, blocks, torch.float32)
        else:
            scales = _power(payload[:blocks].to(torch.int32) - 127)
        if self.format == "e5m2":
            add_scaled(flat, codes, scales, self.block, weight, self._halves, fused.add_e5m2)
            return
        unit = 2.0**8  # its exponents are counted from -7, those of float16 from -15
        halves = 1 if bool((scales < 2.0**119).all()) else 2  # twice a half, where the whole would overflow
        for _ in range(halves):
            add_scaled(flat, codes, scales * (unit / halves), self.block, weight, self._halves, fused.add_e4m3)

    def _halves(self, codes: Tensor) -> Tensor:
        """The elements as float16, which a processor turns into float32 faster than 8 bits: the bits put in their places."""
        bits = codes.to(torch.int16)
        if self.format == "e5m2":
            return bits.bitwise_left_shift_(8).view(torch.float16)
        return bits.bitwise_left_shift_(7).bitwise_and_(~0x4000).view(torch.float16)

    def _scales(self, largest: Tensor, top: float) -> Tensor:
        if self.scale == "amax":
            return largest.div(top).clamp_(min=SMALLEST_STEP)
        mantissa, exponent = torch.frexp(largest)  # largest = mantissa 2^exponent, mantissa in [1/2, 1)
        # top = 7/8 of the power of two above it; what lies between takes twice the scale.
        exponent = exponent - math.frexp(top)[1] + (mantissa > 0.875)
        return torch.where(largest.isfinite(), _power(exponent.clamp(min=-126)), math.inf)

    def _scales_to_bytes(self, scales: Tensor) -> Tensor:
        if self.scale == "amax":
            return scales.view(torch.uint8)
        return scales.view(torch.int32).bitwise_right_shift(23).to(torch.uint8)


class Natural(FlatCompressor):
    """Natural compression: each element becomes one of the two powers of two around it, at random: ``d + 1`` bytes.

    The sign and 7 bits for the power, 126 of them down from the largest; the first byte says which. Unbiased, since
    ``2^e (1 + f)`` is rounded up with probability ``f`` and what is below the lowest power goes to it or to zero.
    Magnitudes above ``2^127`` become that, and a NaN anywhere makes all of the message NaN.

    Source: Horváth et al., "Natural Compression for Distributed Deep Learning", arXiv 1905.10988, where full range takes
    9 bits; powers counted from the largest need 8.
    """

    private = True

    def payload_bytes(self, shape: Shape) -> int:
        """``d + 1``, none for an empty tensor."""
        return numel(shape) + 1 if numel(shape) else 0

    def variance(self, shape: Shape) -> float:
        """1/8, attained at ``f = 1/3``: the variance ``f (1 - f)`` is at most an eighth of ``(1 + f)^2``."""
        return 1 / 8 if numel(shape) else 0.0

    def contraction(self, shape: Shape) -> float:
        """``1 - omega = 7/8``."""
        return 1.0 - self.variance(shape)

    def pack(self, flat: Tensor, seed: int) -> Tensor:
        """The lowest power, then one signed byte per element."""
        payload = torch.empty(flat.numel() + 1, dtype=torch.uint8, device=flat.device)
        low, high = flat.aminmax()
        largest = float(torch.maximum(-low, high))
        if math.isnan(largest):
            return payload.fill_(255)
        lowest = max(-126, math.frexp(min(largest, 2.0**127))[1] - 126)
        payload[0] = lowest + 126
        codes, dither = payload[1:].view(torch.int8), Dither(seed, flat.device)
        # The lowest power becomes 2^-126, so places are exponents, and what lies below is evenly spaced as well.
        factor = 2.0 ** -(lowest + 126)
        count = fused.rows_of(flat, TILE)
        start = count * TILE
        if count:
            x, turned = flat[:start].view(count, TILE), dither.tiles(count, TILE, torch.int32)
            fused.run(fused.naturals, x, torch.tensor(factor), *turned, codes[:start].view_as(x))
        scratch = torch.empty(0, device=flat.device)
        for first, last, _ in tiles(flat.numel(), 1, flat.device, start):
            x = flat[first:last] if largest <= 2.0**127 else flat[first:last].clamp(-(2.0**127), 2.0**127)
            values = torch.mul(x, factor, out=scratch.resize_(last - first))
            _signed_exponents(dither.carry(values.view(torch.int32)), codes[first:last])
        return payload

    def unpack_add(self, payload: Tensor, flat: Tensor, weight: float, seed: int) -> None:
        """Add the powers.

        Raises:
            ValueError: a first byte that no encoder writes.
        """
        head = int(payload[0])
        if head > 128 and head != 255:
            raise ValueError(f"{self!r}: a message that begins with {head}, where 128 is the largest; damaged")
        codes, power = payload[1:].view(torch.int8), math.nan if head == 255 else 2.0 ** min(head, 127)
        # Products with powers of two are exact in any order, as long as none overflows.
        count = fused.rows_of(flat, TILE) if head != 128 and abs(weight) <= 1.0 else 0
        start = count * TILE
        if count:
            factors = torch.full((count,), weight * power)
            fused.run(fused.add_powers, flat[:start].view(count, TILE), codes[:start].view(count, TILE), factors)
        scratch = torch.empty(0, dtype=torch.promote_types(flat.dtype, torch.float32), device=flat.device)
        for first, last, _ in tiles(flat.numel(), 1, flat.device, start):
            values = scratch.resize_(last - first).copy_(_signed_powers(codes[first:last], 7).view(torch.bfloat16))
            if head == 128:
                values.mul_(2.0)
            flat[first:last].add_(values.mul_(power), alpha=weight)


class E3M0(FlatCompressor):
    """Four bits per element, a sign and a power of two, with a float32 scale per ``block`` elements.

    The levels of a block are zero and ``max|x|`` times 1, 1/2, ... 1/64, with both signs; the largest element arrives
    exactly (but for float32 rounding). Next to :class:`Int4` small elements survive and large ones are coarser. The
    message is the scales followed by two codes to a byte, the first half of the vector in the low nibbles.

    *Bounds*, with ``m = max|x|`` and ``n = b - 1`` others in a block: to nearest, elements above ``m / 64`` err by at most a
    third of themselves, the others by at most ``m / 128``: ``max(1/9, n / (n + 128^2))`` of the energy. Stochastic,
    the variance is at most an eighth of the square above ``m / 64``, and below it as for integers of that step
    (:class:`Int8`): ``omega = max(1/8, (sqrt(1 + n / 64^2) - 1) / 2)``.

    Args:
        block: elements that share one scale, in row-major order; at least 1. The default costs 1/32 byte per element.
        stochastic: round up or down at random so that the mean is exact (unbiased), instead of to nearest.

    Raises:
        ValueError: ``block`` below 1 or ``stochastic`` not a bool.
    """

    def __init__(self, block: int = 128, stochastic: bool = False) -> None:
        self.block = check_int("E3M0", "block", block, 1)
        self.stochastic = check_flag("E3M0", "stochastic", stochastic)

    @property
    def private(self) -> bool:  # type: ignore[override]
        """Stochastic rounding errors must be independent on the ranks, else they do not average out."""
        return self.stochastic

    def _others(self, shape: Shape) -> int:
        return max(0, min(self.block, numel(shape)) - 1)

    def payload_bytes(self, shape: Shape) -> int:
        """``4 ceil(d / block) + ceil(d / 2)``."""
        return 4 * block_count(shape, self.block) + (numel(shape) + 1) // 2

    def contraction(self, shape: Shape) -> float | None:
        """To nearest ``min(8/9, 128^2 / (128^2 + b - 1))``; stochastic ``1 - omega`` where that is positive."""
        omega = self.variance(shape)
        if omega is None:
            return min(8 / 9, 2.0**14 / (2.0**14 + self._others(shape)))
        return 1.0 - omega if omega < 1.0 else None

    def floats_at(self, shape: Shape) -> tuple[int, int]:
        """The scales, one per block."""
        return 0, block_count(shape, self.block)

    def variance(self, shape: Shape) -> float | None:
        """Stochastic ``omega`` as above (0 where every block is one element); to nearest is biased."""
        others = self._others(shape)
        if not self.stochastic or not others:
            return 0.0 if self.stochastic else None
        return max(1 / 8, (math.sqrt(1.0 + others / 2.0**12) - 1.0) / 2.0)

    def pack(self, flat: Tensor, seed: int) -> Tensor:
        """Scales, then nibbles."""
        blocks = block_count(flat.shape, self.block)
        payload = torch.empty(self.payload_bytes(flat.shape), dtype=torch.uint8, device=flat.device)
        scales = section(payload, 0, blocks, torch.float32)
        codes = torch.empty(flat.numel(), dtype=torch.int8, device=flat.device)
        dither = Dither(seed, flat.device) if self.stochastic else None
        scratch, gaps = torch.empty(0, device=flat.device), torch.empty(0, dtype=torch.int32, device=flat.device)
        row = self._pack_compiled(flat, scales, codes, dither)
        for first, last, width in tiles(flat.numel(), self.block, flat.device, row * self.block):
            rows = (last - first) // width
            x, scale = flat[first:last].view(rows, width), scales[row : row + rows]
            values = scratch.resize_(last - first).view(rows, width)
            peaks(x, scale, values).clamp_(min=SMALLEST_STEP)
            bits = torch.mul(x, scale.reciprocal()[:, None], out=values).view(-1).view(torch.int32)
            # The distance between the levels around each element: its own power of two, at least the lowest.
            exponents = torch.bitwise_and(bits, fused.EXPONENT, out=gaps.resize_(last - first))
            gap, flatly = exponents.view(torch.float32).clamp_(min=2.0**-6), values.view(-1)
            if dither is not None:
                dither.add_to(flatly, gap)
            # So far from zero the floats are as far apart as the levels: adding rounds.
            flatly.add_(gap, alpha=fused.FAR).sub_(gap, alpha=fused.FAR).mul_(2.0**-120)
            _signed_exponents(bits, codes[first:last])
            row += rows
        pack_nibbles(codes, payload[4 * blocks :])
        return payload

    def _pack_compiled(self, flat: Tensor, scales: Tensor, codes: Tensor, dither: Dither | None) -> int:
        """The same for the first blocks; answers how many."""
        tile = tile_of(self.block)
        per_tile = 1 if dither is None else tile // self.block
        rows = fused.rows_of(flat, per_tile * self.block) * per_tile
        if rows:
            x, scale = flat[: rows * self.block].view(rows, self.block), scales[:rows]
            factors = peaks(x, scale, None).clamp_(min=SMALLEST_STEP).reciprocal()
            codes = codes[: x.numel()].view_as(x)
            if dither is None:
                fused.run(fused.powers, x, factors, codes)
            else:
                noise, turns = dither.tiles(rows // per_tile, tile, torch.float32)
                shape = (len(turns), per_tile, self.block)
                noise = noise.view(1, *shape[1:])
                fused.run(
                    fused.dithered_powers, x.view(shape), factors.view(shape[:2]), noise, turns, codes.view(shape)
                )
        return rows

    def unpack_add(self, payload: Tensor, flat: Tensor, weight: float, seed: int) -> None:
        """Add scale times power; the code -8, which is never sent, counts as -7."""
        blocks = block_count(flat.shape, self.block)
        codes = unpack_nibbles(payload[4 * blocks :], flat.numel()).clamp_(min=-7)
        scales = section(payload, 0, blocks, torch.float32)
        add_scaled(flat, codes, scales, self.block, weight, self._floats, fused.add_e3m0)

    @staticmethod
    def _floats(codes: Tensor) -> Tensor:
        """The powers for the codes: those of float16 are counted from ``2^-15``, these from ``2^-7``."""
        return _signed_powers(codes, 10).view(torch.float16).to(torch.float32).mul_(2.0**8)


def _signed_exponents(bits: Tensor, codes: Tensor) -> None:
    """Fill int8 codes with the signs times the exponents, up to 127, of float32 given as int32, which is overwritten."""
    # With the sign shifted in on the left a negative number is its exponent - 256, and 256 - e is -e in eight bits.
    codes.copy_(bits.bitwise_right_shift_(23).to(torch.int16).abs_())


def _signed_powers(codes: Tensor, mantissa: int) -> Tensor:
    """The sign and the magnitude of int8 codes in the places of sign and exponent of a 16-bit float, as int16."""
    bits = codes.to(torch.int16)
    sign = bits.bitwise_and(-(2**15))
    return bits.abs_().bitwise_left_shift_(mantissa).bitwise_or_(sign)


def _power(exponent: Tensor) -> Tensor:
    """``2^e`` for int32 exponents from -126 to 127, infinity for 128."""
    return exponent.add(127).bitwise_left_shift_(23).view(torch.float32)
