"""Matchings that change every round: each rank averages with at most one partner."""

from __future__ import annotations

from abc import abstractmethod
from functools import lru_cache

from lightning_dopt._checks import check_int
from lightning_dopt.topology._graph import log2_ceil, random_bits
from lightning_dopt.topology.base import Topology
from lightning_dopt.topology.static import check_power_of_two
from lightning_dopt.topology.weights import UndirectedGraph


class _Matching(Topology):
    """Disjoint pairs in every round; a pair averages with weights 1/2, whoever has no partner keeps its value.

    Every matrix is symmetric, doubly stochastic and a projection (``W @ W == W``).
    """

    @abstractmethod
    def partner(self, n: int, rank: int, step: int) -> int:
        """The rank that ``rank`` averages with in round ``step``; ``rank`` itself if it idles."""

    def row(self, n: int, rank: int, step: int = 0) -> dict[int, float]:
        """One half each for ``rank`` and its partner, one for ``rank`` if it idles."""
        partner = self.partner(n, rank, step)
        return {rank: 1.0} if partner == rank else {rank: 0.5, partner: 0.5}

    def max_degree(self, n: int) -> int:
        """One partner."""
        return min(1, n - 1)

    def is_mean(self, n: int) -> bool:
        """Whether the only pair is everybody, which is so for up to two workers."""
        return n <= 2


class OnePeerHypercube(_Matching):
    """In round ``t`` the partner of ``i`` differs in binary digit ``t mod log2(n)``; a full period is the exact mean.

    The symmetric relative of :class:`OnePeerExponential`: same cost, same finite time, and usable where a method needs
    a symmetric matrix.

    Raises:
        ValueError: from ``check``, a number of workers that is not a power of two.
    """

    def check(self, n: int) -> None:
        """Raise ``ValueError`` if ``n`` is not a power of two."""
        super().check(n)
        check_power_of_two("OnePeerHypercube", n)

    def period(self, n: int) -> int:
        """``log2 n``, at least 1."""
        return max(1, log2_ceil(n))

    def partner(self, n: int, rank: int, step: int) -> int:
        """``rank`` with one binary digit flipped."""
        return rank ^ (1 << (step % self.period(n))) if n > 1 else rank


class RandomPairs(_Matching):
    """A fresh uniformly random matching every round; with an odd number of workers one random rank idles.

    The draw depends on ``(seed, step)`` alone and not on any generator's state, so all ranks agree without exchanging a
    word and a resumed run continues with the same pairs. For even ``n`` the expected matrix is at distance
    ``(n - 2) / (2 (n - 1))``, below one half, from the exact mean. The model is randomized gossip (Boyd et al., 2006)
    with all pairs of a matching active at once.

    Args:
        seed: selects the sequence of matchings, at least 0.

    Raises:
        ValueError: a negative or non-integer seed.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = check_int("RandomPairs", "seed", seed, 0)

    def period(self, n: int) -> int | None:
        """``None``, or 1 where there is only one matching."""
        return 1 if n <= 2 else None

    def partner(self, n: int, rank: int, step: int) -> int:
        """The partner in the matching drawn for this round."""
        return _random_matching(self.seed, n, step)[rank]


class RoundRobin(_Matching):
    """A tournament by the circle method: within ``n - 1`` rounds (``n`` if odd) every rank meets every other once.

    For even ``n`` every round is a perfect matching; for odd ``n`` each rank idles once per period. The order is fixed,
    so two ranks never wait for each other in different orders.
    """

    def period(self, n: int) -> int:
        """``n - 1`` for even ``n``, ``n`` for odd ``n``."""
        return n - 1 + n % 2

    def partner(self, n: int, rank: int, step: int) -> int:
        """The opponent of ``rank``: ranks ``i`` and ``j`` below the fixed last one meet where ``i + j = 2 step``."""
        circle = self.period(n)
        fixed = circle  # the last of an even number of places; nobody sits there if n is odd
        if rank == fixed:
            return step % circle
        opponent = (2 * step - rank) % circle
        if opponent != rank:
            return opponent
        return fixed if fixed < n else rank


class AlternatingRing(_Matching):
    """A ring of an even number of ranks whose links take turns: ``2k`` with ``2k + 1``, then ``2k + 1`` with ``2k + 2``.

    Two messages in two rounds where :class:`Ring` sends four, at a comparable rate per message.

    Raises:
        ValueError: from ``check``, an odd number of workers other than 1.
    """

    def check(self, n: int) -> None:
        """Raise ``ValueError`` if ``n`` is odd and not 1."""
        super().check(n)
        check_even("AlternatingRing", n)

    def period(self, n: int) -> int:
        """2, or 1 where both rounds are the same."""
        return 1 if n <= 2 else 2

    def partner(self, n: int, rank: int, step: int) -> int:
        """The next rank or the one before, in turn."""
        return (rank + (1 if (rank + step) % 2 == 0 else -1)) % n


class BipartiteExponential(_Matching):
    """Odd ranks meet even ranks at the distances 1, 3, 5, 9, 17, ... (one and one plus each power of two) in turn.

    A perfect matching in every round. All links join an odd and an even rank, so that odd ones can always start an
    exchange and even ones answer, and nobody waits in a circle: the graph of asynchronous pairwise averaging.

    Source: Lian et al., "Asynchronous Decentralized Parallel Stochastic Gradient Descent" (2018); offsets: Assran et
    al., "Stochastic Gradient Push for Distributed Deep Learning" (2019).

    Raises:
        ValueError: from ``check``, an odd number of workers other than 1.
    """

    def check(self, n: int) -> None:
        """Raise ``ValueError`` if ``n`` is odd and not 1."""
        super().check(n)
        check_even("BipartiteExponential", n)

    def period(self, n: int) -> int:
        """The number of distances below ``n``, at least 1."""
        return 1 if n <= 2 else (n - 2).bit_length()

    def partner(self, n: int, rank: int, step: int) -> int:
        """The rank at the distance of the round: ahead of odd ranks, behind even ones."""
        turn = step % self.period(n)
        distance = 1 if turn == 0 else 1 + (1 << turn)
        return (rank + (distance if rank % 2 else -distance)) % n


class MatchingsOf(_Matching):
    """A fresh random matching of a fixed graph's links every round: one partner at most, neighbours only.

    Links are visited in an order drawn from ``(seed, step)`` and taken if both ends are free, so that no link is left
    whose ends both idle. The gossip of :class:`RandomPairs` for networks in which not everybody can reach everybody.

    Args:
        graph: the links that exist, such as ``Torus()``; its weights do not matter.
        seed: selects the sequence of matchings, at least 0.

    Raises:
        ValueError: ``graph`` is not an undirected graph, a negative or non-integer seed; from ``check``, the graph does
            not exist for the number of workers.
    """

    def __init__(self, graph: UndirectedGraph, seed: int = 0) -> None:
        if not isinstance(graph, UndirectedGraph):
            raise ValueError(f"MatchingsOf(graph={graph!r}): must be an undirected graph such as Torus()")
        self.graph = graph
        self.seed = check_int("MatchingsOf", "seed", seed, 0)

    def check(self, n: int) -> None:
        """Raise ``ValueError`` if the graph does not exist for ``n`` workers."""
        self.graph.check(n)

    def period(self, n: int) -> int | None:
        """``None``, or 1 where there is only one matching."""
        return 1 if n <= 2 else None

    def partner(self, n: int, rank: int, step: int) -> int:
        """The partner in the matching drawn for this round."""
        return _matching_of(self.graph, self.seed, n, step)[rank]


def check_even(owner: str, n: int) -> None:
    """Raise ``ValueError`` in one line, in the name of ``owner``, if ``n`` is odd and not 1."""
    if n > 1 and n % 2:
        raise ValueError(f"{owner}(n={n}): the number of workers must be even; RoundRobin() takes any")


@lru_cache(maxsize=64)
def _edges(graph: UndirectedGraph, n: int) -> tuple[tuple[int, int], ...]:
    return tuple((i, j) for i in range(n) for j in graph.adjacent(n, i) if i < j)


@lru_cache(maxsize=256)
def _matching_of(graph: UndirectedGraph, seed: int, n: int, step: int) -> tuple[int, ...]:
    """The partner of every rank: take links in the order of a random key each as long as both ends are free."""
    partners = list(range(n))
    for i, j in sorted(_edges(graph, n), key=lambda ends: (random_bits(seed, step, *ends), ends)):
        if partners[i] == i and partners[j] == j:
            partners[i], partners[j] = j, i
    return tuple(partners)


@lru_cache(maxsize=256)
def _random_matching(seed: int, n: int, step: int) -> tuple[int, ...]:
    """The partner of every rank: order the ranks by a random key each and pair them two by two."""
    order = sorted(range(n), key=lambda rank: (random_bits(seed, step, rank), rank))
    partners = list(range(n))
    for a, b in zip(order[0::2], order[1::2], strict=False):
        partners[a], partners[b] = b, a
    return tuple(partners)
