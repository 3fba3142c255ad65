"""One choice for every row at the least total cost, within a limit: the multiple-choice knapsack by dynamic programming."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def allocate(cost: Tensor, weight: Tensor, limit: float, bins: int = 10_000) -> list[int] | None:
    """The column of every row that makes ``sum cost`` least while ``sum weight <= limit``.

    What each weight exceeds the least of its row by is counted in units: the largest common whole number if all weights are
    whole, else, or if that makes too many, what the limit leaves beyond the least weights divided by ``bins``, rounded up. So
    the limit is never exceeded, and the choice is the best for the rounded weights. One pass per row and column over the
    units, on the CPU in float64: equal arguments give equal choices on every machine.

    Args:
        cost: shape (rows, columns).
        weight: of the same shape, at least 0.
        limit: of the sum of weights.
        bins: the most units; more are finer and slower.

    Returns:
        A column for each row, or ``None`` if even the least weights exceed the limit.
    """
    cost, weight = cost.double().cpu(), weight.double().cpu()
    least = weight.amin(1, keepdim=True) if len(weight) else weight
    slack = limit - float(least.sum())
    if slack < 0:
        return None
    units, room = _units(weight - least, slack, bins)
    best = torch.zeros(room + 1, dtype=torch.float64)  # of the rows so far, with at most so many units
    picks = []
    for prices, sizes in zip(cost.tolist(), units, strict=True):
        new = torch.full_like(best, math.inf)
        pick = torch.zeros(room + 1, dtype=torch.int16)
        for column, (price, size) in enumerate(zip(prices, sizes, strict=True)):
            if size <= room:
                with_it, best_yet = best[: room + 1 - size] + price, new[size:]
                pick[size:].masked_fill_(with_it < best_yet, column)
                torch.minimum(with_it, best_yet, out=best_yet)
        best = new
        picks.append(pick)
    left = int((best == best[-1]).nonzero()[0])  # the fewest units that do
    chosen = []
    for pick, sizes in zip(reversed(picks), reversed(units), strict=True):
        chosen.append(int(pick[left]))
        left -= sizes[chosen[-1]]
    return chosen[::-1]


def _units(excess: Tensor, slack: float, bins: int) -> tuple[list[list[int]], int]:
    """Weights in units, and how many units there is room for."""
    whole = math.gcd(*{int(e) for row in excess.tolist() for e in row}) if bool((excess == excess.floor()).all()) else 0
    if whole and slack / whole <= bins:
        return (excess / whole).long().tolist(), int(slack // whole)
    scaled = excess * bins / slack if slack > 0 else torch.where(excess > 0, math.inf, 0.0)
    return scaled.clamp(max=2.0 * bins + 2).ceil().long().tolist(), bins
