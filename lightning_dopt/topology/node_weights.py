"""Mixing that keeps a weighted mean: row-stochastic matrices induced by the weights of the nodes."""

from __future__ import annotations

import math
from typing import Literal

from lightning_dopt._checks import check_choice, check_float, check_int
from lightning_dopt.topology.base import Topology
from lightning_dopt.topology.weights import UndirectedGraph

NodeRule = Literal["metropolis", "paper"]
"""How :class:`NodeWeighted` weighs the links of its graph."""

RULES: tuple[NodeRule, ...] = ("metropolis", "paper")
LAZINESS = 0.1
_TOLERANCE = 1e-6
_EQUAL = 1e-12


def checked_shares(owner: str, shares: list[float] | None, counts: list[int] | None) -> list[float]:
    """The shares that ``shares`` or ``counts`` describe: positive, summing to one up to rounding.

    Args:
        owner: the class that errors name.
        shares: one positive number per rank, summing to one (up to 1e-6, then divided by their sum).
        counts: one positive whole number per rank, such as numbers of samples; divided by their sum.

    Raises:
        ValueError: both or neither are given, or a value is not allowed.
    """
    if (shares is None) == (counts is None):
        raise ValueError(f"{owner}: give either shares (positive, summing to 1) or counts (samples of each rank)")
    if counts is not None:
        if not counts:
            raise ValueError(f"{owner}(counts=[]): must have one count for every rank")
        for rank, count in enumerate(counts):
            check_int(owner, f"counts[{rank}]", count, 1)
        return [count / sum(counts) for count in counts]
    assert shares is not None
    if not shares:
        raise ValueError(f"{owner}(shares=[]): must have one share for every rank")
    given = [
        check_float(owner, f"shares[{rank}]", share, 0.0, open_low=True, open_high=True)
        for rank, share in enumerate(shares)
    ]
    total = math.fsum(given)
    if abs(total - 1) > _TOLERANCE:
        raise ValueError(
            f"{owner}(shares=...): sum to {total:g}, must sum to 1; divide them by their sum or pass counts="
        )
    return [share / total for share in given]


def check_ranks(owner: str, what: str, given: int, n: int) -> None:
    """Raise ``ValueError`` in one line unless there are as many shares or counts as workers."""
    check_int(owner, "n", n, 1)
    if given != n:
        raise ValueError(f"{owner}({what}=...): has {given} numbers for {n} workers; give one for every rank")


class _Weighted(Topology):
    """What graphs with node weights have in common; the subclass sets ``shares`` and ``counts``."""

    shares: list[float] | None
    counts: list[int] | None
    _lambda: list[float]

    def _weigh(self, shares: list[float] | None, counts: list[int] | None) -> None:
        self._lambda = checked_shares(type(self).__name__, shares, counts)
        self.shares = None if shares is None else list(shares)
        self.counts = None if counts is None else list(counts)
        self._uniform = max(self._lambda) - min(self._lambda) <= _EQUAL * max(self._lambda)
        if self._uniform:  # exactly, so that ratios are one
            self._lambda = [1.0 / len(self._lambda)] * len(self._lambda)

    def check(self, n: int) -> None:
        """Raise ``ValueError`` in one line unless there is one weight for each of ``n`` workers."""
        what = "shares" if self.shares is not None else "counts"
        check_ranks(type(self).__name__, what, len(self._lambda), n)

    def stationary(self, n: int) -> list[float]:
        """The shares: every round keeps ``sum_i lambda_i x_i``, and repeated rounds end in it."""
        return list(self._lambda)

    def doubly_stochastic(self, n: int) -> bool:
        """Whether columns sum to one as well: only if all shares are equal."""
        return self._uniform

    def symmetric(self, n: int) -> bool:
        """Whether the matrix equals its transpose: only if all shares are equal."""
        return self._uniform

    def reversible(self, n: int) -> bool:
        """Whether detailed balance ``lambda_i W[i, j] = lambda_j W[j, i]`` holds with the stationary weights: yes.

        Then ``W`` is self-adjoint in the space weighted by ``lambda``, its eigenvalues are real, and methods that need a
        symmetric matrix (exact diffusion) work if they measure in that space.
        """
        return True


class NodeWeighted(_Weighted):
    """A graph whose mixing keeps the weighted mean ``sum_i lambda_i x_i``: row-stochastic and reversible.

    Over these peers, plain unweighted losses are trained towards the minimum of ``sum_i lambda_i f_i``, with any inner
    optimizer (Strategy II). Do not weight the losses as well. With ``d_i`` the number of neighbours of ``i`` and
    ``W[i, i]`` what is left to one, the weight of a link is

    * ``"metropolis"``: ``min(1 / (1 + d_i), lambda_j / (lambda_i (1 + d_j)))``; for equal shares exactly the
      Metropolis-Hastings matrix;
    * ``"paper"``: ``(1 - laziness) / d_i * min(1, lambda_j d_i / (lambda_i d_j))``; for shares proportional to degrees
      the lazy random walk ``(1 - laziness) D^-1 A + laziness I``. For equal shares it is doubly stochastic, but not the
      Metropolis-Hastings matrix.

    A row needs the shares and degrees of its neighbours only, and of shares their ratios only. Rows sum to one, entries
    are at least 0, the own weight is at least ``1 / (1 + d_i)`` or ``laziness``, and
    ``lambda_i W[i, j] = lambda_j W[j, i]`` up to rounding.

    Args:
        graph: who is linked to whom; it keeps its default ``weights``, which the rule replaces.
        shares: ``lambda``, one positive number per rank, summing to one.
        counts: instead of shares, one positive whole number per rank, such as its number of samples.
        rule: see above.
        laziness: smallest own weight of the rule ``"paper"``, in (0, 1); ``None`` means 0.1 there. The rule
            ``"metropolis"`` takes none.

    Raises:
        ValueError: a graph that is not undirected or has weights of its own, shares and counts both given or both
            missing or not allowed, an unknown rule, a laziness out of range or without effect; from ``check``, another
            number of workers than shares.

    Source: Liu, Kong, Lu, Yuan, Zhao, "Row-Stochastic Matrices Can Provably Outperform Doubly Stochastic Matrices in
    Decentralized Learning", arXiv 2511.19513, Eq. (3), for ``"paper"``.
    """

    def __init__(
        self,
        graph: UndirectedGraph,
        shares: list[float] | None = None,
        counts: list[int] | None = None,
        rule: NodeRule = "metropolis",
        laziness: float | None = None,
    ) -> None:
        if not isinstance(graph, UndirectedGraph):
            raise ValueError(
                f"NodeWeighted(graph={graph!r}): must be a fixed undirected graph such as Ring() or Star(); "
                "where everybody hears everybody, use WeightedMean"
            )
        if graph.weights != "metropolis":
            raise ValueError(f"NodeWeighted(graph={graph!r}): weights of the graph have no effect here, leave them out")
        check_choice("NodeWeighted", "rule", rule, RULES)
        if laziness is not None:
            check_float("NodeWeighted", "laziness", laziness, 0.0, 1.0, open_low=True, open_high=True)
            if rule != "paper":
                raise ValueError(
                    f"NodeWeighted(laziness={laziness!r}): has an effect with rule='paper' only; for more, Lazy(...)"
                )
        self.graph, self.rule, self.laziness = graph, rule, laziness
        self._weigh(shares, counts)

    def check(self, n: int) -> None:
        """Raise ``ValueError`` if the graph does not exist for ``n`` workers or there are not ``n`` weights."""
        self.graph.check(n)
        super().check(n)

    def row(self, n: int, rank: int, step: int = 0) -> dict[int, float]:
        """The weights of ``rank``'s links by the rule; the same in every round."""
        own, links = self._lambda[rank], self.graph.adjacent(n, rank)
        if self.rule == "metropolis":
            scale, extra = 1.0, 1
        else:
            scale, extra = 1.0 - (LAZINESS if self.laziness is None else self.laziness), 0
        mine = 1.0 / (extra + len(links)) if links else 0.0
        row = {j: scale * min(mine, self._lambda[j] / own / (extra + self.graph.degree(n, j))) for j in links}
        row[rank] = 1.0 - math.fsum(row.values())
        return row

    def neighbors(self, n: int, rank: int, step: int = 0) -> list[int]:
        """The ranks linked to ``rank`` in the graph."""
        return self.graph.adjacent(n, rank)

    def max_degree(self, n: int) -> int:
        """The largest degree of the graph."""
        return self.graph.max_degree(n)

    def is_mean(self, n: int) -> bool:
        """Whether a round is the plain mean: with equal shares, over the complete graph, by the Metropolis rule."""
        return n == 1 or (self._uniform and self.rule == "metropolis" and self.graph.is_mean(n))


class WeightedMean(_Weighted):
    """The complete graph with ``W = 1 lambda^T``: one round gives every rank the exact weighted mean.

    The reference for :class:`NodeWeighted`: adapt-then-combine over these peers is SGD on ``sum_i lambda_i f_i``.

    Args:
        shares: ``lambda``, one positive number per rank, summing to one.
        counts: instead of shares, one positive whole number per rank, such as its number of samples.

    Raises:
        ValueError: shares and counts both given or both missing or not allowed; from ``check``, another number of
            workers than shares.
    """

    agrees = True

    def __init__(self, shares: list[float] | None = None, counts: list[int] | None = None) -> None:
        self._weigh(shares, counts)

    def row(self, n: int, rank: int, step: int = 0) -> dict[int, float]:
        """The shares, the same on every rank."""
        return dict(enumerate(self._lambda))

    def neighbors(self, n: int, rank: int, step: int = 0) -> list[int]:
        """All other ranks."""
        return [j for j in range(n) if j != rank]

    def max_degree(self, n: int) -> int:
        """All ranks but one."""
        return n - 1

    def is_mean(self, n: int) -> bool:
        """Whether the weighted mean is the plain one: with equal shares."""
        return self._uniform
