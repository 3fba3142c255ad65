"""How large a batch the noise of gradients asks for."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

_TINY = 1e-12


def noise_ratio(gradients: Tensor, eta: float) -> float | None:
    """By what to multiply the batch for the norm test: ``sum_m |g_m - g|^2 / ((M - 1) M eta^2 |g|^2)`` with the mean ``g``.

    The numerator over ``M (M - 1)`` estimates the variance of ``g``; at 1 its root is ``eta`` times the norm of ``g``.

    Args:
        gradients: One row per worker (or a sketch of it that keeps norms), shape (M, d), all at batches of one size.
        eta: How much noise to put up with, above 0.

    Returns:
        The ratio, ``None`` if there is one worker only or the mean vanishes.

    Source: the norm test of Byrd, Chin, Nocedal, Wu, "Sample size selection in optimization methods for machine learning"
    (2012), in the form of AdLoCo, arXiv 2508.18182.
    """
    count = len(gradients)
    mean = gradients.mean(0)
    energy = float(mean.square().sum())
    if count < 2 or energy < _TINY:
        return None
    spread = float((gradients - mean).square().sum())
    return spread / ((count - 1) * count * eta**2 * energy)


def largest_ratio(gradients: Tensor, groups: Sequence[Sequence[int]], eta: float) -> float:
    """The largest :func:`noise_ratio` of the groups of workers, each a list of rows; 0 if nothing can be said."""
    ratios = [noise_ratio(gradients[list(group)], eta) for group in groups]
    return max((ratio for ratio in ratios if ratio is not None), default=0.0)
