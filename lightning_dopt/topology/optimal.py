"""The best weights for the links of a given graph: one constant, fastest mixing, fastest linear averaging."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_DIGITS = 9
_NOTHING = 1e-6
"""Links with less weight than this are dropped: they cost a message and mix nothing."""

_GROWTH = 4.0
_STAGES = 22
_STEPS = 30
"""The weight of the objective grows by the factor in each stage, with so many Newton steps at most in one."""

Edges = tuple[tuple[int, int], ...]


class _Problem(NamedTuple):
    """Minimise ``s`` with ``-s I <= W - J <= s I`` for ``W = I - sum_e w_e (e_i - e_j)(e_i - e_j)'``."""

    first: Tensor
    second: Tensor
    n: int
    positive: bool


def laplacian(n: int, edges: Edges) -> Tensor:
    """The graph Laplacian ``L``: float64, shape (n, n), degrees on the diagonal and -1 for each link."""
    w = torch.zeros(n, n, dtype=torch.float64)
    for i, j in edges:
        w[i, j] = w[j, i] = -1.0
    return w - torch.diag(w.sum(1))


def best_constant(n: int, edges: Edges) -> float:
    """The constant ``eps`` for which ``I - eps L`` mixes fastest among those without a negative weight.

    ``2 / (lambda_2 + lambda_max)`` of the Laplacian, which makes the eigenvalues next to 1 and furthest below equally
    large, or ``1 / d_max`` if that is smaller. Rounded to 12 digits, so that ranks whose linear algebra differs in the
    last bits agree.
    """
    if 2 * len(edges) == n * (n - 1):
        return 1.0 / n
    w = laplacian(n, edges)
    values = torch.linalg.eigvalsh(w)
    return min(round(2.0 / float(values[1] + values[-1]), 12), 1.0 / float(w.diagonal().max()))


def fastest(n: int, edges: Edges, positive: bool) -> list[float]:
    """The weights of ``edges``, in their order, that minimise the consensus rate ``||W - J||_2`` of a symmetric ``W``.

    A semidefinite program, solved by a barrier method: Newton steps in float64 with a fixed schedule and no random
    numbers, so that every rank finds the same; cut to 9 digits, so that ranks whose linear algebra differs in the last
    bits agree. Symmetries of the graph are kept. Cost of the order of ``200 (n**3 + n m**2)`` for ``m`` links.

    Args:
        n: number of workers.
        edges: the links, each once.
        positive: whether link and own weights must be at least zero (fastest mixing Markov chain), or may have any sign
            (fastest distributed linear averaging).

    Source: Xiao and Boyd, "Fast linear iterations for distributed averaging" (2004); Boyd, Diaconis and Xiao, "Fastest
    mixing Markov chain on a graph" (2004).
    """
    if 2 * len(edges) == n * (n - 1):
        return [1.0 / n] * len(edges)
    ends = torch.tensor(edges)
    problem = _Problem(ends[:, 0], ends[:, 1], n, positive)
    top = int(torch.bincount(ends.flatten()).max())
    point = torch.full((len(edges) + 1,), 1.0 / (1 + top), dtype=torch.float64)
    point[-1] = 1.5
    scale = 1.0
    for _ in range(_STAGES):
        point = _centre(problem, point, scale)
        scale *= _GROWTH
    # towards zero, so that own weights do not become negative
    found: list[float] = [math.trunc(weight * 10**_DIGITS) / 10**_DIGITS for weight in point[:-1].tolist()]
    return [0.0 if abs(weight) < _NOTHING else weight for weight in found]


def _centre(problem: _Problem, point: Tensor, scale: float) -> Tensor:
    """Minimise ``scale * s`` plus the barriers by damped Newton steps."""
    for _ in range(_STEPS):
        value, gradient, hessian = _barrier(problem, point, scale)
        step = -torch.linalg.solve(hessian, gradient)
        decrease = -float(gradient @ step)
        if decrease < 1e-12:
            break
        length = 1.0
        while length > 1e-10:
            there = point + length * step
            new = _value(problem, there, scale)
            if new is not None and new <= value - 0.1 * length * decrease:
                break
            length /= 2
        else:
            break
        point = there
    return point


def _matrices(problem: _Problem, point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``s I - (W - J)``, ``s I + (W - J)`` and the own weights."""
    n, weights = problem.n, point[:-1]
    w = torch.zeros(n, n, dtype=torch.float64)
    w[problem.first, problem.second] = weights
    w[problem.second, problem.first] = weights
    own = 1.0 - w.sum(1)
    mixed = w + torch.diag(own) - 1.0 / n
    ball = point[-1] * torch.eye(n, dtype=torch.float64)
    return ball - mixed, ball + mixed, own


def _value(problem: _Problem, point: Tensor, scale: float) -> float | None:
    """The objective with barriers; ``None`` outside of them."""
    above, below, own = _matrices(problem, point)
    limits = torch.cat([point[:-1], own])
    if problem.positive and bool((limits <= 0).any()):
        return None
    total = scale * float(point[-1])
    for block in (above, below):
        factor, failed = torch.linalg.cholesky_ex(block)
        if int(failed):
            return None
        total -= 2 * float(factor.diagonal().log().sum())
    return total - (float(limits.log().sum()) if problem.positive else 0.0)


def _barrier(problem: _Problem, point: Tensor, scale: float) -> tuple[float, Tensor, Tensor]:
    """Value, gradient and Hessian of the objective with barriers."""
    above, below, own = _matrices(problem, point)
    size = len(point)
    a, b = problem.first, problem.second
    gradient, hessian = torch.zeros(size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64)
    gradient[-1] = scale
    for block, sign in ((above, 1.0), (below, -1.0)):
        inverse = torch.linalg.inv(block)
        columns = inverse[:, a] - inverse[:, b]  # inverse times (e_i - e_j)
        inner = columns[a] - columns[b]
        gradient[:-1] -= sign * inner.diagonal()
        gradient[-1] -= inverse.trace()
        hessian[:-1, :-1] += inner**2
        mixed = sign * (columns**2).sum(0)
        hessian[:-1, -1] += mixed
        hessian[-1, :-1] += mixed
        hessian[-1, -1] += (inverse**2).sum()
    if problem.positive:
        weights = point[:-1]
        gradient[:-1] += -1 / weights + 1 / own[a] + 1 / own[b]
        hessian[:-1, :-1] += torch.diag(weights**-2)
        incident = torch.zeros(problem.n, size - 1, dtype=torch.float64)
        place = torch.arange(size - 1)
        incident[a, place] = 1.0
        incident[b, place] = 1.0
        hessian[:-1, :-1] += incident.T @ (incident / own[:, None] ** 2)
    value = _value(problem, point, scale)
    assert value is not None
    return value, gradient, hessian
