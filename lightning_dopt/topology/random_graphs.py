"""Graphs that are drawn once, equal on all ranks: Erdos-Renyi, random regular and small-world graphs."""

from __future__ import annotations

import math
from functools import lru_cache

from lightning_dopt._checks import check_float, check_int
from lightning_dopt.topology._graph import random_bits, strongly_connected, uniform
from lightning_dopt.topology.weights import UndirectedGraph, WeightRule

_DRAWS = 200
_Links = tuple[tuple[int, ...], ...]


class ErdosRenyi(UndirectedGraph):
    """A connected random graph, fixed for the whole run: every pair is linked with probability ``p``.

    The draw depends on ``seed`` and the number of workers alone, so all ranks hold the same graph; it is repeated until
    the graph is connected.

    Args:
        p: probability of a link, in (0, 1]; by default ``min(1, 2 ln(n) / n)``, twice the threshold from which on large
            graphs are almost surely connected (Erdos and Renyi, 1959).
        seed: selects the graph, at least 0.
        weights: see :class:`~lightning_dopt.topology.UndirectedGraph`.

    Raises:
        ValueError: an argument outside its range; from ``check``, no connected graph in 200 draws (``p`` is too small).
    """

    def __init__(self, p: float | None = None, seed: int = 0, weights: WeightRule = "metropolis") -> None:
        super().__init__(weights)
        self.p = None if p is None else check_float("ErdosRenyi", "p", p, 0.0, 1.0, open_low=True)
        self.seed = check_int("ErdosRenyi", "seed", seed, 0)

    def check(self, n: int) -> None:
        """Raise ``ValueError`` if no connected graph is found for ``n`` workers."""
        super().check(n)
        self._links(n)

    def adjacent(self, n: int, rank: int) -> list[int]:
        """The ranks linked to ``rank`` in the drawn graph."""
        return list(self._links(n)[rank])

    def _links(self, n: int) -> _Links:
        p = min(1.0, 2 * math.log(n) / n) if self.p is None else self.p
        return _connected_draw(p, self.seed, n)


@lru_cache(maxsize=64)
def _connected_draw(p: float, seed: int, n: int) -> _Links:
    for attempt in range(_DRAWS):
        links: list[list[int]] = [[] for _ in range(n)]
        for i in range(n):
            for j in range(i + 1, n):
                if random_bits(seed, attempt, i, j) < p * 2.0**64:
                    links[i].append(j)
                    links[j].append(i)
        if strongly_connected(links):
            return tuple(tuple(sorted(row)) for row in links)
    raise ValueError(f"ErdosRenyi(p={p:g}): no connected graph of {n} workers in {_DRAWS} draws; use a larger p")


class RandomRegular(UndirectedGraph):
    """A connected random graph, fixed for the whole run, in which every rank has ``k`` neighbours.

    Random regular graphs mix nearly as fast as any graph of their degree: with weights ``1 / (k + 1)`` the consensus
    rate stays near ``(1 + 2 sqrt(k - 1)) / (k + 1)`` however large ``n`` is. Drawn by random switches of pairs of
    links, which keep all degrees, from a circulant start until connected. Depends on ``seed`` and ``n`` alone.

    Args:
        k: neighbours of every rank, at least 1.
        seed: selects the graph, at least 0.
        weights: see :class:`~lightning_dopt.topology.UndirectedGraph`.

    Raises:
        ValueError: an argument outside its range; from ``check``, a number of workers for which no connected graph of
            this degree exists.
    """

    def __init__(self, k: int = 3, seed: int = 0, weights: WeightRule = "metropolis") -> None:
        super().__init__(weights)
        self.k = check_int("RandomRegular", "k", k, 1)
        self.seed = check_int("RandomRegular", "seed", seed, 0)

    def check(self, n: int) -> None:
        """Raise ``ValueError`` if no connected graph of ``n`` workers with ``k`` neighbours each exists."""
        super().check(n)
        if n <= self.k:
            raise ValueError(f"RandomRegular(k={self.k}): {n} workers have no {self.k} neighbours; k must be below {n}")
        if n * self.k % 2:
            raise ValueError(f"RandomRegular(k={self.k}): {n} workers are odd in number, so k must be even")
        if self.k == 1 and n > 2:
            raise ValueError(f"RandomRegular(k=1): {n} workers in pairs are not connected; use k of at least 2")
        _regular_draw(self.k, self.seed, n)

    def adjacent(self, n: int, rank: int) -> list[int]:
        """The ranks linked to ``rank`` in the drawn graph."""
        return list(_regular_draw(self.k, self.seed, n)[rank])

    def degree(self, n: int, rank: int) -> int:
        """``k`` for every rank."""
        return self.k

    def max_degree(self, n: int) -> int:
        """``k``."""
        return self.k


class SmallWorld(UndirectedGraph):
    """A small world: a ring with ``hops`` neighbours on each side, some of whose links lead to random ranks instead.

    Each link from ``i`` to ``i + h``, ``h = 1..hops``, keeps its end at ``i`` and moves the other with probability
    ``p`` to a uniformly random rank not yet linked to ``i``; the draw is repeated until the graph is connected. The
    number of links stays ``n * hops``. A few shortcuts make a ring's mixing nearly independent of ``n``.

    Source: Watts and Strogatz, "Collective dynamics of 'small-world' networks" (1998).

    Args:
        hops: neighbours on each side before rewiring, at least 1; up to ``2 hops + 1`` workers form a complete graph.
        p: probability that a link is moved, in [0, 1].
        seed: selects the graph, at least 0.
        weights: see :class:`~lightning_dopt.topology.UndirectedGraph`.

    Raises:
        ValueError: an argument outside its range; from ``check``, no connected graph in 200 draws.
    """

    def __init__(self, hops: int = 2, p: float = 0.2, seed: int = 0, weights: WeightRule = "metropolis") -> None:
        super().__init__(weights)
        self.hops = check_int("SmallWorld", "hops", hops, 1)
        self.p = check_float("SmallWorld", "p", p, 0.0, 1.0)
        self.seed = check_int("SmallWorld", "seed", seed, 0)

    def check(self, n: int) -> None:
        """Raise ``ValueError`` if no connected graph is found for ``n`` workers."""
        super().check(n)
        _small_world_draw(self.hops, self.p, self.seed, n)

    def adjacent(self, n: int, rank: int) -> list[int]:
        """The ranks linked to ``rank`` in the drawn graph."""
        return list(_small_world_draw(self.hops, self.p, self.seed, n)[rank])


def _circulant(n: int, hops: int) -> list[set[int]]:
    return [{(i + o) % n for o in range(-hops, hops + 1)} - {i} for i in range(n)]


def _frozen(links: list[set[int]]) -> _Links:
    return tuple(tuple(sorted(row)) for row in links)


@lru_cache(maxsize=64)
def _regular_draw(k: int, seed: int, n: int) -> _Links:
    for attempt in range(_DRAWS):
        links = _circulant(n, k // 2)
        if k % 2:
            links = [row | {(i + n // 2) % n} for i, row in enumerate(links)]
        ends = [(i, j) for i in range(n) for j in links[i] if i < j]
        for turn in range(10 * len(ends)):
            _switch(links, ends, uniform(len(ends), seed, attempt, turn, 0), uniform(len(ends), seed, attempt, turn, 1))
        if _connected(links):
            return _frozen(links)
    raise ValueError(f"RandomRegular(k={k}): no connected graph of {n} workers in {_DRAWS} draws; use another seed")


def _switch(links: list[set[int]], ends: list[tuple[int, int]], first: int, second: int) -> None:
    """Replace the links a-b and c-d by a-d and c-b if that makes neither a loop nor a double link."""
    (a, b), (c, d) = ends[first], ends[second]
    if first % 2 != second % 2:  # otherwise a link would always keep the lower of its ends
        c, d = d, c
    if a == d or c == b or d in links[a] or b in links[c]:
        return
    for x, y in ((a, b), (c, d)):
        links[x].discard(y)
        links[y].discard(x)
    for place, (x, y) in ((first, (a, d)), (second, (c, b))):
        links[x].add(y)
        links[y].add(x)
        ends[place] = (x, y)


@lru_cache(maxsize=64)
def _small_world_draw(hops: int, p: float, seed: int, n: int) -> _Links:
    if n <= 2 * hops + 1:
        return _frozen(_circulant(n, n // 2))
    for attempt in range(_DRAWS):
        links = _circulant(n, hops)
        for hop in range(1, hops + 1):
            for i in range(n):
                if random_bits(seed, attempt, hop, i) < p * 2.0**64:
                    _rewire(links, i, (i + hop) % n, random_bits(seed, attempt, hop, i, 1))
        if _connected(links):
            return _frozen(links)
    raise ValueError(
        f"SmallWorld(hops={hops}, p={p:g}): no connected graph of {n} workers in {_DRAWS} draws; use more hops"
    )


def _rewire(links: list[set[int]], i: int, old: int, key: int) -> None:
    free = sorted(set(range(len(links))) - links[i] - {i})
    if free and old in links[i]:
        new = free[uniform(len(free), key)]
        links[i].discard(old)
        links[old].discard(i)
        links[i].add(new)
        links[new].add(i)


def _connected(links: list[set[int]]) -> bool:
    return strongly_connected([list(row) for row in links])
