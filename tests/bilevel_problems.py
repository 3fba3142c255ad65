"""Bilevel problems whose solution is known, and a few-line reference of every recursion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dopt.bilevel import BilevelPlan, BilevelSimulation

P, Q = 4, 5
MU = 0.5


def sgd(lr: float) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


@dataclass
class Quadratic:
    """``G_i = y'A_i y / 2 - y'(B_i x + b_i)``, ``F_i = mu |x|^2 / 2 + |C_i y - c_i|^2 / 2``."""

    A: Tensor
    B: Tensor
    b: Tensor
    C: Tensor
    c: Tensor
    sigma: float = 0.0

    @classmethod
    def drawn(cls, n: int, h: float, seed: int = 0, sigma: float = 0.0) -> Quadratic:
        """``h`` is how much workers differ."""
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        root, e = normal(Q, Q), normal(n, Q, Q)
        return cls(
            root @ root.T / Q + torch.eye(Q) + 0.3 * h * e @ e.mT / Q,
            normal(Q, P) + 0.5 * h * normal(n, Q, P),
            normal(Q) + h * normal(n, Q),
            torch.eye(Q) + 0.3 * h * normal(n, Q, Q),
            normal(Q) + h * normal(n, Q),
            sigma,
        )

    @property
    def n(self) -> int:
        return len(self.A)

    def noise(self, rank: int, step: int, kind: int, size: int) -> Tensor:
        """A draw that is a function of its arguments."""
        g = torch.Generator().manual_seed((rank * 100003 + step) * 4 + kind)
        return self.sigma * torch.randn(size, generator=g, dtype=torch.float64)

    def lower_loss(self, rank: int, lower: dict[str, Tensor], upper: dict[str, Tensor], step: int) -> Tensor:
        x, y = upper["x"], lower["y"]
        value = 0.5 * y @ self.A[rank] @ y - y @ (self.B[rank] @ x + self.b[rank])
        return value + y @ self.noise(rank, step, 0, Q) if self.sigma else value

    def upper_loss(self, rank: int, lower: dict[str, Tensor], upper: dict[str, Tensor], step: int) -> Tensor:
        x, y = upper["x"], lower["y"]
        value = 0.5 * MU * x @ x + 0.5 * (self.C[rank] @ y - self.c[rank]).square().sum()
        if self.sigma:
            value = value + x @ self.noise(rank, step, 1, P) + y @ self.noise(rank, step, 2, Q)
        return value

    def solution(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``y*(x)``, ``z*(x)`` and the hypergradient, each of the means."""
        a, b0 = self.A.mean(0), self.B.mean(0)
        y = torch.linalg.solve(a, b0 @ x + self.b.mean(0))
        cc, cd = (self.C.mT @ self.C).mean(0), (self.C.mT @ self.c[..., None]).mean(0)[:, 0]
        z = torch.linalg.solve(a, cc @ y - cd)
        return y, z, MU * x + b0.T @ z

    def value(self, x: Tensor) -> Tensor:
        """The upper objective."""
        y = self.solution(x)[0]
        return 0.5 * MU * x @ x + 0.5 * (self.C @ y - self.c).square().sum(-1).mean()

    def best(self) -> Tensor:
        """``x*``: the hypergradient is affine in ``x``."""
        zero = self.solution(torch.zeros(P, dtype=torch.float64))[2]
        columns = [self.solution(e)[2] - zero for e in torch.eye(P, dtype=torch.float64)]
        return torch.linalg.solve(torch.stack(columns, 1), -zero)

    def simulate(
        self, plan: BilevelPlan, alpha: float = 0.05, beta: float = 0.1, n: int | None = None
    ) -> BilevelSimulation:
        return BilevelSimulation(
            plan,
            n or self.n,
            lambda rank: {"y": torch.zeros(Q, dtype=torch.float64)},
            lambda rank: {"x": torch.zeros(P, dtype=torch.float64)},
            self.lower_loss,
            self.upper_loss,
            sgd(beta),
            sgd(alpha),
        )

    def error(self, run: BilevelSimulation) -> float:
        """``mean_i |x_i - x*|^2``."""
        return float((run.stacked("upper", "x") - self.best()).square().sum(1).mean())

    # ------------------------------------------------------------------ a reference, all workers at once

    def directions(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``v``, ``p`` and ``u`` of every worker, without noise."""
        v = torch.einsum("nij,nj->ni", self.A, y) - torch.einsum("nij,nj->ni", self.B, x) - self.b
        residual = torch.einsum("nij,nj->ni", self.C, y) - self.c
        p = torch.einsum("nij,nj->ni", self.A, z) - torch.einsum("nji,nj->ni", self.C, residual)
        return v, p, MU * x + torch.einsum("nji,nj->ni", self.B, z)

    def reference(
        self,
        rows: dict[str, str],
        w: Tensor | dict[str, Tensor],
        steps: int,
        alpha: float = 0.05,
        beta: float = 0.1,
        theta: float = 0.3,
        gamma: float | None = None,
    ) -> Tensor:
        """SPARKLE's matrix form with dual variables, ``s <- C (A s - a g) - B d``, ``d <- d + B s``; returns ``x``."""
        s = {k: torch.zeros(self.n, size, dtype=torch.float64) for k, size in (("y", Q), ("z", Q), ("x", P))}
        dual = {k: torch.zeros_like(t) for k, t in s.items()}
        r = torch.zeros_like(s["x"])

        def move(level: str, direction: Tensor, rate: float) -> None:
            a, b, c = table(rows[level], w[level] if isinstance(w, dict) else w)
            s[level] = c @ (a @ s[level] - rate * direction) - b @ dual[level]
            dual[level] = dual[level] + b @ s[level]

        for _ in range(steps):
            move("y", self.directions(s["x"], s["y"], s["z"])[0], beta)
            move("z", self.directions(s["x"], s["y"], s["z"])[1], gamma or beta)
            r = (1 - theta) * r + theta * self.directions(s["x"], s["y"], s["z"])[2]
            move("x", r, alpha)
        return s["x"]


def root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T


def table(row: str, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SPARKLE's matrices A, B, C."""
    one = torch.eye(len(w), dtype=w.dtype)
    return {
        "ed": (one, root(one - w), w),
        "extra": (w, root(one - w), one),
        "gt": (one, one - w, w @ w),
        "semi_gt": (w, one - w, w),
        "non_atc_gt": (w @ w, one - w, one),
        "dsgd": (one, torch.zeros_like(w), w),
    }[row]
