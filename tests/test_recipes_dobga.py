"""Decentralized submodular ascent: the bound against the optimum found by trying all sets, and agreement of the workers."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_dopt.topology import Complete, Ring
from recipes.dobga import SHARE, Coverage, ascend, boosting, project


def test_values_count_served_customers() -> None:
    serves = torch.tensor([[[True, False], [True, True]], [[False, True], [False, False]]])
    problem = Coverage(torch.tensor([[1.0, 2.0], [4.0, 8.0]], dtype=torch.float64), serves)
    half = torch.tensor([0.5, 0.5], dtype=torch.float64)
    assert float(problem.value(half, 0)) == pytest.approx(0.5 * 1 + 0.75 * 2)
    assert float(problem.value(half, 1)) == pytest.approx(0.5 * 4)
    assert float(problem.value(half)) == pytest.approx((2.0 + 2.0) / 2)
    assert problem.best(1) == pytest.approx((2.0 + 4.0) / 2)  # site 1 serves customers of both


def test_projection_is_the_closest_feasible_point() -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        y = 2 * torch.randn(6, generator=g, dtype=torch.float64)
        x = project(y, 2.0)
        assert float(x.min()) >= 0
        assert float(x.max()) <= 1
        assert float(x.sum()) <= 2 + 1e-9
        for _ in range(50):  # optimality: no feasible point lies at an acute angle
            other = torch.rand(6, generator=g, dtype=torch.float64)
            other *= min(1.0, 2.0 / float(other.sum()))
            assert float((y - x) @ (other - x)) <= 1e-9


def test_boosting_has_its_density() -> None:
    z = torch.tensor([boosting(3, k) for k in range(4000)], dtype=torch.float64)
    assert float(z.min()) >= 0
    assert float(z.max()) <= 1
    assert float(z.mean()) == pytest.approx(math.exp(-1) / SHARE, abs=0.02)  # integral of z exp(z - 1) is 1/e


@pytest.mark.parametrize("seed", [0, 1])
def test_the_ring_reaches_the_bound_and_what_a_center_would_reach(seed: int) -> None:
    problem = Coverage.drawn(workers=6, customers=8, sites=7, seed=seed)
    best = problem.best(3)
    ring, center = (ascend(problem, 3, topology, steps=150) for topology in (Ring(), Complete()))
    values = torch.stack([problem.value(x) for x in ring])
    assert float(values.min()) > SHARE * best
    assert float(values.min()) > 0.9 * best  # in practice far above the bound
    assert float(problem.value(torch.full((7,), 3 / 7, dtype=torch.float64))) < 0.9 * best  # which is not trivial
    assert torch.allclose(values, problem.value(center[0]), rtol=0.02, atol=0)
    assert torch.all(ring.sum(1) <= 3 + 1e-9)
