"""Messages as bytes: typed sections, bit and nibble packing, tiles that stay in cache."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lightning_dopt.compress import _fused as fused
from lightning_dopt.compress.base import Compressor, Shape, numel

TILE = 1 << 18
"""Elements handled at a time on a CPU: scratch of this size stays in cache, whole-tensor temporaries page-fault."""


class FlatCompressor(Compressor):
    """A compressor that sees the elements in row-major order and ignores the shape.

    A subclass implements :meth:`pack` and :meth:`unpack_add` for a contiguous vector of at least one element; empty,
    strided, half-precision, float64 and gradient-tracking tensors are dealt with here. Values travel as float32 at
    most.
    """

    @abstractmethod
    def pack(self, flat: Tensor, seed: int) -> Tensor:
        """Encode a contiguous float32 vector of at least one element."""

    @abstractmethod
    def unpack_add(self, payload: Tensor, flat: Tensor, weight: float, seed: int) -> None:
        """Add ``weight`` times the decoded message to the contiguous vector ``flat`` in place."""

    def encode(self, x: Tensor, seed: int = 0) -> Tensor:
        """See :meth:`Compressor.encode`; the values are rounded to float32 first."""
        if x.numel() == 0:
            return torch.empty(0, dtype=torch.uint8, device=x.device)
        return self.pack(x.detach().reshape(-1).to(torch.float32), seed)

    def decode_add(self, payload: Tensor, out: Tensor, weight: float = 1.0, seed: int = 0) -> None:
        """See :meth:`Compressor.decode_add`; ``out`` may be strided and of any floating point type.

        Raises:
            ValueError: the message does not have the length that the shape of ``out`` calls for.
        """
        check_length(self, payload, out.shape)
        if out.numel() == 0:
            return
        target = out.detach()
        if target.is_contiguous():
            self.unpack_add(payload, target.view(-1), weight, seed)
        else:
            flat = torch.zeros(out.numel(), dtype=out.dtype, device=out.device)
            self.unpack_add(payload, flat, weight, seed)
            target.add_(flat.view(out.shape))


def check_length(compressor: Compressor, payload: Tensor, shape: Shape) -> None:
    """Raise ``ValueError`` if the message is not as long as the compressor says for that shape."""
    expected = compressor.payload_bytes(shape)
    if payload.numel() != expected:
        raise ValueError(
            f"{compressor!r}: a message of {payload.numel()} bytes, but shape {tuple(shape)} takes {expected}"
        )


def as_bytes(values: Tensor) -> Tensor:
    """The memory of a tensor as a ``uint8`` vector (a view if it is contiguous)."""
    return values.contiguous().view(-1).view(torch.uint8)


def section(payload: Tensor, start: int, count: int, dtype: torch.dtype) -> Tensor:
    """``count`` values of ``dtype`` that begin at byte ``start``: a view where the address is aligned, else a copy."""
    part = payload[start : start + count * dtype.itemsize]
    aligned = part.is_contiguous() and part.storage_offset() % dtype.itemsize == 0
    return (part if aligned else part.clone(memory_format=torch.contiguous_format)).view(dtype)


def block_count(shape: Shape, block: int) -> int:
    """Number of blocks of ``block`` elements, the last one possibly shorter."""
    return -(-numel(shape) // block)


def tiles(d: int, block: int, device: torch.device, start: int = 0) -> Iterator[tuple[int, int, int]]:
    """Cut ``d`` elements into pieces ``(first, last, width)`` of whole blocks of ``width``, then the shorter block.

    With ``start``, a multiple of ``width``, only what follows it.
    """
    width = min(block, d)
    if not width:
        return
    whole = d - d % width
    step = tile_of(width) if device.type == "cpu" else whole
    for first in range(start, whole, step):
        yield first, min(first + step, whole), width
    if whole < d:
        yield whole, d, d - whole


def tile_of(width: int) -> int:
    """Elements of a tile of whole rows of ``width``."""
    return max(1, TILE // width) * width


def peaks(x: Tensor, out: Tensor, scratch: Tensor | None) -> Tensor:
    """The largest magnitude of each row of float32, NaN if there is one; without ``scratch`` by compiled loops."""
    if scratch is None:
        fused.run(fused.peaks, x, out)
        return out
    # Magnitudes are in the order of their bits, and whole numbers are compared faster.
    torch.amax(torch.abs(x, out=scratch).view(torch.int32), dim=1, out=out.view(torch.int32))
    return out


def add_scaled(
    flat: Tensor,
    codes: Tensor,
    scales: Tensor,
    block: int,
    weight: float,
    meaning: Callable[[Tensor], Tensor] | None = None,
    loop: Callable[[Tensor, Tensor, Tensor], None] = fused.add_codes,
) -> None:
    """``flat += weight * scale of the block * code``, in at least float32.

    The codes are numbers of any type, or what ``meaning`` makes numbers of, a tile at a time; ``loop`` does the same compiled.
    """
    dtype = torch.promote_types(flat.dtype, torch.float32)
    factors = scales.to(dtype) * weight
    scratch = torch.empty(0, dtype=dtype, device=flat.device)
    row = fused.rows_of(flat, block)
    start = row * block
    if row:
        fused.run(loop, flat[:start].view(row, block), codes[:start].view(row, block), factors[:row])
    for first, last, width in tiles(flat.numel(), block, flat.device, start):
        rows = (last - first) // width
        part = codes[first:last]
        values = scratch.resize_(last - first).copy_(part if meaning is None else meaning(part))
        values.view(rows, width).mul_(factors[row : row + rows, None])
        flat[first:last].add_(values)
        row += rows


def pack_bits(bits: Tensor) -> Tensor:
    """Eight booleans to a byte, the first in the lowest bit; a last incomplete byte is filled with zeros."""
    d = bits.numel()
    if d % 8:
        bits = torch.cat([bits, bits.new_zeros(8 - d % 8)])
    # One multiplication gathers the lowest bits of eight bytes in the top byte of a 64-bit word.
    return bits.view(torch.int64).mul(0x0102040810204080).bitwise_right_shift_(56).to(torch.uint8)


def unpack_signs(packed: Tensor, d: int) -> Tensor:
    """The ``d`` signs of :func:`pack_bits` as int8: +1 for a set bit, -1 for a clear one."""
    byte = torch.arange(256, dtype=torch.int32, device=packed.device)[:, None]
    table = ((byte >> torch.arange(8, dtype=torch.int32, device=packed.device)) & 1).mul_(2).sub_(1).to(torch.int8)
    words = table.view(torch.int64).view(-1).index_select(0, packed.to(torch.int32))
    return words.view(torch.int8)[:d]


def pack_nibbles(codes: Tensor, out: Tensor | None = None) -> Tensor:
    """Two codes in [-8, 7] to a byte: the first half of the vector in the low nibbles, the second in the high ones."""
    half = (codes.numel() + 1) // 2
    packed = torch.empty(half, dtype=torch.uint8, device=codes.device) if out is None else out
    bits = codes.view(torch.uint8)
    for first, last, _ in tiles(half, 1, codes.device):
        part = torch.bitwise_and(bits[first:last], 15, out=packed[first:last])
        high = bits[half + first : half + last].bitwise_left_shift(4)
        part[: high.numel()].bitwise_or_(high)
    return packed


def unpack_nibbles(packed: Tensor, d: int) -> Tensor:
    """The ``d`` codes of :func:`pack_nibbles` as int8."""
    half, signed = packed.numel(), packed.view(torch.int8)
    codes = torch.empty(2 * half, dtype=torch.int8, device=packed.device)
    for first, last, _ in tiles(half, 1, packed.device):
        low = torch.bitwise_left_shift(signed[first:last], 4, out=codes[first:last])
        low.bitwise_right_shift_(4)  # the shift to the right spreads the sign bit
        torch.bitwise_right_shift(signed[first:last], 4, out=codes[half + first : half + last])
    return codes[:d]
