"""Small whole numbers as bytes: positions, codes of a few bits, and digits to the base three."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dopt.compress._wire import pack_bits, pack_nibbles, unpack_nibbles, unpack_signs
from lightning_dopt.compress.base import Compressor

_POWERS_OF_THREE = (1, 3, 9, 27, 81)


def code_bytes(count: int, bits: int) -> int:
    """Bytes of :func:`pack_codes`: ``count`` for 8 bits, half of it for 4, else ``bits`` planes of ``count / 8``."""
    if bits == 8:
        return count
    return (count + 1) // 2 if bits == 4 else bits * ((count + 7) // 8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Integers in [0, 2^bits) as bytes: nibbles for 4 bits, else one plane of packed bits after the other."""
    if bits == 8:
        return codes.to(torch.uint8)
    if bits == 4:
        return pack_nibbles(codes.to(torch.int8))
    planes = [pack_bits(codes.bitwise_right_shift(b).bitwise_and_(1).to(torch.bool)) for b in range(bits)]
    return torch.cat(planes) if planes else torch.empty(0, dtype=torch.uint8, device=codes.device)


def unpack_codes(packed: Tensor, count: int, bits: int) -> Tensor:
    """The ``count`` codes of :func:`pack_codes`, as int8, int16 (8 bits) or int64 (more)."""
    if bits == 8:
        return packed.to(torch.int16)
    if bits == 4:
        return unpack_nibbles(packed, count).bitwise_and_(15)
    codes = torch.zeros(count, dtype=torch.int64 if bits > 8 else torch.int8, device=packed.device)
    for b, plane in enumerate(packed.view(bits, -1) if bits else ()):
        codes.add_(unpack_signs(plane, count).add_(1).bitwise_right_shift_(1).to(codes.dtype).bitwise_left_shift_(b))
    return codes


def pack_trits(digits: Tensor) -> Tensor:
    """Five digits 0, 1, 2 to a byte: the first fifth of the vector counts 1, the next 3, then 9, 27, 81."""
    size = (digits.numel() + 4) // 5
    packed = torch.zeros(size, dtype=torch.uint8, device=digits.device)
    for k, power in enumerate(_POWERS_OF_THREE):
        part = digits[k * size : (k + 1) * size].to(torch.uint8)
        packed[: part.numel()].add_(part, alpha=power)
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
    byte = torch.arange(243, dtype=torch.int32, device=packed.device)
    index = packed.to(torch.int32)
    digits = torch.empty(5 * packed.numel(), dtype=torch.int8, device=packed.device).view(5, -1)
    for row, power in zip(digits, _POWERS_OF_THREE, strict=True):
        row.copy_((byte // power % 3).to(torch.int8).index_select(0, index))
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
