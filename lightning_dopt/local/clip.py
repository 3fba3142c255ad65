"""Local gradients made harmless before anything is sent: clipped, or covered by noise."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

from lightning_dopt._checks import check_float, check_int
from lightning_dopt._random import key
from lightning_dopt.local.base import BoundCorrection, Context, Correction


class ClipLocal(Correction):
    """Every rank scales its own gradient down to a norm of at most ``norm``, before memories see it.

    Clipping after the mean, as the Trainer's ``gradient_clip_val`` does, comes too late where gradients are accumulated
    in a memory. With ``spread`` the bound is ``norm / sqrt(n)``: the sum of ``n`` independent gradients of that size has the
    norm ``norm``. The norm is over all parameters of the optimizer that steps; a gradient that is not finite is left as
    it is.

    Args:
        norm: Largest norm, above 0.
        spread: Whether to divide it by the root of the number of workers.

    Raises:
        ValueError: ``norm <= 0``.

    Source: Lin, Han, Mao, Wang, Dally, "Deep Gradient Compression", arXiv 1712.01887, section 3.2.
    """

    def __init__(self, norm: float, spread: bool = False) -> None:
        self.norm = check_float("ClipLocal", "norm", norm, 0.0, open_low=True)
        self.spread = spread

    def bind(self, context: Context) -> BoundCorrection:
        """See :meth:`Correction.bind`."""
        return _BoundClip(self.norm / math.sqrt(context.size) if self.spread else self.norm, context)


class _BoundClip(BoundCorrection):
    def __init__(self, bound: float, context: Context) -> None:
        self.bound, self.context = bound, context

    def on_gradient(self, names: Collection[str]) -> None:
        grads = [g for name in names if (g := self.context.parameters[name].grad) is not None]
        if grads:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
            scale = (self.bound / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(max=1.0)
            torch._foreach_mul_(grads, torch.where(torch.isfinite(norm), scale, torch.ones_like(norm)))


class NoisyGradients(Correction):
    """Adds ``N(0, sigma^2)`` to every element of the local gradient, drawn independently on each rank.

    After :class:`ClipLocal` this is the Gaussian mechanism for the gradient of a batch as a whole: one message reveals
    little of whether that batch was used. It does not make a run private. Single examples are not protected, as they
    are not clipped one by one; nothing adds up the loss of privacy over steps; and the numbers come from a generator
    that anyone who knows ``seed`` can repeat, so that whoever is not to see through the noise must not know it.

    Args:
        sigma: Standard deviation, in units of the gradient.
        seed: Seed of the noise.

    Raises:
        ValueError: ``sigma < 0`` or a negative seed.

    Source: Dwork, Roth, "The Algorithmic Foundations of Differential Privacy", 2014, appendix A.
    """

    def __init__(self, sigma: float, seed: int = 0) -> None:
        self.sigma = check_float("NoisyGradients", "sigma", sigma, 0.0)
        self.seed = check_int("NoisyGradients", "seed", seed, 0)

    def bind(self, context: Context) -> BoundCorrection:
        """See :meth:`Correction.bind`."""
        return _BoundNoise(self.sigma, self.seed, context)


class _BoundNoise(BoundCorrection):
    def __init__(self, sigma: float, seed: int, context: Context) -> None:
        self.sigma, self.seed, self.context = sigma, seed, context
        self.drawn = torch.zeros(1, dtype=torch.int64)

    def on_gradient(self, names: Collection[str]) -> None:
        if not self.sigma:
            return
        for name in names:
            grad = self.context.parameters[name].grad
            if grad is not None:
                seed = key(self.seed, self.context.rank, int(self.drawn))
                generator = torch.Generator(grad.device).manual_seed(seed)
                noise = torch.randn(grad.shape, generator=generator, dtype=grad.dtype, device=grad.device)
                grad.add_(noise, alpha=self.sigma)
                self.drawn += 1

    def state(self) -> dict[str, Tensor]:
        return {"drawn": self.drawn}
