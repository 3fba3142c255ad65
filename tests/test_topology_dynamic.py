"""Changing graphs against their published facts: finite times, links round by round, expected contractions."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import pytest
import torch

from lightning_dopt.topology import (
    AlternatingRing,
    BaseGraph,
    BipartiteExponential,
    Chain,
    Complete,
    CycleThrough,
    DEquiStatic,
    Exponential,
    Grid,
    HyperHypercube,
    InnerOuter,
    MatchingsOf,
    MoshpitGrid,
    ODEquiDyn,
    OnePeerExponential,
    OnePeerHypercube,
    OUEquiDyn,
    RandomPairs,
    RandomPull,
    Ring,
    Star,
    Switch,
    Topology,
    Torus,
    UEquiStatic,
    check_matrix,
    consensus_rate,
    product,
    summary,
)

PERIODS = {
    1: {3: 3, 4: 2, 5: 5, 6: 4, 7: 5, 8: 3, 9: 7, 10: 6, 12: 5, 16: 4, 24: 6, 25: 9, 32: 5},
    2: {3: 1, 4: 2, 5: 3, 6: 2, 7: 4, 9: 2, 10: 4, 16: 4, 25: 6, 32: 5},
    3: {4: 1, 5: 3, 6: 2, 7: 3, 8: 2, 16: 2, 25: 5, 32: 3, 64: 3},
}
ROUNDS = {
    3: "01:1/2 | 12:2/3 | 01:1/2",
    5: "01:1/2 23:1/2 | 02:1/2 13:1/2 | 01:1/2 34:4/5 | 01:1/2 23:1/2 | 02:1/2 13:1/2",
    6: "01:1/2 34:1/2 | 12:2/3 45:2/3 | 01:1/2 34:1/2 | 03:1/2 14:1/2 25:1/2",
    7: "01:1/2 23:1/2 45:1/2 | 02:1/2 13:1/2 45:1/2 | 15:4/7 24:4/7 36:4/7 | 01:1/2 23:1/2 56:2/3 | "
    "02:1/2 13:1/2 45:1/2",
}


def links(topology: Topology, n: int, step: int) -> dict[tuple[int, int], float]:
    return {(i, j): w for i in range(n) for j, w in topology.row(n, i, step).items() if i < j}


def squared_contraction(topology: Topology, n: int, steps: range) -> float:
    """``||E[W' W] - J||_2``, the expectation taken over ``steps``."""
    mean = sum(topology.matrix(n, t).T @ topology.matrix(n, t) for t in steps) / len(steps)
    return consensus_rate(mean)


@pytest.mark.parametrize("n", ROUNDS)
def test_base_graph_link_by_link(n: int) -> None:
    expected = [{(int(e[0]), int(e[1])): float(Fraction(e[3:])) for e in part.split()} for part in ROUNDS[n].split("|")]
    found = [links(BaseGraph(), n, t) for t in range(len(expected))]
    assert [sorted(round_) for round_ in found] == [sorted(round_) for round_ in expected]
    assert all(
        f[e] == pytest.approx(w, abs=1e-14) for f, want in zip(found, expected, strict=True) for e, w in want.items()
    )


@pytest.mark.parametrize("k", PERIODS)
def test_base_graph_periods(k: int) -> None:
    assert {n: BaseGraph(k).period(n) for n in PERIODS[k]} == PERIODS[k]


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_base_graph_is_exact_for_any_number_with_few_partners(k: int) -> None:
    for n in range(1, 65):
        found = product(BaseGraph(k), n)
        assert found.exact
        assert found.rounds <= max(1, 2 * math.log(n, k + 1) + 2)
        assert max(len(BaseGraph(k).neighbors(n, i, t)) for t in range(found.rounds) for i in range(n)) <= k
    assert not product(BaseGraph(k), 23, BaseGraph(k).period(23) - 1).exact


def test_hyper_hypercube_is_the_hypercube_and_its_relatives() -> None:
    for t in range(3):
        assert torch.equal(HyperHypercube().matrix(8, t), OnePeerHypercube().matrix(8, t))
    assert HyperHypercube(2).period(12) == 3
    assert [HyperHypercube(2).neighbors(6, 0, t) for t in range(2)] == [[1], [2, 4]]  # factors 2 and 3
    assert all(product(HyperHypercube(6), n).exact for n in (12, 35, 42))


def test_moshpit_grids_are_exact_after_one_round_per_side() -> None:
    assert [MoshpitGrid().neighbors(9, 4, t) for t in range(2)] == [[3, 5], [1, 7]]
    for dims, n, period in ((2, 9, 2), (3, 8, 3), (2, 7, 1), ([2, 3, 4], 24, 3), (3, 30, 3)):
        found = product(MoshpitGrid(dims), n)
        assert (found.rounds, found.exact) == (period, True)
        assert product(MoshpitGrid(dims), n, period - 1).exact is False
    assert MoshpitGrid().is_mean(7)


@pytest.mark.parametrize(("peers", "powers"), [(2, (3, 9, 27)), (3, (4, 16)), (4, (5, 25))])
def test_more_peers_of_the_exponential_graph(peers: int, powers: tuple[int, ...]) -> None:
    topology = OnePeerExponential(peers)
    assert not product(topology, powers[-1] - 1).exact
    for power, n in enumerate(powers, 1):
        found = product(topology, n)
        assert (found.rounds, found.exact) == (power, True)
        assert topology.max_degree(n) == peers
    assert OnePeerExponential(2).receivers(5, 0, 1) == [3]  # 6 would be 1 once more
    assert [OnePeerExponential(2).receivers(9, 0, t) for t in range(2)] == [[1, 2], [3, 6]]


@pytest.mark.parametrize("n", [4, 7, 8, 12])
def test_equi_topologies_contract_as_published(n: int) -> None:
    """Over all offsets: 1/2 - 1/(2n) at eta 1/2, but 1 - 2/n at eta 1."""
    for eta, expected in ((0.5, 0.5 - 0.5 / n), (1.0, 1 - 2 / n)):
        seen: dict[int, int] = {}
        for t in range(400):
            seen.setdefault(ODEquiDyn(eta).offset(n, t), t)
        assert sorted(seen) == list(range(1, n))
        mean = sum(ODEquiDyn(eta).matrix(n, t).T @ ODEquiDyn(eta).matrix(n, t) for t in seen.values()) / (n - 1)
        assert consensus_rate(mean) == pytest.approx(expected, abs=1e-12)
    assert squared_contraction(ODEquiDyn(0.5), n, range(600)) == pytest.approx(0.5 - 0.5 / n, abs=0.08)


def test_equi_offsets_are_uniform() -> None:
    count = Counter(ODEquiDyn(seed=4).offset(9, t) for t in range(4000))
    assert sorted(count) == list(range(1, 9))
    assert max(abs(c - 500) for c in count.values()) < 4.5 * math.sqrt(500)
    again = sum(ODEquiDyn(seed=4).offset(9, t) == ODEquiDyn(seed=4).offset(9, t + 1) for t in range(4000))
    assert abs(again - 500) < 4.5 * math.sqrt(500)
    some = {ODEquiDyn(peers=3, seed=4).offset(16, t) for t in range(100)}
    assert some == set(DEquiStatic(peers=3, seed=4).offsets(16))


def test_equi_matrices_by_hand() -> None:
    u = ODEquiDyn().offset(5, 0)
    assert ODEquiDyn().row(5, 2, 0) == pytest.approx({2: 0.6, (2 - u) % 5: 0.4})
    offsets = DEquiStatic(peers=4, seed=2).offsets(11)
    assert sum(offsets.values()) == 4
    row = DEquiStatic(peers=4, seed=2).row(11, 3)
    assert row == pytest.approx({3: 1 / 11} | {(3 - u) % 11: c * 10 / 44 for u, c in offsets.items()})
    directed, undirected = (kind(peers=4, seed=2).matrix(11) for kind in (DEquiStatic, UEquiStatic))
    torch.testing.assert_close(undirected, (directed + directed.T) / 2, rtol=0, atol=1e-15)


def test_undirected_equi_pairs_are_at_the_offset() -> None:
    for t in range(50):
        topology, n = OUEquiDyn(seed=1), 9
        u = topology.offset(n, t)
        pairs = links(topology, n, t)
        assert pairs
        assert all((j - i) % n in (u, n - u) and w == pytest.approx(0.5 * 8 / 9) for (i, j), w in pairs.items())
        busy = {i for pair in pairs for i in pair}
        assert not any(i not in busy and (i + u) % n not in busy for i in range(n))


def test_static_equi_graphs_are_connected_whatever_is_drawn() -> None:
    """Half of all single offsets share a divisor with 16 and would leave the graph in pieces."""
    rates = [consensus_rate(DEquiStatic(peers=2, seed=seed).matrix(16)) for seed in range(40)]
    assert max(rates) < 1 - 1e-4
    assert len({tuple(sorted(DEquiStatic(peers=2, seed=seed).offsets(16))) for seed in range(40)}) > 15


def test_static_equi_rates_hold_for_any_size() -> None:
    peers = DEquiStatic.peers_for(64, rate=0.5)
    assert peers == math.ceil(8 * math.log(1280) / 0.75) == 77
    assert max(consensus_rate(DEquiStatic(peers, seed).matrix(64)) for seed in range(10)) < 0.5


@pytest.mark.parametrize(("n", "distance"), [(4, 0.3333), (8, 0.4286), (16, 0.4667), (32, 0.4839)])
def test_expected_matching(n: int, distance: float) -> None:
    """``(n - 2)/(2(n - 1))``: in expectation each of ``n - 1`` partners has weight ``1/(2(n - 1))``."""
    expected = torch.full((n, n), 0.5 / (n - 1), dtype=torch.float64).fill_diagonal_(0.5)
    assert consensus_rate(expected) == pytest.approx((n - 2) / (2 * (n - 1))) == pytest.approx(distance, abs=6e-5)
    mean = sum(RandomPairs(seed=2).matrix(n, t) for t in range(1500)) / 1500
    torch.testing.assert_close(mean, expected, rtol=0, atol=0.06)


def test_alternating_ring() -> None:
    assert [[AlternatingRing().partner(6, i, t) for i in range(6)] for t in range(2)] == [
        [1, 0, 3, 2, 5, 4],
        [5, 2, 1, 4, 3, 0],
    ]


def test_bipartite_pairs_differ_in_parity() -> None:
    """Distances 1, 3, 5, 9 in turn, ahead of odd ranks."""
    assert BipartiteExponential().period(16) == 4
    assert [BipartiteExponential().partner(16, 1, t) for t in range(4)] == [2, 4, 6, 10]
    for n in (2, 4, 6, 10, 16):
        for t in range(BipartiteExponential().period(n)):
            partners = [BipartiteExponential().partner(n, i, t) for i in range(n)]
            assert all(partners[p] == i and (i + p) % 2 == 1 for i, p in enumerate(partners))


def test_restricted_matchings_use_the_graphs_links_only() -> None:
    topology, n = MatchingsOf(Grid(), seed=3), 12
    used = set()
    for t in range(200):
        pairs = set(links(topology, n, t))
        assert all(j in Grid().neighbors(n, i) for i, j in pairs)
        busy = {i for pair in pairs for i in pair}
        assert not any(i not in busy and j not in busy for i in range(n) for j in Grid().neighbors(n, i))
        used |= pairs
    assert len(used) == 17  # all links of a 3 x 4 grid
    star = Counter(MatchingsOf(Star()).partner(5, 0, t) for t in range(2000))
    assert max(abs(star[j] - 500) for j in range(1, 5)) < 4.5 * math.sqrt(500)


def test_random_pulls_keep_agreement_always_and_the_mean_in_expectation() -> None:
    n, p = 6, 0.3
    topology = RandomPull(p, seed=1)
    mean = sum(topology.matrix(n, t) for t in range(3000)) / 3000
    expected = torch.full((n, n), p / 2 / (n - 1), dtype=torch.float64).fill_diagonal_(1 - p / 2)
    torch.testing.assert_close(mean, expected, rtol=0, atol=0.02)
    checks = [check_matrix(topology.matrix(n, t)) for t in range(30)]
    assert all(check.row_stochastic for check in checks)
    assert not all(check.column_stochastic for check in checks)
    assert topology.stationary(n) == [1 / n] * n
    spread = summary(RandomPull(1.0, seed=1), n).rate
    after = product(RandomPull(1.0, seed=1), n).matrix
    assert 0 < spread < 1
    assert spread == pytest.approx(max(float((a - b).clamp(min=0).sum()) for a in after for b in after))


def test_cycling_through_a_graph_sends_one_message_at_a_time() -> None:
    for t in range(3):
        assert torch.equal(CycleThrough(Exponential()).matrix(8, t), OnePeerExponential().matrix(8, t))
    ring = CycleThrough(Ring())
    assert [ring.receivers(5, 4, t) for t in range(3)] == [[0], [3], [0]]
    assert ring.doubly_stochastic(5)
    torus = CycleThrough(Torus(rows=3))
    assert torus.column_stochastic(12)
    assert not torus.row_stochastic(12)  # at the edges of the box two ranks speak to one
    assert {len(torus.receivers(12, i, t)) for i in range(12) for t in range(4)} == {1}


def test_inner_and_outer_links() -> None:
    """Four machines of four: in every round one rank of each speaks to another machine, three speak inside."""
    topology, n = InnerOuter(4), 16
    for t in range(topology.period(n)):
        crossing = [i for i in range(n) if topology.receivers(n, i, t)[0] // 4 != i // 4]
        assert crossing == [t % 4, 4 + t % 4, 8 + t % 4, 12 + t % 4]
        distance = (topology.receivers(n, crossing[0], t)[0] // 4) % 4
        assert distance == (1, 2)[t // 4 % 2]
    assert topology.doubly_stochastic(n)
    for t in range(3):
        assert torch.equal(InnerOuter(8).matrix(8, t), OnePeerExponential().matrix(8, t))
        assert torch.equal(InnerOuter(1).matrix(8, t), OnePeerExponential().matrix(8, t))


def test_switch_counts_the_rounds_of_each_phase() -> None:
    topology = Switch([(2, Chain()), (5, OnePeerExponential()), (None, Complete())])
    expected = [Chain().matrix(8)] * 2 + [OnePeerExponential().matrix(8, t) for t in range(3)] + [Complete().matrix(8)]
    assert [torch.equal(topology.matrix(8, t), w) for t, w in enumerate(expected)] == [True] * 6
    assert topology.directed
    assert not topology.symmetric(8)
    assert topology.doubly_stochastic(8)
    assert topology.max_degree(8) == 7
    assert product(topology, 8, 6).exact
    assert Switch([(None, Ring())]).period(5) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BaseGraph(0), r"BaseGraph\(k=0\): must be an integer of at least 1"),
        (lambda: HyperHypercube(2).check(10), r"HyperHypercube\(k=2\): 10 workers have a prime factor above 3; use .*"),
        (lambda: MoshpitGrid([2, 3]).check(8), r"MoshpitGrid\(dims=\[2, 3\]\): 2 x 3 places hold 6 workers, not 8; .*"),
        (lambda: MoshpitGrid([]), r"MoshpitGrid\(dims=\[\]\): must be a number of dimensions or a list of sides .*"),
        (lambda: ODEquiDyn(eta=0.0), r"ODEquiDyn\(eta=0.0\): must be a number in \(0, 1\]"),
        (lambda: AlternatingRing().check(5), r"AlternatingRing\(n=5\): the number of workers must be even; .*"),
        (
            lambda: BipartiteExponential().check(3),
            r"BipartiteExponential\(n=3\): the number of workers must be even; .*",
        ),
        (lambda: MatchingsOf(Complete()), r"MatchingsOf\(graph=Complete\(\)\): must be an undirected graph such as .*"),
        (lambda: RandomPull(p=1.5), r"RandomPull\(p=1.5\): must be a number in \(0, 1\]"),
        (lambda: CycleThrough(Star()).check(5), r"CycleThrough\(graph=Star\(\)\): ranks send to between 1 and 4 .*"),
        (lambda: CycleThrough(RandomPairs()).check(4), r"CycleThrough\(graph=RandomPairs\(\)\): .* stay the same .*"),
        (
            lambda: InnerOuter(2),
            r"InnerOuter\(local=2\): must be 1 or at least 3; for two per machine use Hierarchical",
        ),
        (lambda: InnerOuter(3).check(8), r"InnerOuter\(local=3\): 8 workers do not fill machines of 3"),
        (lambda: Switch([]), r"Switch\(phases=\[\]\): must have at least one phase, such as \(None, Ring\(\)\)"),
        (lambda: Switch([(3, Ring())]), r"Switch: phase 0 ends at 3; the last phase, and no other, must end at None"),
        (lambda: Switch([(3, Ring()), (3, Star()), (None, Star())]), r"Switch\(phases\[1\]\[0\]=3\): .* at least 4"),
        (lambda: Switch([(None, "ring")]), r"Switch: phase 0 has 'ring'; must be a topology such as Ring\(\)"),
        (lambda: OnePeerExponential(0), r"OnePeerExponential\(peers=0\): must be an integer of at least 1"),
    ],
)
def test_error_lines(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        make()  # type: ignore[operator]
