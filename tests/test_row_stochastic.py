"""Ranks of unequal weight: row-stochastic mixing that keeps their weighted mean, and weighted losses beside it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import row_vs_doubly
from lightning_dopt import Complete, Plan, Ring, Simulation, Star, Sync, cli
from lightning_dopt.local import ExactDiffusion, GradientTracking, LossWeights
from lightning_dopt.local.loss_weights import warn_if_scale_free
from lightning_dopt.topology import (
    Chain,
    DirectedRing,
    ErdosRenyi,
    FromAdjacency,
    Grid,
    Lazy,
    NodeWeighted,
    UndirectedGraph,
    WeightedMean,
    consensus_rate,
    weighted_report,
)
from lightning_dopt.topology import weighted_space as space
from recipes import row_stochastic as recipe
from recipes.row_stochastic import __main__ as recipe_main
from recipes.row_stochastic.strategies import cases, matched, random_shares
from tests.problems import Quadratics, adam, momentum_sgd, p1, p2, sgd

TENTHS = [0.1, 0.2, 0.3, 0.4]
GRAPHS: list[tuple[UndirectedGraph, int]] = [
    (Star(), 16),
    (Star(), 2),
    (Ring(), 4),
    (Ring(hops=2), 9),
    (Grid(), 6),
    (Chain(), 5),
    (ErdosRenyi(0.3), 16),
]
RULES = ["metropolis", "paper"]

graphs = pytest.mark.parametrize(("graph", "n"), GRAPHS, ids=lambda v: repr(v)[:24])
rules = pytest.mark.parametrize("rule", RULES)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0.0, atol=tolerance)


def tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def profiles(graph: UndirectedGraph, n: int) -> list[list[float]]:
    return [[1 / n] * n, matched(graph, n), random_shares(n, 3), random_shares(n, 4)]


def still(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def mixed(topology: NodeWeighted | WeightedMean | UndirectedGraph, x: Tensor, rounds: int = 1) -> Tensor:
    """What the engine makes of values that nobody trains."""

    def backward(rank: int, parameters: dict[str, Tensor], step: int) -> None:
        parameters["x"].grad = torch.zeros_like(parameters["x"])

    plan = Plan([Sync(peers=topology)])
    return Simulation(plan, len(x), lambda rank: {"x": x[rank]}, backward, sgd(0.1)).run(rounds).stacked()


# ---------------------------------------------------------------------- the matrices


@rules
@graphs
def test_rows_are_convex_and_local(graph: UndirectedGraph, n: int, rule: str) -> None:
    for shares in profiles(graph, n):
        w = NodeWeighted(graph, shares, rule=rule).matrix(n)
        close(w.sum(1), torch.ones(n, dtype=torch.float64))
        assert bool((w >= 0).all())
        links = torch.tensor([[i == j or j in graph.adjacent(n, i) for j in range(n)] for i in range(n)])
        assert bool((w[~links] == 0).all())
        assert bool((w[links & ~torch.eye(n, dtype=torch.bool)] > 0).all())
        own = tensor([0.1 if rule == "paper" else 1 / (1 + graph.degree(n, i)) for i in range(n)])
        assert bool((w.diagonal() >= own - 1e-12).all())


@rules
@graphs
def test_the_weighted_mean_is_kept(graph: UndirectedGraph, n: int, rule: str) -> None:
    x = still(n, torch.float32)
    for shares in profiles(graph, n):
        peers, lam = NodeWeighted(graph, shares, rule=rule), tensor(shares)
        close(lam @ peers.matrix(n), lam)
        close(tensor(peers.stationary(n)), lam)
        after = mixed(peers, x)
        close(lam @ after.double(), lam @ x.double(), 1e-6)
        if max(shares) - min(shares) > 0.01:
            assert float((after - x).mean(0).abs().max()) > 1e-3  # the plain mean is not
    close(mixed(graph, x).mean(0), x.mean(0), 1e-6)


@rules
@graphs
def test_detailed_balance(graph: UndirectedGraph, n: int, rule: str) -> None:
    x, y = still(n), still(n).flip(0)
    for shares in profiles(graph, n):
        peers, doubly = NodeWeighted(graph, shares, rule=rule), graph.matrix(n)
        w = peers.matrix(n)
        assert space.self_adjoint_residual(w, shares) <= 1e-12
        assert space.is_self_adjoint(w, shares)
        assert peers.reversible(n)
        uniform = max(shares) - min(shares) < 1e-12
        assert (space.self_adjoint_residual(doubly, shares) > 1e-3) is not uniform
        assert peers.symmetric(n) is peers.doubly_stochastic(n) is uniform
        close(space.adjoint(w, shares), w)
        across = space.inner(doubly @ x, y, shares) - space.inner(x, space.adjoint(doubly, shares) @ y, shares)
        assert abs(across) < 1e-12


def test_the_ring_of_four_is_the_worked_example() -> None:
    w = NodeWeighted(Ring(), TENTHS).matrix(4)
    rows = [[1 / 3, 1 / 3, 0, 1 / 3], [1 / 6, 1 / 2, 1 / 3, 0], [0, 2 / 9, 4 / 9, 1 / 3], [1 / 12, 0, 1 / 4, 2 / 3]]
    close(w, tensor(rows))  # type: ignore[arg-type]
    eigenvalues = torch.linalg.eigvals(w).real.sort(descending=True).values
    close(eigenvalues, tensor([1.0, 0.590823, 0.367824, -0.014202]), 1e-6)
    close(torch.linalg.matrix_power(w, 200), tensor(TENTHS).expand(4, 4))
    assert space.weighted_rate(w, TENTHS) == pytest.approx(0.590823, abs=1e-6)


def test_special_cases() -> None:
    for graph, n in GRAPHS:
        d = tensor([float(graph.degree(n, i)) for i in range(n)])
        adjacency = tensor([[float(j in graph.adjacent(n, i)) for j in range(n)] for i in range(n)])  # type: ignore[misc]
        walk = 0.8 * adjacency / d[:, None] + 0.2 * torch.eye(n, dtype=torch.float64)
        close(NodeWeighted(graph, matched(graph, n), rule="paper", laziness=0.2).matrix(n), walk)
        equal = NodeWeighted(graph, [1 / n] * n, rule="paper").matrix(n)
        off = 0.9 * adjacency / torch.maximum(d[:, None], d)
        close(equal, off + torch.diag(1 - off.sum(1)))
        assert NodeWeighted(graph, [1 / n] * n).matrix(n).equal(graph.matrix(n))  # bit by bit
        assert n == 2 or not equal.allclose(graph.matrix(n))
    everybody = FromAdjacency([[j for j in range(8) if j != i] for i in range(8)])
    shares = random_shares(8, 0)
    ideal = WeightedMean(shares).matrix(8)
    assert float((NodeWeighted(everybody, shares, rule="paper").matrix(8) - ideal).abs().max()) > 0.1
    assert space.weighted_rate(ideal, shares) < 1e-12
    assert NodeWeighted(everybody, [1 / 8] * 8).is_mean(8)
    assert not NodeWeighted(everybody, shares).is_mean(8)
    assert WeightedMean([0.25] * 4).is_mean(4)
    assert not WeightedMean(TENTHS).is_mean(4)


def test_the_weighted_mean_takes_one_round() -> None:
    x = still(4)
    close(mixed(WeightedMean(TENTHS), x), (tensor(TENTHS) @ x).expand(4, 7))
    close(mixed(WeightedMean(counts=[1, 2, 3, 4]), x), (tensor(TENTHS) @ x).expand(4, 7))


def test_only_ratios_count() -> None:
    expected = NodeWeighted(Star(), TENTHS).matrix(4)
    for scale in (1, 10, 37):
        close(NodeWeighted(Star(), counts=[scale * k for k in (1, 2, 3, 4)]).matrix(4), expected)
        counts = [scale * k for k in (1, 2, 3, 4)]
        one = p1().simulate(Plan([], [LossWeights(counts=counts)]), 0.1).run(1).stacked()
        close(one, p1().simulate(Plan([], [LossWeights(TENTHS)]), 0.1).run(1).stacked())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NodeWeighted(Star()), "NodeWeighted: give either shares (positive, summing to 1) or counts"),
        (lambda: NodeWeighted(Star(), [0.5, 0.5], [1, 1]), "NodeWeighted: give either shares"),
        (
            lambda: NodeWeighted(Star(), [0.5, 0.6]),
            "NodeWeighted(shares=...): sum to 1.1, must sum to 1; divide them by",
        ),
        (lambda: NodeWeighted(Star(), [1.0, 0.0]), "NodeWeighted(shares[1]=0.0): must be a number in (0, inf)"),
        (lambda: NodeWeighted(Star(), counts=[3, 0]), "NodeWeighted(counts[1]=0): must be an integer of at least 1"),
        (lambda: NodeWeighted(Star(), counts=[3, 1.5]), "NodeWeighted(counts[1]=1.5)"),
        (lambda: NodeWeighted(Star(), []), "NodeWeighted(shares=[]): must have one share for every rank"),
        (lambda: NodeWeighted(Star(), counts=[]), "NodeWeighted(counts=[])"),
        (lambda: NodeWeighted(Star(), [0.5, 0.5]).check(3), "NodeWeighted(shares=...): has 2 numbers for 3 workers"),
        (lambda: WeightedMean(counts=[1, 2]).check(3), "WeightedMean(counts=...): has 2 numbers for 3 workers"),
        (lambda: NodeWeighted(Complete(), TENTHS), "where everybody hears everybody, use WeightedMean"),
        (lambda: NodeWeighted(DirectedRing(), TENTHS), "must be a fixed undirected graph"),
        (lambda: NodeWeighted(Star(weights="lazy"), TENTHS), "weights of the graph have no effect here"),
        (
            lambda: NodeWeighted(Star(), TENTHS, rule="mh"),
            "NodeWeighted(rule='mh'): must be one of 'metropolis', 'paper'",
        ),
        (
            lambda: NodeWeighted(Star(), TENTHS, laziness=0.1),
            "NodeWeighted(laziness=0.1): has an effect with rule='paper'",
        ),
        (lambda: NodeWeighted(Star(), TENTHS, rule="paper", laziness=1.0), "must be a number in (0, 1)"),
        (lambda: space.node_weights([1.0, -1.0]), "must be one positive number per rank"),
        (lambda: space.transient_prefactor(torch.eye(2), [1.0, 1.0], 0), "transient_prefactor(t=0)"),
    ],
)
def test_refusals(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^[^\n]*{re.escape(message)}[^\n]*$"):
        make()


def test_parts_compare_and_print() -> None:
    peers = NodeWeighted(Ring(), counts=[1, 2, 3], rule="paper")
    assert repr(peers) == "NodeWeighted(graph=Ring(), counts=[1, 2, 3], rule='paper')"
    assert eval(repr(peers)) == peers != NodeWeighted(Ring(), counts=[1, 2, 4], rule="paper")
    assert eval(repr(LossWeights(TENTHS))) == LossWeights(TENTHS)


# ---------------------------------------------------------------------- the geometry


def test_norms_are_those_of_the_definitions() -> None:
    lam = tensor([0.4, 0.8, 1.2, 1.6])  # sums to four
    x, m = still(4), NodeWeighted(Star(), [0.25] * 4).matrix(4) + 0.1
    assert space.norm(x, TENTHS) ** 2 == pytest.approx(float((lam * x.square().sum(1)).sum()))
    gains = [space.norm(m @ v, TENTHS) / space.norm(v, TENTHS) for v in torch.randn(2000, 4, 1, dtype=torch.float64)]
    top = space.operator_norm(m, TENTHS)
    assert max(gains) <= top + 1e-12
    assert max(gains) > 0.98 * top
    assert space.kappa(TENTHS) == 2.0
    assert space.penalties(TENTHS) == space.Penalties(2.0, 1.6**0.5, 1.6)
    assert space.degree_match([3, 1, 1, 1], [3, 1, 1, 1]) == 1.0
    assert space.degree_match([3, 1, 1, 1], [1, 1, 1, 2]) == pytest.approx(1 / 6)


@rules
@graphs
def test_powers_decay_without_a_prefactor_in_the_weighted_norm(graph: UndirectedGraph, n: int, rule: str) -> None:
    for shares in profiles(graph, n):
        w, doubly = NodeWeighted(graph, shares, rule=rule).matrix(n), graph.matrix(n)
        rate, kappa = space.weighted_rate(w, shares), space.kappa(shares)
        assert rate < 1
        for t in (1, 2, 7, 50):
            if rate > 1e-9:
                power = torch.linalg.matrix_power(w - tensor(shares), t)
                assert space.operator_norm(power, shares) / rate**t == pytest.approx(1, abs=1e-9)
                assert space.transient_prefactor(w, shares, t) == pytest.approx(1, abs=1e-9)
            assert 1 - 1e-9 <= space.transient_prefactor(doubly, shares, t) <= kappa + 1e-9


def test_doubly_stochastic_mixing_has_a_prefactor() -> None:
    """Measured in the engine from the start that shows it: disagreement exceeds the rate's power, and may even grow."""
    shares, doubly, t = random_shares(16, 2), Star().matrix(16), 5
    rate = consensus_rate(doubly)
    prefactor = space.transient_prefactor(doubly, shares, t)
    assert 1.05 < prefactor < space.kappa(shares)
    x = space.worst_start(doubly, shares, t)[:, None]
    apart = mixed(Star(), x, t) - x.mean(0)
    assert space.norm(apart, shares) / rate**t == pytest.approx(prefactor * space.norm(x, shares), abs=1e-9)
    assert space.operator_norm(doubly - 1 / 16, shares) > rate
    growing = [s for s in range(40) if space.operator_norm(doubly - 1 / 16, random_shares(16, s)) > 1]
    assert growing  # a round that shrinks plain disagreement to 15/16 can enlarge the weighted one

    peers = NodeWeighted(Star(), shares)
    x = space.worst_start(peers.matrix(16), shares, t)[:, None]
    apart = mixed(peers, x, t) - tensor(shares) @ x
    assert space.norm(apart, shares) == pytest.approx(space.weighted_rate(peers.matrix(16), shares) ** t, abs=1e-9)


def test_the_report_has_the_published_rates() -> None:
    star = weighted_report(Star(), 16, matched(Star(), 16), "paper")
    assert (star.weighted_rate, star.plain_rate) == pytest.approx((0.8, 0.9375))
    assert star.kappa == pytest.approx(15**0.5)
    assert star.degree_match == pytest.approx(1.0)
    assert star.weighted_lambda_min == pytest.approx(-0.8)
    assert (star.bounds.left, star.bounds.right) == pytest.approx((0.2, 1.0018 * 15 ** (-1 / 6) / 16))
    assert star.bounds.holds
    ring = weighted_report(Ring(), 16, [1.0] * 16, "paper")
    assert ring.weighted_rate == pytest.approx(0.9315, abs=5e-5)
    assert ring.plain_prefactor == pytest.approx(1.0)
    assert star.weights == pytest.approx([8.0] + [8 / 15] * 15)


@pytest.mark.parametrize("n", [10, 20, 50])
def test_theorem_7_1_holds_where_degrees_follow_weights(n: int) -> None:
    for graph in (Star(), ErdosRenyi(0.3)):
        found = weighted_report(graph, n, matched(graph, n), "paper")
        assert found.bounds.holds
        assert found.weighted_rate < found.plain_rate


@rules
@graphs
def test_the_gap_bound_is_a_bound(graph: UndirectedGraph, n: int, rule: str) -> None:
    doubly = graph.matrix(n)
    for shares in profiles(graph, n):
        w, lam = NodeWeighted(graph, shares, rule=rule).matrix(n), n * tensor(shares)
        bound = space.gap_bound(w, doubly, shares)
        second = torch.linalg.eigvals(w).real.sort(descending=True).values[1]
        assert 0 < bound <= float(1 - second) + 1e-12
        edges = (doubly > 0) & ~torch.eye(n, dtype=torch.bool)
        tau = float((lam[:, None] * w / doubly)[edges].min())
        plain = torch.linalg.eigvalsh(doubly)[-2]
        assert bound >= tau / float(lam.max()) * float(1 - plain) - 1e-12  # edge by edge is cruder


def test_recommendations_speak_of_bounds() -> None:
    assert weighted_report(Ring(), 5, [1.0] * 5).recommendation.startswith("Weights are equal: ")
    star = weighted_report(Star(), 16, matched(Star(), 16)).recommendation
    assert star.startswith("Weighted mixing (II) has the better bound")
    assert "not runs" in star
    ring = weighted_report(Ring(), 4, TENTHS).recommendation
    assert "No bound favours weighted mixing (II) (Theorem 7.1: gap 0.409 against 0.53)" in ring
    assert "with Adam or clipping only II keeps the weights" in ring


# ---------------------------------------------------------------------- the dynamics

MIXING = Plan([Sync(peers=NodeWeighted(Ring(), TENTHS))])
LOSSES = Plan([Sync(peers=Ring())], [LossWeights(TENTHS)])


def adamw(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1)


def by_hand(problem: Quadratics, w: Tensor, factors: Tensor, make: Callable, steps: int) -> Tensor:
    """Own optimizers on every rank, then a product with the matrix."""
    xs = [torch.zeros(problem.d, dtype=torch.float64, requires_grad=True) for _ in range(problem.n)]
    optimizers = [make([x]) for x in xs]
    for _ in range(steps):
        for i, (x, optimizer) in enumerate(zip(xs, optimizers, strict=True)):
            x.grad = factors[i] * problem.gradient(i, x.detach())
            optimizer.step()
        mixed = w @ torch.stack([x.detach() for x in xs])
        for x, new in zip(xs, mixed, strict=True):
            x.data.copy_(new)
    return torch.stack([x.detach() for x in xs])


@pytest.mark.parametrize("make", [sgd(0.05), momentum_sgd, adamw], ids=["sgd", "momentum", "adamw"])
def test_both_strategies_follow_their_recursion(make: Callable) -> None:
    ones, factors = torch.ones(4), 4 * tensor(TENTHS)
    weighted, doubly = NodeWeighted(Ring(), TENTHS).matrix(4), Ring().matrix(4)
    close(p1().simulate(MIXING, make).run(25).stacked(), by_hand(p1(), weighted, ones, make, 25))
    close(p1().simulate(LOSSES, make).run(25).stacked(), by_hand(p1(), doubly, factors, make, 25))


def test_fixed_points_on_the_scalar_problem() -> None:
    lam = tensor(TENTHS)
    mixing = p1().simulate(MIXING, 0.05).run(400).stacked()
    close(mixing.squeeze(), tensor([3.205329, 3.083911, 3.283438, 3.431755]), 2e-6)
    assert float(lam @ mixing) == pytest.approx(3.295049, abs=2e-6)
    losses = p1().simulate(LOSSES, 0.05).run(400).stacked()
    close(losses.squeeze(), tensor([3.324174, 3.220696, 3.31873, 3.37028]), 2e-6)


def fixed_point(problem: Quadratics, w: Tensor, factors: Tensor, lr: float) -> Tensor:
    """``x = W (x - lr factors (A x - A c))``, solved for scalar problems; shape (n,)."""
    a, c = problem.A.flatten() * factors, problem.c.flatten()
    one = torch.eye(len(a), dtype=torch.float64)
    return torch.linalg.solve(one - w @ torch.diag(1 - lr * a), lr * w @ (a * c))


def test_bias_is_linear_in_the_learning_rate() -> None:
    w, doubly, one = NodeWeighted(Ring(), TENTHS).matrix(4), Ring().matrix(4), torch.ones(4)
    close(p1().simulate(MIXING, 0.05).run(400).stacked().squeeze(), fixed_point(p1(), w, one, 0.05), 1e-10)
    for matrix, factors in ((w, one), (doubly, 4 * tensor(TENTHS))):
        errors = [float((fixed_point(p1(), matrix, factors, lr) - 10 / 3).abs().max()) for lr in (1e-3, 5e-4, 2.5e-4)]
        assert errors[0] / errors[1] == pytest.approx(2, abs=0.02)
        assert errors[1] / errors[2] == pytest.approx(2, abs=0.01)
        assert errors[2] < 2e-3


def test_weighted_mixing_has_less_bias_on_the_degree_matched_star() -> None:
    n, shares = 8, matched(Star(), 8)
    g = torch.Generator().manual_seed(0)
    problem = Quadratics(1 + torch.rand(n, 1, 1, generator=g), torch.randn(n, 1, generator=g))
    lam = tensor(shares)
    best = float((lam * problem.A.flatten() * problem.c.flatten()).sum() / (lam * problem.A.flatten()).sum())

    def error(plan: Plan) -> float:
        return float((lam * (problem.simulate(plan, 0.05).run(250).stacked().squeeze() - best).square()).sum())

    mixing = error(Plan([Sync(peers=NodeWeighted(Star(), shares, rule="paper"))]))
    losses = error(Plan([Sync(peers=Star())], [LossWeights(shares)]))
    assert mixing < losses / 3


def state(sim: Simulation, name: str) -> Tensor:
    return torch.stack([engine.corrections[-1].state()[name] for engine in sim.engines])


@rules
def test_exact_methods_reach_the_weighted_optimum(rule: str) -> None:
    """Over weighted mixing, and over weighted losses: 10/3 on every rank, without bias."""
    peers, lam, best = NodeWeighted(Ring(), TENTHS, rule=rule), tensor(TENTHS), torch.full((4, 1), 10 / 3)
    tracking = p1().simulate(Plan([Sync(what="gradients", peers=peers), Sync(peers=peers)], [GradientTracking()]), 0.05)
    for _ in range(5):
        x = tracking.stacked()
        gradients = torch.stack([p1().gradient(i, x[i]) for i in range(4)])
        y = state(tracking.run(1), "y.x")
        close(lam @ y, lam @ gradients)
    diffusion = p1().simulate(Plan([Sync(peers=Lazy(peers))], [ExactDiffusion()]), 0.05)
    for _ in range(5):
        close(lam @ state(diffusion.run(1), "h0"), torch.zeros(1, dtype=torch.float64))
    close(tracking.run(300).stacked(), best.double(), 1e-6)
    close(diffusion.run(300).stacked(), best.double(), 1e-6)
    losses = Plan([Sync(peers=Lazy(Ring()))], [LossWeights(TENTHS), ExactDiffusion()])
    close(p1().simulate(losses, 0.05).run(300).stacked(), best.double(), 1e-6)


@pytest.mark.parametrize("make", [sgd(0.05), momentum_sgd, adamw], ids=["sgd", "momentum", "adamw"])
@rules
def test_strategies_coincide_for_equal_weights_over_the_same_matrix(rule: str, make: Callable) -> None:
    peers = NodeWeighted(Star(), [1 / 8] * 8, rule=rule)
    mixing = p2().simulate(Plan([Sync(peers=peers)]), make).run(20).stacked()
    losses = p2().simulate(Plan([Sync(peers=peers)], [LossWeights([1 / 8] * 8)]), make).run(20).stacked()
    assert mixing.equal(losses)
    assert (rule == "metropolis") is mixing.equal(p2().simulate(Plan([Sync(peers=Star())]), make).run(20).stacked())


@pytest.mark.parametrize("make", [sgd(0.05), momentum_sgd], ids=["sgd", "momentum"])
def test_the_exact_weighted_mean_is_centralized_training_of_the_weighted_loss(make: Callable) -> None:
    problem, shares = p2(), random_shares(8, 5)
    x = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = make([x])
    for _ in range(30):
        x.grad = sum(s * problem.gradient(i, x.detach()) for i, s in enumerate(shares))  # type: ignore[assignment]
        optimizer.step()
    after = problem.simulate(Plan([Sync(peers=WeightedMean(shares))]), make).run(30).stacked()
    close(after, x.detach().expand(8, 5))
    losses = problem.simulate(Plan([Sync(what="gradients")], [LossWeights(shares)]), make).run(30).stacked()
    close(losses, x.detach().expand(8, 5))


def with_adam(plan: Plan) -> float:
    """Where the mean of the replicas comes to rest; noise of one size outweighs all gradients and makes Adam fair."""

    def backward(rank: int, parameters: dict[str, Tensor], step: int) -> None:
        noise = 20.0 if (step + rank) % 2 else -20.0
        problem.backward(rank, parameters, step)
        parameters["x"].grad += noise

    problem = p1()
    start = torch.full((1,), 3.15, dtype=torch.float64)
    make = lambda ps: torch.optim.Adam(ps, lr=0.1, betas=(0.9, 0.99))  # noqa: E731
    sim = Simulation(plan, 4, lambda rank: {"x": start}, backward, make).run(280)
    path = torch.stack([sim.run(1).stacked().squeeze() for _ in range(20)])
    return float(path.mean(0) @ tensor(plan.means(4)))


def test_adam_loses_the_weights_of_the_losses_and_keeps_those_of_the_mixing() -> None:
    """On four ranks with minimum 3 of the plain loss and 10/3 of the weighted one."""
    mean, plain = WeightedMean(TENTHS), Plan([Sync(peers=Complete())])
    losses = Plan([Sync(peers=Complete())], [LossWeights(TENTHS)])
    assert with_adam(plain) == pytest.approx(3, abs=0.02)
    assert with_adam(losses) == pytest.approx(3, abs=0.02)
    assert with_adam(Plan([Sync(peers=mean)])) == pytest.approx(10 / 3, abs=0.02)
    exact = p1().simulate(losses, 0.02).run(500).stacked()
    assert float(exact.mean()) == pytest.approx(10 / 3, abs=0.02)  # SGD keeps them

    for step in (1, 50):  # to the last digits: Adam does the same with weights as without
        weighted, unweighted = (
            p1().simulate(plan, adam).run(step).stacked() for plan in (LOSSES, Plan([Sync(peers=Ring())]))
        )
        close(weighted, unweighted, 1e-6)


# ---------------------------------------------------------------------- weighted losses


def test_gradients_are_multiplied_once_and_only_where_they_are() -> None:
    seen: list[dict[str, Tensor]] = []

    class Watched(torch.optim.SGD):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            seen.append(
                {str(k): p.grad.clone() for k, p in enumerate(self.param_groups[0]["params"]) if p.grad is not None}
            )

    def backward(rank: int, parameters: dict[str, Tensor], step: int) -> None:
        parameters["a"].grad = torch.tensor([1.0, 2.0])

    init = {"a": torch.zeros(2), "frozen": torch.zeros(1)}
    plan = Plan([Sync(peers=Ring())], [LossWeights(counts=[1, 2, 3, 4])])
    Simulation(plan, 4, lambda rank: init, backward, lambda ps: Watched(ps, lr=0.1)).run(1)
    for count, gradients in zip((1, 2, 3, 4), seen, strict=True):
        close(gradients["0"], torch.tensor([1.0, 2.0]) * 0.4 * count, 1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LossWeights(), "LossWeights: give either shares"),
        (lambda: LossWeights([0.4, 0.4]), "LossWeights(shares=...): sum to 0.8"),
        (
            lambda: Plan([Sync()], [LossWeights([0.5, 0.5])]).check(3),
            "LossWeights(shares=...): has 2 numbers for 3 workers",
        ),
        (
            lambda: Plan([Sync(peers=WeightedMean(TENTHS))], [LossWeights(TENTHS)]).check(4),
            "LossWeights: WeightedMean(shares=[0.1, 0.2, 0.3, 0.4]) weighs ranks unequally already",
        ),
        (lambda: Plan([Sync()], [LossWeights(TENTHS), LossWeights(TENTHS)]), "LossWeights: given twice"),
        (
            lambda: Plan([Sync(what="gradients"), Sync()], [GradientTracking(), LossWeights(TENTHS)]),
            "LossWeights: must be the first correction",
        ),
    ],
)
def test_refused_weights_of_losses(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^[^\n]*{re.escape(message)}[^\n]*$"):
        make()


class Lion(torch.optim.Optimizer):
    def __init__(self, params: list[Tensor]) -> None:
        super().__init__(params, {"lr": 0.1})


def test_warnings_about_lost_weights() -> None:
    p = [torch.zeros(1, requires_grad=True)]

    class MyAdam(torch.optim.Adam):
        pass

    for optimizer in (torch.optim.Adam(p), torch.optim.AdamW(p), MyAdam(p), torch.optim.RMSprop(p), Lion(p)):
        told = warn_if_scale_free(optimizer)
        assert told is not None
        assert "divides by the size of its gradients" in told
        assert "NodeWeighted" in told
    plain = torch.optim.SGD(p, lr=0.1, momentum=0.9)
    assert warn_if_scale_free(plain) is None
    assert warn_if_scale_free(plain, 0.0) is None
    told = warn_if_scale_free(plain, 1.0)
    assert told is not None
    assert "clipping to 1 " in told


# ---------------------------------------------------------------------- recipe, benchmark, command line


def test_the_algebra_is_the_engine() -> None:
    problem = recipe.LeastSquares(6, seeds=2, steps=25)
    case = recipe.Case("grid", Grid(), random_shares(6, 1))
    lam = tensor(case.shares)
    for rule in RULES:
        outcome = recipe.compare(case, problem, rule)  # type: ignore[arg-type]
        w = NodeWeighted(Grid(), case.shares, rule=rule).matrix(6)
        close(outcome.mixing, recipe.recursion(problem, w, torch.ones(6), lam))
        close(outcome.losses, recipe.recursion(problem, Grid().matrix(6), 6 * lam, lam))


def test_orderings_of_the_two_strategies() -> None:
    """At least ten times less error on the degree-matched star, 1.5 times on random graphs, none for equal weights."""
    problem = recipe.LeastSquares(16, seeds=3, steps=300)
    star = row_vs_doubly.trial(problem, Star(), matched(Star(), 16), "paper")
    assert star.mixing < star.losses / 10
    assert star.foreseen
    random = row_vs_doubly.trial(problem, ErdosRenyi(0.3), matched(ErdosRenyi(0.3), 16), "paper")
    assert random.mixing < random.losses / 1.5
    assert random.foreseen
    ring = row_vs_doubly.trial(problem, Ring(), [1 / 16] * 16, "metropolis")
    assert ring.mixing == pytest.approx(ring.losses, rel=1e-12)


def test_the_recipe_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = recipe_main.main(["-n", "6", "--seeds", "1", "--steps", "8", "--format", "svg", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert [o.case.name for o in outcomes] == [c.name for c in cases(6)]
    for outcome in outcomes:
        assert outcome.case.name in printed
        assert f"{outcome.last[0]:.4f}" in printed
    equal = next(o for o in outcomes if o.case.name == "ring, equal")
    assert equal.losses.equal(equal.mixing)
    for name in ("errors", "penalties"):
        assert (tmp_path / f"{name}.svg").read_text().startswith("<?xml")


def test_the_benchmark_counts(capsys: pytest.CaptureFixture[str]) -> None:
    row_vs_doubly.main(["-n", "8", "--draws", "2", "--seeds", "1", "--steps", "120"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert re.search(r"star, by degree +1/1 +1/1 ", lines[1])


def dopt(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    cli.main(["topology", *words])
    return capsys.readouterr().out


def test_the_command_line_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = dopt(capsys, "star", "-n", "16", "--lambda", "degree", "--lambda-rule", "paper")
    assert re.search(r"own rate per round +0\.9375 +0\.8\n", text)
    assert "sqrt(max / min) = 3.873" in text
    assert "Weighted mixing (II) has the better bound (Theorem 7.1: gap 0.2 against 0.0399)" in text
    assert "Weights are equal" in dopt(capsys, "ring", "-n", "5", "--lambda", "uniform")
    (tmp_path / "counts.txt").write_text("10 20\n30, 40\n")
    shares = dopt(capsys, "ring", "-n", "4", "--lambda=0.1,0.2,0.3,0.4")
    assert re.search(r"own rate per round +0\.333333 +0\.590823\n", shares)
    assert dopt(capsys, "ring", "-n", "4", "--lambda", str(tmp_path / "counts.txt")) == shares
    assert dopt(capsys, "ring", "-n", "4", "--lambda", "1,2,3,4") == shares


@pytest.mark.parametrize(
    ("graph", "given", "message"),
    [
        ("ring", "1,2,3", "--lambda=1,2,3: has 3 numbers for 4 workers"),
        ("ring", "1,2,3,0", "--lambda=1,2,3,0: all numbers must be positive"),
        ("ring", "1,2,3,nan", "--lambda=1,2,3,nan: all numbers must be positive"),
        ("ring", "0.1,0.2,0.3,0.5", "--lambda=0.1,0.2,0.3,0.5: sum to 1.1; shares must sum to 1"),
        ("ring", "nowhere.txt", "--lambda=nowhere.txt: must be 'uniform', 'degree'"),
        ("complete", "degree", "--lambda=degree: NodeWeighted(graph=Complete()): must be a fixed undirected graph"),
    ],
)
def test_the_command_line_refuses(graph: str, given: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        cli.main(["topology", graph, "-n", "4", f"--lambda={given}"])
    assert status.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(f"dopt topology: {message}")
    assert told.count("\n") == 1


def test_laziness_keeps_the_weights() -> None:
    lazy = Lazy(NodeWeighted(Ring(), TENTHS))
    close(tensor(lazy.stationary(4)) @ lazy.matrix(4), tensor(TENTHS))
    assert space.is_self_adjoint(lazy.matrix(4), TENTHS)
