"""The promises every topology makes, checked for every topology and many numbers of workers."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from types import ModuleType

import pytest
import torch

import lightning_dopt.topology as topology_package
from lightning_dopt.topology import (
    AlternatingRing,
    BaseGraph,
    BipartiteExponential,
    Chain,
    Complete,
    CycleThrough,
    DEquiStatic,
    Directed,
    DirectedRing,
    ErdosRenyi,
    Exponential,
    FromAdjacency,
    FromFile,
    FromMatrix,
    Grid,
    Groups,
    Hierarchical,
    Hypercube,
    HyperHypercube,
    InnerOuter,
    Lazy,
    MatchingsOf,
    MoshpitGrid,
    NodeWeighted,
    ODEquiDyn,
    OnePeerExponential,
    OnePeerHypercube,
    OUEquiDyn,
    Permute,
    RandomGroups,
    RandomPairs,
    RandomPull,
    RandomRegular,
    Ring,
    RoundRobin,
    Sample,
    SmallWorld,
    Star,
    Switch,
    SymmetricExponential,
    Thinned,
    Topology,
    Torus,
    Tree,
    UEquiStatic,
    WeightedMean,
    by_name,
    check_matrix,
    names,
    product,
)

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 16)
OWN_LINKS = [[1, 2], [0, 2], [0, 1, 3], [2, 4], [3]]
OWN_ENTRIES = [[0.5, 0.0, 0.5, 0.0], [0.25, 0.75, 0.0, 0.0], [0.0, 0.1, 0.2, 0.7], [1 / 3, 0.0, 0.0, 2 / 3]]
PUSH_LINKS = [[1, 2], [2], [3], [4, 0], [0]]
FILES = Path(__file__).parent / "graphs"
MATRIX_FILE, GRAPH_FILE = str(FILES / "matrix.json"), str(FILES / "graph.csv")
TOPOLOGIES: list[Topology] = [
    *(by_name(name) for name in names()),
    Ring(hops=2),
    Thinned(RandomPairs(), 0.4),
    Thinned(Ring(), 0.5, seed=3),
    Thinned(Complete(), 1.0),
    Ring(weights="lazy"),
    Chain(weights="max_degree"),
    Grid(weights="max_degree"),
    Grid(rows=1, weights="lazy"),
    Torus(rows=1),
    Star(weights="max_degree"),
    Star(weights="laplacian"),
    Chain(weights="laplacian"),
    Grid(weights="laplacian"),
    Tree(weights="fastest"),
    ErdosRenyi(weights="fastest"),
    SmallWorld(weights="fdla"),
    Torus(dims=3),
    Torus(dims=[2, 4, 1]),
    Tree(branching=3, weights="lazy"),
    SymmetricExponential(base=3),
    RandomRegular(k=4, seed=2),
    RandomRegular(k=1),
    SmallWorld(hops=1, p=0.5, seed=4, weights="max_degree"),
    Hierarchical(2, Ring()),
    Hierarchical(4, OnePeerExponential()),
    Hierarchical(1, RandomPairs()),
    ErdosRenyi(p=0.7, seed=3, weights="max_degree"),
    RandomPairs(seed=11),
    RandomGroups(3, seed=2),
    RandomGroups(4),
    FromAdjacency(OWN_LINKS),
    FromMatrix(OWN_ENTRIES),
    Lazy(Ring()),
    Lazy(OnePeerExponential()),
    Lazy(RandomPairs()),
    Lazy(FromMatrix(OWN_ENTRIES)),
    DEquiStatic(peers=3, seed=3),
    UEquiStatic(peers=2, seed=1),
    ODEquiDyn(eta=1.0),
    ODEquiDyn(peers=2, seed=5),
    OUEquiDyn(eta=0.53, seed=2),
    OnePeerExponential(peers=2),
    HyperHypercube(k=2),
    BaseGraph(k=2),
    BaseGraph(k=3),
    MoshpitGrid(dims=3),
    MoshpitGrid(dims=[3, 3]),
    MatchingsOf(Chain()),
    MatchingsOf(Torus(), seed=3),
    RandomPull(p=1.0, seed=2),
    CycleThrough(Exponential()),
    CycleThrough(Ring()),
    CycleThrough(Torus(rows=2)),
    InnerOuter(1),
    InnerOuter(3),
    InnerOuter(4),
    Switch([(7, Lazy(Ring())), (9, OnePeerExponential()), (None, Complete())]),
    Switch([(None, RandomPairs())]),
    Switch([(3, RandomPairs()), (None, FromMatrix(OWN_ENTRIES))]),
    Directed(PUSH_LINKS),
    Directed(PUSH_LINKS, weights="pull"),
    Directed([[1], [2], [0]]),
    FromFile(MATRIX_FILE),
    FromFile(GRAPH_FILE, weights="lazy"),
    Lazy(Directed(PUSH_LINKS)),
    Hierarchical(2, Directed([[1], [2], [0, 1]])),
    NodeWeighted(Ring(), [0.1, 0.2, 0.3, 0.4]),
    WeightedMean([0.1, 0.2, 0.3, 0.4]),
]


def exists(topology: Topology, n: int) -> bool:
    try:
        topology.check(n)
    except ValueError:
        return False
    return True


def rounds(topology: Topology, n: int) -> range:
    return range(2 * (topology.period(n) or 20))


def sizes(topology: Topology) -> list[int]:
    return [n for n in SIZES if exists(topology, n)]


def forget_draws() -> None:
    """Clear every cache of every module, as in a fresh process."""
    for module in vars(topology_package).values():
        if isinstance(module, ModuleType):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


for_every_topology = pytest.mark.parametrize("topology", TOPOLOGIES, ids=lambda t: repr(t)[:40])


def expected_sizes(topology: Topology) -> list[int]:
    """Where each topology has to exist, written down a second time."""
    inner = topology
    while isinstance(inner, Lazy):
        inner = inner.topology
    even = [1, 2, 4, 6, 8, 16]
    some = {
        Hypercube: [1, 2, 4, 8, 16],
        OnePeerHypercube: [1, 2, 4, 8, 16],
        AlternatingRing: even,
        BipartiteExponential: even,
        FromAdjacency: [5],
        FromMatrix: [4],
        NodeWeighted: [4],
        WeightedMean: [4],
    }
    if isinstance(inner, RandomRegular):
        return [2] if inner.k == 1 else [n for n in SIZES if n > inner.k and n * inner.k % 2 == 0]
    if isinstance(inner, HyperHypercube):
        return [n for n in SIZES if n in {1: (1, 2, 4, 8, 16), 2: (1, 2, 3, 4, 6, 8, 9, 16)}[inner.k]]
    if isinstance(inner, Hierarchical) and isinstance(inner.between, Directed):
        return [6]
    if isinstance(inner, (Hierarchical, InnerOuter)):
        return [n for n in SIZES if n % inner.local == 0]
    if isinstance(inner, CycleThrough) and isinstance(inner.graph, Torus):
        return even[1:]
    if isinstance(inner, (Torus, MoshpitGrid)) and isinstance(inner.dims, list):
        return [math.prod(inner.dims)]
    if isinstance(inner, Switch) and len(inner.phases) == 2:
        return [4]
    if isinstance(inner, Directed):
        return [len(inner.links)]
    if isinstance(inner, FromFile):
        return [4] if inner.path == MATRIX_FILE else [3]
    return some.get(type(inner), list(SIZES))


@for_every_topology
def test_the_sizes_that_exist_are_the_expected_ones(topology: Topology) -> None:
    assert sizes(topology) == expected_sizes(topology) != []


@for_every_topology
def test_weights_are_positive_and_sum_to_one(topology: Topology) -> None:
    """Along rows, or along columns where push-sum is needed."""
    for n in sizes(topology):
        for step in rounds(topology, n):
            for rank in range(n):
                row = topology.row(n, rank, step)
                assert set(row) <= set(range(n))
                rule = getattr(topology, "weights", None)
                assert row[rank] > 0 or (rule in ("laplacian", "fastest", "fdla") and row[rank] >= 0) or rule == "fdla"
                assert min(weight for j, weight in row.items() if j != rank or len(row) == 1) > 0 or rule == "fdla"
                if topology.row_stochastic(n):
                    assert sum(row.values()) == pytest.approx(1, abs=1e-12)
            if not topology.row_stochastic(n):
                assert topology.matrix(n, step).sum(0).tolist() == pytest.approx([1] * n, abs=1e-12)


@for_every_topology
def test_receivers_are_the_columns_of_the_matrix(topology: Topology) -> None:
    for n in sizes(topology):
        for step in rounds(topology, n):
            w = topology.matrix(n, step)
            w.fill_diagonal_(0)
            for rank in range(n):
                assert topology.neighbors(n, rank, step) == w[rank].nonzero().flatten().tolist()
                assert topology.receivers(n, rank, step) == w[:, rank].nonzero().flatten().tolist()
                if not topology.directed:
                    assert topology.receivers(n, rank, step) == topology.neighbors(n, rank, step)


@for_every_topology
def test_declared_properties_are_those_of_the_matrices(topology: Topology) -> None:
    for n in sizes(topology):
        checks = [check_matrix(topology.matrix(n, step)) for step in rounds(topology, n)]
        rows, columns = topology.row_stochastic(n), topology.column_stochastic(n)
        if getattr(topology, "weights", None) == "fdla":  # weights may be negative
            assert max(max(check.row_error, check.column_error) for check in checks) < 1e-12
            assert rows
            assert columns
        else:
            assert rows == all(check.row_stochastic for check in checks)
            assert columns == all(check.column_stochastic for check in checks)
        assert topology.doubly_stochastic(n) == (rows and columns)
        assert topology.symmetric(n) == all(check.symmetric for check in checks)


@for_every_topology
def test_stationary_weights_are_kept_by_every_round(topology: Topology) -> None:
    for n in sizes(topology):
        weights = torch.tensor(topology.stationary(n), dtype=torch.float64)
        assert weights.min() > 0
        assert float(weights.sum()) == pytest.approx(1, abs=1e-12)
        if not topology.row_stochastic(n):
            assert topology.stationary(n) == [1 / n] * n
            weights = torch.ones(n, dtype=torch.float64)  # what is kept is the sum
        if isinstance(topology, RandomPull):
            found = [weights @ topology.matrix(n, step) for step in range(400)]
            torch.testing.assert_close(sum(found) / 400, weights, rtol=0, atol=0.08)
            continue
        first = (
            3 if isinstance(topology, Switch) and len(topology.phases) == 2 else 0
        )  # earlier rounds keep another mean
        for step in rounds(topology, n)[first:]:
            torch.testing.assert_close(weights @ topology.matrix(n, step), weights, rtol=0, atol=1e-12)


@for_every_topology
def test_max_degree_is_reached_and_not_exceeded(topology: Topology) -> None:
    for n in sizes(topology):
        degrees = [len(topology.neighbors(n, rank, step)) for step in rounds(topology, n) for rank in range(n)]
        if getattr(topology, "weights", None) == "fastest":  # leaves out links that do not help
            assert max(degrees) <= topology.max_degree(n)
        else:
            assert max(degrees) == topology.max_degree(n)


@for_every_topology
def test_is_mean_exactly_if_every_round_is_the_mean(topology: Topology) -> None:
    for n in sizes(topology):
        worst = max(float((topology.matrix(n, step) - 1 / n).abs().max()) for step in rounds(topology, n))
        assert topology.is_mean(n) == (worst < 1e-12)


@for_every_topology
def test_period_repeats_and_is_the_shortest(topology: Topology) -> None:
    for n in sizes(topology):
        period = topology.period(n)
        if period is None:
            assert len({str(topology.matrix(n, step).tolist()) for step in range(20)}) > 1
            continue
        sequence = [topology.matrix(n, step) for step in range(2 * period)]
        fits = [
            p for p in range(1, period + 1) if all(torch.equal(sequence[s], sequence[s + p]) for s in range(period))
        ]
        assert fits == [period]


@for_every_topology
def test_links_of_a_period_connect_everybody(topology: Topology) -> None:
    for n in sizes(topology):
        union = sum(topology.matrix(n, step) for step in rounds(topology, n))
        reach = torch.linalg.matrix_power((union > 0).double(), n)
        assert bool((reach > 0).all())


@for_every_topology
def test_a_period_shrinks_every_disagreement(topology: Topology) -> None:
    for n in sizes(topology):
        once = product(topology, n, topology.period(n) or 200).matrix
        total = once if isinstance(topology, Switch) else torch.linalg.matrix_power(once, 200)
        mean = torch.tensor(topology.stationary(n), dtype=torch.float64).expand(n, n)
        if not topology.row_stochastic(n):
            total = total / total.sum(1, keepdim=True)  # push-sum divides by ones mixed in the same way
        if isinstance(topology, (RandomPull, Switch)):  # which mean depends on the draws, or on the earlier phases
            mean = total.mean(0).expand(n, n)
        assert float((total - mean).abs().max()) < 0.05


@for_every_topology
def test_every_rank_computes_the_same_round(topology: Topology) -> None:
    for n in sizes(topology):
        here = [topology.row(n, rank, 7) for rank in range(n)]
        forget_draws()
        torch.manual_seed(5)
        other = pickle.loads(pickle.dumps(topology))
        assert [other.row(n, rank, 7) for rank in reversed(range(n))] == here[::-1]


@for_every_topology
def test_printed_form_makes_an_equal_topology(topology: Topology) -> None:
    again = eval(repr(topology), vars(topology_package))
    assert again == topology
    assert hash(again) == hash(topology)
    assert pickle.loads(pickle.dumps(topology)) == topology


@for_every_topology
@pytest.mark.parametrize("n", [0, -1, 2.0, True])
def test_a_number_of_workers_is_a_positive_integer(topology: Topology, n: int) -> None:
    with pytest.raises(ValueError, match=r"\(n=.*\): must be an integer of at least 1$"):
        topology.matrix(n)


def test_directed_graphs_must_say_who_hears_a_rank() -> None:
    class Mute(Topology):
        directed = True

        def row(self, n: int, rank: int, step: int = 0) -> dict[int, float]:
            return {rank: 1.0}

    with pytest.raises(NotImplementedError, match="Mute is directed"):
        Mute().receivers(2, 0)


def test_every_class_is_covered() -> None:
    module = topology_package
    classes = {getattr(module, name) for name in module.__all__ if isinstance(getattr(module, name), type)}
    concrete = {c for c in classes if issubclass(c, Topology) and not c.__abstractmethods__}
    federated = {Sample, Groups, Permute}  # mix nothing, or not all: see test_federated.py
    assert {type(t) for t in TOPOLOGIES} == concrete - federated
    assert concrete >= {Complete, DirectedRing, Exponential, RoundRobin}
