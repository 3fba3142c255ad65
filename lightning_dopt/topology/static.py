"""Undirected graphs that stay the same: ring, chain, grid, torus, star, complete graph, hypercube."""

from __future__ import annotations

import math

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


class _Lattice(UndirectedGraph):
    """Ranks row by row on a rectangle of ``rows`` times ``n / rows``."""

    def __init__(self, rows: int | None = None, weights: WeightRule = "metropolis") -> None:
        super().__init__(weights)
        self.rows = None if rows is None else check_int(type(self).__name__, "rows", rows, 1)

    def check(self, n: int) -> None:
        """Raise ``ValueError`` if ``n`` workers do not fill whole rows."""
        super().check(n)
        if self.rows is not None and n % self.rows:
            raise ValueError(f"{self!r}: {n} workers do not fill {self.rows} equal rows; rows must divide {n}")

    def shape(self, n: int) -> tuple[int, int]:
        """Rows and columns: ``rows`` as given, otherwise the largest divisor of ``n`` that is at most ``sqrt(n)``."""
        rows = self.rows or next(r for r in range(math.isqrt(n), 0, -1) if n % r == 0)
        return rows, n // rows


class Grid(_Lattice):
    """Ranks on a rectangle, row by row, linked to the rank above, below, left and right; borders have fewer links.

    A prime ``n`` has no rectangle but one row, which is a :class:`Chain`.

    Args:
        rows: rows of the rectangle, a divisor of the number of workers; by default the largest divisor that is at most
            the square root (2 x 4 for 8 workers, 4 x 4 for 16).
        weights: see :class:`~lightning_dopt.topology.UndirectedGraph`.

    Raises:
        ValueError: an argument outside its range; from ``check``, a number of workers that ``rows`` does not divide.
    """

    def adjacent(self, n: int, rank: int) -> list[int]:
        """Above, left, right and below where they exist."""
        rows, cols = self.shape(n)
        a, b = divmod(rank, cols)
        found = [rank - cols] * (a > 0) + [rank - 1] * (b > 0)
        return found + [rank + 1] * (b < cols - 1) + [rank + cols] * (a < rows - 1)

    def max_degree(self, n: int) -> int:
        """Up to two in each direction."""
        rows, cols = self.shape(n)
        return min(2, rows - 1) + min(2, cols - 1)


class Torus(_Lattice):
    """A :class:`Grid` whose rows and columns close to circles, so that all ranks have the same degree.

    Where a side has two ranks, both ways round lead to the same neighbour, which counts once: a 2 x 4 torus has degree
    3 and weights 1/4. A ``k x k`` torus with ``k >= 3`` has the eigenvalues
    ``(1 + 2 cos(2 pi p / k) + 2 cos(2 pi q / k)) / 5``. A prime ``n`` gives a :class:`Ring`.

    Args:
        rows: rows of the rectangle, a divisor of the number of workers; by default the largest divisor that is at most
            the square root.
        weights: see :class:`~lightning_dopt.topology.UndirectedGraph`.

    Raises:
        ValueError: an argument outside its range; from ``check``, a number of workers that ``rows`` does not divide.
    """

    def adjacent(self, n: int, rank: int) -> list[int]:
        """Above, below, left and right with wrap, each once."""
        rows, cols = self.shape(n)
        a, b = divmod(rank, cols)
        across = {a * cols + (b + o) % cols for o in (-1, 1)}
        along = {(a + o) % rows * cols + b for o in (-1, 1)}
        return sorted((across | along) - {rank})

    def max_degree(self, n: int) -> int:
        """Up to two in each direction."""
        rows, cols = self.shape(n)
        return min(2, rows - 1) + min(2, cols - 1)


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


def check_power_of_two(owner: str, n: int) -> None:
    """Raise ``ValueError`` in one line, in the name of ``owner``, if ``n`` is not a power of two."""
    if not is_power_of_two(n):
        raise ValueError(f"{owner}(n={n}): the number of workers must be a power of two (1, 2, 4, 8, ...)")
