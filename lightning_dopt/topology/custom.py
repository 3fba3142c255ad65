"""Graphs that are drawn or given: Erdos-Renyi graphs, own adjacency lists, own mixing matrices."""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from lightning_dopt._checks import check_float, check_int
from lightning_dopt.topology._graph import random_bits, strongly_connected
from lightning_dopt.topology.base import Topology
from lightning_dopt.topology.weights import UndirectedGraph, WeightRule

_DRAWS = 200
_TOLERANCE = 1e-6
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


class FromAdjacency(UndirectedGraph):
    """The user's own undirected graph.

    Args:
        links: for every rank the list of ranks linked to it, for example ``[[1, 2], [0], [0]]`` for a star of three.
        weights: see :class:`~lightning_dopt.topology.UndirectedGraph`.

    Raises:
        ValueError: a link to a rank that does not exist or to itself, a link given twice or from one end only, a graph
            in several pieces; from ``check``, another number of workers than there are lists.
    """

    def __init__(self, links: list[list[int]], weights: WeightRule = "metropolis") -> None:
        super().__init__(weights)
        self.links = [sorted(row) for row in links]
        self._check_links()

    def _check_links(self) -> None:
        n = len(self.links)
        if n == 0:
            raise ValueError("FromAdjacency(links=[]): must have one list for every rank")
        for i, row in enumerate(self.links):
            for j in row:
                if isinstance(j, bool) or not isinstance(j, int) or not 0 <= j < n or j == i:
                    raise ValueError(f"FromAdjacency: rank {i} is linked to {j!r}; must be another rank in 0..{n - 1}")
                if row.count(j) > 1:
                    raise ValueError(f"FromAdjacency: rank {i} lists rank {j} more than once")
                if i not in self.links[j]:
                    raise ValueError(
                        f"FromAdjacency: rank {i} lists rank {j} but {j} does not list {i}; list both ways"
                    )
        if not strongly_connected(self.links):
            raise ValueError(f"FromAdjacency: the graph of {n} ranks must be connected, and is in several pieces")

    def check(self, n: int) -> None:
        """Raise ``ValueError`` if ``n`` is not the number of ranks in ``links``."""
        _check_size("FromAdjacency", len(self.links), n)

    def adjacent(self, n: int, rank: int) -> list[int]:
        """The given links of ``rank``."""
        return list(self.links[rank])


class FromMatrix(Topology):
    """The user's own mixing matrix, in the receiver's convention ``x_i <- sum_j W[i, j] x_j``.

    Rows have to sum to one; columns need not, but then repeated mixing ends in the weighted mean with the weights
    :meth:`stationary` instead of the plain one. Every own weight has to be positive and every rank reachable from every
    other, which together guarantee that mixing converges. Rows that sum to one up to 1e-6 are accepted and divided by
    their sum, so that values written with few digits do not make the model shrink.

    Args:
        entries: the rows of the matrix; row ``i`` holds the weights with which rank ``i`` takes every rank's value.

    Raises:
        ValueError: a matrix that is not square, a negative or missing weight, a row that does not sum to one, a graph
            in which some rank never hears of some other; from ``check``, another number of workers than rows.
    """

    def __init__(self, entries: list[list[float]]) -> None:
        self.entries = [[float(value) for value in row] for row in entries]
        self._check_entries()
        ranks = range(len(entries))
        self.directed = any((self.entries[i][j] > 0) != (self.entries[j][i] > 0) for i in ranks for j in range(i))

    def _check_entries(self) -> None:
        n = len(self.entries)
        if n == 0:
            raise ValueError("FromMatrix(entries=[]): must have one row for every rank")
        for i, row in enumerate(self.entries):
            if len(row) != n:
                raise ValueError(f"FromMatrix: row {i} has {len(row)} entries; a matrix of {n} rows needs {n}")
            for j, value in enumerate(row):
                if not 0 <= value < math.inf:
                    raise ValueError(f"FromMatrix: entry ({i}, {j}) is {value:g}; weights must be finite, at least 0")
            if abs(math.fsum(row) - 1) > _TOLERANCE:
                raise ValueError(f"FromMatrix: row {i} sums to {math.fsum(row):g}; every row must sum to 1")
            if row[i] == 0:
                raise ValueError(f"FromMatrix: entry ({i}, {i}) is 0; every rank's own weight must be positive")
        if not strongly_connected([[j for j, value in enumerate(row) if value > 0] for row in self.entries]):
            raise ValueError(f"FromMatrix: every one of the {n} ranks must be reachable from every other")

    def check(self, n: int) -> None:
        """Raise ``ValueError`` if ``n`` is not the number of rows."""
        _check_size("FromMatrix", len(self.entries), n)

    def row(self, n: int, rank: int, step: int = 0) -> dict[int, float]:
        """The positive entries of the given row, divided by their sum."""
        total = math.fsum(self.entries[rank])
        return {j: value / total for j, value in enumerate(self.entries[rank]) if value > 0}

    def receivers(self, n: int, rank: int, step: int = 0) -> list[int]:
        """The rows with a positive entry in column ``rank``."""
        return [i for i in range(n) if i != rank and self.entries[i][rank] > 0]

    def is_mean(self, n: int) -> bool:
        """Whether all entries are ``1/n`` (up to rounding)."""
        return bool((self.matrix(n) - 1.0 / n).abs().max() < 1e-12)

    def symmetric(self, n: int) -> bool:
        """Whether the matrix equals its transpose up to 1e-6, the accuracy asked of the rows."""
        w = self.matrix(n)
        return bool((w - w.T).abs().max() <= _TOLERANCE)

    def doubly_stochastic(self, n: int) -> bool:
        """Whether the columns sum to one up to 1e-6, the accuracy asked of the rows."""
        return bool((self.matrix(n).sum(0) - 1).abs().max() <= _TOLERANCE)

    def stationary(self, n: int) -> list[float]:
        """The left eigenvector of eigenvalue one, ``lambda W = lambda``, summing to one (unique and positive here)."""
        if self.doubly_stochastic(n):
            return [1.0 / n] * n
        # (W' - I) lambda = 0 has one redundant equation; the last gives way to sum(lambda) = 1
        system = self.matrix(n).T - torch.eye(n, dtype=torch.float64)
        system[-1] = 1.0
        right = torch.zeros(n, dtype=torch.float64)
        right[-1] = 1.0
        found: list[float] = torch.linalg.solve(system, right).tolist()
        return found


def _check_size(owner: str, size: int, n: int) -> None:
    check_int(owner, "n", n, 1)
    if n != size:
        raise ValueError(f"{owner}(n={n}): the graph was given for {size} workers and exists for {size} only")
