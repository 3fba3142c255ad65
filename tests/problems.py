"""Small problems with known answers, and loops that run a plan on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_dopt import Engine, Link, Plan, Simulation
from lightning_dopt.comm import LinkClock, World

Optimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


def sgd(lr: float, momentum: float = 0.0, nesterov: bool = False) -> Optimizer:
    return lambda ps: torch.optim.SGD(ps, lr=lr, momentum=momentum, nesterov=nesterov)


class Quadratics:
    """Rank ``i`` has ``f_i(x) = (x - c_i)' A_i (x - c_i) / 2``, in float64.

    Args:
        curvature: ``A``, shape (n, d, d).
        minimisers: ``c``, shape (n, d).
    """

    def __init__(self, curvature: Tensor, minimisers: Tensor) -> None:
        self.A, self.c = curvature.double(), minimisers.double()
        self.n, self.d = self.c.shape

    @classmethod
    def scalar(cls, a: Sequence[float], c: Sequence[float]) -> Quadratics:
        return cls(torch.tensor(a).view(-1, 1, 1), torch.tensor(c).view(-1, 1))

    def gradient(self, rank: int, x: Tensor) -> Tensor:
        return self.A[rank] @ (x - self.c[rank])

    def backward(self, rank: int, parameters: dict[str, Tensor], step: int) -> None:
        parameters["x"].grad = self.gradient(rank, parameters["x"].detach())

    def optimum(self) -> Tensor:
        """The minimum of the mean of all ``f_i``."""
        return torch.linalg.solve(self.A.sum(0), (self.A @ self.c.unsqueeze(-1)).sum(0)).squeeze(-1)

    def simulate(
        self, plan: Plan, optimizer: float | Optimizer, start: Tensor | float = 0.0, n: int | None = None
    ) -> Simulation:
        """All ranks from the same ``start`` (or from row ``i`` of a matrix); a number as optimizer is SGD's rate."""
        begin = torch.as_tensor(start, dtype=torch.float64).expand(n or self.n, self.d)
        make = sgd(optimizer) if isinstance(optimizer, float) else optimizer
        return Simulation(plan, n or self.n, lambda rank: {"x": begin[rank].clone()}, self.backward, make)

    def centralized(self, steps: int, optimizer: float | Optimizer, start: Tensor | float = 0.0) -> Tensor:
        """One model trained on the mean gradient; shape (steps + 1, d)."""
        x = torch.as_tensor(start, dtype=torch.float64).expand(self.d).clone().requires_grad_()
        opt = (sgd(optimizer) if isinstance(optimizer, float) else optimizer)([x])
        path = [x.detach().clone()]
        for _ in range(steps):
            x.grad = torch.stack([self.gradient(i, x.detach()) for i in range(self.n)]).mean(0)
            opt.step()
            path.append(x.detach().clone())
        return torch.stack(path)


def p1() -> Quadratics:
    """Four scalars with ``a = c = (1, 2, 3, 4)``; the optimum is 3."""
    return Quadratics.scalar([1, 2, 3, 4], [1, 2, 3, 4])


def p2() -> Quadratics:
    """Eight least squares problems in five dimensions, ``||A_i x - b_i||^2 / 24``, with different solutions."""
    rng = np.random.default_rng(0)
    a, solutions = rng.normal(size=(8, 12, 5)), rng.normal(size=(8, 5))
    b = np.einsum("nij,nj->ni", a, solutions) + 0.1 * rng.normal(size=(8, 12))
    curvature = np.einsum("nij,nik->njk", a, a) / 12
    best = np.stack([np.linalg.lstsq(m, v, rcond=None)[0] for m, v in zip(a, b, strict=True)])
    return Quadratics(torch.from_numpy(curvature), torch.from_numpy(best))


SHAPES: dict[str, tuple[int, ...]] = {
    "head.bias": (3,),
    "head.weight": (3, 8),
    "body.a.weight": (8, 8),
    "body.b.weight": (16, 8),
    "scale": (),
    "body.c.bias": (16,),
}
"""A model of several tensors, neither sorted nor aligned."""


def mosaic(rank: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Starting values, the same on all ranks."""
    g = torch.Generator().manual_seed(5)
    return {name: torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for name, shape in SHAPES.items()}


def mosaic_backward(rank: int, parameters: dict[str, Tensor], step: int) -> None:
    """Unequal curvatures and minimisers per rank and tensor, and noise that is a function of rank and step."""
    for k, p in enumerate(parameters.values()):
        wave = torch.arange(p.numel(), dtype=torch.float64).view(p.shape)
        noise = torch.sin(wave * 1.7 + 2.3 * step + 5.1 * rank + k)
        target = torch.cos(wave * 0.3 + rank) * (rank + 1)
        p.grad = ((0.5 + 0.25 * rank) * (p.detach().double() - target) + 0.3 * noise).to(p.dtype)


def adam(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.05)


def momentum_sgd(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def mosaic_simulation(plan: Plan, n: int, optimizer: Optimizer = momentum_sgd, link: Link | None = None) -> Simulation:
    return Simulation(plan, n, mosaic, mosaic_backward, optimizer, link=link, step_seconds=0.01)


def mosaic_run(
    world: World, plan: Plan, steps: int, optimizer: Optimizer, link: Link | None
) -> tuple[dict[str, Tensor], dict[str, dict[str, int | float]], dict[str, float]]:
    """What :func:`mosaic_simulation` does, written as one rank's own loop; returns weights, ledger and clock."""
    if link is not None:
        world.clock = LinkClock(link)
    parameters = {k: t.requires_grad_() for k, t in mosaic(world.rank).items()}
    opt = optimizer(list(parameters.values()))
    engine = Engine(
        plan,
        parameters,
        world,
        lr=lambda name: float(opt.param_groups[0]["lr"]),
        optimizer_state=lambda name, key: opt.state[parameters[name]][key],
    )
    for step in range(1, steps + 1):
        engine.run(engine.before_step())
        opt.zero_grad()
        mosaic_backward(world.rank, parameters, step)
        if world.clock is not None:
            world.clock.compute(0.01)
        engine.run(engine.on_gradients())
        opt.step()
        engine.run(engine.after_step())
    engine.run(engine.finish())
    clock = world.clock.state_dict() if world.clock is not None else {}
    return {k: t.detach().clone() for k, t in parameters.items()}, world.ledger.state_dict(), clock
