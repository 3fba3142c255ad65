"""Seals: eight bytes at the end of a message by which its receiver knows that it is what its sender wrote."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lightning_dopt._random import key

SEAL = 8
"""Bytes of a seal."""

_TILE = 1 << 15
"""Words of eight bytes that are read at a time; on a CPU they stay in cache."""
_LOW = 0xFFFFFFFF


def sealed(payload: Tensor, stamp: int) -> Tensor:
    """A copy of a 1-D ``uint8`` message with its seal at the end; ``stamp`` says whose and of when it is."""
    return torch.cat([payload, digest(payload, stamp).view(1).view(torch.uint8)])


def is_whole(message: Tensor, stamp: int) -> Tensor:
    """Whether a sealed message is what was sent under this stamp: one bool, on its device."""
    seal = message[-SEAL:].clone().view(torch.int64)
    return (seal == digest(message[:-SEAL], stamp)).view(())


def digest(data: Tensor, stamp: int = 0) -> Tensor:
    """64 bits that depend on every byte of a 1-D ``uint8`` tensor, on their order and number, and on ``stamp``.

    With words ``w_i`` of eight bytes, the last one filled up with zeros: ``sum_i m_i f(w_i)`` modulo ``2^64``. ``f`` (the high
    half of a word added to its low half, bit by bit) and the products with odd ``m_i`` can be undone, so damage within
    one word, such as a flipped bit, always changes the sum. Damage of several words goes unnoticed with a chance of at most
    about ``2^-32`` for the worst patterns, ``2^-64`` for random bytes. It is no protection against an adversary.

    Returns:
        An int64 number on the device of ``data``.
    """
    length = data.numel()
    total = torch.full((), key(stamp, length), dtype=torch.int64, device=data.device)
    whole = length // 8 * 8
    if whole:
        total += _sum(_words(data[:whole]), data.device)
    if whole < length:
        tail = data.new_zeros(8)
        tail[: length - whole] = data[whole:]
        total += _mixed(tail.view(torch.int64)).mul_(key(length, whole) | 1).view(())
    return total


def _words(data: Tensor) -> Tensor:
    aligned = data.is_contiguous() and data.storage_offset() % 8 == 0
    return (data if aligned else data.clone(memory_format=torch.contiguous_format)).view(torch.int64)


def _sum(words: Tensor, device: torch.device) -> Tensor:
    """``m_i`` is the product of an odd number for the place within a tile and one for the tile."""
    count = -(-words.numel() // _TILE)
    within, tiles = _multipliers(0, _TILE, device), _multipliers(1, count, device)
    if device.type == "cpu":
        scratch, parts = torch.empty(min(_TILE, words.numel()), dtype=torch.int64), []
        for first in range(0, words.numel(), _TILE):
            part = words[first : first + _TILE]
            parts.append(torch.dot(_mixed(part, scratch[: part.numel()]), within[: part.numel()]))
        return (torch.stack(parts) * tiles).sum()
    filled = torch.nn.functional.pad(_mixed(words), (0, count * _TILE - words.numel()))
    return ((filled.view(count, _TILE) * within).sum(1) * tiles).sum()


def _mixed(words: Tensor, out: Tensor | None = None) -> Tensor:
    """``w xor (w >> 32)``, so that all bits of a word reach the high bits of its product."""
    return torch.bitwise_right_shift(words, 32, out=out).bitwise_and_(_LOW).bitwise_xor_(words)


@lru_cache(maxsize=16)
def _multipliers(which: int, count: int, device: torch.device) -> Tensor:
    """Odd numbers, the same everywhere."""
    generator = torch.Generator().manual_seed(key(which))
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator).bitwise_or_(1).to(device)
