"""Gossip and its corrections on problems whose fixed points are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from problems import Quadratics, p1, p2, sgd
from torch import Tensor

from lightning_dopt import (
    Blocking,
    Complete,
    Difference,
    Every,
    ExactDiffusion,
    GradientTracking,
    Identity,
    Int8,
    Plan,
    RandK,
    RandomPairs,
    Ring,
    Sign,
    Simulation,
    Sync,
    TopK,
    Torus,
    plans,
)
from lightning_dopt.compress import Compressor
from lightning_dopt.topology import Lazy, OnePeerExponential, OnePeerHypercube, RoundRobin, Topology, by_name, names

Order = Literal["atc", "cta", "awc"]
W = Ring().matrix(4)
A = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
C = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
EYE = torch.eye(4, dtype=torch.float64)


def close(a: Tensor, b: Tensor, tol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b.to(a.dtype), rtol=tol, atol=tol)


def settle(plan: Plan, lr: float, steps: int, start: float = 0.0) -> Tensor:
    return p1().simulate(plan, lr, start).run(steps).stacked()[:, 0]


def still(n: int, d: int = 6) -> Quadratics:
    """No gradients; the starting points are ``c``."""
    start = torch.randn(n, d, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return Quadratics(torch.zeros(n, d, d), start)


# ---------------------------------------------------------------------- plain gossip


@pytest.mark.parametrize("lr", [0.1, 0.05])
def test_fixed_points(lr: float) -> None:
    ring = {order: plans.gossip(Ring(), order=order) for order in ("atc", "awc")}  # type: ignore[arg-type]
    atc = torch.linalg.solve(EYE - W @ (EYE - lr * A), lr * W @ A @ C)
    awc = torch.linalg.solve(EYE - W + lr * A, lr * A @ C)
    steps = int(11 / lr)
    close(settle(ring["atc"], lr, steps, 3.0), atc, 1e-7)
    close(settle(ring["awc"], lr, steps, 3.0), awc, 1e-7)


def test_fixed_points_in_numbers() -> None:
    atc = settle(plans.gossip(Ring()), 0.1, 200)
    awc = settle(plans.gossip(Ring(), order="awc"), 0.1, 200)
    assert (awc.mean() - 3).abs() > 2 * (atc.mean() - 3).abs()
    expected = torch.tensor([[2.949718, 2.810672, 3.041047, 3.076449], [2.703297, 2.644183, 2.971580, 3.273399]])
    torch.testing.assert_close(torch.stack([atc, awc]).float(), expected, rtol=0, atol=1e-6)


def test_mixing_the_last_iterate_of_cta_gives_that_of_atc() -> None:
    for steps in (1, 2, 7):
        cta = p2().simulate(plans.gossip(Ring(), order="cta"), 0.1).run(steps).stacked()
        atc = p2().simulate(plans.gossip(Ring()), 0.1).run(steps).stacked()
        close(Ring().matrix(8) @ cta, atc)


def test_awc_takes_the_gradient_before_and_the_step_after_mixing() -> None:
    start = still(4, 1).c + 2.0
    sim = p1().simulate(plans.gossip(Ring(), order="awc"), 0.1, start)
    for _ in range(3):
        x = sim.stacked()
        close(sim.run(1).stacked(), W @ x - 0.1 * A @ (x - C.view(4, 1)))


@pytest.mark.parametrize(("lr", "error"), [(0.1, 0.1893), (0.05, 0.0995), (0.025, 0.0511)])
def test_the_bias_is_proportional_to_the_learning_rate(lr: float, error: float) -> None:
    weights = settle(plans.gossip(Ring()), lr, int(10 / lr))
    assert float((weights - 3).abs().max()) == pytest.approx(error, abs=6e-5)


@pytest.mark.parametrize(("k", "error"), [(1, 0.0995), (2, 0.2019), (5, 0.4175), (10, 0.6213)])
def test_the_bias_grows_with_the_local_steps(k: int, error: float) -> None:
    weights = settle(Plan([Sync(when=Every(k), peers=Ring())]), 0.05, 400)
    assert float((weights - 3).abs().max()) == pytest.approx(error, abs=6e-5)


@pytest.mark.parametrize("order", ["atc", "cta", "awc"])
def test_no_bias_where_all_minimisers_agree(order: Order) -> None:
    problem = Quadratics.scalar([1, 2, 3, 4], [2, 2, 2, 2])
    weights = problem.simulate(plans.gossip(Ring(), order=order), 0.1).run(120).stacked()
    close(weights, torch.full((4, 1), 2.0), 1e-7)


def test_the_complete_graph_is_centralized_sgd() -> None:
    expected = p2().centralized(25, sgd(0.05, 0.9))[-1].expand(8, 5)
    local = p2().simulate(plans.gossip(Complete()), 0.1).run(25).stacked()
    close(local, p2().centralized(25, 0.1)[-1].expand(8, 5))
    cta = p2().simulate(plans.gossip(Complete(), order="cta"), 0.1).run(25).stacked()
    close(cta.mean(0), p2().centralized(25, 0.1)[-1])
    gradients = p2().simulate(plans.gossip(Complete(), correction="gradient_tracking"), sgd(0.05, 0.9)).run(25)
    close(gradients.stacked(), expected, 1e-10)


DOUBLY_STOCHASTIC = [
    *(t for name in names() if (t := by_name(name)).doubly_stochastic(8)),
    Lazy(Ring()),
    Ring(hops=2),
    RandomPairs(seed=9),
]


@pytest.mark.parametrize("order", ["atc", "cta", "awc"])
@pytest.mark.parametrize("topology", DOUBLY_STOCHASTIC, ids=repr)
def test_gossip_multiplies_by_the_matrix_and_keeps_the_mean(topology: Topology, order: Order) -> None:
    for n in (4, 8):
        problem = still(n)
        x = problem.c
        sim = problem.simulate(plans.gossip(topology, order=order), 0.1, x)
        for t in range(4):
            x = topology.matrix(n, t) @ x
            close(sim.run(1).stacked(), x)
        close(x.mean(0), problem.c.mean(0))


@pytest.mark.parametrize("topology", [OnePeerExponential(), OnePeerHypercube()], ids=repr)
def test_one_peer_graphs_agree_after_one_period(topology: Topology) -> None:
    problem = still(8)
    sim = problem.simulate(plans.gossip(topology), 0.1, problem.c).run(3)
    close(sim.stacked(), problem.c.mean(0).expand(8, 6))
    assert sim.distance() < 1e-14


# ---------------------------------------------------------------------- Adam


def with_decay(plan: Plan, phases: int = 6, length: int = 50) -> Tensor:
    """Adam with a learning rate that is halved again and again."""
    problem = p1()
    sim = problem.simulate(plan, lambda ps: torch.optim.Adam(ps, lr=0.1))
    for phase in range(phases):
        for opt in sim.optimizers:
            opt.param_groups[0]["lr"] = 0.1 * 0.5**phase
        sim.run(length)
    return sim.stacked()


def test_adam_with_plain_gossip_has_a_wrong_limit_and_tracking_repairs_it() -> None:
    plain = with_decay(plans.gossip(Ring()))
    assert float(plain.mean()) == pytest.approx(2.2, abs=0.06), plain
    assert float(plain.std()) < 0.02
    tracked = with_decay(plans.gossip(Ring(), correction="gradient_tracking"))
    close(tracked, torch.full((4, 1), 3.0), 2e-3)


# ---------------------------------------------------------------------- exact methods


def corrected(sim: Simulation, what: str) -> Tensor:
    """The correction's state of all ranks."""
    return torch.stack([e.corrections[0].state()[what] for e in sim.engines])


@pytest.mark.parametrize(("topology", "n"), [(Ring(), 4), (Torus(), 8), (RandomPairs(), 8)], ids=repr)
def test_exact_diffusion_is_exact(topology: Topology, n: int) -> None:
    problem = p1() if n == 4 else p2()
    plan = plans.gossip(topology, correction="exact_diffusion")
    sim = problem.simulate(plan, 0.1)
    sums = [float(corrected(sim.run(1), "h0").sum(0).abs().max()) for _ in range(40)]
    assert max(sums) < 1e-12
    close(sim.run(210).stacked(), problem.optimum().expand(n, problem.d), 1e-6)
    best = torch.stack([problem.gradient(i, problem.optimum()) for i in range(n)])
    close(corrected(sim, "h0"), best, 1e-4)


def test_exact_diffusion_follows_its_recursion() -> None:
    """``x' = V (2 x - x_before - lr (g - g_before))`` with ``V = (I + W) / 2``, after ``x_1 = V (x_0 - lr g_0)``."""
    problem, lr, v = p2(), 0.1, Lazy(Ring()).matrix(8)
    sim = problem.simulate(plans.gossip(Ring(), correction="exact_diffusion"), lr)

    def g(x: Tensor) -> Tensor:
        return torch.stack([problem.gradient(i, x[i]) for i in range(8)])

    before = torch.zeros(8, 5, dtype=torch.float64)
    x = v @ (before - lr * g(before))
    close(sim.run(1).stacked(), x)
    for _ in range(30):
        x, before = v @ (2 * x - before - lr * (g(x) - g(before))), x
        close(sim.run(1).stacked(), x, 1e-11)


@pytest.mark.parametrize(("k", "kappa"), [(1, 0.5), (3, 1.0)])
def test_exact_diffusion_in_gradient_units_follows_its_recursion(k: int, kappa: float) -> None:
    """``K`` steps with ``g - h``, then ``x = V psi`` and ``h <- h + kappa (x - psi) / (lr K)``."""
    problem, lr, v = p1(), 0.05, Lazy(Ring()).matrix(4)
    sim = problem.simulate(Plan([Sync(when=Every(k), peers=Lazy(Ring()))], [ExactDiffusion(kappa)]), lr)
    x, h = torch.zeros(2, 4, 1, dtype=torch.float64)
    for _ in range(12):
        psi = x
        for _ in range(k):
            psi = psi - lr * (torch.stack([problem.gradient(i, psi[i]) for i in range(4)]) - h)
        x = v @ psi
        h = h + kappa * (x - psi) / (lr * k)
        close(sim.run(k).stacked(), x, 1e-11)


def test_exact_diffusion_survives_a_drop_of_the_learning_rate() -> None:
    sim = p1().simulate(plans.gossip(Ring(), correction="exact_diffusion"), 0.1).run(300)
    for opt in sim.optimizers:
        opt.param_groups[0]["lr"] = 0.01
    worst = max(float((sim.run(1).stacked() - 3).abs().max()) for _ in range(20))
    assert worst < 1e-7


def test_exact_diffusion_with_momentum_needs_its_share() -> None:
    def error(kappa: float) -> float:
        plan = Plan([Sync(peers=Lazy(Ring()))], [ExactDiffusion(kappa)])
        return float((p1().simulate(plan, sgd(0.05, 0.9)).run(300).stacked() - 3).abs().max())

    assert error(0.1) < 2e-3
    assert not error(1.0) < 1.0


@pytest.mark.parametrize("k", [2, 4])
def test_exact_diffusion_with_local_steps_is_exact(k: int) -> None:
    plan = Plan([Sync(when=Every(k), peers=Lazy(Ring()))], [ExactDiffusion()])
    close(p1().simulate(plan, 0.05).run(500).stacked(), torch.full((4, 1), 3.0), 1e-5)


@pytest.mark.parametrize("lr", [0.1, 0.2, 0.3, 0.4])
def test_gradient_tracking_is_exact(lr: float) -> None:
    sim = p1().simulate(plans.gossip(Ring(), correction="gradient_tracking"), lr).run(150)
    close(sim.stacked(), torch.full((4, 1), 3.0), 1e-6)


@pytest.mark.parametrize("topology", [Ring(), OnePeerExponential(), RandomPairs(), RoundRobin()], ids=repr)
def test_trackers_sum_to_the_gradients(topology: Topology) -> None:
    problem = p2()
    sim = problem.simulate(plans.gossip(topology, correction="gradient_tracking"), 0.1)
    for _ in range(20):
        x = sim.stacked()
        gradients = torch.stack([problem.gradient(i, x[i]) for i in range(8)])
        sim.run(1)
        close(corrected(sim, "y.x").sum(0), gradients.sum(0), 1e-11)
        close(corrected(sim, "g.x"), gradients)
    close(sim.run(120).stacked(), problem.optimum().expand(8, 5), 1e-3)


def test_gradient_tracking_follows_its_recursion() -> None:
    problem, w = p1(), Ring().matrix(4)
    sim = problem.simulate(Plan([Sync(what="gradients", peers=Ring()), Sync(peers=Ring())], [GradientTracking()]), 0.1)
    x, y, before = (torch.zeros(4, 1, dtype=torch.float64) for _ in range(3))
    for _ in range(20):
        g = torch.stack([problem.gradient(i, x[i]) for i in range(4)])
        y, before = w @ (y + g - before), g
        x = w @ (x - 0.1 * y)
        close(sim.run(1).stacked(), x)


# ---------------------------------------------------------------------- compressed gossip


@pytest.mark.parametrize("topology", [Ring(), Torus(), Complete()], ids=repr)
def test_differences_sent_whole_are_plain_gossip(topology: Topology) -> None:
    plain = p2().simulate(plans.gossip(topology), 0.1).run(40).stacked()
    coded = p2().simulate(plans.gossip(topology, Difference(Identity())), 0.1).run(40).stacked()
    close(coded, plain)


CODECS: list[Compressor] = [TopK(0.2), RandK(0.3), Sign(), Int8()]


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_compressed_gossip_keeps_the_mean_and_agrees(codec: Compressor) -> None:
    problem = still(8, 40)
    sim = problem.simulate(plans.gossip(Ring(), Difference(codec, 0.2)), 0.1, problem.c)
    before = sim.distance()
    for _ in range(4):
        close(sim.run(15).stacked().mean(0), problem.c.mean(0), 1e-11)
    assert sim.distance() < 0.4 * before


def test_copies_of_the_neighbours_stay_true() -> None:
    """``mixed = sum_j W_ij own_j`` on every rank after every step."""
    problem = p2()
    sim = problem.simulate(plans.gossip(Ring(), Difference(TopK(0.2), 0.3)), 0.05)

    def memory(key: str) -> Tensor:
        return torch.stack([e.runners[0].lanes[0].channel.memory_state[key] for e in sim.engines])

    for _ in range(20):
        sim.run(1)
        close(memory("mixed"), Ring().matrix(8) @ memory("own"), 1e-7)


def test_too_large_a_step_towards_the_copies_diverges() -> None:
    problem = still(8, 20)
    run: Callable[[float], float] = lambda gamma: (  # noqa: E731
        problem.simulate(plans.gossip(Ring(), Difference(TopK(0.1), gamma)), 0.1, problem.c).run(120).distance()
    )
    assert run(0.2) < 0.05
    assert run(1.0) > 10.0


def test_the_default_merge_of_each_order() -> None:
    assert [type(Blocking(order).merge).__name__ for order in ("atc", "cta", "awc")] == ["Replace", "Replace", "Rebase"]  # type: ignore[arg-type]
