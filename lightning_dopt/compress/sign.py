"""One bit per element."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dopt._checks import check_int
from lightning_dopt.compress._wire import (
    FlatCompressor,
    add_scaled,
    block_count,
    pack_bits,
    section,
    tiles,
    unpack_signs,
)
from lightning_dopt.compress.base import Shape, numel


class Sign(FlatCompressor):
    """``C(x) = mean|x| * sign(x)`` per block, with ``sign(0) = +1``: ``ceil(d / 8) + 4 ceil(d / block)`` bytes.

    The message is the float32 scales followed by the packed signs. In a block of ``b`` elements the error is
    ``||x||^2 - (sum|x|)^2 / b``; on Gaussian vectors 36 % of the energy remains unsent. The last block averages over
    the elements it has. Biased: use it inside an error memory.

    Args:
        block: elements that share one scale, in row-major order; at least 1.

    Raises:
        ValueError: ``block`` below 1.
    """

    def __init__(self, block: int = 4096) -> None:
        self.block = check_int("Sign", "block", block, 1)

    def payload_bytes(self, shape: Shape) -> int:
        """``4 ceil(d / block) + ceil(d / 8)``."""
        return 4 * block_count(shape, self.block) + (numel(shape) + 7) // 8

    def floats_at(self, shape: Shape) -> tuple[int, int]:
        """The scales, one per block."""
        return 0, block_count(shape, self.block)

    def contraction(self, shape: Shape) -> float:
        """``1 / min(block, d)``, attained by a vector with one nonzero element per block (``sum|x| >= ||x||``)."""
        return 1.0 / max(1, min(self.block, numel(shape)))

    def pack(self, flat: Tensor, seed: int) -> Tensor:
        """Scales, then bits."""
        blocks = block_count(flat.shape, self.block)
        payload = torch.empty(self.payload_bytes(flat.shape), dtype=torch.uint8, device=flat.device)
        scales = section(payload, 0, blocks, torch.float32)
        scratch = torch.empty(0, device=flat.device)
        self._means(flat, scales, scratch, False)
        if not bool(scales.isfinite().all()):
            self._means(flat, scales, scratch, True)  # large values overflow when they are summed first
        packed = payload[4 * blocks :]
        for first, last, _ in tiles(flat.numel(), 8, flat.device):
            # Written as float32 and then cut: a comparison that writes bytes takes three times as long.
            signs = torch.ge(flat[first:last], 0.0, out=scratch.resize_(last - first))
            packed[first // 8 : (last + 7) // 8] = pack_bits(signs.to(torch.int8))
        return payload

    def _means(self, flat: Tensor, scales: Tensor, scratch: Tensor, divide_first: bool) -> None:
        row = 0
        for first, last, width in tiles(flat.numel(), self.block, flat.device):
            rows = (last - first) // width
            magnitudes = torch.abs(flat[first:last].view(rows, width), out=scratch.resize_(rows, width))
            mean = scales[row : row + rows]
            if divide_first:
                torch.sum(magnitudes.div_(width), dim=1, out=mean)
            else:
                torch.sum(magnitudes, dim=1, out=mean).div_(width)
            row += rows

    def unpack_add(self, payload: Tensor, flat: Tensor, weight: float, seed: int) -> None:
        """Add scale times sign."""
        blocks = block_count(flat.shape, self.block)
        signs = unpack_signs(payload[4 * blocks :], flat.numel())
        add_scaled(flat, signs, section(payload, 0, blocks, torch.float32), self.block, weight)
