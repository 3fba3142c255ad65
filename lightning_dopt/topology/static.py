"""Undirected graphs that stay the same: ring, chain, tree, star, complete graph, hypercube, symmetric exponential."""

from __future__ import annotations

from lightning_dopt._checks import check_int
from lightning_dopt.topology._graph import is_power_of_two, log2_ceil
from lightning_dopt.topology.base import Topology
from lightning_dopt.topology.weights import UndirectedGraph, WeightRule


class Ring(UndirectedGraph):
    """Ranks in a circle, each linked to the ``hops`` nearest on both sides.

    With one hop and ``n >= 3`` every weight is 1/3, and for ``n >= 5`` the consensus rate is
    ``(1 + 2 cos(2 pi / n)) / 3``: information needs of the order of ``n**2`` rounds to go round. Two ways to the same
    rank count once, so a small ring (``n <= 2 hops + 1``) is the complete graph.

    Args:
        hops: neighbours on each side, at least 1.
        weights: see :class:`~lightning_dopt.topology.UndirectedGraph`.

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(self, hops: int = 1, weights: WeightRule = "metropolis") -> None:
        super().__init__(weights)
        self.hops = check_int("Ring", "hops", hops, 1)

    def adjacent(self, n: int, rank: int) -> list[int]:
        """``rank - hops, ..., rank + hops`` modulo ``n``, each once."""
        reach = min(self.hops, n // 2)
        return sorted({(rank + o) % n for o in range(-reach, reach + 1)} - {rank})

    def max_degree(self, n: int) -> int:
        """``2 hops``, or ``n - 1`` if the ring is shorter."""
        return min(2 * self.hops, n - 1)


class Chain(UndirectedGraph):
    """Ranks in a line, each linked to the one before and the one after; the ends have one neighbour.

    With Metropolis weights the consensus rate is that of a ring of ``2 n`` ranks.

    Args:
        weights: see :class:`~lightning_dopt.topology.UndirectedGraph`.

    Raises:
        ValueError: an unknown weight rule.
    """

    def adjacent(self, n: int, rank: int) -> list[int]:
        """``rank - 1`` and ``rank + 1`` where they exist."""
        return [j for j in (rank - 1, rank + 1) if 0 <= j < n]

    def max_degree(self, n: int) -> int:
        """2, less where there are fewer than three ranks."""
        return min(2, n - 1)


class Tree(UndirectedGraph):
    """Ranks in a tree with rank 0 as root, numbered level by level: the parent of ``i`` is ``(i - 1) // branching``.

    For methods that need a tree (RelaySum passes partial sums along its links) as well as for gossip with the weights
    of the rule. Any two ranks are at most ``2 log_branching(n)`` links apart.

    Args:
        branching: children of a rank, at least 1; 2 is a binary heap, 1 a :class:`Chain`.
        weights: see :class:`~lightning_dopt.topology.UndirectedGraph`.

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(self, branching: int = 2, weights: WeightRule = "metropolis") -> None:
        super().__init__(weights)
        self.branching = check_int("Tree", "branching", branching, 1)

    def adjacent(self, n: int, rank: int) -> list[int]:
        """Parent and children, as far as they exist."""
        first = self.branching * rank + 1
        return [(rank - 1) // self.branching] * (rank > 0) + list(range(first, min(first + self.branching, n)))

    def max_degree(self, n: int) -> int:
        """Reached by rank 1 (parent and children) or by the root."""
        return max(len(self.adjacent(n, rank)) for rank in range(min(2, n)))


class Star(UndirectedGraph):
    """Rank 0 in the centre, linked to all others, which have no other link.

    With Metropolis weights every link has weight ``1/n`` and the consensus rate is ``1 - 1/n``. The centre carries
    ``n - 1`` messages per round, so this is for teaching and for tests rather than for speed.

    Args:
        weights: see :class:`~lightning_dopt.topology.UndirectedGraph`.

    Raises:
        ValueError: an unknown weight rule.
    """

    def adjacent(self, n: int, rank: int) -> list[int]:
        """Everybody for the centre, the centre for everybody else."""
        return list(range(1, n)) if rank == 0 else [0]

    def degree(self, n: int, rank: int) -> int:
        """``n - 1`` in the centre, else 1."""
        return n - 1 if rank == 0 else 1

    def max_degree(self, n: int) -> int:
        """The degree of the centre."""
        return n - 1


class Complete(Topology):
    """Everybody hears everybody with weight ``1/n``: the exact mean in one round, as an all-reduce gives it."""

    agrees = True

    def row(self, n: int, rank: int, step: int = 0) -> dict[int, float]:
        """``1/n`` for all ranks."""
        return dict.fromkeys(range(n), 1.0 / n)

    def max_degree(self, n: int) -> int:
        """Everybody else."""
        return n - 1

    def is_mean(self, n: int) -> bool:
        """Always."""
        return True


class Hypercube(UndirectedGraph):
    """The corners of a cube in ``d = log2(n)`` dimensions: two ranks are linked if they differ in one binary digit.

    Weights are ``1 / (d + 1)``, the consensus rate is ``(d - 1) / (d + 1)``, the smallest eigenvalue its negative.

    Args:
        weights: see :class:`~lightning_dopt.topology.UndirectedGraph`.

    Raises:
        ValueError: an unknown weight rule; from ``check``, a number of workers that is not a power of two.
    """

    def check(self, n: int) -> None:
        """Raise ``ValueError`` if ``n`` is not a power of two."""
        super().check(n)
        check_power_of_two("Hypercube", n)

    def adjacent(self, n: int, rank: int) -> list[int]:
        """``rank`` with one binary digit flipped."""
        return sorted(rank ^ (1 << k) for k in range(log2_ceil(n)))

    def max_degree(self, n: int) -> int:
        """One per dimension."""
        return log2_ceil(n)


class SymmetricExponential(UndirectedGraph):
    """Rank ``i`` is linked to ``i + b**k`` and ``i - b**k`` modulo ``n`` for all powers of ``b`` up to ``n / 2``.

    The undirected relative of :class:`Exponential` for methods that need a symmetric matrix, at nearly twice the
    messages. All degrees are equal, so the weights are ``1 / (degree + 1)``.

    Args:
        base: ``b``, at least 2.
        weights: see :class:`~lightning_dopt.topology.UndirectedGraph`.

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(self, base: int = 2, weights: WeightRule = "metropolis") -> None:
        super().__init__(weights)
        self.base = check_int("SymmetricExponential", "base", base, 2)

    def adjacent(self, n: int, rank: int) -> list[int]:
        """``rank`` plus and minus each power, modulo ``n``, each once."""
        found, offset = set(), 1
        while 2 * offset <= n:
            found |= {(rank + offset) % n, (rank - offset) % n}
            offset *= self.base
        return sorted(found)

    def degree(self, n: int, rank: int) -> int:
        """The same for every rank."""
        return len(self.adjacent(n, 0))

    def max_degree(self, n: int) -> int:
        """The same for every rank."""
        return len(self.adjacent(n, 0))


def check_power_of_two(owner: str, n: int) -> None:
    """Raise ``ValueError`` in one line, in the name of ``owner``, if ``n`` is not a power of two."""
    if not is_power_of_two(n):
        raise ValueError(f"{owner}(n={n}): the number of workers must be a power of two (1, 2, 4, 8, ...)")
