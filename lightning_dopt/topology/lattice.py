"""Ranks on boxes: the grid, and the torus in any number of dimensions."""

from __future__ import annotations

import math

from lightning_dopt._checks import check_int
from lightning_dopt.topology._graph import box
from lightning_dopt.topology.weights import UndirectedGraph, WeightRule


class Grid(UndirectedGraph):
    """Ranks on a rectangle, row by row, linked to the rank above, below, left and right; borders have fewer links.

    A prime ``n`` has no rectangle but one row, which is a :class:`Chain`.

    Args:
        rows: rows of the rectangle, a divisor of the number of workers; by default the largest divisor that is at most
            the square root (2 x 4 for 8 workers, 4 x 4 for 16).
        weights: see :class:`~lightning_dopt.topology.UndirectedGraph`.

    Raises:
        ValueError: an argument outside its range; from ``check``, a number of workers that ``rows`` does not divide.
    """

    def __init__(self, rows: int | None = None, weights: WeightRule = "metropolis") -> None:
        super().__init__(weights)
        self.rows = None if rows is None else check_int("Grid", "rows", rows, 1)

    def check(self, n: int) -> None:
        """Raise ``ValueError`` if ``n`` workers do not fill whole rows."""
        super().check(n)
        if self.rows is not None:
            check_rows(self, self.rows, n)

    def shape(self, n: int) -> tuple[int, int]:
        """Rows and columns: ``rows`` as given, otherwise the largest divisor of ``n`` that is at most ``sqrt(n)``."""
        rows = self.rows or box(n, 2)[0]
        return rows, n // rows

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


class Torus(UndirectedGraph):
    """A box of ranks whose rows close to circles in every dimension, so that all ranks have the same degree.

    In two dimensions this is a :class:`Grid` with wrap; ranks are numbered row by row, the last dimension fastest.
    Where a side has two ranks, both ways round lead to the same neighbour, which counts once: a 2 x 4 torus has degree
    3 and weights 1/4. With all sides ``k >= 3`` and ``d`` dimensions the eigenvalues are
    ``(1 + 2 cos(2 pi p_1 / k) + ... + 2 cos(2 pi p_d / k)) / (2 d + 1)``. A prime ``n`` gives a :class:`Ring`.

    Args:
        rows: rows of the rectangle in two dimensions, a divisor of the number of workers; by default the largest
            divisor that is at most the square root.
        weights: see :class:`~lightning_dopt.topology.UndirectedGraph`.
        dims: the number of dimensions, at least 1, with sides as equal as the divisors of ``n`` allow (32 workers in
            three dimensions: 2 x 4 x 4), or the list of all sides.

    Raises:
        ValueError: an argument outside its range, ``rows`` with ``dims`` other than 2; from ``check``, a number of
            workers that the box does not hold.
    """

    def __init__(self, rows: int | None = None, weights: WeightRule = "metropolis", dims: int | list[int] = 2) -> None:
        super().__init__(weights)
        self.rows = None if rows is None else check_int("Torus", "rows", rows, 1)
        self.dims = check_dims("Torus", dims)
        if rows is not None and dims != 2:
            raise ValueError(
                f"Torus(rows={rows!r}, dims={dims!r}): rows are for two dimensions; give all sides in dims"
            )

    def check(self, n: int) -> None:
        """Raise ``ValueError`` if ``n`` workers do not fill the box."""
        super().check(n)
        if self.rows is not None:
            check_rows(self, self.rows, n)
        check_sides(self, self.dims, n)

    def shape(self, n: int) -> tuple[int, ...]:
        """The sides of the box."""
        if self.rows is not None:
            return self.rows, n // self.rows
        return sides(self.dims, n)

    def adjacent(self, n: int, rank: int) -> list[int]:
        """One step forward and one back in every dimension, with wrap, each rank once."""
        found, stride = set(), 1
        for side in reversed(self.shape(n)):
            place = rank // stride % side
            found |= {rank + ((place + step) % side - place) * stride for step in (-1, 1)}
            stride *= side
        return sorted(found - {rank})

    def degree(self, n: int, rank: int) -> int:
        """The same for every rank."""
        return self.max_degree(n)

    def max_degree(self, n: int) -> int:
        """Up to two in each direction."""
        return sum(min(2, side - 1) for side in self.shape(n))


def check_rows(owner: UndirectedGraph, rows: int, n: int) -> None:
    """Raise ``ValueError`` in one line if ``n`` workers do not fill whole rows."""
    if n % rows:
        raise ValueError(f"{owner!r}: {n} workers do not fill {rows} equal rows; rows must divide {n}")


def check_dims(owner: str, dims: int | list[int]) -> int | list[int]:
    """Return ``dims`` if it is a number of dimensions or a list of sides, else raise ``ValueError`` in one line."""
    if isinstance(dims, (list, tuple)) and dims:
        return [check_int(owner, "dims", side, 1) for side in dims]
    if isinstance(dims, int):
        return check_int(owner, "dims", dims, 1)
    raise ValueError(f"{owner}(dims={dims!r}): must be a number of dimensions or a list of sides such as [2, 4, 4]")


def sides(dims: int | list[int], n: int) -> tuple[int, ...]:
    """The sides of the box that ``dims`` describes for ``n`` workers."""
    return box(n, dims) if isinstance(dims, int) else tuple(dims)


def check_sides(owner: object, dims: int | list[int], n: int) -> None:
    """Raise ``ValueError`` in one line if given sides do not hold exactly ``n`` workers."""
    if isinstance(dims, list) and math.prod(dims) != n:
        held = " x ".join(map(str, dims))
        raise ValueError(
            f"{owner!r}: {held} places hold {math.prod(dims)} workers, not {n}; sides must multiply to {n}"
        )
