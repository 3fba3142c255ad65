"""Counter-based random numbers: a pure function of integers, equal on every rank and after every resume."""

from __future__ import annotations

_MASK = (1 << 64) - 1


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def key(*values: int) -> int:
    """Hash integers into one seed in [0, 2^63): the same for the same values in the same order, anywhere."""
    state = 0
    for value in values:
        state = _splitmix64(state ^ (value & _MASK))
    return state >> 1


def uniform(*values: int) -> float:
    """A number in [0, 1) drawn from the given counters."""
    return (key(*values) >> 10) / float(1 << 53)
