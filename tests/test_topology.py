"""Topologies against closed forms, tabulated spectra and hand-written matrices."""

from __future__ import annotations

import math
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from lightning_dopt.topology import (
    Chain,
    Complete,
    Directed,
    DirectedRing,
    ErdosRenyi,
    Exponential,
    FromAdjacency,
    FromMatrix,
    Grid,
    Hierarchical,
    Hypercube,
    Lazy,
    MatchingsOf,
    MoshpitGrid,
    OnePeerExponential,
    OnePeerHypercube,
    RandomPairs,
    Ring,
    RoundRobin,
    SmallWorld,
    Star,
    Switch,
    Topology,
    Torus,
    Tree,
    by_name,
    check_matrix,
    consensus_rate,
    draw,
    lambda_min,
    names,
    product,
    spectral_gap,
    summary,
)
from lightning_dopt.topology._graph import log2_ceil, random_bits, strongly_connected

TABLE = [
    (Ring(), (0.333333, 0.804738, 0.949253, 0.987190)),
    (Ring(weights="max_degree"), (0.333333, 0.804738, 0.949253, 0.987190)),
    (Ring(weights="lazy"), (0.666667, 0.902369, 0.974627, 0.993595)),
    (Lazy(Ring()), (0.666667, 0.902369, 0.974627, 0.993595)),
    (Chain(), (0.804738, 0.949253, 0.987190, 0.996790)),
    (Grid(), (0.333333, 0.853553, 0.868641, 0.965778)),
    (Grid(weights="max_degree"), (0.333333, 0.853553, 0.882843, 0.969552)),
    (Torus(), (0.333333, 0.500000, 0.600000, 0.882843)),
    (Star(), (0.750000, 0.875000, 0.937500, 0.968750)),
    (Hypercube(), (0.333333, 0.500000, 0.600000, 0.666667)),
    (Exponential(), (0.333333, 0.500000, 0.600000, 0.666667)),
    (Complete(), (0.0, 0.0, 0.0, 0.0)),
]
PAW = [[1], [0, 2, 3], [1, 3], [1, 2]]
LAMBDA_MIN = [
    (Ring(), (-0.333333,) * 4),
    (Torus(), (-1 / 3, -1 / 2, -3 / 5, -3 / 5)),
    (Hypercube(), (-1 / 3, -1 / 2, -3 / 5, -2 / 3)),
    (Star(), (0.0,) * 4),
    (Grid(), (-0.3333, -0.3838, -0.4308, -0.4958)),
    (Exponential(), (0.0, -0.1768, -0.2180, -0.2742)),
]


def rows(text: str) -> torch.Tensor:
    """A matrix from text such as ``1/2 1/2; 1 0``."""
    return torch.tensor([[float(Fraction(v)) for v in row.split()] for row in text.split(";")], dtype=torch.float64)


@pytest.mark.parametrize(("topology", "rates"), TABLE, ids=lambda v: repr(v) if isinstance(v, Topology) else "")
def test_consensus_rates_of_the_table(topology: Topology, rates: tuple[float, ...]) -> None:
    found = [consensus_rate(topology.matrix(n)) for n in (4, 8, 16, 32)]
    assert found == pytest.approx(rates, abs=6e-7)


@pytest.mark.parametrize(("topology", "values"), LAMBDA_MIN, ids=lambda v: repr(v) if isinstance(v, Topology) else "")
def test_smallest_eigenvalues_of_the_table(topology: Topology, values: tuple[float, ...]) -> None:
    assert [lambda_min(topology.matrix(n)) for n in (4, 8, 16, 32)] == pytest.approx(values, abs=6e-5)


@pytest.mark.parametrize("n", [5, 6, 7, 9, 12, 17])
def test_ring_and_chain_closed_forms(n: int) -> None:
    assert consensus_rate(Ring().matrix(n)) == pytest.approx((1 + 2 * math.cos(2 * math.pi / n)) / 3, abs=1e-12)
    assert consensus_rate(Chain().matrix(n)) == pytest.approx(consensus_rate(Ring().matrix(2 * n)), abs=1e-12)


@pytest.mark.parametrize("n", [4, 6, 8, 12, 16, 32])
def test_exponential_star_and_hypercube_closed_forms(n: int) -> None:
    tau = math.ceil(math.log2(n))
    assert consensus_rate(Exponential().matrix(n)) == pytest.approx((tau - 1) / (tau + 1), abs=1e-12)
    assert spectral_gap(Star().matrix(n)) == pytest.approx(1 / n, abs=1e-12)
    if n & (n - 1) == 0:
        assert lambda_min(Hypercube().matrix(n)) == pytest.approx(-(tau - 1) / (tau + 1), abs=1e-12)


def test_square_torus_eigenvalues() -> None:
    waves = [2 * math.cos(2 * math.pi * p / 5) for p in range(5)]
    expected = sorted((1 + a + b) / 5 for a in waves for b in waves)
    assert torch.linalg.eigvalsh(Torus().matrix(25)).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("topology", "n", "expected"),
    [
        (Ring(), 1, "1"),
        (Ring(), 2, "1/2 1/2; 1/2 1/2"),
        (Ring(), 4, "1/3 1/3 0 1/3; 1/3 1/3 1/3 0; 0 1/3 1/3 1/3; 1/3 0 1/3 1/3"),
        (Ring(hops=2), 6, ";".join(" ".join("0" if (i - j) % 6 == 3 else "1/5" for j in range(6)) for i in range(6))),
        (DirectedRing(), 3, "1/2 0 1/2; 1/2 1/2 0; 0 1/2 1/2"),
        (Chain(), 3, "2/3 1/3 0; 1/3 1/3 1/3; 0 1/3 2/3"),
        (Chain("lazy"), 3, "5/6 1/6 0; 1/6 2/3 1/6; 0 1/6 5/6"),
        (Star(), 3, "1/3 1/3 1/3; 1/3 2/3 0; 1/3 0 2/3"),
        (Grid(), 4, "1/3 1/3 1/3 0; 1/3 1/3 0 1/3; 1/3 0 1/3 1/3; 0 1/3 1/3 1/3"),
        (Exponential(), 4, "1/3 0 1/3 1/3; 1/3 1/3 0 1/3; 1/3 1/3 1/3 0; 0 1/3 1/3 1/3"),
        (
            FromAdjacency([[1], [0, 2, 3], [1, 3], [1, 2]]),
            4,
            "3/4 1/4 0 0; 1/4 1/4 1/4 1/4; 0 1/4 5/12 1/3; 0 1/4 1/3 5/12",
        ),
        (FromAdjacency(PAW, "max_degree"), 4, "3/4 1/4 0 0; 1/4 1/4 1/4 1/4; 0 1/4 1/2 1/4; 0 1/4 1/4 1/2"),
    ],
    ids=lambda v: repr(v) if isinstance(v, Topology) else "",
)
def test_matrices_by_hand(topology: Topology, n: int, expected: str) -> None:
    torch.testing.assert_close(topology.matrix(n), rows(expected), rtol=0, atol=1e-15)


def test_shapes_of_grid_and_torus() -> None:
    assert [Grid().shape(n) for n in (1, 4, 7, 8, 12, 16, 32)] == [
        (1, 1),
        (2, 2),
        (1, 7),
        (2, 4),
        (3, 4),
        (4, 4),
        (4, 8),
    ]
    assert Grid(rows=6).shape(12) == (6, 2)
    assert Grid().neighbors(12, 5) == [1, 4, 6, 9]
    assert Torus().neighbors(12, 0) == [1, 3, 4, 8]
    assert Torus().row(8, 0) == pytest.approx({0: 0.25, 1: 0.25, 3: 0.25, 4: 0.25})
    assert torch.equal(Torus().matrix(7), Ring().matrix(7))
    assert torch.equal(Grid(rows=5).matrix(5), Chain().matrix(5))


def test_every_round_in_neighbor_lists() -> None:
    exponential, cube = OnePeerExponential(), OnePeerHypercube()
    assert [exponential.neighbors(6, 0, t) for t in range(4)] == [[5], [4], [2], [5]]
    assert [exponential.receivers(6, 0, t) for t in range(4)] == [[1], [2], [4], [1]]
    assert [cube.neighbors(8, 5, t) for t in range(4)] == [[4], [7], [1], [4]]
    assert Exponential().neighbors(6, 0) == [2, 4, 5]
    assert Exponential().receivers(6, 0) == [1, 2, 4]


@pytest.mark.parametrize("n", range(2, 33))
def test_one_peer_exponential_is_exact_exactly_for_powers_of_two(n: int) -> None:
    found = product(OnePeerExponential(), n)
    assert found.rounds == math.ceil(math.log2(n))
    assert found.exact == (n in (2, 4, 8, 16, 32))
    assert product(OnePeerExponential(), n, found.rounds - 1).exact is False


@pytest.mark.parametrize("n", [1, 2, 4, 8, 16, 32])
def test_one_peer_hypercube_is_exact_after_a_period(n: int) -> None:
    found = product(OnePeerHypercube(), n)
    assert found.rounds == max(1, n.bit_length() - 1)
    torch.testing.assert_close(found.matrix, torch.full((n, n), 1 / n, dtype=torch.float64), rtol=0, atol=1e-15)


def test_products_apply_the_first_round_first() -> None:
    topology = RoundRobin()
    found = product(topology, 5, 2).matrix
    torch.testing.assert_close(found, topology.matrix(5, 1) @ topology.matrix(5, 0))
    assert not torch.allclose(found, topology.matrix(5, 0) @ topology.matrix(5, 1))


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 7, 8, 9, 16])
def test_round_robin_visits_every_pair_once(n: int) -> None:
    topology = RoundRobin()
    period = topology.period(n)
    assert period == (n - 1 if n % 2 == 0 else n)
    met = Counter((i, j) for t in range(period) for i in range(n) for j in topology.neighbors(n, i, t))
    assert met == {(i, j): 1 for i in range(n) for j in range(n) if i != j}
    idle = Counter(i for t in range(period) for i in range(n) if not topology.neighbors(n, i, t))
    assert idle == (dict.fromkeys(range(n), 1) if n % 2 else {})


def test_round_robin_follows_the_circle_method() -> None:
    assert [RoundRobin().neighbors(6, 5, t) for t in range(6)] == [[0], [1], [2], [3], [4], [0]]
    assert [RoundRobin().neighbors(6, 1, t) for t in range(5)] == [[4], [5], [3], [0], [2]]


@pytest.mark.parametrize(("n", "distance"), [(4, 0.3333), (8, 0.4286), (16, 0.4667)])
def test_random_pairs_are_uniform(n: int, distance: float) -> None:
    count = 3000
    partners = [[RandomPairs(seed=1).partner(n, i, t) for i in range(n)] for t in range(count)]
    assert all(sorted(p) == list(range(n)) and all(p[p[i]] == i != p[i] for i in range(n)) for p in partners)
    met = Counter((i, j) for p in partners for i, j in enumerate(p))
    expected, sigma = count / (n - 1), math.sqrt(count / (n - 1))
    assert max(abs(met[i, j] - expected) for i in range(n) for j in range(n) if i != j) < 4.5 * sigma
    mean = sum(RandomPairs(seed=1).matrix(n, t) for t in range(500)) / 500
    assert consensus_rate(mean) == pytest.approx(distance, abs=0.08)


def test_random_pairs_of_an_odd_number_idle_in_turn() -> None:
    idle = Counter(i for t in range(1000) for i in range(5) if RandomPairs().partner(5, i, t) == i)
    assert sum(idle.values()) == 1000
    assert min(idle.values()) > 150


def test_random_pairs_depend_on_seed_and_step_alone() -> None:
    first = [RandomPairs(seed=0).partner(16, 3, t) for t in range(40)]
    torch.manual_seed(1)
    assert [RandomPairs(seed=0).partner(16, 3, t) for t in range(39, -1, -1)] == first[::-1]
    assert [RandomPairs(seed=1).partner(16, 3, t) for t in range(40)] != first
    assert len(set(first)) > 8


def test_random_bits_are_those_of_splitmix64() -> None:
    assert random_bits(0) == 0xE220A8397B1DCDAF
    assert random_bits(1, 2) != random_bits(2, 1)
    ones = sum(bin(random_bits(7, k)).count("1") for k in range(1000))
    assert abs(ones - 32000) < 4 * math.sqrt(64000) / 2


def test_erdos_renyi_has_the_asked_density() -> None:
    def links(n: int, p: float | None, seed: int) -> int:
        topology = ErdosRenyi(p=p, seed=seed)
        return sum(topology.degree(n, i) for i in range(n)) // 2

    found = sum(links(16, 0.5, seed) for seed in range(20)) / 20
    assert found == pytest.approx(60, abs=4 * math.sqrt(30 / 20))
    by_default = sum(links(16, None, seed) for seed in range(20)) / 20
    assert by_default == pytest.approx(120 * 2 * math.log(16) / 16, abs=6)
    assert links(6, 1.0, 0) == 15
    assert ErdosRenyi(p=1.0).is_mean(6)
    assert ErdosRenyi(seed=0).matrix(16).tolist() != ErdosRenyi(seed=1).matrix(16).tolist()


def test_lambda_weighted_matrix_keeps_its_weights() -> None:
    w = rows("1/3 1/3 0 1/3; 1/6 1/2 1/3 0; 0 2/9 4/9 1/3; 1/12 0 1/4 2/3")
    topology = FromMatrix(w.tolist())
    assert topology.stationary(4) == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=1e-12)
    assert not topology.doubly_stochastic(4)
    assert not topology.symmetric(4)
    assert not topology.directed
    assert consensus_rate(w, topology.stationary(4)) == pytest.approx(0.590823, abs=6e-7)
    assert lambda_min(w) == pytest.approx(-0.014202, abs=6e-7)
    assert summary(topology, 4).rate == pytest.approx(0.590823, abs=6e-7)
    assert summary(Lazy(topology), 4).rate == pytest.approx((1 + 0.590823) / 2, abs=6e-7)


def test_own_matrix_with_few_digits_is_normalized() -> None:
    topology = FromMatrix([[0.3333333, 0.6666666], [0.6666666, 0.3333333]])
    assert sum(topology.row(2, 0).values()) == pytest.approx(1, abs=1e-15)
    assert topology.entries[0] == [0.3333333, 0.6666666]
    assert FromMatrix([[1.0]]).is_mean(1)
    assert FromMatrix([[0.5, 0.5], [0.5, 0.5]]).is_mean(2)


def test_own_directed_matrix_knows_who_hears_whom() -> None:
    topology = FromMatrix([[0.5, 0.0, 0.5], [0.5, 0.5, 0.0], [0.0, 0.5, 0.5]])
    assert topology == FromMatrix(DirectedRing().matrix(3).tolist())
    assert topology.directed
    assert Lazy(topology).directed
    assert topology.receivers(3, 0) == [1]
    assert topology.neighbors(3, 0) == [2]


def test_the_complete_graph_in_disguise_is_recognized() -> None:
    def means(topology: Topology) -> list[int]:
        return [n for n in range(1, 8) if topology.is_mean(n)]

    assert means(Complete()) == [1, 2, 3, 4, 5, 6, 7]
    assert means(Ring()) == [1, 2, 3]
    assert means(Ring(hops=2)) == [1, 2, 3, 4, 5]
    assert means(Ring(weights="lazy")) == means(Lazy(Complete())) == [1]
    assert means(Star()) == means(Chain()) == means(DirectedRing()) == means(OnePeerExponential()) == [1, 2]
    assert means(Exponential()) == means(Torus()) == [1, 2, 3]
    assert means(RandomPairs()) == means(RoundRobin()) == [1, 2]


def test_symmetry_of_directed_graphs() -> None:
    assert [n for n in range(1, 9) if DirectedRing().symmetric(n)] == [1, 2]
    assert [n for n in range(1, 9) if Exponential().symmetric(n)] == [1, 2, 3]
    assert [n for n in range(1, 9) if OnePeerExponential().symmetric(n)] == [1, 2]


def test_check_matrix_finds_each_fault() -> None:
    good = check_matrix(Ring().matrix(5))
    assert good.doubly_stochastic
    assert good.symmetric
    skewed = check_matrix(rows("1/2 1/2; 1/4 3/4"))
    assert (skewed.row_stochastic, skewed.column_stochastic, skewed.symmetric) == (True, False, False)
    assert (skewed.column_error, skewed.symmetry_error) == (0.25, 0.25)
    leaking = check_matrix(rows("1/2 1/4; 1/4 1/2"))
    assert (leaking.row_error, leaking.row_stochastic) == (0.25, False)
    negative = check_matrix(rows("3/2 -1/2; -1/2 3/2"))
    assert (negative.nonnegative, negative.doubly_stochastic, negative.smallest_entry) == (False, False, -0.5)
    assert check_matrix(rows("1/2 1/4; 1/4 1/2"), tolerance=0.3).doubly_stochastic


def test_summary_of_a_changing_graph() -> None:
    found = summary(OnePeerExponential(), 6)
    assert (found.name, found.n, found.period, found.rounds) == ("OnePeerExponential()", 6, 3, 3)
    assert (found.max_degree, found.messages) == (1, 1.0)
    assert (found.directed, found.symmetric, found.doubly_stochastic) == (True, False, True)
    assert (found.is_mean, found.connected, found.exact) == (False, True, False)
    assert found.rate == pytest.approx(consensus_rate(product(OnePeerExponential(), 6).matrix), abs=1e-12)
    assert found.rate_per_round**3 == pytest.approx(found.rate, abs=1e-12)
    assert found.spectral_gap == pytest.approx(1 - found.rate_per_round)
    assert found.lambda_min == pytest.approx(0, abs=1e-12)  # 1/4 in the later rounds
    assert summary(OnePeerExponential(), 8).rate == 0
    assert summary(Star(), 8).messages == pytest.approx(2 * 7 / 8)
    assert summary(RandomPairs(), 7).rounds == 7
    assert summary(RandomPairs(), 7).messages == pytest.approx(6 / 7)
    assert summary(Grid(), 16).lambda_min == pytest.approx(-0.4308, abs=6e-5)


def test_names() -> None:
    assert len(names()) == 28
    assert by_name("one_peer_exponential") == by_name("OnePeerExponential") == OnePeerExponential()
    assert by_name("erdos_renyi") == ErdosRenyi()
    with pytest.raises(ValueError, match=r"^by_name\(name='rign'\): must be one of complete, ring, directed_ring, .*"):
        by_name("rign")


def test_graph_helpers() -> None:
    assert [log2_ceil(n) for n in (1, 2, 3, 4, 5, 8, 9)] == [0, 1, 2, 2, 3, 3, 4]
    assert strongly_connected([[1], [2], [0]])
    assert not strongly_connected([[1], [2], []])
    assert not strongly_connected([[], [0], [0, 1]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ring(hops=0), r"Ring\(hops=0\): must be an integer of at least 1"),
        (
            lambda: Ring(weights="metro"),
            r"Ring\(weights='metro'\): must be one of 'metropolis', 'max_degree', 'lazy', .*",
        ),
        (lambda: Grid(rows=0), r"Grid\(rows=0\): must be an integer of at least 1"),
        (lambda: Torus(rows=3).matrix(8), r"Torus\(rows=3\): 8 workers do not fill 3 equal rows; rows must divide 8"),
        (lambda: Hypercube().check(6), r"Hypercube\(n=6\): the number of workers must be a power of two .*"),
        (lambda: Lazy(OnePeerHypercube()).check(6), r"OnePeerHypercube\(n=6\): .* must be a power of two .*"),
        (lambda: RandomPairs(seed=-1), r"RandomPairs\(seed=-1\): must be an integer of at least 0"),
        (lambda: ErdosRenyi(p=0.0), r"ErdosRenyi\(p=0.0\): must be a number in \(0, 1\]"),
        (lambda: ErdosRenyi(p=1e-6).check(4), r"ErdosRenyi\(p=1e-06\): no connected graph of 4 workers in 200 .*"),
        (lambda: Lazy("ring"), r"Lazy\(topology='ring'\): must be a topology such as Ring\(\)"),
        (lambda: FromAdjacency([]), r"FromAdjacency\(links=\[\]\): must have one list for every rank"),
        (lambda: FromAdjacency([[1], [0, 1]]), r"FromAdjacency: rank 1 is linked to 1; must be another rank in 0..1"),
        (lambda: FromAdjacency([[1], [0, 2]]), r"FromAdjacency: rank 1 is linked to 2; must be another rank in 0..1"),
        (lambda: FromAdjacency([[1, 1], [0]]), r"FromAdjacency: rank 0 lists rank 1 more than once"),
        (lambda: FromAdjacency([[1], []]), r"FromAdjacency: rank 0 lists rank 1 but 1 does not list 0; list both ways"),
        (lambda: FromAdjacency([[1], [0], [3], [2]]), r"FromAdjacency: the graph of 4 ranks must be connected, .*"),
        (lambda: FromAdjacency([[1], [0]]).check(3), r"FromAdjacency\(n=3\): the graph was given for 2 workers .*"),
        (lambda: FromMatrix([]), r"FromMatrix\(entries=\[\]\): must have one row for every rank"),
        (lambda: FromMatrix([[1.0], [0.5, 0.5]]), r"FromMatrix: row 0 has 1 entries; a matrix of 2 rows needs 2"),
        (lambda: FromMatrix([[1.5, -0.5], [0.5, 0.5]]), r"FromMatrix: entry \(0, 1\) is -0.5; weights must be .*"),
        (lambda: FromMatrix([[math.nan]]), r"FromMatrix: entry \(0, 0\) is nan; weights must be finite, at least 0"),
        (lambda: FromMatrix([[0.5, 0.4], [0.5, 0.5]]), r"FromMatrix: row 0 sums to 0.9; every row must sum to 1"),
        (lambda: FromMatrix([[0, 1], [0.5, 0.5]]), r"FromMatrix: entry \(0, 0\) is 0; every rank's own weight must .*"),
        (lambda: FromMatrix([[1, 0], [0.5, 0.5]]), r"FromMatrix: every one of the 2 ranks must be reachable .*"),
        (lambda: FromMatrix([[1.0]]).check(2), r"FromMatrix\(n=2\): the graph was given for 1 workers .*"),
        (lambda: consensus_rate(torch.ones(2, 3)), r"consensus_rate\(W\): must be a square matrix, got shape \(2, 3\)"),
        (
            lambda: consensus_rate(torch.eye(2), [1.0, 0.0]),
            r"consensus_rate\(stationary=.*\): must be 2 positive .*",
        ),
        (lambda: product(Ring(), 3, -1), r"product\(rounds=-1\): must be at least 0"),
        (lambda: draw(Ring(), 3, "ring.pdf"), r"draw\(path='ring.pdf'\): the file name must end in .png or .svg"),
        (lambda: draw(Hypercube(), 3, "cube.png"), r"Hypercube\(n=3\): .*"),
    ],
)
def test_error_lines(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        make()  # type: ignore[operator]


def test_topologies_can_be_written_in_a_configuration_file() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--peers", type=Topology)
    prefix = "lightning_dopt.topology."

    def parse(value: dict[str, object]) -> Topology:
        instantiate = getattr(parser, "instantiate", parser.instantiate_classes)
        made: Topology = instantiate(parser.parse_object({"peers": value})).peers
        return made

    assert parse({"class_path": prefix + "RandomPairs", "init_args": {"seed": 4}}) == RandomPairs(seed=4)
    inner = {"class_path": prefix + "Grid", "init_args": {"rows": 2, "weights": "max_degree"}}
    lazy = parse({"class_path": prefix + "Lazy", "init_args": {"topology": inner}})
    assert lazy == Lazy(Grid(rows=2, weights="max_degree"))
    entries = [[0.5, 0.5], [0.25, 0.75]]
    assert parse({"class_path": prefix + "FromMatrix", "init_args": {"entries": entries}}) == FromMatrix(entries)
    assert parse({"class_path": prefix + "Torus", "init_args": {"dims": 3}}) == Torus(dims=3)
    assert parse({"class_path": prefix + "MoshpitGrid", "init_args": {"dims": [2, 4]}}) == MoshpitGrid([2, 4])
    phases = [[3, {"class_path": prefix + "Ring"}], [None, {"class_path": prefix + "Complete"}]]
    assert parse({"class_path": prefix + "Switch", "init_args": {"phases": phases}}) == Switch(
        [(3, Ring()), (None, Complete())]
    )
    machines = {"local": 2, "between": {"class_path": prefix + "Star"}}
    assert parse({"class_path": prefix + "Hierarchical", "init_args": machines}) == Hierarchical(2, Star())
    restricted = {"graph": {"class_path": prefix + "Tree", "init_args": {"weights": "fastest"}}}
    assert parse({"class_path": prefix + "MatchingsOf", "init_args": restricted}) == MatchingsOf(
        Tree(weights="fastest")
    )
    assert parse({"class_path": prefix + "Directed", "init_args": {"links": [[1], [0]]}}) == Directed([[1], [0]])


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    svg = draw(OnePeerExponential(), 8, tmp_path / "exponential.svg")
    assert svg == tmp_path / "exponential.svg"
    text = svg.read_text()
    assert text.count('<g id="axes_') == 3
    png = draw(Lazy(Grid()), 6, str(tmp_path / "grid.png"))
    assert png.read_bytes().startswith(b"\x89PNG")
    assert draw(RandomPairs(), 4, tmp_path / "pairs.svg").read_text().count('<g id="axes_') == 8
    for topology, n in ((Tree(), 1), (Tree(3), 8), (SmallWorld(weights="fdla"), 9), (Directed([[1], [2], [0]]), 3)):
        assert "<svg" in draw(topology, n, tmp_path / "any.svg").read_text()


def test_a_missing_matplotlib_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"^draw\(\) needs matplotlib: pip install lightning_dopt\[report\]$"):
        draw(Ring(), 3, tmp_path / "ring.png")
    assert not list(tmp_path.iterdir())
