"""Remainders: what is left of each element when whole numbers are taken away, in a few bits."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dopt._checks import check_int
from lightning_dopt.compress._wire import TILE, FlatCompressor, as_bytes, pack_bits, section, unpack_signs
from lightning_dopt.compress.base import Shape, numel


class Modulo(FlatCompressor):
    """Each element modulo one, rounded to a multiple of ``2^-bits``: ``ceil(bits d / 8)`` bytes and no scale.

    Decoded numbers lie in [-1/2, 1/2) and differ from ``x`` by a whole number and at most ``2^-(bits + 1)``. This says
    little about ``x`` by itself; :class:`~lightning_dopt.compress.memory.MoniQua` finds the whole number again. Elements
    come in row-major order, the lowest bit of each first.

    Args:
        bits: bits per element, 1 to 16.

    Raises:
        ValueError: ``bits`` outside 1 to 16.
    """

    def __init__(self, bits: int) -> None:
        self.bits = check_bits("Modulo", bits)

    def payload_bytes(self, shape: Shape) -> int:
        """``ceil(bits d / 8)``."""
        return (self.bits * numel(shape) + 7) // 8

    def pack(self, flat: Tensor, seed: int) -> Tensor:
        """Codes from 0 to ``2^bits - 1``; ``x`` and ``x + 1`` have the same."""
        payload = torch.empty(self.payload_bytes(flat.shape), dtype=torch.uint8, device=flat.device)
        for first in range(0, flat.numel(), TILE):
            x = flat[first : first + TILE]
            codes = (x - x.round()).mul_(2**self.bits).round_().to(torch.int32).bitwise_and_(2**self.bits - 1)
            part = self._pack_codes(codes)
            start = first * self.bits // 8  # whole bytes, as TILE is a multiple of 8
            payload[start : start + part.numel()] = part
        return payload

    def unpack_add(self, payload: Tensor, flat: Tensor, weight: float, seed: int) -> None:
        """Add the numbers in [-1/2, 1/2)."""
        half, dtype = 2 ** (self.bits - 1), torch.promote_types(flat.dtype, torch.float32)
        for first in range(0, flat.numel(), TILE):
            part = flat[first : first + TILE]
            codes = self._unpack_codes(payload, first, part.numel())
            signed = codes.add_(half).bitwise_and_(2 * half - 1).sub_(half)
            part.add_(signed.to(dtype).mul_(weight / (2 * half)))

    def _pack_codes(self, codes: Tensor) -> Tensor:
        if self.bits == 8:
            return codes.to(torch.uint8)
        if self.bits == 16:
            return as_bytes(codes.to(torch.int16))
        shifts = torch.arange(self.bits, dtype=torch.int32, device=codes.device)
        bits = codes[:, None].bitwise_right_shift(shifts).bitwise_and_(1).to(torch.bool).view(-1)
        return pack_bits(bits)[: (bits.numel() + 7) // 8]

    def _unpack_codes(self, payload: Tensor, first: int, count: int) -> Tensor:
        start = first * self.bits // 8
        if self.bits == 8:
            return payload[start : start + count].to(torch.int32)
        if self.bits == 16:
            return section(payload, start, count, torch.int16).to(torch.int32).bitwise_and_(2**16 - 1)
        shifts = torch.arange(self.bits, dtype=torch.int32, device=payload.device)
        signs = unpack_signs(payload[start : start + (count * self.bits + 7) // 8], count * self.bits)
        bits = signs.view(count, self.bits).to(torch.int32).add_(1).bitwise_right_shift_(1)
        return bits.bitwise_left_shift_(shifts).sum(1, dtype=torch.int32)


def check_bits(owner: str, bits: int) -> int:
    """Return ``bits`` if it is an integer from 1 to 16.

    Raises:
        ValueError: otherwise.
    """
    check_int(owner, "bits", bits, 1)
    if bits > 16:
        raise ValueError(f"{owner}(bits={bits!r}): must be at most 16; beyond that use BF16() or Identity()")
    return bits
