"""Every element is sent: exactly, or cast to two bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dopt.compress._wire import FlatCompressor, as_bytes, section, tiles
from lightning_dopt.compress.base import Rounds, Shape, numel


class Identity(FlatCompressor):
    """No compression: ``C(x) = x``, 4 bytes per element, linear.

    The message holds float32. :meth:`roundtrip` and :meth:`rounds` keep the dtype, so that what does not pass through
    bytes (sums, simulations in float64) is exact.
    """

    linear = True

    def payload_bytes(self, shape: Shape) -> int:
        """``4 d``."""
        return 4 * numel(shape)

    def pack(self, flat: Tensor, seed: int) -> Tensor:
        """The memory of ``flat`` itself, no copy."""
        return as_bytes(flat)

    def unpack_add(self, payload: Tensor, flat: Tensor, weight: float, seed: int) -> None:
        """Add the float32 values."""
        flat.add_(section(payload, 0, flat.numel(), torch.float32), alpha=weight)

    def roundtrip(self, x: Tensor, seed: int = 0) -> Tensor:
        """A copy of ``x`` in its own dtype."""
        return x.detach().clone()

    def squared_error(self, x: Tensor, seed: int = 0, scale: float = 1.0) -> Tensor:
        """``(scale - 1)^2 ||x||^2``."""
        return x.square().sum() * (scale - 1.0) ** 2

    def contraction(self, shape: Shape) -> float:
        """1: no error."""
        return 1.0

    def variance(self, shape: Shape) -> float:
        """0: no error."""
        return 0.0

    def rounds(self, x: Tensor, state: dict[str, Tensor], seed: int, size: int) -> Rounds:
        """One sum of ``x`` itself."""
        own = x.detach().clone()
        total = yield own.clone()
        return own, total / size


class _Cast(FlatCompressor):
    """Two bytes per element, rounded to nearest; what is out of range is sent as the largest finite number."""

    _dtype: torch.dtype

    def payload_bytes(self, shape: Shape) -> int:
        """``2 d``."""
        return 2 * numel(shape)

    def pack(self, flat: Tensor, seed: int) -> Tensor:
        """Cast, with saturation: an infinity on the wire would never leave an error memory again."""
        largest = torch.finfo(self._dtype).max
        codes = torch.empty_like(flat, dtype=self._dtype)
        scratch = torch.empty(0, device=flat.device)
        for first, last, _ in tiles(flat.numel(), 1, flat.device):
            codes[first:last] = torch.clamp(flat[first:last], -largest, largest, out=scratch.resize_(last - first))
        return as_bytes(codes)

    def unpack_add(self, payload: Tensor, flat: Tensor, weight: float, seed: int) -> None:
        """Add the values, widened first."""
        values = section(payload, 0, flat.numel(), self._dtype)
        scratch = torch.empty(0, dtype=torch.promote_types(flat.dtype, torch.float32), device=flat.device)
        for first, last, _ in tiles(flat.numel(), 1, flat.device):
            flat[first:last].add_(scratch.resize_(last - first).copy_(values[first:last]), alpha=weight)


class BF16(_Cast):
    """Cast to bfloat16: 2 bytes per element, the range of float32 with 8 bits of precision.

    The relative error of an element is at most ``2^-8``. Saturates at 3.39e38.
    """

    _dtype = torch.bfloat16

    def contraction(self, shape: Shape) -> float:
        """``1 - 2^-16``; like every statement about float32 it leaves subnormal numbers (below 1.2e-38) aside."""
        return 1.0 - 2.0**-16


class FP16(_Cast):
    """Cast to IEEE half precision: 2 bytes per element, 11 bits of precision between 6.1e-5 and 65504.

    The relative error of an element in that range is at most ``2^-11``. Outside it saturates (above) or loses precision
    down to zero (below 3e-8), which is why gradients are better sent as :class:`BF16` or :class:`Int8`.
    """

    _dtype = torch.float16

    def contraction(self, shape: Shape) -> float:
        """``1 - 2^-22`` for elements in range; outside all that holds is that nothing expands."""
        return 1.0 - 2.0**-22
