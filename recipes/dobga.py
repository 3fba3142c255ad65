"""``python -m recipes.dobga``: decentralized boosted gradient ascent for monotone DR-submodular functions.

Eight workers choose where to open at most three of eight sites. Each worker knows its own customers only: the chance that
somebody is served if site ``s`` opens with probability ``x_s`` is the multilinear extension of coverage, which is not
concave, but has diminishing returns. Projected ascent along *boosted* gradients,

    x_i <- P(sum_j W_ij x_j + eta_t d_i),   d_i = (1 - 1/e) grad f_i(z x_i),   z ~ exp(z - 1) / (1 - 1/e) on [0, 1],

reaches ``1 - 1/e`` of the optimum, with one gradient and one message per step: gossip (adapt while combining), an oracle
around the gradient, and a projection. Lightning is not needed. Takes about five seconds on one core.

Source: Zhang, Deng, Jian, Chen, Hu, Yang, "Communication-Efficient Decentralized Online Continuous DR-Submodular
Maximization", arXiv 2208.08681 (DOBGA).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dopt import Simulation, plans
from lightning_dopt._random import uniform
from lightning_dopt.topology import Complete, Ring
from lightning_dopt.topology.base import Topology

SHARE = 1 - math.exp(-1)


@dataclass(frozen=True)
class Coverage:
    """Customers of every worker, and the sites that can serve each."""

    worth: Tensor
    """What a customer is worth, shape (workers, customers), not negative."""
    serves: Tensor
    """Whether site ``s`` serves customer ``u`` of worker ``i``: bool, shape (workers, customers, sites)."""

    @classmethod
    def drawn(cls, workers: int = 8, customers: int = 12, sites: int = 8, seed: int = 0) -> Coverage:
        """Workers with different customers, most of whom can be served from few sites."""
        g = torch.Generator().manual_seed(seed)
        worth = torch.rand(workers, customers, generator=g, dtype=torch.float64)
        return cls(worth, torch.rand(workers, customers, sites, generator=g) < 0.25)

    @property
    def workers(self) -> int:
        """Number of workers."""
        return self.worth.shape[0]

    @property
    def sites(self) -> int:
        """Number of sites."""
        return self.serves.shape[2]

    def value(self, x: Tensor, worker: int | None = None) -> Tensor:
        """Expected worth of the served customers of one worker; ``None``: the mean over all workers."""
        missed = torch.where(self.serves, 1 - x, torch.ones_like(x)).prod(-1)
        per_worker = (self.worth * (1 - missed)).sum(-1)
        return per_worker.mean() if worker is None else per_worker[worker]

    def best(self, budget: int) -> float:
        """The optimum over ``0 <= x <= 1, sum x <= budget``, by trying all sets: some set is always optimal."""
        sets = itertools.combinations(range(self.sites), budget)
        return max(float(self.value(torch.eye(self.sites, dtype=torch.float64)[list(s)].sum(0))) for s in sets)


def project(x: Tensor, budget: float) -> Tensor:
    """The closest point of ``{0 <= x <= 1, sum x <= budget}``: ``clamp(x - t)`` with the smallest ``t >= 0`` that fits."""
    if float(x.clamp(0, 1).sum()) <= budget:
        return x.clamp(0, 1)
    low, high = 0.0, float(x.max())
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float((x - middle).clamp(0, 1).sum()) > budget else (low, middle)
    return (x - high).clamp(0, 1)


def boosting(*counters: int) -> float:
    """A draw of ``z`` with density ``exp(z - 1) / (1 - 1/e)`` on [0, 1], the same for the same counters."""
    return 1 + math.log(math.exp(-1) + uniform(*counters) * SHARE)


def ascend(
    problem: Coverage, budget: int, topology: Topology, steps: int = 200, rate: float = 0.3, seed: int = 0
) -> Tensor:
    """What every worker ends with, shape (workers, sites): the mean of the second half of its points."""

    def backward(worker: int, parameters: dict[str, Tensor], step: int) -> None:
        at = (boosting(seed, worker, step) * parameters["x"].detach()).requires_grad_()
        (gradient,) = torch.autograd.grad(problem.value(at, worker), at)
        parameters["x"].grad = -SHARE * gradient

    simulation = Simulation(
        plans.gossip(topology, order="awc"),
        problem.workers,
        lambda worker: {"x": torch.zeros(problem.sites, dtype=torch.float64)},
        backward,
        lambda parameters: torch.optim.SGD(parameters, lr=rate),
    )
    total = torch.zeros(problem.workers, problem.sites, dtype=torch.float64)
    for step in range(1, steps + 1):
        for optimizer in simulation.optimizers:
            optimizer.param_groups[0]["lr"] = rate / math.sqrt(step)
        simulation.run(1)
        with torch.no_grad():
            for replica in simulation.replicas:
                replica["x"].copy_(project(replica["x"], budget))
        total += simulation.stacked() * (step > steps // 2)
    return total / (steps - steps // 2)


def main() -> None:
    """Compare gossip on a ring with the complete graph, which is centralized ascent."""
    problem, budget = Coverage.drawn(), 3
    best = problem.best(budget)
    print(f"optimum {best:.4f}, guaranteed {SHARE * best:.4f}")
    for name, topology in (("ring", Ring()), ("complete graph", Complete())):
        values = [float(problem.value(x)) for x in ascend(problem, budget, topology)]
        print(f"{name}: {min(values):.4f} to {max(values):.4f} over the workers")


if __name__ == "__main__":
    main()
