"""Graphs that are given: own adjacency lists, own mixing matrices."""

from __future__ import annotations

import math

from lightning_dopt.topology._graph import GraphLike, check_size, links_of, stationary_weights, strongly_connected
from lightning_dopt.topology.base import Topology
from lightning_dopt.topology.weights import UndirectedGraph, WeightRule

_TOLERANCE = 1e-6


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

    @classmethod
    def from_networkx(cls, graph: GraphLike, weights: WeightRule = "metropolis") -> FromAdjacency:
        """The links of an undirected networkx graph, or of anything with ``nodes``, ``edges`` and ``is_directed()``.

        Ranks are the node numbers if the nodes are 0 to n - 1, otherwise the places in ``graph.nodes``. Loops and
        repeated edges are dropped (every rank keeps a weight for itself anyway), edge weights are not read.

        Raises:
            ValueError: as the constructor, or the graph is directed or has no nodes.
        """
        if graph.is_directed():
            raise ValueError("FromAdjacency: the graph is directed; use Directed.from_networkx")
        return cls(links_of("FromAdjacency", graph), weights)

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
        check_size("FromAdjacency", len(self.links), n)

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
        check_size("FromMatrix", len(self.entries), n)

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
        return stationary_weights(self.matrix(n))
