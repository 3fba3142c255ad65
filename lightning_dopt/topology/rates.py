"""Rates of randomised pairwise communication: how often each link should speak, and how fast agreement then comes.

In asynchronous methods (A2CiD2, DADAO) links wake up at random times, link ``e`` with rate ``r_e`` (exchanges per unit of
time). With the Laplacian ``L = sum_e r_e (e_i - e_j)(e_i - e_j)'`` two numbers say all about speed: ``chi1``, the slowest
mode, and ``chi2``, the worst link. Plain pairwise averaging takes time of the order of ``chi1``, an accelerated method
``sqrt(chi1 chi2)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dopt._checks import check_float
from lightning_dopt.topology.weights import UndirectedGraph

_POWERS = (4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class EdgeRates:
    """The rates of a graph's links and what follows from them; time in units of the rates."""

    rates: dict[tuple[int, int], float]
    """Exchanges per unit of time of every link (lower rank first)."""

    chi1: float
    """``1 / lambda_2(L)``: the time in which the slowest mode of disagreement decays."""

    chi2: float
    """Half the largest effective resistance across a link, ``1/2 max_e (e_i - e_j)' L^+ (e_i - e_j)``; at most ``chi1``."""

    @property
    def total(self) -> float:
        """Exchanges per unit of time of the whole graph."""
        return math.fsum(self.rates.values())

    @property
    def time(self) -> float:
        """``sqrt(chi1 chi2)``, the time scale of agreement of accelerated methods."""
        return math.sqrt(self.chi1 * self.chi2)

    @property
    def eta(self) -> float:
        """A2CiD2's rate of mixing with the momentum buffer, ``1 / (2 sqrt(chi1 chi2))``."""
        return 0.5 / self.time

    @property
    def momentum_step(self) -> float:
        """A2CiD2's step of the momentum buffer at an exchange, ``sqrt(chi1 / chi2) / 2``."""
        return 0.5 * math.sqrt(self.chi1 / self.chi2)

    @property
    def exchange_rate(self) -> float:
        """DADAO's rate of exchanges of the whole graph per round of gradients, ``sqrt(2 chi1 chi2)`` at total rate one."""
        return math.sqrt(2.0) * self.time * self.total


def rates(graph: UndirectedGraph, n: int, total: float | None = None) -> EdgeRates:
    """``chi1`` and ``chi2`` of a graph whose links all have the same rate.

    Args:
        graph: the links; its weights do not matter.
        n: number of workers, at least 2.
        total: exchanges per unit of time of the whole graph, positive; by default ``n / 2``, so that a rank takes part in
            one exchange per unit of time on average (exactly one if all degrees are equal).

    Raises:
        ValueError: the graph does not exist for ``n`` workers, is no undirected graph or has no link; ``total`` is not
            positive.
    """
    edges, amount = _checked("rates", graph, n, total)
    return _measured(n, edges, torch.full((len(edges),), amount / len(edges), dtype=torch.float64))


def optimal_rates(graph: UndirectedGraph, n: int, total: float | None = None) -> EdgeRates:
    """The rates of a graph's links that minimise ``sqrt(chi1 chi2)`` at a fixed total rate.

    The eigenvalue and the maximum are replaced by norms of rising power, which keep symmetries of the graph, and
    minimised by a quasi-Newton method from equal rates; for up to some hundred links. Accurate to about 1e-3, and never
    worse than equal rates. Links that do not help get a rate near zero.

    Args:
        graph: the links; its weights do not matter.
        n: number of workers, at least 2.
        total: as in :func:`rates`.

    Raises:
        ValueError: as in :func:`rates`.
    """
    edges, amount = _checked("optimal_rates", graph, n, total)
    free = torch.zeros(len(edges), dtype=torch.float64, requires_grad=True)
    best = rates(graph, n, total)
    for power in _POWERS:
        optimizer = torch.optim.LBFGS([free], max_iter=60, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

        def closure(power: int = power, optimizer: torch.optim.LBFGS = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = _smooth(n, edges, amount * free.softmax(0), power)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        found = _measured(n, edges, amount * free.detach().softmax(0))
        best = min(best, found, key=lambda measured: measured.time)
    return best


def _checked(owner: str, graph: UndirectedGraph, n: int, total: float | None) -> tuple[list[tuple[int, int]], float]:
    if not isinstance(graph, UndirectedGraph):
        raise ValueError(f"{owner}(graph={graph!r}): must be an undirected graph such as Ring()")
    graph.check(n)
    if n == 1:
        raise ValueError(f"{owner}(n=1): a single worker has no links; must be at least 2")
    edges = [(i, j) for i in range(n) for j in graph.adjacent(n, i) if i < j]
    return edges, n / 2 if total is None else check_float(owner, "total", total, 0.0, open_low=True)


def _inverse(n: int, edges: list[tuple[int, int]], values: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of ``L`` on what is orthogonal to agreement, and the effective resistance across every link."""
    a, b = torch.tensor(edges).T
    incidence = torch.zeros(len(edges), n, dtype=torch.float64)
    place = torch.arange(len(edges))
    incidence[place, a] = 1.0
    incidence[place, b] = -1.0
    mean = torch.full((n, n), 1.0 / n, dtype=torch.float64)
    # L + J has the eigenvectors of L, with one instead of zero for agreement
    inverse = torch.linalg.inv(incidence.T @ (values[:, None] * incidence) + mean) - mean
    return inverse, ((incidence @ inverse) * incidence).sum(1)


def _measured(n: int, edges: list[tuple[int, int]], values: Tensor) -> EdgeRates:
    inverse, resistance = _inverse(n, edges, values)
    chi1 = float(torch.linalg.eigvalsh(inverse)[-1])
    return EdgeRates(dict(zip(edges, values.tolist(), strict=True)), chi1, 0.5 * float(resistance.max()))


def _smooth(n: int, edges: list[tuple[int, int]], values: Tensor, power: int) -> Tensor:
    """``log(chi1 chi2)`` with ``power``-norms in place of the two maxima."""
    inverse, resistance = _inverse(n, edges, values)
    modes = torch.linalg.eigvalsh(inverse)[1:].clamp(min=1e-300)
    return ((modes.log() * power).logsumexp(0) + (resistance.log() * power).logsumexp(0)) / power
