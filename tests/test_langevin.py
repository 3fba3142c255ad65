"""Federated Langevin dynamics against Gaussian posteriors that are known."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from problems import sgd
from torch import Tensor

from lightning_dopt import Plan, Simulation, Sync, plans
from lightning_dopt.comm import lockstep
from lightning_dopt.local import ConduciveGradient, Langevin

D, N, LR = 1000, 4, 0.02
PRECISIONS = torch.tensor([0.5, 1.0, 1.5, 1.0], dtype=torch.float64)
"""Of the likelihood of each rank's data, in every one of ``D`` independent coordinates."""
MEANS = torch.tensor([-3.0, 1.0, 2.0, 4.0], dtype=torch.float64)
TOTAL = float(PRECISIONS.sum())
MEAN = float((PRECISIONS * MEANS).sum()) / TOTAL


def backward(rank: int, parameters: dict[str, Tensor], step: int) -> None:
    """Full batches of a Gaussian, ``N`` times the rank's share, no prior."""
    parameters["x"].grad = N * PRECISIONS[rank] * (parameters["x"].detach() - MEANS[rank])


def chains(plan: Plan) -> Simulation:
    return Simulation(plan, N, lambda rank: {"x": torch.full((D,), MEAN, dtype=torch.float64)}, backward, sgd(LR))


def variance(precision: float) -> float:
    """Of the stationary distribution with this learning rate."""
    return 1.0 / (precision * (1.0 - LR * precision / 2.0))


def moments(simulation: Simulation, rounds: int, h: int) -> tuple[float, float]:
    """Mean and variance over coordinates, ranks and rounds."""
    samples = torch.stack([simulation.run(h).stacked() for _ in range(rounds)])
    return float(samples.mean()), float(samples.var())


def test_one_rank_samples_its_own_posterior() -> None:
    one = Simulation(
        Plan([Sync()], [Langevin(0.5)]), 1, lambda rank: {"x": torch.zeros(D, dtype=torch.float64)}, backward, sgd(LR)
    )
    one.run(300)
    mean, var = moments(one, 20, 20)
    assert mean == pytest.approx(-3.0, abs=0.02)
    assert var == pytest.approx(0.5 * variance(N * 0.5), rel=0.03)
    still = Simulation(Plan([Sync()], [Langevin(0.0)]), 1, lambda rank: {"x": torch.zeros(1)}, backward, sgd(LR)).run(
        900
    )
    assert float(still.stacked()) == pytest.approx(-3.0, abs=1e-4)


def exact(simulation: Simulation, fit: int) -> None:
    """Give every rank the exact Gaussians of all."""
    for rank, engine in enumerate(simulation.engines):
        state = engine.corrections[1].state()
        state["00"].fill_(float(PRECISIONS.sum() - N * PRECISIONS[rank]))
        state["10"].fill_(float((PRECISIONS * MEANS).sum() - N * PRECISIONS[rank] * MEANS[rank]))
        state["steps"].fill_(fit)


def test_with_exact_gaussians_every_rank_pulls_the_same_way() -> None:
    sim = chains(plans.fsgld(20, 4))
    exact(sim, 4)
    x = torch.linspace(-2, 3, D, dtype=torch.float64)
    for rank, (engine, replica) in enumerate(zip(sim.engines, sim.replicas, strict=True)):
        replica["x"].data.copy_(x)
        backward(rank, replica, 1)
        engine.corrections[1].on_gradient({"x"})
        torch.testing.assert_close(replica["x"].grad, TOTAL * (x - MEAN), rtol=1e-12, atol=1e-12)


def test_long_visits_bias_chains_without_conducive_gradients_and_do_not_with_them() -> None:
    """100 steps a visit: without, chains forget where they came from and spread over the ranks' own means."""
    without = chains(plans.fsgld(100, 0)).run(300)
    mean, var = moments(without, 16, 25)
    assert var > 4 * variance(TOTAL)
    with_them = chains(plans.fsgld(100, 400)).run(600)
    mean, var = moments(with_them, 16, 25)
    assert mean == pytest.approx(MEAN, abs=0.1)
    assert var < 1.5 * variance(TOTAL)
    assert var > 0.7 * variance(TOTAL)
    perfect = chains(plans.fsgld(100, 4)).run(4)
    exact(perfect, 4)
    perfect.run(300)
    mean, var = moments(perfect, 24, 25)
    assert mean == pytest.approx(MEAN, abs=0.02)
    assert var == pytest.approx(variance(TOTAL), rel=0.03)


def test_what_is_fitted_sums_to_zero_and_is_the_gaussian_of_the_data() -> None:
    sim = chains(plans.fsgld(20, 1200)).run(1200)
    states = [engine.corrections[1].state() for engine in sim.engines]
    for kind in ("00", "10"):
        assert float(torch.stack([s[kind] for s in states]).sum(0).abs().max()) < 1e-9
    for rank, state in enumerate(states):  # sum_j Q_j - n Q_s: correlated samples of 600 steps
        want = float(PRECISIONS.sum() - N * PRECISIONS[rank])
        assert float(state["00"].mean()) == pytest.approx(want, abs=0.35)
    assert sim.bytes == [2 * 2 * (N - 1) * 8 * D // N] * N


def test_chains_travel_whole_and_a_run_resumed_is_the_same() -> None:
    plan = plans.fsgld(3, 6)
    for stop in (4, 6, 10):
        whole, first, again = (chains(plan) for _ in range(3))
        whole.run(14)
        first.run(stop)
        lockstep([engine.land() for engine in first.engines])
        for k in range(N):
            again.engines[k].load_state_dict(copy.deepcopy(first.engines[k].state_dict()))
            again.replicas[k]["x"].data.copy_(first.replicas[k]["x"].data)
        again.run(14 - stop)
        assert torch.equal(again.stacked(), whole.stacked())
    assert len({float(row[0]) for row in whole.stacked()}) == N  # different noise, nothing averaged


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: plans.fsgld(fit=3), r"^fsgld\(fit=3\): must be 0 or an integer of at least 4$"),
        (lambda: plans.fsgld(0), r"^fsgld\(sync_every=0\): must be an integer of at least 1$"),
        (lambda: plans.fsgld(temperature=-1.0), r"^fsgld\(temperature=-1.0\): must be a number"),
        (
            lambda: Plan([Sync()], [Langevin(), ConduciveGradient(5)]),
            r"^ConduciveGradient\(fit=5\): needs two syncs of what='tracker'",
        ),
    ],
)
def test_bad_options_are_refused_in_one_line(make: Any, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        make()


def test_samples_are_fitted_with_their_noise() -> None:
    with pytest.raises(
        ValueError, match=r"^ConduciveGradient: fits the samples of Langevin\(\), which must stand before"
    ):
        Plan([Sync()], [ConduciveGradient(5), Langevin()])
