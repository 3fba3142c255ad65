"""Small whole numbers as bytes: positions, codes of a few bits, and digits to the base three."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_dopt.compress._wire import TILE, pack_nibbles, unpack_nibbles
from lightning_dopt.compress.base import Compressor

_POWERS_OF_THREE = (1, 3, 9, 27, 81)


def code_bytes(count: int, bits: int) -> int:
    """Bytes of :func:`pack_codes`: ``count`` for 8 bits, half of it for 4, else ``bits ceil(count / 8)``."""
    if bits == 8:
        return count
    return (count + 1) // 2 if bits == 4 else bits * ((count + 7) // 8)


def pack_codes(codes: Tensor, bits: int, out: Tensor | None = None) -> Tensor:
    """Integers in [0, 2^bits) as bytes: bytes for 8 bits, nibbles for 4, else pieces of 8, 4, 2 and 1 of their bits.

    The lowest bits come first. For a piece of ``p`` bits the vector is cut into ``8 / p`` equal parts; the first part
    has the lowest ``p`` bits of the bytes, the next part the next.
    """
    if bits == 8:
        return codes.to(torch.uint8) if out is None else out.copy_(codes)
    if bits == 4:
        return pack_nibbles(codes.to(torch.int8), out)
    packed = (
        torch.empty(code_bytes(codes.numel(), bits), dtype=torch.uint8, device=codes.device) if out is None else out
    )
    packed.zero_()
    for first, last, start, low, width, k in _pieces(codes.numel(), bits, codes.device):
        part = codes[first:last]
        if low:
            part = part.bitwise_right_shift(low)
        if low + width < bits:
            part = part.bitwise_and((1 << width) - 1)
        part = part.to(torch.uint8)
        packed[start : start + last - first].bitwise_or_(part.bitwise_left_shift(k * width) if k else part)
    return packed


def unpack_codes(packed: Tensor, count: int, bits: int) -> Tensor:
    """The ``count`` codes of :func:`pack_codes`, as int8, int16 (8 bits) or int64 (more)."""
    if bits == 8:
        return packed.to(torch.int16)
    if bits == 4:
        return unpack_nibbles(packed, count).bitwise_and_(15)
    dtype = torch.int64 if bits > 8 else torch.int8
    codes = torch.zeros(count, dtype=dtype, device=packed.device)
    for first, last, start, low, width, k in _pieces(count, bits, packed.device):
        part = packed[start : start + last - first]
        if k:
            part = part.bitwise_right_shift(k * width)
        if width < 8:
            part = part.bitwise_and((1 << width) - 1)
        codes[first:last].bitwise_or_(part.to(dtype).bitwise_left_shift_(low) if low else part.to(dtype))
    return codes


def _pieces(count: int, bits: int, device: torch.device) -> Iterator[tuple[int, int, int, int, int, int]]:
    """Which codes (from, to) share which bytes (from): with which bits (the lowest, how many), as which part of a byte."""
    start = low = 0
    while low < bits:
        width = next(w for w in (8, 4, 2, 1) if low + w <= bits)
        size = width * ((count + 7) // 8)
        step = TILE if device.type == "cpu" else max(1, size)
        for offset in range(0, size, step):
            for k in range(8 // width):
                first, last = k * size + offset, min(k * size + min(offset + step, size), count)
                if first < last:
                    yield first, last, start + offset, low, width, k
        start, low = start + size, low + width


def pack_trits(digits: Tensor, out: Tensor | None = None) -> Tensor:
    """Five digits 0, 1, 2 to a byte: the first fifth of the vector counts 1, the next 3, then 9, 27, 81."""
    size = (digits.numel() + 4) // 5
    packed = torch.empty(size, dtype=torch.uint8, device=digits.device) if out is None else out
    packed.zero_()
    step = TILE if digits.device.type == "cpu" else max(1, size)
    for first in range(0, size, step):
        for k, power in enumerate(_POWERS_OF_THREE):
            part = digits[k * size + first : k * size + min(first + step, size)].to(torch.uint8)
            packed[first : first + part.numel()].add_(part, alpha=power)
    return packed


def unpack_trits(compressor: Compressor, packed: Tensor, count: int) -> Tensor:
    """The ``count`` digits of :func:`pack_trits` as int8.

    Raises:
        ValueError: a byte above 242, which no five digits make.
    """
    if int(packed.max()) > 242:
        raise ValueError(
            f"{compressor!r}: a byte of {int(packed.max())} in a message where 242 is the largest; damaged"
        )
    size = packed.numel()
    digits = torch.empty(5 * size, dtype=torch.int8, device=packed.device).view(5, -1)
    step = TILE if packed.device.type == "cpu" else size
    for first in range(0, size, step):
        rest = packed[first : first + step].to(torch.int16)
        for k in range(4):
            third = rest.add(1).mul_(85).bitwise_right_shift_(8)  # a third of it, rounded down: exact up to 257
            digits[k, first : first + step] = rest.sub_(third, alpha=3)
            rest = third
        digits[4, first : first + step] = rest
    return digits.view(-1)[:count]


def position_bits(below: int) -> int:
    """8, 12, 16, 24 or 32: bits of :func:`pack_positions` for positions inside a block of this many elements."""
    return next(bits for bits in (8, 12, 16, 24, 32) if below <= 1 << bits)


def position_bytes(count: int, bits: int) -> int:
    """Bytes of :func:`pack_positions`: ``ceil(count bits / 8)``."""
    return (count * bits + 7) // 8


def pack_positions(index: Tensor, bits: int) -> Tensor:
    """Contiguous int64 positions in 8, 12, 16, 24 or 32 bits each; with 12 all low bytes, then the rest as nibbles."""
    parts = index.view(-1, 1).view(torch.uint8)
    low = parts[:, : bits // 8].reshape(-1)
    return low if bits != 12 else torch.cat([low, pack_nibbles(index.bitwise_right_shift(8).to(torch.int8))])


def unpack_positions(packed: Tensor, count: int, bits: int) -> Tensor:
    """The ``count`` positions of :func:`pack_positions`, int64."""
    parts = torch.zeros(count, 8, dtype=torch.uint8, device=packed.device)
    width = bits // 8
    parts[:, :width] = packed[: count * width].view(count, width)
    if bits == 12:
        parts[:, 1] = unpack_nibbles(packed[count:], count).bitwise_and_(15).view(torch.uint8)
    return parts.view(torch.int64).view(-1)


def check_below(compressor: Compressor, index: Tensor, below: int) -> None:
    """Raise ``ValueError`` if a position (none of them negative) lies outside the tensor or block it is for."""
    if index.numel() and int(index.max()) >= below:
        raise ValueError(f"{compressor!r}: a message with position {int(index.max())} of {below} elements; damaged")
