"""Plain graph helpers: connectivity, shapes, and a counter-based random source that is equal on every rank."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lightning_dopt._checks import check_int

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


class GraphLike(Protocol):
    """What is read of a networkx graph."""

    @property
    def nodes(self) -> Iterable[Hashable]:
        """The nodes, in the order of the ranks."""

    @property
    def edges(self) -> Iterable[Sequence[Hashable]]:
        """The edges; the first two items of each are its ends."""

    def is_directed(self) -> bool:
        """Whether an edge leads from its first end to its second only."""


def links_of(owner: str, graph: GraphLike) -> list[list[int]]:
    """For every rank the ranks that ``graph`` links it to, without loops, each once.

    Raises:
        ValueError: the graph has no nodes.
    """
    nodes = list(graph.nodes)
    if not nodes:
        raise ValueError(f"{owner}: the graph has no nodes; must have one for every rank")
    if set(nodes) == set(range(len(nodes))):
        nodes = list(range(len(nodes)))
    place = {node: rank for rank, node in enumerate(nodes)}
    found: list[set[int]] = [set() for _ in nodes]
    for edge in graph.edges:
        a, b = place[edge[0]], place[edge[1]]
        found[a].add(b)
        if not graph.is_directed():
            found[b].add(a)
    return [sorted(row - {rank}) for rank, row in enumerate(found)]


def check_size(owner: str, size: int, n: int) -> None:
    """Raise ``ValueError`` in one line if a graph given for ``size`` workers is asked for another number."""
    check_int(owner, "n", n, 1)
    if n != size:
        raise ValueError(f"{owner}(n={n}): the graph was given for {size} workers and exists for {size} only")


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


def uniform(below: int, *key: int) -> int:
    """A pseudo-random integer in ``0..below-1`` that depends on ``key`` alone (bias below ``below / 2**64``)."""
    return random_bits(*key) * below >> 64


def box(n: int, dims: int) -> tuple[int, ...]:
    """The sides of a box of ``n`` places in ``dims`` dimensions, as equal as divisors taken one by one allow, ascending.

    The first side is the largest divisor of ``n`` that is at most ``n ** (1 / dims)``, and so on with the rest.
    """
    if dims == 1:
        return (n,)
    top = math.isqrt(n)
    while top**dims > n:
        top -= 1
    side = next(r for r in range(top, 0, -1) if n % r == 0)
    return (side, *box(n // side, dims - 1))


def stationary_weights(w: Tensor) -> list[float]:
    """The left eigenvector of eigenvalue one of ``w``, rows summing to one: ``lambda W = lambda``, ``sum(lambda) = 1``.

    Unique if every rank can be reached from every other.
    """
    n = len(w)
    # (W' - I) lambda = 0 has one redundant equation; the last gives way to sum(lambda) = 1
    system = w.T - torch.eye(n, dtype=torch.float64)
    system[-1] = 1.0
    right = torch.zeros(n, dtype=torch.float64)
    right[-1] = 1.0
    found: list[float] = torch.linalg.lstsq(system, right, driver="gelsd").solution.tolist()
    return found


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
