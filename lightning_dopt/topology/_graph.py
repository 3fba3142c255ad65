"""Plain graph helpers: connectivity and a counter-based random source that is equal on every rank."""

from __future__ import annotations

from collections.abc import Sequence

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def random_bits(*key: int) -> int:
    """A pseudo-random integer of 64 bits that depends on ``key`` alone.

    The SplitMix64 finalizer (Steele, Lea and Flood, 2014) absorbs one key after the other, so ``random_bits(0)`` is the
    first output of SplitMix64 with seed 0. Integer arithmetic only: the value is equal on every rank, machine and
    Python version, and no generator has a state that could drift apart or need a checkpoint.
    """
    state = 0
    for part in key:
        z = (state + part + _GOLDEN) & _MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        state = z ^ (z >> 31)
    return state


def is_power_of_two(n: int) -> bool:
    """Whether ``n`` is 1, 2, 4, 8, ..."""
    return n >= 1 and n & (n - 1) == 0


def log2_ceil(n: int) -> int:
    """``ceil(log2(n))`` for ``n >= 1``, without rounding errors."""
    return (n - 1).bit_length()


def strongly_connected(links: Sequence[Sequence[int]]) -> bool:
    """Whether every node reaches every other along ``links``, where ``links[i]`` are the nodes that ``i`` points to."""
    reverse: list[list[int]] = [[] for _ in links]
    for i, targets in enumerate(links):
        for j in targets:
            reverse[j].append(i)
    return _reaches_all(links) and _reaches_all(reverse)


def _reaches_all(links: Sequence[Sequence[int]]) -> bool:
    seen, todo = {0}, [0]
    while todo:
        fresh = set(links[todo.pop()]) - seen
        seen |= fresh
        todo.extend(fresh)
    return len(seen) == len(links)
