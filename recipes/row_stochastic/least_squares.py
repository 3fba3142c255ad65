"""Noisy least squares that differ from rank to rank, for several seeds at once, and two ways to train them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_dopt import Plan, Simulation

LR = 0.05


class LeastSquares:
    """Rank ``i`` has ``f_i(x) = ||A_i x - y_i||^2 / 2`` and sees its gradient with noise; float64.

    ``A_i`` has 30 rows with entries ``N(0, 1/30)``, so that Hessians are near the identity; labels come from solutions
    ``common + N(0, I)`` of each rank with noise of 0.1. The strategies differ in what they make of the disagreement.

    Args:
        n: number of ranks.
        seeds: independent problems that are trained side by side, as a leading dimension of all tensors.
        steps: noise is drawn for that many steps.
        noise: standard deviation of the gradients' noise in each coordinate.
        d: number of parameters.
    """

    def __init__(self, n: int, seeds: int = 5, steps: int = 600, noise: float = 0.5, d: int = 10) -> None:
        self.n, self.seeds, self.steps, self.d = n, seeds, steps, d
        hessians, linear, noises = [], [], []
        for seed in range(seeds):
            g = torch.Generator().manual_seed(seed)

            def normal(*shape: int, g: torch.Generator = g) -> Tensor:
                return torch.randn(*shape, generator=g, dtype=torch.float64)

            a = normal(n, 30, d) / 30**0.5
            y = a @ (normal(d) + normal(n, d)).unsqueeze(-1) + 0.1 * normal(n, 30, 1)
            hessians.append(a.mT @ a)
            linear.append((a.mT @ y).squeeze(-1))
            noises.append(noise * normal(steps, n, d))
        self.H, self.b, self.noise = torch.stack(hessians), torch.stack(linear), torch.stack(noises)

    def optimum(self, shares: Tensor) -> Tensor:
        """The minimum of ``sum_i shares_i f_i``, shape (seeds, d)."""
        H, b = torch.einsum("i,sijk->sjk", shares, self.H), torch.einsum("i,sij->sj", shares, self.b)
        return torch.linalg.solve(H, b)

    def error(self, x: Tensor, shares: Tensor) -> Tensor:
        """``sum_i shares_i ||x_i - optimum||^2``, the mean over seeds; ``x`` has shape (n, seeds, d)."""
        return ((x - self.optimum(shares)).square().sum(-1) * shares[:, None]).sum(0).mean()


def recursion(problem: LeastSquares, W: Tensor, factors: Tensor, shares: Tensor, lr: float = LR) -> Tensor:
    """Errors after each step of ``x_i <- sum_j W[i, j] (x_j - lr factors_j g_j)`` from zero, in a few lines of algebra.

    Args:
        problem: what to train; all its steps are taken.
        W: mixing matrix, shape (n, n).
        factors: what the gradients are multiplied by, shape (n,): 1, or ``n shares`` if losses are weighted.
        shares: the objective's weights, summing to one.
        lr: learning rate.
    """
    x = torch.zeros(problem.seeds, problem.n, problem.d, dtype=torch.float64)
    errors = []
    for t in range(problem.steps):
        gradient = torch.einsum("sijk,sik->sij", problem.H, x) - problem.b + problem.noise[:, t]
        x = W @ (x - lr * factors.double()[:, None] * gradient)
        errors.append(problem.error(x.transpose(0, 1), shares))
    return torch.stack(errors)


def simulated(
    problem: LeastSquares, plan: Plan, shares: Tensor, optimizer: Callable[[list[Tensor]], Optimizer] | None = None
) -> Tensor:
    """Errors after each step of a plan, run by the engine that trains models; by default with SGD.

    Args:
        problem: what to train; all its steps are taken.
        plan: how.
        shares: the objective's weights, summing to one.
        optimizer: makes each rank's inner optimizer.
    """

    def backward(rank: int, parameters: dict[str, Tensor], step: int) -> None:
        x = parameters["x"].detach()
        gradient = torch.einsum("sjk,sk->sj", problem.H[:, rank], x) - problem.b[:, rank]
        parameters["x"].grad = gradient + problem.noise[:, step - 1, rank]

    def zeros(rank: int) -> dict[str, Tensor]:
        return {"x": torch.zeros(problem.seeds, problem.d, dtype=torch.float64)}

    sim = Simulation(plan, problem.n, zeros, backward, optimizer or (lambda ps: torch.optim.SGD(ps, lr=LR)))
    return torch.stack([problem.error(sim.run(1).stacked(), shares) for _ in range(problem.steps)])
