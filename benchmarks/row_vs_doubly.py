"""How often does weighted mixing beat weighted losses, and does Theorem 7.1 foresee it?

``python -m benchmarks.row_vs_doubly`` draws weights of 16 ranks at random, 20 times per graph, trains noisy least squares
with both strategies and counts. It runs the few lines of algebra in ``recipes.row_stochastic.recursion``; a test holds them
against the engine. Weights that follow degrees come first, for comparison; on the ring these are equal, and what differs
there is the base of the two matrices alone. Seconds on two cores.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import get_args

import torch

from lightning_dopt.topology import NodeRule, NodeWeighted, UndirectedGraph, weighted_report
from recipes.row_stochastic import LeastSquares, recursion
from recipes.row_stochastic.strategies import LAST, graphs, matched, random_shares


@dataclass(frozen=True)
class Trial:
    """Errors of both strategies for one graph and one set of weights."""

    losses: float
    mixing: float
    foreseen: bool
    """Whether Theorem 7.1 says that the bound of weighted mixing is better."""

    @property
    def won(self) -> bool:
        return self.mixing < self.losses


def trial(problem: LeastSquares, graph: UndirectedGraph, shares: list[float], rule: NodeRule) -> Trial:
    lam = torch.tensor(shares, dtype=torch.float64)
    n = problem.n
    losses = recursion(problem, graph.matrix(n), n * lam, lam)
    mixing = recursion(problem, NodeWeighted(graph, shares, rule=rule).matrix(n), torch.ones_like(lam), lam)
    foreseen = weighted_report(graph, n, shares, rule).bounds.holds
    return Trial(float(losses[-LAST:].mean()), float(mixing[-LAST:].mean()), foreseen)


def line(name: str, trials: list[Trial]) -> str:
    ratio = torch.tensor([t.losses / t.mixing for t in trials]).median()
    won, foreseen = sum(t.won for t in trials), sum(t.foreseen for t in trials)
    both = sum(t.won and t.foreseen for t in trials)
    count = len(trials)
    return f"{name:<26}{won:>5}/{count:<5}{foreseen:>9}/{count:<5}{both:>9}/{foreseen:<5}{ratio:>10.2f}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.row_vs_doubly")
    parser.add_argument("-n", type=int, default=16)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rule", choices=get_args(NodeRule), default="paper")
    given = parser.parse_args(arguments)
    began = time.monotonic()
    problem = LeastSquares(given.n, given.seeds, given.steps)
    print(f"{'graph, weights':<26}{'II wins':>10}{'Thm 7.1':>13}{'won if so':>15}{'I / II':>12}  (median)")
    for name, graph in graphs().items():
        print(line(f"{name}, by degree", [trial(problem, graph, matched(graph, given.n), given.rule)]))
        drawn = [random_shares(given.n, seed) for seed in range(given.draws)]
        print(line(f"{name}, random", [trial(problem, graph, shares, given.rule) for shares in drawn]))
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
