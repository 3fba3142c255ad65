"""Graphs and mixing matrices read from files."""

from __future__ import annotations

import json
from pathlib import Path

from lightning_dopt.topology.base import Topology
from lightning_dopt.topology.custom import FromAdjacency, FromMatrix
from lightning_dopt.topology.weights import UndirectedGraph, WeightRule

_SUFFIXES = (".txt", ".csv", ".npy", ".json")
_EXACT = 1e-6


class FromFile(Topology):
    """The user's own graph or mixing matrix, read from a file of ``n`` rows with ``n`` numbers each.

    A symmetric matrix of zeros and ones with a zero diagonal is an adjacency matrix and becomes a
    :class:`FromAdjacency` whose weights follow from ``weights``. Everything else is a mixing matrix in the receiver's
    convention, rows summing to one, and becomes a :class:`FromMatrix`. The file is read once, when the topology is
    made; every rank that makes it needs the same file.

    Args:
        path: ``.txt`` (numbers separated by blanks), ``.csv`` (by commas), ``.npy`` (a two-dimensional numpy array) or
            ``.json`` (a list of rows); lines that start with ``#`` are left out of the first two.
        weights: the weight rule of an adjacency matrix, see :class:`~lightning_dopt.topology.UndirectedGraph`; must stay
            ``None`` for a mixing matrix. ``None`` means ``"metropolis"``.

    Raises:
        ValueError: a file that is missing, unreadable or of another kind; a matrix that is not square; a graph in
            pieces; rows that do not sum to one; ``weights`` for a mixing matrix.
    """

    def __init__(self, path: str, weights: WeightRule | None = None) -> None:
        self.path = str(path)
        self.weights = weights
        rows = _read(self.path)
        try:
            self._inner = _made(rows, weights)
        except ValueError as error:
            raise ValueError(f"FromFile(path={self.path!r}): {error}") from None
        self.directed = self._inner.directed

    def check(self, n: int) -> None:
        """Raise ``ValueError`` if ``n`` is not the number of rows of the file."""
        self._inner.check(n)

    def row(self, n: int, rank: int, step: int = 0) -> dict[int, float]:
        """The row of the graph or matrix in the file."""
        return self._inner.row(n, rank, step)

    def neighbors(self, n: int, rank: int, step: int = 0) -> list[int]:
        """The ranks heard according to the file."""
        return self._inner.neighbors(n, rank, step)

    def receivers(self, n: int, rank: int, step: int = 0) -> list[int]:
        """The receivers according to the file."""
        return self._inner.receivers(n, rank, step)

    def is_mean(self, n: int) -> bool:
        """Whether one round is the exact mean."""
        return self._inner.is_mean(n)

    def is_tree(self, n: int) -> bool:
        """Whether the file holds the adjacency matrix of a tree."""
        return self._inner.is_tree(n)

    def symmetric(self, n: int) -> bool:
        """Whether the mixing matrix is symmetric."""
        return self._inner.symmetric(n)

    def doubly_stochastic(self, n: int) -> bool:
        """Whether the columns sum to one as well."""
        return self._inner.doubly_stochastic(n)

    def stationary(self, n: int) -> list[float]:
        """The stationary weights of the mixing matrix."""
        return self._inner.stationary(n)


def _made(rows: list[list[float]], weights: WeightRule | None) -> UndirectedGraph | FromMatrix:
    n = len(rows)
    for i, row in enumerate(rows):
        if len(row) != n:
            raise ValueError(f"must be square, but row {i} has {len(row)} numbers and there are {n} rows")
    ranks = range(n)
    if all(value in (0, 1) for row in rows for value in row) and not any(rows[i][i] for i in ranks):
        for i in ranks:
            for j in ranks:
                if rows[i][j] != rows[j][i]:
                    raise ValueError(
                        f"an adjacency matrix must be symmetric, but entries ({i}, {j}) and ({j}, {i}) differ; "
                        "for one-way links use Directed"
                    )
        return FromAdjacency([[j for j in ranks if row[j]] for row in rows], weights or "metropolis")
    if weights is not None:
        raise ValueError(f"weights={weights!r} is for adjacency matrices, and the file holds a mixing matrix")
    _check_sums(rows)
    return FromMatrix(rows)


def _check_sums(rows: list[list[float]]) -> None:
    """Refuse a matrix whose columns, not rows, sum to one with the remedy; ``FromMatrix`` refuses the rest."""
    bad = next(((i, sum(row)) for i, row in enumerate(rows) if abs(sum(row) - 1) > _EXACT), None)
    if bad and all(abs(sum(column) - 1) <= _EXACT for column in zip(*rows, strict=True)):
        raise ValueError(
            f"row {bad[0]} sums to {bad[1]:g} but every column to 1; rows must sum to 1, row i what rank i does with "
            "what it hears: transpose the matrix"
        )


def _read(path: str) -> list[list[float]]:
    file, owner = Path(path), f"FromFile(path={path!r})"
    if file.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"{owner}: the file name must end in {', '.join(_SUFFIXES)}")
    if not file.is_file():
        raise ValueError(f"{owner}: there is no such file; relative paths start at {Path.cwd()}")
    try:
        rows = _parsed(file)
    except (ValueError, TypeError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{owner}: must hold rows of numbers, and reading stopped with: {reason}") from None
    if not rows:
        raise ValueError(f"{owner}: must have one row for every rank, and is empty")
    return rows


def _parsed(file: Path) -> list[list[float]]:
    kind = file.suffix.lower()
    if kind == ".npy":
        import numpy as np

        array = np.load(file, allow_pickle=False)
        return [[float(value) for value in row] for row in array]
    if kind == ".json":
        return [[float(value) for value in row] for row in json.loads(file.read_text())]
    lines = [line.strip() for line in file.read_text().splitlines()]
    separator = "," if kind == ".csv" else None
    return [[float(value) for value in line.split(separator)] for line in lines if line and not line.startswith("#")]
