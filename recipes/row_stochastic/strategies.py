"""The two strategies for ranks of unequal weight, as plans, and the graphs and weights on which to compare them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dopt import Plan, Star, Sync
from lightning_dopt.local import LossWeights
from lightning_dopt.topology import ErdosRenyi, Grid, NodeRule, NodeWeighted, Ring, UndirectedGraph, WeightedReport
from lightning_dopt.topology import weighted_report as report
from recipes.row_stochastic.least_squares import LeastSquares, simulated

LAST = 100


@dataclass(frozen=True)
class Case:
    """A graph and the weights of its ranks."""

    name: str
    graph: UndirectedGraph
    shares: list[float]

    def weighted_losses(self, rule: NodeRule) -> Plan:
        """Strategy I: doubly stochastic mixing, gradients times ``n share``; equal shares get the base of Strategy II."""
        uniform = max(self.shares) - min(self.shares) < 1e-12
        peers = NodeWeighted(self.graph, self.shares, rule=rule) if uniform else self.graph
        return Plan([Sync(peers=peers)], [LossWeights(self.shares)])

    def weighted_mixing(self, rule: NodeRule) -> Plan:
        """Strategy II: row-stochastic mixing, losses as they are."""
        return Plan([Sync(peers=NodeWeighted(self.graph, self.shares, rule=rule))])


@dataclass(frozen=True)
class Outcome:
    """What became of both strategies in one case."""

    case: Case
    report: WeightedReport
    losses: Tensor
    """Errors after each step of Strategy I: ``sum_i share_i ||x_i - optimum||^2``, the mean over seeds."""

    mixing: Tensor
    """The same of Strategy II."""

    @property
    def last(self) -> tuple[float, float]:
        """Errors of I and II, the mean over the last steps."""
        return float(self.losses[-LAST:].mean()), float(self.mixing[-LAST:].mean())


def matched(graph: UndirectedGraph, n: int) -> list[float]:
    """Shares proportional to degrees."""
    degrees = [graph.degree(n, rank) for rank in range(n)]
    return [degree / sum(degrees) for degree in degrees]


def random_shares(n: int, seed: int) -> list[float]:
    """Shares proportional to draws from ``U(0.3, 3)``."""
    draws = 0.3 + 2.7 * torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    shares: list[float] = (draws / draws.sum()).tolist()
    return shares


def graphs() -> dict[str, UndirectedGraph]:
    """Sparse graphs of unequal and of equal degrees."""
    return {"star": Star(), "ring": Ring(), "grid": Grid(), "Erdos-Renyi": ErdosRenyi(0.3)}


def cases(n: int) -> list[Case]:
    """Every graph with shares that follow its degrees (equal ones on the ring) and with random ones."""
    found = []
    for name, graph in graphs().items():
        kind = "equal" if name == "ring" else "by degree"
        found += [
            Case(f"{name}, {kind}", graph, matched(graph, n)),
            Case(f"{name}, random", graph, random_shares(n, 1)),
        ]
    return found


def compare(case: Case, problem: LeastSquares, rule: NodeRule = "paper") -> Outcome:
    """Train with both strategies, on the same data with the same noise, through the engine."""
    shares = torch.tensor(case.shares, dtype=torch.float64)
    return Outcome(
        case,
        report(case.graph, problem.n, shares, rule),
        simulated(problem, case.weighted_losses(rule), shares),
        simulated(problem, case.weighted_mixing(rule), shares),
    )
