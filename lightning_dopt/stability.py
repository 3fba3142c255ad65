"""Bounds beyond which outer optimizers run away, by the theory of one quadratic mode with equal curvature on all ranks."""

from __future__ import annotations

from collections.abc import Sequence


def outer_bound(momentum: float, nesterov: bool, share: float = 1.0) -> float:
    """The largest stable ``s``: ``lr`` times the share of the way to the optimum that a round goes (1 where it converges).

    With the in-flight share ``w`` (1: the result is applied at once; 0: a round late) the error ``z^k`` obeys
    ``z (z - 1)(z - mu) + s (w z + 1 - w)((1 + mu) z - mu) = 0`` with Nesterov momentum; with heavy ball
    the last factor is ``z``. Fresh Nesterov: ``1 + 1 / (1 + 2 mu)``; fresh heavy ball: ``2 (1 + mu)``; delayed heavy ball:
    ``1 - mu``.

    Args:
        momentum: ``mu`` in [0, 1).
        nesterov: Nesterov momentum instead of heavy ball.
        share: ``w`` in [0, 1].
    """

    def stable(s: float) -> bool:
        top, low = (1.0 + momentum, -momentum) if nesterov else (1.0, 0.0)
        w, v = share, 1.0 - share
        mixed = [w * top, w * low + v * top, v * low]  # (w z + 1 - w)(top z + low), by falling powers
        return _inside([1.0, -(1.0 + momentum) + s * mixed[0], momentum + s * mixed[1], s * mixed[2]])

    low, high = 0.0, 4.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if stable(middle) else (low, middle)
    return low


def pairs_bound(momentum: float, n: int, size: int = 2) -> float:
    """The largest pull towards partners at which replicas in random pairs (groups) stay together, without gradients.

    ``2 (1 - alpha^2) / (1 - alpha (2 p - 1))`` with ``p = n (g - 1) / (g (n - 1))`` for groups of ``g``; infinite where one group
    is everybody.

    Args:
        momentum: ``alpha`` in [0, 1).
        n: Number of workers.
        size: Ranks in a group.
    """
    if n <= size:
        return float("inf")
    p = n * (size - 1) / (size * (n - 1))
    return 2 * (1 - momentum**2) / (1 - momentum * (2 * p - 1))


def _inside(coefficients: Sequence[float]) -> bool:
    """Whether all roots lie inside the unit circle (Schur-Cohn); coefficients by falling powers."""
    c = list(coefficients)
    while len(c) > 1:
        if abs(c[-1]) >= abs(c[0]):
            return False
        ratio = c[-1] / c[0]
        c = [a - ratio * b for a, b in zip(c[:-1], c[:0:-1], strict=True)]
    return True
