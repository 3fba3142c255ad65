"""A fixed number of elements of every block is sent, or all that reach a threshold, up to a limit."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_dopt._checks import check_float, check_int
from lightning_dopt.compress._codes import check_below, pack_positions, position_bits, position_bytes, unpack_positions
from lightning_dopt.compress._wire import FlatCompressor, as_bytes, section, tiles
from lightning_dopt.compress.base import Shape, numel
from lightning_dopt.compress.sparse import at_least, index_bytes, largest


class BlockTopK(FlatCompressor):
    """The ``k`` elements of largest magnitude in every block: ``4 + w / 8`` bytes for each that is sent.

    Positions inside a block take ``w`` = 8 bits up to 256 elements, 12 up to 4096, 16 up to 65536, where :class:`TopK`
    needs 24 or 32 for a large model. On Gaussian vectors the energy sent is that of :class:`TopK` to three digits; where
    magnitudes differ much between layers it is less, and no layer starves. The message is the float32 values, block
    after block, followed by their positions. Biased: use it inside an error memory.

    Args:
        ratio: share of each block to send, in (0, 1]; ``k`` is ``ratio * block`` rounded half up, at least 1. The last,
            shorter block counts by itself.
        block: elements of a block, in row-major order; 1 to 65536.

    Raises:
        ValueError: ``ratio`` outside (0, 1] or ``block`` outside 1 to 65536; in decoding, a position outside its block.
    """

    def __init__(self, ratio: float, block: int = 4096) -> None:
        self.ratio = check_float("BlockTopK", "ratio", ratio, 0.0, 1.0, open_low=True)
        self.block = check_int("BlockTopK", "block", block, 1)
        if block > 65536:
            raise ValueError(f"BlockTopK(block={block!r}): must be at most 65536, so that positions take 16 bits")

    def kept_of(self, width: int) -> int:
        """``k`` of a block of ``width`` elements, 0 of none."""
        return min(width, max(1, math.floor(self.ratio * width + 0.5)))

    def kept(self, shape: Shape) -> int:
        """How many elements of a tensor of this shape are sent."""
        whole, rest = divmod(numel(shape), self.block)
        return whole * self.kept_of(self.block) + self.kept_of(rest)

    def payload_bytes(self, shape: Shape) -> int:
        """``4 K + ceil(w K / 8)`` for ``K`` elements sent in all."""
        kept = self.kept(shape)
        return 4 * kept + position_bytes(kept, position_bits(self.block))

    def values_at(self, shape: Shape) -> tuple[int, int]:
        """All values from the first byte on."""
        return 0, self.kept(shape)

    def contraction(self, shape: Shape) -> float:
        """The least ``k / b`` of the blocks, attained by equal magnitudes."""
        whole, rest = divmod(numel(shape), self.block)
        widths = [self.block] * bool(whole) + [rest] * bool(rest)
        return min((self.kept_of(b) / b for b in widths), default=1.0)

    def pack(self, flat: Tensor, seed: int) -> Tensor:
        """Values, then positions."""
        values, index = [], []
        for first, last, width in tiles(flat.numel(), self.block, flat.device):
            x = flat[first:last].view(-1, width)
            places = x.abs().topk(self.kept_of(width), dim=1, sorted=False).indices
            values.append(x.gather(1, places).view(-1))
            index.append(places.view(-1))
        return torch.cat([as_bytes(torch.cat(values)), pack_positions(torch.cat(index), position_bits(self.block))])

    def unpack_add(self, payload: Tensor, flat: Tensor, weight: float, seed: int) -> None:
        """Add the values at their positions (no two are equal)."""
        kept = self.kept(flat.shape)
        index = unpack_positions(payload[4 * kept :], kept, position_bits(self.block))
        values = section(payload, 0, kept, torch.float32).to(flat.dtype)
        whole, rest = divmod(flat.numel(), self.block)
        inner = index[: whole * self.kept_of(self.block)].view(whole, self.kept_of(self.block))
        check_below(self, inner, self.block)
        check_below(self, index[inner.numel() :], rest)
        inner.add_(torch.arange(whole, device=flat.device)[:, None], alpha=self.block)
        index[inner.numel() :].add_(whole * self.block)
        flat.index_add_(0, index, values, alpha=weight)


class Threshold(FlatCompressor):
    """The elements of magnitude at least ``threshold``, as many as there are up to ``k``: ``4 + (4 + w) k`` bytes.

    Messages have room for ``k`` elements, whatever they hold, since all ranks must know their length beforehand; of more
    elements the ``k`` largest are sent. The message is an int32 count, the float32 values filled up with zeros, and the
    positions in the fewest bytes ``w`` as in :class:`TopK`. So :class:`TopK` sends more in as many bytes; what this one
    promises is that noise below the threshold is never sent. No contraction, since a small ``x`` is not sent at all: as
    long as ``k`` suffices, ``||C(x) - x||^2 < d threshold^2``. An error memory around it is stable in that sense only.

    Args:
        threshold: smallest magnitude that is sent, in the units of the tensor; positive.
        capacity: room, as a share of the elements in (0, 1]; ``k`` is ``capacity * d`` rounded half up, at least 1.

    Raises:
        ValueError: ``threshold`` not positive and finite, or ``capacity`` outside (0, 1]; in decoding, a count or a
            position that cannot be.
    """

    def __init__(self, threshold: float, capacity: float) -> None:
        self.threshold = check_float("Threshold", "threshold", threshold, 0.0, open_low=True, open_high=True)
        self.capacity = check_float("Threshold", "capacity", capacity, 0.0, 1.0, open_low=True)

    def room(self, shape: Shape) -> int:
        """``k``: how many elements of a tensor of this shape can be sent."""
        d = numel(shape)
        return min(d, max(1, math.floor(self.capacity * d + 0.5)))

    def payload_bytes(self, shape: Shape) -> int:
        """``4 + (4 + w) k``, none for an empty tensor."""
        room = self.room(shape)
        return 4 + 4 * room + position_bytes(room, 8 * index_bytes(numel(shape))) if room else 0

    def values_at(self, shape: Shape) -> tuple[int, int]:
        """The values after the count."""
        return 4, self.room(shape)

    def pack(self, flat: Tensor, seed: int) -> Tensor:
        """Count, values, positions."""
        room = self.room(flat.shape)
        index = at_least(flat, self.threshold, rare=20 * room <= flat.numel())
        if index.numel() > room:
            index = index[largest(flat[index], room)]
        count = torch.tensor([index.numel()], dtype=torch.int32, device=flat.device)
        values, places = flat.new_zeros(room), index.new_zeros(room)
        values[: index.numel()], places[: index.numel()] = flat[index], index
        return torch.cat(
            [count.view(torch.uint8), as_bytes(values), pack_positions(places, 8 * index_bytes(flat.numel()))]
        )

    def unpack_add(self, payload: Tensor, flat: Tensor, weight: float, seed: int) -> None:
        """Add the values at their positions."""
        room, count = self.room(flat.shape), int(section(payload, 0, 1, torch.int32))
        if not 0 <= count <= room:
            raise ValueError(f"{self!r}: a message of {count} elements with room for {room}; damaged")
        values = section(payload, 4, room, torch.float32)[:count].to(flat.dtype)
        index = unpack_positions(payload[4 + 4 * room :], room, 8 * index_bytes(flat.numel()))[:count]
        check_below(self, index, flat.numel())
        flat.index_add_(0, index, values, alpha=weight)
