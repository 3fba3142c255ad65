"""Asynchronous methods on the virtual clock: limits with known answers, and what no order of events may change."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from problems import Optimizer, adam, p1, p2, sgd
from torch import Tensor

from lightning_dopt.asynchronous import (
    Acid,
    Averaging,
    Dadao,
    EventClock,
    MailboxSimulation,
    Matchings,
    PairRule,
    PairwiseSimulation,
    edges,
)
from lightning_dopt.topology import Complete, DirectedRing, FromAdjacency, Grid, Hypercube, RandomPairs, Ring, Star
from lightning_dopt.topology.base import Topology
from lightning_dopt.topology.weights import UndirectedGraph

FAST = [1.0, 1.0, 1.0, 0.25]
"""Seconds per gradient: node 3 is four times faster."""


def zero(rank: int) -> dict[str, Tensor]:
    return {"x": torch.zeros(1, dtype=torch.float64)}


def adpsgd(lr: float = 0.01, *, correct_speed: bool = False, rate: float = 8.0, seed: int = 0) -> PairwiseSimulation:
    p = p1()
    return PairwiseSimulation(
        Ring(), 4, zero, p.backward, sgd(lr), rate=rate, correct_speed=correct_speed, seconds=FAST, seed=seed
    )


def time_average(simulation: PairwiseSimulation, settle: float, samples: int = 20) -> float:
    simulation.run(settle)
    means = []
    for _ in range(samples):
        simulation.run(5.0)
        means.append(float(simulation.stacked().mean()))
    return sum(means) / samples


# ------------------------------------------------------------------ the clock


def test_events_run_in_order_of_time_then_of_planning() -> None:
    clock, seen = EventClock(), []
    clock.after(2.0, lambda: seen.append(("b", clock.now)))
    clock.after(1.0, lambda: clock.after(1.0, lambda: seen.append(("c", clock.now))))
    clock.every(0.75, lambda: seen.append(("t", clock.now)), phase=0.25)
    clock.run(2.0)
    assert seen == [("t", 0.25), ("t", 1.0), ("t", 1.75), ("b", 2.0), ("c", 2.0)]
    assert clock.now == 2.0


def test_poisson_gaps_have_the_right_mean_and_spread_and_are_reproducible() -> None:
    def times(seed: int) -> list[float]:
        clock, out = EventClock(seed), []
        clock.poisson(4.0, lambda: out.append(clock.now))
        clock.run(500.0)
        return out

    gaps = torch.tensor(times(3)).diff()
    assert float(gaps.mean()) == pytest.approx(0.25, rel=0.05)
    assert float(gaps.std()) == pytest.approx(0.25, rel=0.1)
    assert times(3) == times(3) != times(4)


def test_running_in_pieces_changes_nothing() -> None:
    whole, pieces = adpsgd().run(30.0), adpsgd()
    for _ in range(60):
        pieces.run(0.5)
    assert torch.equal(whole.stacked(), pieces.stacked())


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: EventClock(-1), r"EventClock\(seed=-1\)"),
        (lambda: EventClock().after(-1.0, lambda: None), r"EventClock.after\(seconds=-1.0\)"),
        (lambda: edges(DirectedRing(), 4), r"edges\(topology=DirectedRing\(\)\)"),
        (lambda: edges(RandomPairs(), 4), r"edges\(topology=RandomPairs\(\)\)"),
        (lambda: Acid(0.0, 1.0), r"Acid\(eta=0.0\)"),
        (lambda: Acid.of(Complete(), 4), r"Acid.of\(topology=Complete\(\)\)"),
        (lambda: Acid.of(Ring(), 1), r"n=1\)"),
        (lambda: PairwiseSimulation(Ring(), 2, zero, None, sgd(0.1), rate=0), r"rate=0\)"),
        (lambda: PairwiseSimulation(Ring(), 2, zero, None, sgd(0.1), seconds=[1.0]), r"seconds=\[1.0\]"),
        (lambda: PairwiseSimulation(Ring(), 2, zero, None, sgd(0.1), arrivals="now"), r"arrivals='now'"),
        (lambda: MailboxSimulation(RandomPairs(), 4, zero, None, sgd(0.1)), r"stays the same"),
        (lambda: Dadao(Ring(), lambda i, x: x, torch.zeros(4, 1), mu=2.0, smoothness=1.0), r"mu=2.0\)"),
    ],
)
def test_bad_arguments_are_named_in_one_line(call: object, text: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*" + text):
        call()  # type: ignore[operator]


# ------------------------------------------------------------------ constants and matchings


def two_way_exponential(n: int) -> UndirectedGraph:
    hops = [2**k for k in range(int(math.log2(n)))]
    return FromAdjacency([sorted({(i + s * h) % n for h in hops for s in (1, -1)}) for i in range(n)])


@pytest.mark.parametrize(
    ("topology", "n", "eta", "alpha"),
    [
        (Ring(), 4, 0.5774, 0.5774),
        (Ring(), 8, 0.2893, 0.9877),
        (Ring(), 16, 0.1425, 1.8717),
        (Ring(), 32, 0.0704, 3.6648),
        (Hypercube(), 8, 0.4364, 0.6547),
        (Hypercube(), 16, 0.3651, 0.7303),
        (two_way_exponential(16), 16, 0.3863, 0.6761),
        (two_way_exponential(32), 32, 0.3353, 0.7545),
    ],
    ids=repr,
)
def test_constants_of_known_graphs(topology: UndirectedGraph, n: int, eta: float, alpha: float) -> None:
    rule = Acid.of(topology, n)
    assert (rule.eta, rule.alpha) == pytest.approx((eta, alpha), abs=1e-4)
    faster = Acid.of(topology, n, rate=3.0)  # time runs three times as fast, shares stay
    assert (faster.eta, faster.alpha) == pytest.approx((3 * rule.eta, rule.alpha))


@pytest.mark.parametrize(
    ("topology", "n"), [(Ring(), 4), (Ring(), 5), (Star(), 5), (Grid(), 6), (Complete(), 7), (Ring(), 2)], ids=repr
)
def test_matchings_are_mutual_and_use_every_edge_equally_often(topology: Topology, n: int) -> None:
    matchings = Matchings(topology, n, seed=5)
    met: Counter[tuple[int, int]] = Counter()
    for k in range(4 * matchings.colours):
        for i in range(n):
            j = matchings.partner(i, k)
            if j is not None:
                assert j in matchings.neighbours(i)
                assert matchings.partner(j, k) == i
                met[min(i, j), max(i, j)] += 1
    assert met == Counter(dict.fromkeys(edges(topology, n), 8))
    per_node = 2 * len(matchings.pairs) / n / matchings.colours
    assert matchings.indexes_per_gradient(0.5) * per_node == pytest.approx(0.5)


def test_matchings_of_a_ring_leave_nobody_alone_and_depend_on_the_seed() -> None:
    ring = Matchings(Ring(), 8)
    assert ring.colours == 2
    assert all(ring.partner(i, k) is not None for i in range(8) for k in range(10))
    partners = [tuple(Matchings(Ring(), 8, seed).partner(0, k) for k in range(40)) for seed in range(3)]
    assert len(set(partners)) == 3


# ------------------------------------------------------------------ AD-PSGD


def test_speed_bias_and_its_correction() -> None:
    biased = time_average(adpsgd(0.005), 400.0)
    repaired = time_average(adpsgd(0.005, correct_speed=True), 400.0)
    assert biased == pytest.approx(3.54, abs=0.03)  # the optimum weighted by speed is 39/11
    assert repaired == pytest.approx(3.0, abs=0.03)
    assert adpsgd().run(40.0).gradients == [40, 40, 40, 160]


def test_a_meeting_keeps_the_sum_and_equalises() -> None:
    x0 = torch.tensor([[1.0], [5.0]], dtype=torch.float64)
    pair = PairwiseSimulation(Ring(), 2, lambda r: {"x": x0[r]}, None, sgd(0.1), arrivals="regular", rate=1.0)
    pair.run(0.49)
    assert pair.stacked().tolist() == [[1.0], [5.0]]
    pair.run(0.02)
    assert pair.stacked().tolist() == [[3.0], [3.0]]
    assert pair.meetings == 1


@pytest.mark.parametrize("rule", [Averaging(), Acid.of(Ring(), 8)], ids=["averaging", "acid"])
@pytest.mark.parametrize("link_seconds", [0.0, 0.3])
@pytest.mark.parametrize("arrivals", ["poisson", "regular"])
def test_sums_change_by_gradients_only(rule: PairRule, link_seconds: float, arrivals: str) -> None:
    """All gradients ask for 1, so the sum of all nodes counts them."""

    def backward(rank: int, parameters: dict[str, Tensor], step: int) -> None:
        parameters["x"].grad = torch.full((2,), -10.0, dtype=torch.float64)

    g = torch.Generator().manual_seed(0)
    x0 = torch.randn(8, 2, generator=g, dtype=torch.float64)
    run = PairwiseSimulation(
        Ring(),
        8,
        lambda r: {"x": x0[r]},
        backward,
        sgd(0.1),
        rule=rule,
        link_seconds=link_seconds,
        arrivals=arrivals,  # type: ignore[arg-type]
        seconds=[0.7 + 0.1 * k for k in range(8)],
    )
    run.run(25.0)
    expected = x0.sum(0) + sum(run.gradients)
    assert torch.allclose(run.stacked().sum(0), expected, rtol=0, atol=1e-11)
    if isinstance(rule, Acid):
        both = torch.stack([s.xt for s in run.states if s.xt is not None])
        assert torch.allclose(both.sum(0), expected, rtol=0, atol=1e-11)
    assert run.meetings > 60


def test_gradients_are_taken_at_the_beginning_and_land_on_what_x_has_become() -> None:
    """One gradient of ``x^2 / 2`` from 4 with rate 1/2, a meeting with -2 half way: 4 -> 1 -> 1 - 2."""
    x0 = torch.tensor([[4.0], [-2.0]], dtype=torch.float64)

    def backward(rank: int, parameters: dict[str, Tensor], step: int) -> None:
        parameters["x"].grad = parameters["x"].detach().clone() if rank == 0 else torch.zeros(1, dtype=torch.float64)

    run = PairwiseSimulation(Ring(), 2, lambda r: {"x": x0[r]}, backward, sgd(0.5), arrivals="regular")
    run.run(1.1)
    assert run.stacked().tolist() == [[-1.0], [1.0]]
    assert run.staleness == Counter({1: 2})


def test_queued_meetings_wait_for_each_other() -> None:
    """A chain whose meetings take 0.5 s: edges ring at 0.125 (0, 1) and 0.375 (1, 2); the second starts at 0.625."""
    x0 = torch.tensor([[0.0], [4.0], [8.0]], dtype=torch.float64)
    chain = FromAdjacency([[1], [0, 2], [1]])
    run = PairwiseSimulation(
        chain, 3, lambda r: {"x": x0[r]}, None, sgd(0.1), arrivals="regular", link_seconds=0.5, rate=8 / 3
    )
    run.run(0.625 + 1e-9)
    assert run.stacked().flatten().tolist() == [2.0, 2.0, 8.0]
    run.run(0.5)
    assert run.stacked().flatten().tolist() == [2.0, 5.0, 5.0]


# ------------------------------------------------------------------ A2CiD2


def consensus(n: int, rule: PairRule, seed: int, times: Sequence[float]) -> list[float]:
    """Relative squared consensus error at the given times, from random vectors, without gradients."""
    g = torch.Generator().manual_seed(seed)
    x0 = torch.randn(n, 10, generator=g, dtype=torch.float64)
    run = PairwiseSimulation(Ring(), n, lambda r: {"x": x0[r]}, None, sgd(0.1), rule=rule, seed=seed)
    start, out = run.distance(), []
    for t in times:
        run.run(t - run.clock.now)
        out.append((run.distance() / start) ** 2)
    return out


def test_the_drift_is_exact_and_divisible() -> None:
    rule = Acid(eta=0.4, alpha=1.0)
    x = torch.tensor([1.0, -3.0], dtype=torch.float64)
    one, many = rule.begin(x.clone()), rule.begin(x.clone())
    for state in (one, many):
        assert state.xt is not None
        state.xt.copy_(torch.tensor([5.0, 1.0], dtype=torch.float64))
    rule.drift(one, 2.0)
    for k in range(1, 9):
        rule.drift(many, k / 4)
    e = math.exp(-1.6)
    assert one.x.tolist() == pytest.approx([3 - 2 * e, -1 - 2 * e])
    assert one.xt is not None
    assert one.xt.tolist() == pytest.approx([3 + 2 * e, -1 + 2 * e])
    assert many.x.tolist() == pytest.approx(one.x.tolist())


def test_acid_reaches_consensus_faster_on_rings() -> None:
    plain = torch.tensor([consensus(16, Averaging(), s, [40.0, 80.0, 160.0]) for s in range(3)]).mean(0)
    acid = torch.tensor([consensus(16, Acid.of(Ring(), 16), s, [40.0, 80.0, 160.0]) for s in range(3)]).mean(0)
    assert torch.all(plain > torch.tensor([3e-3, 1e-4, 1e-7]))
    assert torch.all(plain < torch.tensor([3e-2, 3e-3, 1e-5]))
    assert torch.all(acid < torch.tensor([3e-3, 1e-5, 1e-12]))
    longer = [consensus(32, rule, 0, [80.0])[0] for rule in (Averaging(), Acid.of(Ring(), 32))]
    assert longer[1] < longer[0] / 8
    assert 3e-3 < longer[0] < 5e-2


@pytest.mark.parametrize(
    ("optimizer", "near"),
    [(sgd(0.01), 0.1), (sgd(0.002, momentum=0.9), 0.1), (adam, 1.5)],
    ids=["sgd", "momentum", "adam"],
)
def test_acid_takes_displacements_of_any_optimizer(optimizer: Optimizer, near: float) -> None:
    """``sum x = sum xt`` at all times; SGD finds the optimum 3, Adam its own limit between the minimisers 1 and 4."""
    p = p1()
    run = PairwiseSimulation(Ring(), 4, zero, p.backward, optimizer, rule=Acid.of(Ring(), 4, 4.0), rate=4.0)
    run.run(300.0)
    x, xt = run.stacked(), torch.stack([s.xt for s in run.states if s.xt is not None])
    assert float(x.sum()) == pytest.approx(float(xt.sum()), abs=1e-9)
    assert float(x.mean()) == pytest.approx(3.0, abs=near)


def test_weight_decay_is_part_of_the_displacement() -> None:
    def decoupled(parameters: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5)

    def still(rank: int, parameters: dict[str, Tensor], step: int) -> None:
        parameters["x"].grad = torch.zeros(1, dtype=torch.float64)

    def start(rank: int) -> dict[str, Tensor]:
        return {"x": torch.ones(1, dtype=torch.float64)}

    run = PairwiseSimulation(Ring(), 2, start, still, decoupled, arrivals="regular").run(3.2)
    assert run.stacked().flatten().tolist() == pytest.approx([0.95**3] * 2)


# ------------------------------------------------------------------ mailboxes


def test_mailbox_pulls_agree_on_another_mean() -> None:
    """With symmetric weights the limit weighs nodes by the inverse of their speed, 15/13 on average over all orders."""
    run = MailboxSimulation(
        Ring(), 4, lambda r: {"x": torch.tensor([float(r)], dtype=torch.float64)}, None, sgd(0.1), seconds=FAST
    ).run(60.0)
    assert run.distance() < 1e-12
    assert float(run.stacked().mean()) == pytest.approx(15 / 13, abs=0.02)


def test_mailbox_limit_is_the_product_of_the_pulls() -> None:
    """Equal speeds: nodes pull one after the other, 0 to 3, each with what the ones before it have just sent."""
    w, product = Ring().matrix(4), torch.eye(4, dtype=torch.float64)
    for _ in range(80):
        for i in range(4):
            pull = torch.eye(4, dtype=torch.float64)
            pull[i] = w[i]
            product = pull @ product
    x0 = torch.arange(4.0, dtype=torch.float64)
    run = MailboxSimulation(Ring(), 4, lambda r: {"x": x0[r : r + 1]}, None, sgd(0.1)).run(80.0)
    assert torch.allclose(run.stacked().flatten(), product @ x0, rtol=0, atol=1e-12)
    late = MailboxSimulation(Ring(), 4, lambda r: {"x": x0[r : r + 1]}, None, sgd(0.1), link_seconds=0.5).run(80.0)
    assert float(late.stacked().mean()) == pytest.approx(1.5)  # all pull before any message of the round arrives


def test_mailbox_hardly_has_a_speed_bias_and_scaling_by_speed_creates_one() -> None:
    p = p1()

    def scaled(rank: int, parameters: dict[str, Tensor], step: int) -> None:
        p.backward(rank, parameters, step)
        parameters["x"].grad = parameters["x"].grad * FAST[rank]  # type: ignore[operator]

    raw = MailboxSimulation(Ring(), 4, zero, p.backward, sgd(0.01), seconds=FAST).run(400.0).stacked()
    bent = MailboxSimulation(Ring(), 4, zero, scaled, sgd(0.01), seconds=FAST).run(400.0).stacked()
    assert torch.all((raw - 3.0).abs() < 0.07)
    assert torch.all((bent - 2.56).abs() < 0.06)


def test_mailbox_pulls_every_few_gradients() -> None:
    x0 = torch.tensor([0.0, 6.0], dtype=torch.float64)
    run = MailboxSimulation(Ring(), 2, lambda r: {"x": x0[r : r + 1]}, None, sgd(0.1), every=3, link_seconds=0.1)
    assert run.run(2.5).stacked().flatten().tolist() == [0.0, 6.0]
    assert run.run(1.0).stacked().flatten().tolist() == [3.0, 3.0]


# ------------------------------------------------------------------ DADAO


def test_dadao_converges_linearly_and_its_dual_stays_balanced() -> None:
    p = p2()
    run = Dadao(Ring(), p.gradient, torch.zeros(8, 5), mu=0.07398, smoothness=2.5815)
    for t, expected in ((100.0, 1.2e-3), (200.0, 8.4e-5)):
        run.run(t - run.clock.now)
        error = float((run.x - p.optimum()).square().mean())
        assert expected / 3 < error < expected * 3
        assert float(run.state[:, 4].sum(0).abs().max()) < 1e-11


def test_dadao_constants() -> None:
    c = Dadao(Ring(), lambda i, x: x, torch.zeros(8, 1), mu=0.5, smoothness=4.0).constants
    assert (c.nu, c.eta, c.a, c.theta) == (0.25, 1 / 32, 1 / 16, 2.0)
    assert (c.gamma, c.gamma_t, c.delta) == (1 / 16, 1 / 4, 1 + 1 / 16)
    chi1, chi2 = 8 / (2 - math.sqrt(2)), 8 * 7 / 16
    assert c.edge_events == pytest.approx(math.sqrt(2 * chi1 * chi2))
    assert c.beta_t == pytest.approx(2 * chi1 / c.edge_events * 4)


def test_dadao_events_by_hand() -> None:
    """Two nodes, mu = 1/2, smoothness 4: constants are powers of two but for ``beta_t``."""
    run = Dadao(Ring(), lambda i, x: 2 * x + 1, torch.tensor([[4.0], [0.0]]), mu=0.5, smoothness=4.0)
    run._gradient(0)  # q = 9 - 1 = 8
    assert run.state[0].flatten().tolist() == [4 - 0.5, 4 - 2.0, 0.0, 8.5, 0.0, 0.0]
    run.state[:, 2] = torch.tensor([[3.0], [1.0]])
    run._meet(0, 1)  # p = 2
    t = run.constants.beta_t * 2
    assert run.state[:, 4].flatten().tolist() == [-1.0, 1.0]
    assert run.state[:, 5].flatten().tolist() == [-t, t]


def test_dadao_rests_at_the_optimum() -> None:
    p = p2()
    best = p.optimum()
    run = Dadao(Ring(), p.gradient, best.expand(8, 5), mu=0.07398, smoothness=2.5815)
    for i in range(8):
        dual = p.gradient(i, best) - run.constants.nu * best
        run.state[i, 2:4] = dual
        run.state[i, 4:6] = -dual - run.constants.nu * best
    before = run.state.clone()
    assert torch.allclose(run.run(20.0).state, before, rtol=0, atol=1e-10)
