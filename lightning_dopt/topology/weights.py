"""Mixing weights for undirected graphs, and the lazy version of any topology."""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import lru_cache
from typing import Literal

from lightning_dopt._checks import check_choice
from lightning_dopt.topology.base import Topology
from lightning_dopt.topology.optimal import best_constant, fastest

WeightRule = Literal["metropolis", "max_degree", "lazy", "laplacian", "fastest", "fdla"]
"""How an undirected graph weighs its links; see :class:`UndirectedGraph`."""

RULES: tuple[WeightRule, ...] = ("metropolis", "max_degree", "lazy", "laplacian", "fastest", "fdla")

_SOLVED = ("fastest", "fdla")


class UndirectedGraph(Topology):
    """A fixed undirected graph whose weights follow from its degrees; a subclass says who is adjacent to whom.

    With ``d_i`` the number of neighbours of ``i`` and ``W[i, i]`` what is left to one, the rules are

    * ``"metropolis"``: ``W[i, j] = 1 / (1 + max(d_i, d_j))``, which needs the neighbours' degrees only;
    * ``"max_degree"``: ``W[i, j] = 1 / (1 + max_k d_k)``, the same weight on every link;
    * ``"lazy"``: ``(I + W) / 2`` of the Metropolis matrix, so that no eigenvalue is negative;
    * ``"laplacian"``: the same weight on every link, the best one: ``2 / (lambda_2 + lambda_max)`` with eigenvalues of
      the graph Laplacian, or ``1 / max_k d_k`` where that is smaller, so that no own weight is negative;
    * ``"fastest"``: the weights with the smallest consensus rate among all symmetric ones that are not negative
      (fastest mixing Markov chain); links that do not help get no weight and no message, so that
      :meth:`max_degree` is an upper bound;
    * ``"fdla"``: the same with weights of any sign (fastest distributed linear averaging). Own weights may be negative,
      so that a round is no convex combination: fine for linear averaging, unproven with lossy or robust combining.

    All matrices are symmetric and doubly stochastic. The first three have a positive diagonal; with the fourth and fifth
    an own weight may be zero. The last three are computed once, from the graph alone, by a fixed sequence of float64
    operations rounded to 12 (``"laplacian"``) or 9 digits: every rank finds the same without a message. The last two
    cost seconds for some hundred links. If all degrees are equal the first two coincide; where all links look alike
    (ring, hypercube, square torus, star) the fourth and fifth do.

    Sources: Xiao, Boyd and Lall, "A Scheme for Robust Distributed Sensor Fusion Based on Average Consensus" (2005); Xiao
    and Boyd, "Fast linear iterations for distributed averaging" (2004); Boyd, Diaconis and Xiao, "Fastest mixing Markov
    chain on a graph" (2004).
    """

    weights: WeightRule

    def __init__(self, weights: WeightRule = "metropolis") -> None:
        check_choice(type(self).__name__, "weights", weights, RULES)
        self.weights = weights

    @abstractmethod
    def adjacent(self, n: int, rank: int) -> list[int]:
        """The ranks linked to ``rank``, ascending, without ``rank`` itself."""

    def degree(self, n: int, rank: int) -> int:
        """How many ranks are linked to ``rank``."""
        return len(self.adjacent(n, rank))

    def row(self, n: int, rank: int, step: int = 0) -> dict[int, float]:
        """The weights of ``rank``'s links by the chosen rule; the same in every round."""
        if self.weights in _SOLVED:
            return dict(_solved(self, n)[rank])
        links = self.adjacent(n, rank)
        if self.weights == "max_degree":
            row = dict.fromkeys(links, 1.0 / (1 + self.max_degree(n)))
        elif self.weights == "laplacian":
            row = dict.fromkeys(links, _constant(self, n))
        else:
            own = self.degree(n, rank)
            scale = 0.5 if self.weights == "lazy" else 1.0
            row = {j: scale / (1 + max(own, self.degree(n, j))) for j in links}
        return _completed(row, rank)

    def is_tree(self, n: int) -> bool:
        """Whether the graph has no circle, that is ``n - 1`` links (it is connected)."""
        return sum(self.degree(n, rank) for rank in range(n)) == 2 * (n - 1)

    def neighbors(self, n: int, rank: int, step: int = 0) -> list[int]:
        """The ranks linked to ``rank``, ascending; the same in every round."""
        return super().neighbors(n, rank, step) if self.weights in _SOLVED else self.adjacent(n, rank)

    def is_mean(self, n: int) -> bool:
        """Whether everybody is linked to everybody with weight ``1/n``."""
        return n == 1 or (self.weights != "lazy" and all(self.degree(n, i) == n - 1 for i in range(n)))


def _completed(row: dict[int, float], rank: int) -> dict[int, float]:
    """A row of link weights with what they leave to one as the own weight (an own weight of rounding errors is zero)."""
    own = 1.0 - math.fsum(row.values())
    row[rank] = 0.0 if abs(own) < 1e-14 else own
    return row


def _edges(graph: UndirectedGraph, n: int) -> tuple[tuple[int, int], ...]:
    return tuple((i, j) for i in range(n) for j in graph.adjacent(n, i) if i < j)


@lru_cache(maxsize=64)
def _constant(graph: UndirectedGraph, n: int) -> float:
    """The best constant weight of the graph's links."""
    return best_constant(n, _edges(graph, n))


@lru_cache(maxsize=64)
def _solved(graph: UndirectedGraph, n: int) -> tuple[dict[int, float], ...]:
    """The rows of the best matrix on the graph's links; links without weight are left out."""
    edges = _edges(graph, n)
    rows: list[dict[int, float]] = [{} for _ in range(n)]
    for (i, j), weight in zip(edges, fastest(n, edges, positive=graph.weights == "fastest"), strict=True):
        if weight:
            rows[i][j] = rows[j][i] = weight
    return tuple(_completed(row, rank) for rank, row in enumerate(rows))


class _Around(Topology):
    """Another topology with other weights: same links, same rounds."""

    topology: Topology

    def check(self, n: int) -> None:
        """Raise ``ValueError`` if the inner topology does not exist for ``n`` workers."""
        self.topology.check(n)

    def period(self, n: int) -> int | None:
        """The period of the inner topology."""
        return self.topology.period(n)

    def neighbors(self, n: int, rank: int, step: int = 0) -> list[int]:
        """The neighbours in the inner topology."""
        return self.topology.neighbors(n, rank, step)

    def receivers(self, n: int, rank: int, step: int = 0) -> list[int]:
        """The receivers in the inner topology."""
        return self.topology.receivers(n, rank, step)

    def max_degree(self, n: int) -> int:
        """The largest degree of the inner topology."""
        return self.topology.max_degree(n)

    def doubly_stochastic(self, n: int) -> bool:
        """Whether the inner matrices are doubly stochastic."""
        return self.topology.doubly_stochastic(n)


class Lazy(_Around):
    """The lazy version of another topology: ``(I + W) / 2`` in every round.

    Same links, same stationary weights; every eigenvalue ``mu`` of a round becomes ``(1 + mu) / 2``. For a symmetric
    ``W`` none is negative any more, which exact diffusion and NIDS need; the price is up to half the spectral gap.

    Args:
        topology: the topology to slow down.

    Raises:
        ValueError: ``topology`` is not a topology.
    """

    def __init__(self, topology: Topology) -> None:
        if not isinstance(topology, Topology):
            raise ValueError(f"Lazy(topology={topology!r}): must be a topology such as Ring()")
        self.topology = topology
        self.directed = topology.directed

    def row(self, n: int, rank: int, step: int = 0) -> dict[int, float]:
        """Half of the inner row, and one half more for ``rank`` itself."""
        row = {j: weight / 2 for j, weight in self.topology.row(n, rank, step).items()}
        row[rank] = row.get(rank, 0.0) + 0.5
        return row

    def is_tree(self, n: int) -> bool:
        """Whether the inner graph is a tree."""
        return self.topology.is_tree(n)

    def symmetric(self, n: int) -> bool:
        """Whether the inner matrices are symmetric."""
        return self.topology.symmetric(n)

    def reversible(self, n: int) -> bool:
        """As the inner topology."""
        return self.topology.reversible(n)

    def stationary(self, n: int) -> list[float]:
        """The stationary weights of the inner topology."""
        return self.topology.stationary(n)

    def row_stochastic(self, n: int) -> bool:
        """Whether the rows of the inner matrices sum to one."""
        return self.topology.row_stochastic(n)

    def column_stochastic(self, n: int) -> bool:
        """Whether the columns of the inner matrices sum to one."""
        return self.topology.column_stochastic(n)


class RowNormalised(_Around):
    """Another topology whose rows are divided by their sums, for tensors that push-sum does not carry (statistics).

    Args:
        topology: Usually one whose columns alone sum to one.
    """

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self.directed = topology.directed

    def row(self, n: int, rank: int, step: int = 0) -> dict[int, float]:
        """The inner row, divided by its sum."""
        row = self.topology.row(n, rank, step)
        total = math.fsum(row.values())
        return {j: weight / total for j, weight in row.items()}
