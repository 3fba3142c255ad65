"""Projected gradient ascent on inputs, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from lightning_dopt import Simulation, plans
from lightning_dopt.adversarial import attacked

DATA = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(0))


def linear(x: Tensor) -> Tensor:
    """Grows along the same direction everywhere."""
    return (x * torch.tensor([1.0, -2.0, 0.5, 0.0])).sum()


def test_on_a_linear_loss_the_far_corner_and_the_far_point_of_the_ball_are_reached() -> None:
    corner = attacked(linear, DATA, 0.3, steps=4)
    torch.testing.assert_close(corner - DATA, 0.3 * torch.tensor([1.0, -1.0, 1.0, 0.0]).expand(6, 3, 4))
    point = attacked(linear, DATA, 0.3, steps=4, norm="l2")
    direction = torch.tensor([1.0, -2.0, 0.5, 0.0]).expand(6, 3, 4)
    torch.testing.assert_close(point - DATA, 0.3 * direction / direction.flatten(1).norm(dim=1)[:, None, None])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_stays_within_the_radius_and_raises_the_loss(norm: Any) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 2))
    y = torch.ones(6, 2)
    loss = lambda x: mse_loss(net(x), y)  # noqa: E731
    for radius in (0.01, 0.5):
        there = attacked(loss, DATA, radius, steps=9, step_size=radius, norm=norm)
        away = (there - DATA).flatten(1)
        size = away.abs().amax(1) if norm == "linf" else away.norm(dim=1)
        assert bool((size <= radius * (1 + 1e-5)).all())
        with torch.no_grad():
            assert float(loss(there)) > float(loss(DATA)) + 1e-4 * radius
    assert all(p.grad is None for p in net.parameters())
    assert not there.requires_grad


def test_statistics_and_inputs_are_left_alone_and_no_radius_changes_nothing() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(12, 1))
    before, data = [b.clone() for b in net.buffers()], DATA.clone()
    loss = lambda x: net(x).square().mean()  # noqa: E731
    attacked(loss, DATA, 0.1, module=net)
    assert all(torch.equal(b, old) for b, old in zip(net.buffers(), before, strict=True))
    assert torch.equal(DATA, data)
    assert torch.equal(attacked(loss, DATA, 0.0, module=net), DATA)
    attacked(loss, DATA, 0.1)
    assert any(not torch.equal(b, old) for b, old in zip(net.buffers(), before, strict=True))


def test_federated_adversarial_learning_finds_the_robust_regression() -> None:
    """With ``|w x - y|`` within a radius the worst case is ``(|w x - y| + radius |w|)^2``; radius 0 is FedAvg."""
    xs, ys = torch.tensor([1.0, 2.0]).double(), torch.tensor([1.5, 2.5]).double()

    def run(radius: float) -> float:
        def backward(rank: int, parameters: dict[str, Tensor], step: int) -> None:
            w = parameters["w"]
            loss = lambda x: (w * x - ys[rank]).square().sum()  # noqa: E731
            x = attacked(loss, xs[rank].view(1, 1), radius, steps=3)
            (w.grad,) = torch.autograd.grad(loss(x), w)

        start = lambda rank: {"w": torch.zeros(1, dtype=torch.float64)}  # noqa: E731
        sim = Simulation(plans.fedavg(1), 2, start, backward, lambda ps: torch.optim.SGD(ps, lr=0.02)).run(400)
        return float(sim.replicas[0]["w"].detach())

    grid = torch.linspace(0.5, 2.0, 150_001, dtype=torch.float64)
    for radius in (0.0, 0.3):
        worst = sum(((grid * x - y).abs() + radius * grid).square() for x, y in zip(xs, ys, strict=True))
        assert run(radius) == pytest.approx(float(grid[worst.argmin()]), abs=2e-2)  # it hops across the kink


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"radius": -1.0}, r"^attacked\(radius=-1.0\): must be a number in \[0, inf\)$"),
        ({"radius": 0.1, "steps": 0}, r"^attacked\(steps=0\): must be an integer of at least 1$"),
        ({"radius": 0.1, "norm": "l1"}, r"^attacked\(norm='l1'\): must be one of 'linf', 'l2'$"),
        ({"radius": 0.1, "step_size": -0.1}, r"^attacked\(step_size=-0.1\): must be a number"),
    ],
)
def test_bad_options_are_refused_in_one_line(options: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        attacked(linear, DATA, **options)
