"""Few random levels: QSGD with the norm of each block as its scale, TernGrad with the largest element."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_dopt._checks import check_float, check_int
from lightning_dopt.compress._codes import code_bytes, pack_codes, pack_trits, unpack_codes, unpack_trits
from lightning_dopt.compress._wire import add_scaled, block_count, pack_nibbles, peaks, section, unpack_nibbles
from lightning_dopt.compress.base import Shape, numel
from lightning_dopt.compress.quantize import SMALLEST_STEP, Blockwise

_LARGEST_NORM = 3.4e38
"""Norms are cut here, just inside float32; no element of the block exceeds it by more than 0.1 %."""


class QSGD(Blockwise):
    """``C(x) = ||x|| / s * code`` per block, with whole codes from ``-s`` to ``s`` drawn so that the mean is ``x``.

    With few levels most codes are zero. A code takes ``w`` bits, as many as the numbers from 0 to ``2 s`` need: with 1
    level 2 bits, 3 levels 3 bits, 7 levels 4 bits, 127 levels 8 bits. The message is the float32 steps, then ``w``
    bits per element, as bytes (8), nibbles (4) or in pieces of 4, 2 and 1 bits (``w ceil(d / 8)`` bytes). Not linear: the scales
    differ between ranks.

    *Variance.* With ``y = s |x| / ||x|| = j + f`` it is ``f (1 - f)`` in units of the step. The sum of the
    ``b`` of them under ``sum y^2 = s^2`` is at most ``b / (4 u) + (u - 1) s^2`` for any ``u >= 1``, and the best ``u``
    gives ``sqrt(b) / s - 1`` for ``sqrt(b) >= 2 s`` (attained by equal magnitudes), else ``b / (4 s^2)``. The paper's
    bound is ``min(b / s^2, sqrt(b) / s)``.

    Source: Alistarh et al., "QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding", NeurIPS 2017,
    section 3.1; codes of fixed width instead of Elias's, so that the size is known beforehand.

    Args:
        levels: ``s``, from 1 to 127.
        block: elements that share one norm, in row-major order; at least 1.

    Raises:
        ValueError: ``levels`` outside 1 to 127, or ``block`` below 1.
    """

    stochastic = True

    def __init__(self, levels: int = 7, block: int = 256) -> None:
        self.levels = check_int("QSGD", "levels", levels, 1)
        if levels > 127:
            raise ValueError(f"QSGD(levels={levels!r}): must be at most 127; beyond that use FP16() or BF16()")
        self.block = check_int("QSGD", "block", block, 1)

    @property
    def _levels(self) -> int:  # type: ignore[override]
        return self.levels

    @property
    def bits(self) -> int:
        """``w``: bits per code."""
        return (2 * self.levels).bit_length()

    def payload_bytes(self, shape: Shape) -> int:
        """``4 ceil(d / block)`` and ``d``, ``ceil(d / 2)`` or ``w ceil(d / 8)``."""
        return 4 * block_count(shape, self.block) + code_bytes(numel(shape), self.bits)

    def variance(self, shape: Shape) -> float:
        """``sqrt(b) / s - 1`` or ``b / (4 s^2)`` as above, with ``b = min(block, d)``; 0 for ``b = 1``."""
        b = min(self.block, numel(shape))
        if b <= 1:
            return 0.0
        return math.sqrt(b) / self.levels - 1.0 if b >= 4 * self.levels**2 else b / (4.0 * self.levels**2)

    def pack(self, flat: Tensor, seed: int) -> Tensor:
        """Steps, then codes: with 4 and 8 bits as signed numbers, else counted from ``-s``."""
        payload, packed, codes = _quantized(self, flat, seed)
        if self.bits == 4:
            pack_nibbles(codes, packed)
        else:
            pack_codes(codes.view(torch.uint8) if self.bits == 8 else codes.add_(self.levels), self.bits, packed)
        return payload

    def unpack_add(self, payload: Tensor, flat: Tensor, weight: float, seed: int) -> None:
        """Add step times code."""
        blocks = block_count(flat.shape, self.block)
        packed = payload[4 * blocks :]
        if self.bits == 8:
            codes = packed.view(torch.int8)
        elif self.bits == 4:
            codes = unpack_nibbles(packed, flat.numel())
        else:
            codes = unpack_codes(packed, flat.numel(), self.bits).sub_(self.levels)
        add_scaled(flat, codes, section(payload, 0, blocks, torch.float32), self.block, weight)

    def _steps(self, x: Tensor, step: Tensor, scratch: Tensor | None) -> None:
        _norms(x, step, scratch).clamp_(max=_LARGEST_NORM).div_(self.levels).clamp_(min=SMALLEST_STEP)


class TernGrad(Blockwise):
    """``C(x) = s sign(x) Bernoulli(|x| / s)`` with ``s = max|x|`` of each block: 1.6 bits per element, unbiased.

    The message is the float32 scales and the digits, five to a byte. Not linear: the scales differ between ranks.

    The published training clips first: with ``clip = c`` elements beyond ``c`` root mean squares of their block are cut
    there, which makes ``s`` and with it the variance smaller. The mean is then the clipped block, so no constant holds
    for every ``x``: ``contraction`` and ``variance`` are ``None``, and error memories have no guarantee. The paper's 2.5
    touches 1.2 % of a Gaussian vector; its sigma is taken about the mean instead of zero, which would clip equal
    elements to nothing.

    Source: Wen et al., "TernGrad: Ternary Gradients to Reduce Communication in Distributed Deep Learning", NeurIPS 2017,
    equations 1-3 and 12.

    Args:
        block: elements that share one scale, in row-major order; at least 1. The variance grows with its root.
        clip: ``c``; 0 does not clip.

    Raises:
        ValueError: ``block`` below 1 or a negative ``clip``.
    """

    stochastic = True
    _levels = 1

    def __init__(self, block: int = 256, clip: float = 0.0) -> None:
        self.block = check_int("TernGrad", "block", block, 1)
        self.clip = check_float("TernGrad", "clip", clip, 0.0, open_high=True)

    def payload_bytes(self, shape: Shape) -> int:
        """``4 ceil(d / block) + ceil(d / 5)``."""
        return 4 * block_count(shape, self.block) + (numel(shape) + 4) // 5

    def variance(self, shape: Shape) -> float | None:
        """``(sqrt(b) - 1) / 2`` with ``b = min(block, d)``, the largest ``s sum|x| / ||x||^2 - 1``; unknown if clipped."""
        return None if self.clip else super().variance(shape)

    def contraction(self, shape: Shape) -> float | None:
        """``1 - omega`` where that is positive, else ``None``."""
        return None if self.clip else super().contraction(shape)

    def pack(self, flat: Tensor, seed: int) -> Tensor:
        """Scales, then digits 0, 1, 2 for -1, 0, 1."""
        payload, packed, codes = _quantized(self, flat, seed)
        pack_trits(codes.add_(1), packed)
        return payload

    def unpack_add(self, payload: Tensor, flat: Tensor, weight: float, seed: int) -> None:
        """Add scale times digit.

        Raises:
            ValueError: a byte that no five digits make.
        """
        blocks = block_count(flat.shape, self.block)
        digits = unpack_trits(self, payload[4 * blocks :], flat.numel()).sub_(1)
        add_scaled(flat, digits, section(payload, 0, blocks, torch.float32), self.block, weight)

    @property
    def _spills(self) -> bool:
        return self.clip > 0.0

    def _steps(self, x: Tensor, step: Tensor, scratch: Tensor | None) -> None:
        peaks(x, step, scratch)
        if self.clip:
            limit = _norms(x, torch.empty_like(step), scratch).mul_(self.clip / math.sqrt(x.shape[1]))
            torch.minimum(step, limit, out=step)
        step.clamp_(min=SMALLEST_STEP)


def _quantized(compressor: Blockwise, flat: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A message with its float32 steps, the room in it for the packed codes, and the int8 codes."""
    blocks = block_count(flat.shape, compressor.block)
    payload = torch.empty(compressor.payload_bytes(flat.shape), dtype=torch.uint8, device=flat.device)
    codes = torch.empty(flat.numel(), dtype=torch.int8, device=flat.device)
    compressor._quantize(flat, section(payload, 0, blocks, torch.float32), codes, seed)
    return payload, payload[4 * blocks :], codes


def _norms(x: Tensor, out: Tensor, scratch: Tensor | None) -> Tensor:
    """The norm of each row of ``x``, also where the squares leave the range of float32."""
    torch.linalg.vector_norm(x, dim=1, out=out)
    if not bool(((out > 1e-15) & (out < 1e18)).all()):
        unit = peaks(x, torch.empty_like(out), scratch).clamp_(min=SMALLEST_STEP)
        torch.linalg.vector_norm(torch.div(x, unit[:, None], out=scratch), dim=1, out=out).mul_(unit)
    return out
