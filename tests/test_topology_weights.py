"""The best weights of a graph's links against closed forms, and against every other choice."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_dopt.topology import (
    Chain,
    Complete,
    ErdosRenyi,
    FromAdjacency,
    Grid,
    Hypercube,
    Ring,
    SmallWorld,
    Star,
    Topology,
    Torus,
    Tree,
    UndirectedGraph,
    consensus_rate,
    lambda_min,
)
from lightning_dopt.topology.optimal import fastest, laplacian

TABLE = [
    (Ring(weights="laplacian"), (0.333333, 0.744521, 0.926670, 0.980968)),
    (Ring(weights="fastest"), (0.333333, 0.744521, 0.926670, 0.980968)),
    (Chain(weights="laplacian"), (0.707107, 0.923880, 0.980785, 0.995185)),
    (Star(weights="fdla"), (0.600000, 0.777778, 0.882353, 0.939394)),
]


def rate(topology: Topology, n: int) -> float:
    return consensus_rate(topology.matrix(n))


@pytest.mark.parametrize(("topology", "rates"), TABLE, ids=lambda v: repr(v) if isinstance(v, Topology) else "")
def test_consensus_rates_of_the_table(topology: Topology, rates: tuple[float, ...]) -> None:
    assert [rate(topology, n) for n in (4, 8, 16, 32)] == pytest.approx(rates, abs=6e-7)


@pytest.mark.parametrize("n", [3, 5, 8, 13])
def test_star_closed_forms(n: int) -> None:
    """The centre's own weight stops the constant at 1/(n - 1); with negative weights allowed it does not."""
    for rule in ("laplacian", "fastest"):
        assert rate(Star(weights=rule), n) == pytest.approx(1 - 1 / (n - 1), abs=2e-8)
        assert Star(weights=rule).row(n, 0)[0] == pytest.approx(0, abs=2e-8)
    assert rate(Star(weights="fdla"), n) == pytest.approx((n - 1) / (n + 1), abs=2e-8)
    assert Star(weights="fdla").row(n, 0)[0] == pytest.approx(1 - 2 * (n - 1) / (n + 1), abs=2e-8)


@pytest.mark.parametrize(("graph", "n"), [(Ring, 9), (Torus, 9), (Torus, 16), (Hypercube, 8), (Chain, 3), (Star, 6)])
def test_edge_transitive_graphs_want_the_same_weight_everywhere(graph: type[UndirectedGraph], n: int) -> None:
    constant, best = graph(weights="laplacian").matrix(n), graph(weights="fastest").matrix(n)
    torch.testing.assert_close(best, constant, rtol=0, atol=2e-7)
    values = torch.linalg.eigvalsh(
        laplacian(n, tuple((i, j) for i in range(n) for j in graph().adjacent(n, i) if i < j))
    )
    if graph is not Star:
        expected = float((values[-1] - values[1]) / (values[-1] + values[1]))
        assert consensus_rate(constant) == pytest.approx(expected, abs=1e-9)
        assert -lambda_min(constant) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("graph", "n"), [(Grid(), 8), (Grid(), 12), (Tree(), 11), (ErdosRenyi(seed=2), 12), (SmallWorld(), 14)]
)
def test_no_other_weights_are_better(graph: UndirectedGraph, n: int) -> None:
    """Better than the other rules, and than any small change of the weights."""
    links = [graph.adjacent(n, i) for i in range(n)]
    rates = {rule: rate(FromAdjacency(links, rule), n) for rule in ("metropolis", "laplacian", "fastest", "fdla")}
    assert rates["fdla"] <= rates["fastest"] + 1e-8 < rates["laplacian"]
    assert rates["fastest"] < rates["metropolis"]
    edges = tuple((i, j) for i in range(n) for j in links[i] if i < j)
    best = torch.tensor(fastest(n, edges, positive=True), dtype=torch.float64)
    torch.manual_seed(0)
    for _ in range(40):
        other = (best + 0.01 * torch.randn(len(edges), dtype=torch.float64)).clamp(min=0)
        w = torch.zeros(n, n, dtype=torch.float64)
        for (i, j), weight in zip(edges, other.tolist(), strict=True):
            w[i, j] = w[j, i] = weight
        if float(w.sum(1).max()) <= 1:
            assert consensus_rate(w + torch.diag(1 - w.sum(1))) > rates["fastest"] - 2e-6


def test_a_bridge_gets_more_weight_than_the_rest() -> None:
    """Two triangles and a link between them: the bridge is the bottleneck."""
    barbell = FromAdjacency([[1, 2], [0, 2], [0, 1, 3], [2, 4, 5], [3, 5], [3, 4]], "fastest")
    assert barbell.row(6, 2)[3] > 1.5 * barbell.row(6, 2)[0] > 0
    assert barbell.row(6, 2)[0] == pytest.approx(barbell.row(6, 3)[4], abs=1e-8)


def test_links_that_do_not_help_are_left_out() -> None:
    found = ErdosRenyi(weights="fastest")
    links = sum(len(found.neighbors(16, i)) for i in range(16))
    assert links < sum(len(found.adjacent(16, i)) for i in range(16))
    assert all(i in found.receivers(16, j) for i in range(16) for j in found.neighbors(16, i))


@pytest.mark.parametrize("rule", ["laplacian", "fastest", "fdla"])
def test_the_complete_graph_stays_the_exact_mean(rule: str) -> None:
    for n in (1, 2, 3):
        assert Ring(weights=rule).is_mean(n)
        assert torch.equal(Ring(weights=rule).matrix(n).round(decimals=14), Complete().matrix(n).round(decimals=14))


def test_weights_are_rounded() -> None:
    """So that ranks whose linear algebra differs in the last bits find the same numbers."""
    weight = Tree(weights="fastest").row(7, 0)[1]
    assert weight == round(weight, 9)
    constant = Ring(weights="laplacian").row(8, 0)[1]
    assert constant == round(constant, 12) == pytest.approx(2 / (4 + 2 - 2 * math.cos(math.pi / 4)), abs=1e-12)
