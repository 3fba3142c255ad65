"""Noise on the wire: a model of inexact links, and of messages made private."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dopt._checks import check_float
from lightning_dopt.compress._wire import FlatCompressor, as_bytes, section
from lightning_dopt.compress.base import Shape, numel


class GaussianNoise(FlatCompressor):
    """Every element is sent in float32 with normal noise of standard deviation ``sigma`` added, 4 bytes per element.

    The noise does not shrink with the message, so that no memory learns it away: methods for it are those that tolerate
    inexact messages, such as ``RobustTracking`` with ``Direct`` or ``Averaged``.

    Args:
        sigma: standard deviation, in the units of the tensor; at least 0.

    Raises:
        ValueError: a negative ``sigma``.
    """

    private = True

    def __init__(self, sigma: float) -> None:
        self.sigma = check_float("GaussianNoise", "sigma", sigma, 0.0)

    def payload_bytes(self, shape: Shape) -> int:
        """``4 d``."""
        return 4 * numel(shape)

    def pack(self, flat: Tensor, seed: int) -> Tensor:
        """Add noise drawn from ``seed`` on the device of ``flat``."""
        generator = torch.Generator(flat.device).manual_seed(seed % (1 << 63))
        noise = torch.randn(flat.shape, generator=generator, dtype=torch.float32, device=flat.device)
        return as_bytes(noise.mul_(self.sigma).add_(flat))

    def unpack_add(self, payload: Tensor, flat: Tensor, weight: float, seed: int) -> None:
        """Add the float32 values."""
        flat.add_(section(payload, 0, flat.numel(), torch.float32), alpha=weight)
