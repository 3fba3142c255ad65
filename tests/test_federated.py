"""Federated methods against closed forms, their limiting cases and each other."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from problems import Quadratics, adam, mosaic_simulation, p1, p2, sgd
from test_engine_invariants import assert_same, load, save
from torch import Tensor

from lightning_dopt import Every, Int8, Plan, Simulation, Sync, TopK, outer, plans
from lightning_dopt.adaptive import FedAdagrad, FedAdam, FedYogi, ServerOptimizer
from lightning_dopt.compress import GaussianNoise, Identity, RandK
from lightning_dopt.local import ConsensusADMM, ControlVariate, Scaffold
from lightning_dopt.personal import Personal
from lightning_dopt.topology import Groups, Permute, Sample, WeightedMean


def scaffold(
    h: int,
    option: str = "II",
    outer_lr: float = 1.0,
    fraction: float = 1.0,
    counts: list[int] | None = None,
    seed: int = 0,
) -> Plan:
    """Always with two messages, as the paper has it."""
    peers, when = Sample(fraction, counts, seed), Every(h)
    move = Sync(when, signal="delta", peers=peers, outer=outer.SGD(outer_lr))
    return Plan([move, Sync(when, "tracker", peers=peers)], [ControlVariate(option)])  # type: ignore[arg-type]


def close(a: Tensor, b: Tensor, tol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def few() -> Quadratics:
    """Three of the least squares problems."""
    return Quadratics(p2().A[:3], p2().c[:3])


def run(problem: Quadratics, plan: Plan, steps: int, lr: object = 0.1, start: object = 0.0) -> Tensor:
    return problem.simulate(plan, lr, start).run(steps).stacked()  # type: ignore[arg-type]


# ---------------------------------------------------------------------- who takes part


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.9, 1.0])
def test_a_sample_has_the_right_size_and_every_rank_gets_its_weighted_mean(n: int, fraction: float) -> None:
    counts = [k + 1 for k in range(n)]
    peers = Sample(fraction, counts, seed=5)
    peers.check(n)
    for step in range(20):
        drawn = peers.drawn(n, step)
        assert len(drawn) == max(1, round(fraction * n))
        total = sum(counts[j] for j in drawn)
        for rank in range(n):
            row = peers.row(n, rank, step)
            assert row == pytest.approx({j: counts[j] / total for j in drawn})
            assert peers.speaks(n, rank, step) == (rank in drawn)
            assert peers.receivers(n, rank, step) == [j for j in range(n) if rank in peers.neighbors(n, j, step)]
        assert peers.share(n, step) == pytest.approx(total / sum(counts))
        assert peers.max_degree(n) >= max(len(peers.neighbors(n, rank, step)) for rank in range(n))


def test_all_subsets_are_drawn_equally_often() -> None:
    peers = Sample(0.5, seed=1)
    seen: dict[tuple[int, ...], int] = {}
    for step in range(3000):
        drawn = tuple(peers.drawn(4, step))
        seen[drawn] = seen.get(drawn, 0) + 1
    assert len(seen) == 6
    assert all(abs(count - 500) < 80 for count in seen.values())


def test_groups_average_among_themselves_and_a_permutation_only_moves() -> None:
    start = torch.arange(5.0, dtype=torch.float64).view(5, 1)
    flat = Quadratics(torch.zeros(5, 1, 1), torch.zeros(5, 1))
    grouped = Plan([Sync(peers=Groups([[0, 3], [1, 2, 4]]))])
    close(
        run(flat, grouped, 1, 0.1, start).flatten(), torch.tensor([1.5, 7 / 3, 7 / 3, 1.5, 7 / 3], dtype=torch.float64)
    )
    sim = flat.simulate(Plan([Sync(peers=Permute(3))]), 0.1, start)
    visited = torch.stack([sim.run(1).stacked().flatten() for _ in range(30)])
    assert all(sorted(row.tolist()) == [0, 1, 2, 3, 4] for row in visited)
    assert all(len(set(visited[:, rank].tolist())) == 5 for rank in range(5))
    assert sim.bytes == [30 * 8] * 5


@pytest.mark.parametrize("bad", ["Groups([[0, 1], [1]])", "Groups([[0], []])", "Groups([[0, 2]])", "Sample(0.0)"])
def test_bad_peers_are_refused(bad: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        eval(bad)


def test_fedavg_with_a_sample_is_the_loop_of_the_paper() -> None:
    """Written down a second time: draw, train from the common weights, average by samples; others do nothing."""
    problem, counts = p2(), [5, 1, 2, 9, 4, 4, 3, 7]
    plan = plans.fedavg(5, fraction=0.4, counts=counts, seed=7)
    sim, w = problem.simulate(plan, 0.05), torch.zeros(5, dtype=torch.float64)
    for round_ in range(12):
        drawn = plan.syncs[0].peers.drawn(8, round_)  # type: ignore[attr-defined]
        ends = []
        for i in drawn:
            x = w.clone()
            for _ in range(5):
                x -= 0.05 * problem.gradient(i, x)
            ends.append(x)
        total = sum(counts[i] for i in drawn)
        w = sum((counts[i] / total * x for i, x in zip(drawn, ends, strict=True)), torch.zeros(5).double())
        rows = sim.run(5).stacked()
        close(rows, w.expand(8, 5))
        assert all(torch.equal(row, rows[0]) for row in rows)


def test_a_rank_that_is_not_drawn_sends_nothing() -> None:
    plan = plans.fedavg(2, fraction=0.25, seed=3)
    peers = plan.syncs[0].peers
    sim = p2().simulate(plan, 0.05).run(20)
    assert sim.bytes == [sum(peers.speaks(8, rank, k) for k in range(10)) * 7 * 5 * 8 for rank in range(8)]


def test_weights_by_samples_without_sampling_end_in_the_weighted_optimum() -> None:
    problem, counts = p2(), [1, 2, 3, 4, 5, 6, 7, 8]
    share = torch.tensor(counts).double() / 36
    a = (share.view(8, 1, 1) * problem.A).sum(0)
    b = (share.view(8, 1, 1) * (problem.A @ problem.c.unsqueeze(-1))).sum(0)
    close(run(problem, plans.fedavg(1, counts=counts), 300), torch.linalg.solve(a, b).squeeze(-1).expand(8, 5), 1e-3)


def test_anchors_may_be_shared_over_a_weighted_mean() -> None:
    peers = WeightedMean(counts=[1, 2, 3, 4, 5, 6, 7, 8])
    by_delta = Plan([Sync(Every(3), signal="delta", peers=peers, outer=outer.Nesterov(0.5, 0.5))])
    by_value = Plan([Sync(Every(3), signal="value", peers=peers, outer=outer.Nesterov(0.5, 0.5))])
    close(run(p2(), by_delta, 30), run(p2(), by_value, 30))
    assert Sync(peers=peers, outer=outer.SGD()).signal == "delta"


def test_the_residual_of_a_rank_that_is_not_drawn_waits() -> None:
    plan = plans.fedavg(2, fraction=0.5, codec=TopK(0.3), seed=2)
    sim = mosaic_simulation(plan, 4)
    memories = [[lane.channel.memory_state["residual"] for lane in e.runners[0].lanes] for e in sim.engines]
    moved = 0
    for round_ in range(8):
        before = [[m.clone() for m in ms] for ms in memories]
        sim.run(2)
        for rank in range(4):
            same = all(torch.equal(a, b) for a, b in zip(before[rank], memories[rank], strict=True))
            assert same != plan.syncs[0].peers.speaks(4, rank, round_)
            moved += not same
    assert moved == 16


def test_clients_start_every_round_without_moments() -> None:
    """Adam is told from the start of each round as if it were new."""
    problem, plan = p1(), plans.fedavg(4)
    ends = problem.simulate(plan, lambda ps: torch.optim.Adam(ps, lr=0.1)).run(12).stacked()
    w = torch.zeros(1, dtype=torch.float64)
    for _ in range(3):
        sim = problem.simulate(Plan(), lambda ps: torch.optim.Adam(ps, lr=0.1), w)
        w = sim.run(4).stacked().mean(0)
    close(ends, w.expand(4, 1))
    kept = problem.simulate(plans.fedavg(4, restart=False), lambda ps: torch.optim.Adam(ps, lr=0.1)).run(12).stacked()
    assert float((kept - ends).abs().max()) > 1e-3


# ---------------------------------------------------------------------- adaptive outer optimizers


@pytest.mark.parametrize("make", [FedAdagrad, FedAdam, FedYogi])
def test_adaptive_steps_as_written_in_the_paper(make: type[FedAdagrad | FedAdam]) -> None:
    rule = make(0.3, 0.8, tau=0.05) if make is FedAdagrad else make(0.3, 0.8, 0.9, 0.05)  # type: ignore[call-arg]
    g = torch.Generator().manual_seed(2)
    a = torch.zeros(6, dtype=torch.float64)
    x, m, v = a.clone(), torch.zeros(6).double(), torch.full((6,), 0.05**2, dtype=torch.float64)
    optimizer = rule.build([a])
    for _ in range(7):
        delta = torch.randn(6, generator=g, dtype=torch.float64)  # x_i - x of the paper: uphill for the anchor
        a.grad = -delta
        optimizer.step()
        m = 0.8 * m + 0.2 * delta
        if make is FedAdagrad:
            v = v + delta**2
        elif make is FedAdam:
            v = 0.9 * v + 0.1 * delta**2
        else:
            v = v - 0.1 * delta**2 * torch.sign(v - delta**2)
        x = x + 0.3 * m / (v.sqrt() + 0.05)
        close(a, x)


def stepped(rule: str, gradients: list[Tensor], lr: float, beta1: float, beta2: float, tau: float) -> Tensor:
    a = torch.zeros_like(gradients[0])
    optimizer = ServerOptimizer([a], rule, lr, beta1, beta2, tau)  # type: ignore[arg-type]
    for g in gradients:
        a.grad = g
        optimizer.step()
    return a


def test_limits_of_adaptivity() -> None:
    gs = [torch.randn(5, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in range(6)]
    ema, plain = torch.zeros(5).double(), torch.zeros(5).double()
    for g in gs:
        ema = 0.9 * ema + 0.1 * g
        plain -= 0.2 * ema
    for rule in ("adagrad", "adam", "yogi"):
        tau = 1e8  # SGD with averaged gradients; tau counts twice, in the root of v, too
        close(stepped(rule, gs, 2 * tau * 0.2, 0.9, 1 - 1e-9, tau), plain, 1e-6)
    scaled = [1e3 * g for g in gs]
    close(stepped("adam", gs, 0.1, 0.9, 0.99, 1e-12), stepped("adam", scaled, 0.1, 0.9, 0.99, 1e-12), 1e-6)
    close(stepped("adam", gs[:1], 0.1, 0.0, 0.0, 1e-12), -0.1 * gs[0].sign(), 1e-9)


def test_one_local_step_and_fedadam_is_adam_without_bias_correction() -> None:
    weights = run(p2(), plans.fedadam(1, outer_lr=0.05, tau=0.01), 40, 1.0)

    def inner(ps: list[Tensor]) -> torch.optim.Optimizer:
        return ServerOptimizer(ps, "adam", 0.05, 0.9, 0.99, 0.01)

    close(weights, p2().centralized(40, inner)[-1].expand(8, 5), 1e-10)


# ---------------------------------------------------------------------- FedProx


@pytest.mark.parametrize("mu", [0.0, 0.5, 3.0])
def test_fedprox_has_its_fixed_point(mu: float) -> None:
    """FedAvg's bias with ``A_i + mu`` in the local steps: ``B_i = (I - (I - eta (A_i + mu))^H)(A_i + mu)^-1 A_i``."""
    problem, eta, h = few(), 0.05, 10
    eye = torch.eye(5, dtype=torch.float64)
    curved = problem.A + mu * eye
    b = (eye - torch.linalg.matrix_power(eye - eta * curved, h)) @ torch.linalg.solve(curved, problem.A)
    fixed = torch.linalg.solve(b.sum(0), (b @ problem.c.unsqueeze(-1)).sum(0)).squeeze(-1)
    close(run(problem, plans.fedprox(h, mu), 1500, eta), fixed.expand(3, 5), 1e-6)
    bias = float((fixed - problem.optimum()).norm())
    assert bias > 0.01
    if mu == 3.0:
        unpulled = run(problem, plans.fedavg(h), 1500, eta)[0]
        assert bias < float((unpulled - problem.optimum()).norm())


def test_fedprox_without_weight_is_fedavg() -> None:
    assert torch.equal(run(p2(), plans.fedprox(4, 0.0), 24), run(p2(), plans.fedavg(4), 24))


# ---------------------------------------------------------------------- SCAFFOLD


@pytest.mark.parametrize("option", ["I", "II", "mean"])
def test_scaffold_with_one_step_is_sgd_on_the_mean_gradient(option: str) -> None:
    plan = scaffold(1, option, outer_lr=0.7)  # type: ignore[arg-type]
    close(run(p2(), plan, 40), p2().centralized(40, 0.07)[-1].expand(8, 5), 1e-11)


@pytest.mark.parametrize("option", ["I", "II", "mean"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_scaffold_is_exact_and_learns_the_gradients(option: str, fraction: float) -> None:
    problem = few()
    sim = problem.simulate(scaffold(5, option, fraction=fraction, seed=1), 0.1)  # type: ignore[arg-type]
    for _ in range(10):
        sim.run(5)
        bound = [e.corrections[0] for e in sim.engines]
        mean = torch.stack([b.own[0] for b in bound]).mean(0)  # type: ignore[attr-defined]
        for b in bound:
            close(b.common[0], mean)  # type: ignore[attr-defined]
    sim.run(900)
    close(sim.stacked(), problem.optimum().expand(3, 5), 1e-6)
    for rank, b in enumerate(bound):
        close(b.own[0], problem.gradient(rank, problem.optimum()), 1e-5)  # type: ignore[attr-defined]
    assert float((run(problem, plans.fedavg(5), 900, 0.05)[0] - problem.optimum()).norm()) > 0.02


def test_options_two_and_mean_are_the_same_for_sgd() -> None:
    a, b = (run(p2(), scaffold(4, o, fraction=0.5), 40, 0.05) for o in ("II", "mean"))  # type: ignore[arg-type]
    close(a, b)


def test_option_mean_is_exact_with_adam() -> None:
    sim = p1().simulate(scaffold(4, "mean"), lambda ps: torch.optim.Adam(ps, lr=0.05)).run(300)
    for opt in sim.optimizers:
        opt.param_groups[0]["lr"] = 0.005
    assert float((sim.run(200).stacked() - 3).abs().max()) < 0.02


@pytest.mark.parametrize("inner", [adam, sgd(0.05, 0.9)])
def test_displacements_of_momentum_are_refused(inner: object) -> None:
    with pytest.raises(ValueError, match=r"SGD without momentum.*the inner optimizer keeps"):
        mosaic_simulation(scaffold(2), 2, inner).run(2)  # type: ignore[arg-type]
    for plan in (plans.scaffold(2), plans.scallion(sync_every=2), plans.scafcom(sync_every=2)):
        with pytest.raises(ValueError, match=r"^Scaffold: reads.*SGD without momentum.*the inner optimizer keeps"):
            mosaic_simulation(plan, 2, inner).run(2)  # type: ignore[arg-type]


def test_learning_rates_that_change_within_a_round_are_summed() -> None:
    """With falling rates option II still takes gradients apart from steps; a rate of zero moves nothing and is no error."""
    problem = p1()
    sim = problem.simulate(scaffold(3), 0.05)
    for step in range(1, 1201):
        for opt in sim.optimizers:
            opt.param_groups[0]["lr"] = 0.0 if step <= 4 else (0.06, 0.03, 0.01)[step % 3]
        sim.run(1)
        if step == 4:
            assert float(sim.stacked().abs().max()) == 0.0
    close(sim.stacked(), torch.full((4, 1), 3.0).double(), 1e-6)


# ---------------------------------------------------------------------- SCALLION, SCAFCOM


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_scallion_without_compression_is_scaffold(fraction: float) -> None:
    one = run(p2(), plans.scallion(Identity(), 5, 1.0, 0.8, fraction), 50, 0.05)
    two = run(p2(), scaffold(5, "II", 0.8, fraction), 50, 0.05)
    close(one, two)


@pytest.mark.parametrize(
    "plan",
    [
        plans.scallion(Identity(), 4, 0.3, 1.0),
        plans.scallion(RandK(0.4), 4, outer_lr=1.0),
        plans.scallion(Int8(stochastic=True), 4, fraction=0.5),
        plans.scafcom(TopK(0.4), 4, 0.2),
        plans.scafcom(TopK(0.4), 4, 0.2, fraction=0.5),
        plans.scafcom(Int8(), 4, 0.2),
    ],
    ids=str,
)
def test_compressed_control_variates_are_exact(plan: Plan) -> None:
    problem = few()
    sim = problem.simulate(plan, 0.05)
    for _ in range(10):
        sim.run(4)
        bound = [e.corrections[0] for e in sim.engines]
        mean = torch.stack([b.own[0] for b in bound]).mean(0)  # type: ignore[attr-defined]
        for b in bound:
            close(b.mean[0], mean, 1e-6)  # type: ignore[attr-defined]
    sim.run(1200)
    close(sim.stacked(), problem.optimum().expand(3, 5), 1e-3)


def test_a_correction_that_remembers_needs_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plans.scafcom(TopK(0.01), 4, 0.2)


def test_one_compressed_message_a_round() -> None:
    plan = plans.scafcom(TopK(0.1), 4, 0.2)
    wire = TopK(0.1).payload_bytes((236,))
    assert mosaic_simulation(plan, 4, sgd(0.05)).run(8).bytes == [2 * 3 * wire] * 4


# ---------------------------------------------------------------------- FedSpeed, ADMM


@pytest.mark.parametrize(("dual_mean", "fraction"), [("participants", 1.0), ("all", 1.0), ("all", 0.67)])
def test_fedspeed_without_sam_is_exact(dual_mean: str, fraction: float) -> None:
    problem = few()
    plan = plans.fedspeed(5, rho=0.0, weight=1.0, dual_mean=dual_mean, fraction=fraction)  # type: ignore[arg-type]
    sim = problem.simulate(plan, 0.1).run(1200)
    close(sim.stacked(), problem.optimum().expand(3, 5), 1e-5)
    for rank, engine in enumerate(sim.engines):
        dual = engine.corrections[0].h[0]  # type: ignore[attr-defined]
        close(dual, problem.gradient(rank, problem.optimum()), 1e-4)


def test_both_means_of_the_duals_are_one_if_everybody_takes_part() -> None:
    a, b = (run(p2(), plans.fedspeed(4, 0.0, 0.3, which), 40, 0.05) for which in ("participants", "all"))  # type: ignore[arg-type]
    close(a, b)


def test_a_round_of_fedspeed_by_hand() -> None:
    """Two steps of ``g - d + (x - w) / lambda``, ``d <- d - (x - w) / lambda``, send ``x - lambda d``, twice."""
    problem, weight, lr = p1(), 0.4, 0.1
    w, d = torch.zeros(1).double(), torch.zeros(4, 1).double()
    for _ in range(2):
        sent = []
        for i in range(4):
            x = w.clone()
            for _ in range(2):
                x = x - lr * (problem.gradient(i, x) - d[i] + weight * (x - w))
            d[i] -= weight * (x - w)
            sent.append(x - d[i] / weight)
        w = torch.stack(sent).mean(0)
    close(run(problem, plans.fedspeed(2, 0.0, weight), 4, lr), w.expand(4, 1))


def test_a_weak_proximal_term_leaves_the_bias_of_fedavg() -> None:
    weak = run(p1(), plans.fedspeed(5, 0.0, 1e-6), 1000, 0.04)
    close(weak, run(p1(), plans.fedavg(5), 1000, 0.04), 1e-4)
    assert float((weak - 3).abs().max()) > 0.05


def test_admm_is_exact_and_its_multipliers_cancel() -> None:
    problem = few()
    sim = problem.simulate(plans.fed_admm(5, 1.0), 0.1)
    for _ in range(5):
        multipliers = torch.stack([e.corrections[0].u[0] for e in sim.run(5).engines])  # type: ignore[attr-defined]
        close(multipliers.sum(0), torch.zeros(5).double())
    close(sim.run(1200).stacked(), problem.optimum().expand(3, 5), 1e-5)
    with pytest.raises(ValueError, match="ConsensusADMM: multipliers of absent ranks"):
        Plan([Sync(Every(2), signal="delta", peers=Sample(0.5))], plans.fed_admm().corrections)


# ---------------------------------------------------------------------- ProxSkip, games


def test_proxskip_is_exact_and_its_shifts_cancel() -> None:
    problem = few()
    sim = problem.simulate(plans.proxskip(0.2, seed=3), 0.1)
    for _ in range(40):
        sim.run(1)
        shifts = torch.stack([e.corrections[0].h[0] for e in sim.engines])  # type: ignore[attr-defined]
        close(shifts.sum(0), torch.zeros(5).double())
    close(sim.run(1200).stacked(), problem.optimum().expand(3, 5), 1e-6)
    assert 0.1 < sim.engines[0].runners[0].rounds / 1240 < 0.3


def test_proxskip_with_a_certain_coin_is_sgd_on_the_mean_gradient() -> None:
    plan = Plan([Sync(signal="value")], plans.proxskip(1.0).corrections)
    close(run(p2(), plan, 30), p2().centralized(30, 0.1)[-1].expand(8, 5))
    close(run(p2(), plans.proxskip(1.0), 30), p2().centralized(30, 0.1)[-1].expand(8, 5))


def test_proxskip_with_an_l1_norm_finds_the_sparse_optimum() -> None:
    """Compared with the proximal gradient method on the mean loss."""
    problem, l1 = few(), 0.1
    x = torch.zeros(5, dtype=torch.float64)
    for _ in range(3000):
        x = x - 0.1 * torch.stack([problem.gradient(i, x) for i in range(3)]).mean(0)
        x = x.sign() * (x.abs() - 0.1 * l1).clamp(min=0)
    assert 0 < int((x == 0).sum()) < 5
    sim = problem.simulate(plans.proxskip(0.3, l1=l1), 0.1).run(1500)
    while not sim.engines[0].plan.syncs[0].when.due(sim.engines[0].step):
        sim.run(1)  # at a sync all hold the sparse point
    close(sim.stacked(), x.expand(3, 5), 1e-6)


def game(rank: int, parameters: dict[str, Tensor], step: int) -> None:
    """``f_i(x, y) = x^2 / 2 + a_i x y - y^2 / 2 + b_i x + c_i y``."""
    x, y = parameters["x"].detach(), parameters["y"].detach()
    a, b, c = ((1.0, 0.5, -1.0), (2.5, -1.0, 0.3), (0.2, 2.0, 2.0))[rank]
    parameters["x"].grad, parameters["y"].grad = x + a * y + b, a * x - y + c


def played(plan: Plan, steps: int) -> tuple[Tensor, Tensor]:
    start = {"x": torch.zeros(1, dtype=torch.float64), "y": torch.zeros(1, dtype=torch.float64)}
    sim = Simulation(plan, 3, lambda rank: start, game, sgd(0.05)).run(steps)
    return sim.stacked("x"), sim.stacked("y")


def test_games_are_solved_exactly_with_proxskip_and_not_by_local_descent_ascent() -> None:
    a, b, c = 3.7 / 3, 1.5 / 3, 1.3 / 3  # x + a y + b = 0, a x - y + c = 0
    y = (c - a * b) / (1 + a * a)
    x = -a * y - b
    for plan in (plans.proxskip(0.2, maximise="y"), plans.local_gda("y", 1)):
        xs, ys = played(plan, 1500)
        close(xs, torch.full((3, 1), x, dtype=torch.float64), 1e-6)
        close(ys, torch.full((3, 1), y, dtype=torch.float64), 1e-6)
    xs, ys = played(plans.local_gda("y", 10), 1500)
    assert float((xs - x).abs().max()) + float((ys - y).abs().max()) > 0.01


# ---------------------------------------------------------------------- all together


COMPOSED = {
    "sampled, packed, yogi": plans.fedavg(2, 0.5, codec=Int8(), outer=FedYogi(0.05)),
    "sampled prox": plans.fedprox(2, 0.3, 0.5, [1, 2, 3, 4]),
    "scaffold I": scaffold(2, "I", fraction=0.5),
    "scaffold mean": scaffold(3, "mean", fraction=0.5),
    "scaffold II": scaffold(2, "II", 0.5, 0.5, [4, 3, 2, 1]),
    "scallion": plans.scallion(RandK(0.25), 2, fraction=0.5),
    "scafcom and yogi": Plan(
        [Sync(Every(2), signal="delta", codec=TopK(0.2), peers=Sample(0.5), outer=FedYogi(0.01))], [Scaffold(beta=0.3)]
    ),
    "fedspeed": plans.fedspeed(2, 0.0, dual_mean="all", fraction=0.5),
    "admm": plans.fed_admm(2),
    "proxskip": plans.proxskip(0.4),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_a_run_resumed_at_any_step_is_the_same(name: str) -> None:
    def simulation() -> Simulation:
        return mosaic_simulation(COMPOSED[name], 4, sgd(0.05))

    steps = 7
    reference, going, files = simulation().run(steps).finish(), simulation(), []
    for _ in range(steps):
        files.append(save(going))
        going.run(1)
    assert_same(going.finish(), reference)
    for step, data in enumerate(files):
        assert_same(load(simulation(), data).run(steps - step).finish(), reference)


@pytest.mark.parametrize("name", [n for n in COMPOSED if n != "proxskip"])
def test_after_a_round_all_ranks_are_bit_equal(name: str) -> None:
    """And so are the anchors; whoever took part."""
    every = COMPOSED[name].syncs[0].when.n  # type: ignore[attr-defined]
    sim = mosaic_simulation(COMPOSED[name], 4, sgd(0.05))
    for _ in range(5):
        sim.run(every)
        for key in sim.replicas[0]:
            rows = sim.stacked(key)
            assert all(torch.equal(row, rows[0]) for row in rows)


@pytest.mark.parametrize("name", ["sampled prox", "scaffold I", "scallion", "fedspeed"])
def test_corrections_of_a_rank_that_is_not_drawn_wait(name: str) -> None:
    sim = mosaic_simulation(COMPOSED[name], 4, sgd(0.05))
    peers = COMPOSED[name].syncs[0].peers
    own = {"sampled prox": (), "scaffold I": ("own",), "scallion": ("own",), "fedspeed": ("h",)}[name]
    for round_ in range(6):
        before = [{k: t.clone() for k, t in e.corrections[0].state().items()} for e in sim.engines]
        sim.run(2)
        for rank, engine in enumerate(sim.engines):
            for k, t in engine.corrections[0].state().items():
                if k.rstrip("0123456789") in own:
                    assert torch.equal(t, before[rank][k]) != peers.speaks(4, rank, round_)


def test_schedules_and_peers_of_both_messages_must_match() -> None:
    one = Sync(Every(2), signal="delta", peers=Sample(0.5))
    for other in (Sync(Every(2), "tracker"), Sync(Every(3), "tracker", peers=Sample(0.5))):
        with pytest.raises(ValueError, match="ControlVariate: needs one sync of what='tracker'"):
            Plan([one, other], [ControlVariate()])
    with pytest.raises(ValueError, match="after that of the parameters"):
        Plan([Sync(Every(2), "tracker", peers=Sample(0.5)), one], [ControlVariate()])


# ---------------------------------------------------------------------- personal models


def personal_net(alpha: float, learn: bool) -> Personal:
    torch.manual_seed(3)
    return Personal(torch.nn.Linear(3, 1, dtype=torch.float64), alpha, learn)


def squared(x: Tensor, y: Tensor) -> Callable[[Callable[..., Tensor]], Tensor]:
    return lambda net: (net(x) - y).square().mean()


def test_gradients_of_a_personal_model() -> None:
    """``grad f(w)`` for the shared, ``alpha grad f(u)`` for the personal copy, ``<grad f(u), v - w> + 0.02 alpha`` for alpha."""
    net, (x, y) = personal_net(0.3, True), (torch.randn(8, 3).double(), torch.randn(8, 1).double())
    with torch.no_grad():
        net.personal.weight.add_(0.5)  # type: ignore[union-attr, operator]
    net.loss(squared(x, y)).backward()

    def gradient(weight: Tensor, bias: Tensor) -> Tensor:
        return 2 * (x @ weight.T + bias - y).T @ x / 8

    w, v, b = (p.detach() for p in (net.shared.weight, net.personal.weight, net.shared.bias))  # type: ignore[union-attr]
    at_u = gradient(0.3 * v + 0.7 * w, b)
    close(net.shared.weight.grad, gradient(w, b), 1e-6)  # type: ignore[arg-type, union-attr]
    close(net.personal.weight.grad, 0.3 * at_u, 1e-6)  # type: ignore[arg-type, union-attr]
    close(net.alpha.grad.double(), (at_u * (v - w)).sum() + 0.02 * 0.3, 1e-6)  # type: ignore[union-attr]


def personal_run(alpha: float, learn: bool, plan: Plan) -> tuple[Simulation, list[Personal]]:
    """Three ranks with unlike least squares problems."""
    nets = [personal_net(alpha, learn) for _ in range(3)]
    data = []
    for rank in range(3):
        g = torch.Generator().manual_seed(rank)
        x = torch.randn(16, 3, generator=g, dtype=torch.float64)
        data.append((x, x @ torch.randn(3, 1, generator=g, dtype=torch.float64)))

    def train(rank: int, parameters: dict[str, Tensor], step: int) -> None:
        names = dict(nets[rank].named_parameters())
        for name, p in parameters.items():
            names[name].data = p.data
            names[name].grad = None
        nets[rank].loss(squared(*data[rank])).backward()
        for name, p in parameters.items():
            p.grad = names[name].grad

    sim = Simulation(plan, 3, lambda rank: {n: p.data for n, p in nets[rank].named_parameters()}, train, sgd(0.05))
    return sim.run(40), nets


def test_personal_models_stay_and_shared_ones_are_fedavg() -> None:
    plan = plans.apfl("shared.*", 4)
    sim, nets = personal_run(0.5, True, plan)
    for net in nets:  # each forward pass brings it back
        net(torch.zeros(1, 3).double())
        assert 0.0 <= net.alpha.item() <= 1.0
    shared, personal = sim.stacked("shared.weight"), sim.stacked("personal.weight")
    assert torch.equal(shared[0], shared[1])
    assert float((personal[0] - personal[1]).abs().max()) > 1e-2
    assert sim.bytes == [10 * 43] * 3  # rounds of a ring sum of three weights and a bias, 2 * 2 * 32 / 3 bytes
    alone, _ = personal_run(0.0, False, plan)  # nothing of the personal model reaches the shared one
    close(alone.stacked("shared.weight"), shared)
    only, _ = personal_run(1.0, False, plan)
    none, _ = personal_run(1.0, False, Plan())
    close(only.stacked("personal.weight"), none.stacked("personal.weight"))


def test_the_shares_of_a_personal_model() -> None:
    x = torch.randn(5, 3).double()
    for alpha, which in ((0.0, "shared"), (1.0, "personal")):
        net = personal_net(alpha, False)
        with torch.no_grad():
            net.personal.weight.mul_(-2.0)  # type: ignore[union-attr, operator]
        close(net(x), getattr(net, which)(x))
    with pytest.raises(ValueError, match="may be called 'shared'"):
        Personal(torch.nn.ModuleDict({"shared": torch.nn.Linear(1, 1)}))


def test_noise_that_all_hear_alike_does_not_add_up_in_the_multipliers() -> None:
    """Noisy messages, one noisy mean for all: the error after 400 rounds is what it was after 60."""
    problem = p2()
    plan = Plan([Sync(Every(5), signal="delta", codec=GaussianNoise(0.01))], [ConsensusADMM(1.0)])
    sim, best, errors = problem.simulate(plan, 0.1), problem.optimum(), []
    for rounds in (60, 300):
        sim.run(5 * rounds)
        near = [float((sim.run(5).stacked().mean(0) - best).norm()) for _ in range(60)]
        errors.append(sum(near) / len(near))
        multipliers = torch.stack([engine.corrections[0].state()["u0"] for engine in sim.engines])
        assert float(multipliers.sum(0).norm()) < 8 * 0.01 * 5**0.5 * 3
    assert 0.003 < errors[0] < 0.02
    assert errors[1] < 1.3 * errors[0]
