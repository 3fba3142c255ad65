"""How fast a topology reaches agreement: consensus rates, spectral gaps, checks and summaries.

Matrices are dense, of shape (n, n) and in the receiver's convention (``x_i <- sum_j W[i, j] x_j``); all is computed in
float64. ``J`` is the matrix with all entries ``1/n``: one application of ``J`` is the exact mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dopt.topology._graph import stationary_weights, strongly_connected
from lightning_dopt.topology.base import Topology

_EXACT = 1e-12


class Product(NamedTuple):
    """Several mixing rounds in one matrix."""

    matrix: Tensor
    """``W(rounds - 1) ... W(1) W(0)``, float64, shape (n, n)."""

    rounds: int
    """How many rounds were multiplied."""

    exact: bool
    """Whether the matrix equals ``J`` (to 1e-12), so that these rounds give the exact mean."""


@dataclass(frozen=True)
class MatrixCheck:
    """What holds for one mixing matrix, with the largest deviations found."""

    row_error: float
    """Largest distance of a row sum from one."""

    column_error: float
    """Largest distance of a column sum from one."""

    symmetry_error: float
    """Largest entry of ``|W - W'|``."""

    smallest_entry: float
    """The smallest entry; negative if the matrix is no convex combination."""

    tolerance: float
    """Deviations up to here count as none."""

    @property
    def row_stochastic(self) -> bool:
        """Rows sum to one and no entry is negative: agreement is a fixed point."""
        return self.row_error <= self.tolerance and self.nonnegative

    @property
    def column_stochastic(self) -> bool:
        """Columns sum to one and no entry is negative: the sum over all ranks is kept."""
        return self.column_error <= self.tolerance and self.nonnegative

    @property
    def doubly_stochastic(self) -> bool:
        """Rows and columns sum to one and no entry is negative: mixing converges to the plain mean, if it converges."""
        return self.row_stochastic and self.column_stochastic

    @property
    def symmetric(self) -> bool:
        """The matrix equals its transpose."""
        return self.symmetry_error <= self.tolerance

    @property
    def nonnegative(self) -> bool:
        """No entry is negative."""
        return self.smallest_entry >= -self.tolerance


@dataclass(frozen=True)
class TopologySummary:
    """The figures of one topology for one number of workers, as a table would show them."""

    name: str
    """The topology as code."""

    n: int
    """Number of workers."""

    period: int | None
    """Rounds until the graphs repeat; ``None`` if they never do."""

    rounds: int
    """Rounds that ``rate`` covers: one period, or ``n`` rounds if there is none."""

    max_degree: int
    """The most ranks any rank hears in one round."""

    messages: float
    """Messages sent per rank and round, mean over ranks and over ``rounds``."""

    directed: bool
    """Whether links may go one way only."""

    symmetric: bool
    """Whether every round's matrix is symmetric."""

    doubly_stochastic: bool
    """Whether every round keeps agreement and the plain mean."""

    row_stochastic: bool
    """Whether every round keeps agreement; if not, only push-sum can use the topology."""

    column_stochastic: bool
    """Whether every round keeps the plain sum over all ranks."""

    is_mean: bool
    """Whether every round is the exact mean."""

    connected: bool
    """Whether the links of all ``rounds`` together lead from every rank to every other."""

    exact: bool
    """Whether ``rounds`` rounds give the exact mean."""

    rate: float
    """Factor by which ``rounds`` rounds shrink the distance to agreement, in the worst case; 0 if ``exact``.

    The distance is Euclidean, weighted by the stationary weights. If only columns sum to one, it is that of the push-sum
    ratios; if the mean is kept in expectation only, it is the largest value minus the smallest.
    """

    rate_per_round: float
    """``rate ** (1 / rounds)``."""

    lambda_min: float
    """Smallest real part of an eigenvalue of any of the rounds."""

    @property
    def spectral_gap(self) -> float:
        """``1 - rate_per_round``."""
        return 1.0 - self.rate_per_round


def consensus_rate(W: Tensor, stationary: Sequence[float] | None = None) -> float:
    """``||W - J||_2``: the factor by which one application shrinks the distance to agreement in the worst case.

    This is the largest singular value, which for a matrix that is not normal exceeds the largest eigenvalue modulus.

    Args:
        W: mixing matrix, shape (n, n).
        stationary: positive weights ``lambda`` with ``lambda W = lambda`` for a matrix that is not doubly stochastic.
            The rate is then measured in their norm: ``||D^(1/2) (W - 1 lambda') D^(-1/2)||_2``, ``D = diag(lambda)``.

    Raises:
        ValueError: ``W`` is not square, or ``stationary`` has another length or an entry that is not positive.
    """
    w = _square("consensus_rate", W)
    n = len(w)
    if stationary is None:
        return float(torch.linalg.matrix_norm(w - 1.0 / n, 2))
    weights = torch.as_tensor(stationary, dtype=torch.float64)
    if weights.shape != (n,) or not bool((weights > 0).all()):
        raise ValueError(f"consensus_rate(stationary={list(stationary)!r}): must be {n} positive weights")
    root = (weights / weights.sum()).sqrt()
    return float(torch.linalg.matrix_norm(root[:, None] * w / root - root[:, None] * root, 2))


def spectral_gap(W: Tensor) -> float:
    """``1 - consensus_rate(W)``: 1 for the exact mean, 0 if some disagreement does not shrink at all.

    Raises:
        ValueError: ``W`` is not square.
    """
    return 1.0 - consensus_rate(W)


def lambda_min(W: Tensor) -> float:
    """The smallest real part of an eigenvalue of ``W``.

    Methods that apply ``W`` to differences of iterates bound it from below: D2 with a plain symmetric ``W`` needs more
    than -1/3; :class:`~lightning_dopt.topology.Lazy` raises it to at least 0.

    Raises:
        ValueError: ``W`` is not square.
    """
    w = _square("lambda_min", W)
    if torch.allclose(w, w.T, rtol=0.0, atol=_EXACT):
        return float(torch.linalg.eigvalsh(w).min())
    return float(torch.linalg.eigvals(w).real.min())


def check_matrix(W: Tensor, tolerance: float = _EXACT) -> MatrixCheck:
    """Measure row sums, column sums, symmetry and signs of ``W``.

    Raises:
        ValueError: ``W`` is not square.
    """
    w = _square("check_matrix", W)
    return MatrixCheck(
        row_error=float((w.sum(1) - 1).abs().max()),
        column_error=float((w.sum(0) - 1).abs().max()),
        symmetry_error=float((w - w.T).abs().max()),
        smallest_entry=float(w.min()),
        tolerance=tolerance,
    )


def product(topology: Topology, n: int, rounds: int | None = None) -> Product:
    """The product of the first ``rounds`` matrices; by default one period, or ``n`` rounds if the graphs never repeat.

    Raises:
        ValueError: the topology does not exist for ``n`` workers, or ``rounds`` is negative.
    """
    topology.check(n)
    count = (topology.period(n) or n) if rounds is None else rounds
    if count < 0:
        raise ValueError(f"product(rounds={rounds!r}): must be at least 0")
    total = torch.eye(n, dtype=torch.float64)
    for step in range(count):
        total = topology.matrix(n, step) @ total
    return Product(total, count, bool((total - 1.0 / n).abs().max() <= _EXACT))


def summary(topology: Topology, n: int) -> TopologySummary:
    """Everything worth knowing about ``topology`` with ``n`` workers; cost ``O(n**3)`` per round of a period.

    Raises:
        ValueError: the topology does not exist for ``n`` workers.
    """
    total = product(topology, n)
    steps, ranks = range(total.rounds), range(n)
    rate = 0.0 if total.exact else _rate(topology, n, total.matrix)
    heard = [[topology.neighbors(n, i, step) for i in ranks] for step in steps]
    union = [sorted({j for lists in heard for j in lists[i]}) for i in ranks]
    return TopologySummary(
        name=repr(topology),
        n=n,
        period=topology.period(n),
        rounds=total.rounds,
        max_degree=topology.max_degree(n),
        messages=sum(len(row) for lists in heard for row in lists) / (n * total.rounds),
        directed=topology.directed,
        symmetric=topology.symmetric(n),
        doubly_stochastic=topology.doubly_stochastic(n),
        row_stochastic=topology.row_stochastic(n),
        column_stochastic=topology.column_stochastic(n),
        is_mean=topology.is_mean(n),
        connected=strongly_connected(union),
        exact=total.exact,
        rate=rate,
        rate_per_round=rate ** (1.0 / total.rounds),
        lambda_min=min(lambda_min(topology.matrix(n, step)) for step in steps),
    )


def _rate(topology: Topology, n: int, w: Tensor) -> float:
    """The factor on the distance to agreement of several rounds in one matrix, whatever its rows and columns sum to."""
    if topology.doubly_stochastic(n):
        return consensus_rate(w)
    if not topology.row_stochastic(n):
        # push-sum: u = w u, v = w v, and u / v moves as the transpose does, whose stationary weights are those of v
        limit = stationary_weights(w.T)
        return consensus_rate(w.T, limit) if min(limit) > 0 else 1.0
    weights = torch.tensor(topology.stationary(n), dtype=torch.float64)
    if float((weights @ w - weights).abs().max()) <= 1e-6:
        return consensus_rate(w, weights.tolist())
    # a mean that is kept in expectation only: the factor on the spread (largest minus smallest value), never above one
    return float((w[:, None, :] - w[None, :, :]).abs().sum(2).max()) / 2


def _square(owner: str, W: Tensor) -> Tensor:
    if W.dim() != 2 or W.shape[0] != W.shape[1] or W.shape[0] == 0:
        raise ValueError(f"{owner}(W): must be a square matrix, got shape {tuple(W.shape)}")
    return W.to(torch.float64)
