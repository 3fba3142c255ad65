"""Static and given graphs: closed forms, drawn graphs, own links, files, and push-sum on one-way links."""

from __future__ import annotations

import json
import math
from itertools import product as pairs
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_dopt.topology import (
    Chain,
    Complete,
    Directed,
    DirectedRing,
    Exponential,
    FromAdjacency,
    FromFile,
    FromMatrix,
    Grid,
    Hierarchical,
    Lazy,
    OnePeerExponential,
    RandomRegular,
    Ring,
    SmallWorld,
    Star,
    SymmetricExponential,
    Torus,
    Tree,
    UndirectedGraph,
    by_name,
    consensus_rate,
    lambda_min,
    names,
    summary,
)
from lightning_dopt.topology._graph import box, strongly_connected, uniform

PUSH = [[1, 2], [2], [3], [4, 0], [0]]


@pytest.mark.parametrize(("dims", "k"), [(1, 7), (2, 5), (3, 3), (3, 4)])
def test_torus_eigenvalues(dims: int, k: int) -> None:
    waves = [2 * math.cos(2 * math.pi * p / k) for p in range(k)]
    expected = sorted((1 + sum(some)) / (2 * dims + 1) for some in pairs(waves, repeat=dims))
    found = torch.linalg.eigvalsh(Torus(dims=dims).matrix(k**dims)).tolist()
    assert found == pytest.approx(expected, abs=1e-12)


def test_torus_sides() -> None:
    assert [Torus(dims=3).shape(n) for n in (1, 7, 8, 12, 32, 36, 64)] == [
        (1, 1, 1),
        (1, 1, 7),
        (2, 2, 2),
        (2, 2, 3),
        (2, 4, 4),
        (3, 3, 4),
        (4, 4, 4),
    ]
    assert box(60, 2) == (6, 10)
    assert Torus(dims=[2, 3, 4]).neighbors(24, 0) == [1, 3, 4, 8, 12]
    assert torch.equal(Torus(dims=[4, 4]).matrix(16), Torus().matrix(16))
    assert torch.equal(Torus(dims=3).matrix(8), by_name("hypercube").matrix(8))


def test_trees() -> None:
    assert [Tree().neighbors(7, i) for i in range(4)] == [[1, 2], [0, 3, 4], [0, 5, 6], [1]]
    assert [Tree(branching=3).neighbors(6, i) for i in range(3)] == [[1, 2, 3], [0, 4, 5], [0]]
    assert torch.equal(Tree(branching=1).matrix(6), Chain().matrix(6))
    for graph in (Tree(), Tree(3), Chain(), Star(), Grid(rows=1), Lazy(Tree())):
        assert graph.is_tree(9)
    for graph in (Ring(), Grid(), Torus(), Complete(), DirectedRing(), OnePeerExponential()):
        assert not graph.is_tree(9)
    assert Ring().is_tree(2)
    assert consensus_rate(Tree().matrix(15)) == pytest.approx(float(torch.linalg.eigvalsh(Tree().matrix(15))[-2]))


def test_symmetric_exponential() -> None:
    assert SymmetricExponential().neighbors(16, 0) == [1, 2, 4, 8, 12, 14, 15]
    assert SymmetricExponential(base=3).neighbors(16, 2) == [1, 3, 5, 15]
    assert SymmetricExponential().row(16, 5)[5] == 1 / 8
    w = SymmetricExponential().matrix(16)
    waves = [1 + 2 * sum(math.cos(2 * math.pi * f * o / 16) for o in (1, 2, 4)) + (-1) ** f for f in range(16)]
    assert torch.linalg.eigvalsh(w).tolist() == pytest.approx(sorted(x / 8 for x in waves), abs=1e-12)


@pytest.mark.parametrize(("k", "n"), [(2, 9), (3, 10), (4, 9), (5, 16)])
def test_random_regular_graphs_are_regular_and_differ(k: int, n: int) -> None:
    drawn = [tuple(tuple(RandomRegular(k, seed).adjacent(n, i)) for i in range(n)) for seed in range(12)]
    for links in drawn:
        assert {len(row) for row in links} == {k}
        assert all(i in links[j] and i != j for i, row in enumerate(links) for j in row)
        assert strongly_connected(links)
    assert len(set(drawn)) > 8


def test_random_regular_graphs_mix_like_good_ones() -> None:
    """Near the Ramanujan bound, where a ring with as many links is far from it."""
    bound = (1 + 2 * math.sqrt(3)) / 5
    rates = [consensus_rate(RandomRegular(4, seed).matrix(64)) for seed in range(5)]
    assert max(rates) < bound + 0.05
    assert consensus_rate(Ring(hops=2).matrix(64)) > 0.98


def test_small_worlds_lie_between_a_ring_and_a_random_graph() -> None:
    assert torch.equal(SmallWorld(p=0.0).matrix(12), Ring(hops=2).matrix(12))
    assert SmallWorld().is_mean(5)
    for seed in range(5):
        graph = SmallWorld(p=0.3, seed=seed)
        assert sum(graph.degree(40, i) for i in range(40)) == 2 * 80
        assert consensus_rate(graph.matrix(40)) < consensus_rate(Ring(hops=2).matrix(40)) - 0.02
    moved = (
        sum(j not in Ring(hops=2).neighbors(40, i) for i in range(40) for j in SmallWorld(p=0.3).adjacent(40, i)) / 2
    )
    assert moved == pytest.approx(0.3 * 80, abs=4 * math.sqrt(80 * 0.21))


@pytest.mark.parametrize(
    "between", [Ring(), Exponential(), OnePeerExponential(), FromMatrix([[0.5, 0.5], [0.25, 0.75]])]
)
def test_machines_mix_as_their_graph_does(between: UndirectedGraph) -> None:
    machines = 2 if isinstance(between, FromMatrix) else 6
    w, inner = Hierarchical(4, between).matrix(4 * machines), between.matrix(machines)
    torch.testing.assert_close(w, torch.kron(inner, torch.full((4, 4), 0.25, dtype=torch.float64)))
    found, expected = summary(Hierarchical(4, between), 4 * machines), summary(between, machines)
    assert found.rate == pytest.approx(expected.rate, abs=1e-12)
    assert found.messages == 4 * (expected.messages + 1) - 1


def test_push_weights_on_the_digraph_of_five() -> None:
    """Sums are kept; mixed ones converge to known values, their ratio with mixed values to the mean."""
    graph = Directed(PUSH)
    c = graph.matrix(5)
    assert c.sum(0).tolist() == pytest.approx([1] * 5)
    assert not graph.row_stochastic(5)
    u = torch.tensor([3.0, -1.0, 4.0, 1.0, 5.0], dtype=torch.float64)
    v = torch.ones(5, dtype=torch.float64)
    for _ in range(300):
        u, v = c @ u, c @ v
    assert v.tolist() == pytest.approx([1.071429, 0.714286, 1.428571, 1.071429, 0.714286], abs=6e-7)
    assert (u / v).tolist() == pytest.approx([2.4] * 5)
    assert graph.stationary(5) == [0.2] * 5
    found = summary(graph, 5)
    assert (found.row_stochastic, found.column_stochastic, found.doubly_stochastic) == (False, True, False)
    eigenvalues = torch.linalg.eigvals(c).abs().sort().values
    assert float(eigenvalues[-2]) <= found.rate < 1
    assert found.rate == pytest.approx(consensus_rate(c.T, v.tolist()))  # ratios move as the transpose does


def test_pull_weights_keep_the_perron_mean() -> None:
    graph = Directed(PUSH, weights="pull")
    w, x = graph.matrix(5), torch.tensor([3.0, -1.0, 4.0, 1.0, 5.0], dtype=torch.float64)
    assert graph.row_stochastic(5)
    assert not graph.column_stochastic(5)
    weights = torch.tensor(graph.stationary(5), dtype=torch.float64)
    assert (torch.linalg.matrix_power(w, 300) @ x).tolist() == pytest.approx([float(weights @ x)] * 5)
    assert max(abs(weight - 0.2) for weight in weights.tolist()) > 0.01
    assert graph.row(5, 0) == {0: 1 / 3, 3: 1 / 3, 4: 1 / 3}
    assert Directed(PUSH).row(5, 0) == {0: 1 / 3, 3: 1 / 3, 4: 1 / 2}


def test_regular_one_way_links_are_doubly_stochastic_either_way() -> None:
    ring = [[1], [2], [3], [0]]
    for weights in ("push", "pull"):
        assert torch.equal(Directed(ring, weights).matrix(4), DirectedRing().matrix(4))
        assert Directed(ring, weights).doubly_stochastic(4)
    assert Directed([[1], [0]]).is_mean(2)


class Graph:
    """Looks like a networkx graph, and is none."""

    def __init__(self, nodes: list[object], edges: list[tuple[object, ...]], directed: bool = False) -> None:
        self.nodes, self.edges, self.directed = nodes, edges, directed

    def is_directed(self) -> bool:
        return self.directed


def test_networkx_graphs() -> None:
    named = Graph(["c", "a", "b"], [("a", "b"), ("b", "c"), ("b", "a"), ("a", "a")])
    assert FromAdjacency.from_networkx(named).links == [[2], [2], [0, 1]]
    assert FromAdjacency.from_networkx(Graph([2, 0, 1], [(0, 1), (1, 2)])).links == [[1], [0, 2], [1]]
    arrows = Graph([0, 1, 2], [(0, 1, 0), (1, 2, 0), (2, 0, 0), (2, 0, 1)], directed=True)
    assert Directed.from_networkx(arrows, "pull") == Directed([[1], [2], [0]], "pull")
    assert Directed.from_networkx(named).links == [[2], [2], [0, 1]]
    with pytest.raises(ValueError, match=r"^FromAdjacency: the graph is directed; use Directed.from_networkx$"):
        FromAdjacency.from_networkx(arrows)
    with pytest.raises(ValueError, match=r"^Directed: the graph has no nodes; must have one for every rank$"):
        Directed.from_networkx(Graph([], []))


def test_real_networkx_graphs() -> None:
    networkx = pytest.importorskip("networkx")
    found = FromAdjacency.from_networkx(networkx.cycle_graph(5))
    assert torch.equal(found.matrix(5), Ring().matrix(5))
    arrows = networkx.MultiDiGraph([(0, 1), (0, 1), (1, 2), (2, 0)])
    assert Directed.from_networkx(arrows) == Directed([[1], [2], [0]])


RING = [[0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0]]
UNEVEN = [[0.5, 0.5, 0.0], [0.25, 0.5, 0.25], [0.0, 0.5, 0.5]]


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".npy", ".json"])
def test_files(tmp_path: Path, suffix: str) -> None:
    def write(name: str, rows: list[list[float]]) -> str:
        path = tmp_path / f"{name}{suffix}"
        text = {".txt": "# rank by rank\n" + "\n".join(" ".join(map(str, row)) for row in rows) + "\n\n"}
        text |= {".csv": "\n".join(",".join(map(str, row)) for row in rows), ".json": json.dumps(rows)}
        if suffix == ".npy":
            np.save(path, np.array(rows))
        else:
            path.write_text(text[suffix])
        return str(path)

    ring = FromFile(write("ring", RING))
    assert torch.equal(ring.matrix(4), Ring().matrix(4))
    assert torch.equal(FromFile(ring.path, "lazy").matrix(4), Ring(weights="lazy").matrix(4))
    matrix = FromFile(write("matrix", UNEVEN))
    assert torch.equal(matrix.matrix(3), FromMatrix(UNEVEN).matrix(3))
    assert matrix.stationary(3) == pytest.approx([0.25, 0.5, 0.25])
    assert not matrix.doubly_stochastic(3)
    assert FromFile(write("line", [[0, 1, 0], [1, 0, 1], [0, 1, 0]])).is_tree(3)
    with pytest.raises(ValueError, match=r"^FromAdjacency\(n=5\): the graph was given for 4 workers .*"):
        ring.check(5)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", r"must have one row for every rank, and is empty"),
        ("a.txt", "0 1\n1", r"must be square, but row 1 has 1 numbers and there are 2 rows"),
        ("a.txt", "0 x\n1 0", r"must hold rows of numbers, and reading stopped with: could not convert .*'x'"),
        ("a.json", "[[0, 1", r"must hold rows of numbers, and reading stopped with: Expecting .*"),
        ("a.json", "[1, 2]", r"must hold rows of numbers, and reading stopped with: 'int' object is not iterable"),
        ("a.npy", "not numpy", r"must hold rows of numbers, and reading stopped with: .*"),
        ("a.csv", "0,1,0\n1,0,0\n0,0,0", r".*must be connected, and is in several pieces"),
        ("a.csv", "0,1,0\n0,0,1\n1,0,0", r"an adjacency matrix must be symmetric, .* one-way links use Directed"),
        ("a.csv", "0.5,0.4\n0.5,0.5", r"FromMatrix: row 0 sums to 0.9; every row must sum to 1"),
        ("a.csv", "0.5,0.25\n0.5,0.75", r"row 0 sums to 0.75 but every column to 1; .*: transpose the matrix"),
        ("a.xls", "0 1\n1 0", r"the file name must end in .txt, .csv, .npy, .json"),
    ],
)
def test_refused_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"^FromFile\(path='.*{name}'\): {message}$"):
        FromFile(str(path))


def test_refused_weights_of_a_matrix_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "w.csv"
    path.write_text("0.5,0.5\n0.5,0.5\n")
    with pytest.raises(
        ValueError, match=r"weights='lazy' is for adjacency matrices, and the file holds a mixing matrix$"
    ):
        FromFile(str(path), "lazy")
    with pytest.raises(
        ValueError, match=r"^FromFile\(path='none.csv'\): there is no such file; relative paths start at .*"
    ):
        FromFile("none.csv")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Torus(rows=2, dims=3), r"Torus\(rows=2, dims=3\): rows are for two dimensions; .*"),
        (lambda: Torus(dims=0), r"Torus\(dims=0\): must be an integer of at least 1"),
        (lambda: Torus(dims=[2, 0]), r"Torus\(dims=0\): must be an integer of at least 1"),
        (lambda: Torus(dims=[2, 3]).check(8), r"Torus\(dims=\[2, 3\]\): 2 x 3 places hold 6 workers, not 8; .*"),
        (lambda: Tree(branching=0), r"Tree\(branching=0\): must be an integer of at least 1"),
        (lambda: SymmetricExponential(base=1), r"SymmetricExponential\(base=1\): must be an integer of at least 2"),
        (lambda: RandomRegular(3).check(3), r"RandomRegular\(k=3\): 3 workers have no 3 neighbours; k must be below 3"),
        (lambda: RandomRegular(3).check(7), r"RandomRegular\(k=3\): 7 workers are odd in number, so k must be even"),
        (lambda: RandomRegular(1).check(4), r"RandomRegular\(k=1\): 4 workers in pairs are not connected; .*"),
        (lambda: SmallWorld(p=2.0), r"SmallWorld\(p=2.0\): must be a number in \[0, 1\]"),
        (lambda: Hierarchical(0, Ring()), r"Hierarchical\(local=0\): must be an integer of at least 1"),
        (lambda: Hierarchical(4, Ring()).check(6), r"Hierarchical\(local=4\): 6 workers do not fill machines of 4"),
        (lambda: Hierarchical(2, "ring"), r"Hierarchical\(between='ring'\): must be a topology such as Ring\(\)"),
        (lambda: Directed([]), r"Directed\(links=\[\]\): must have one list for every rank"),
        (lambda: Directed([[1], [2]]), r"Directed: rank 1 sends to 2; must be another rank in 0..1"),
        (lambda: Directed([[1, 1], [0]]), r"Directed: rank 0 lists rank 1 more than once"),
        (lambda: Directed([[1], []]), r"Directed: every one of the 2 ranks must be reachable from every other; .*"),
        (lambda: Directed([[1], [0]], "shove"), r"Directed\(weights='shove'\): must be one of 'push', 'pull'"),
        (lambda: Directed([[1], [0]]).check(3), r"Directed\(n=3\): the graph was given for 2 workers .*"),
    ],
)
def test_error_lines(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        make()  # type: ignore[operator]


def test_names_in_snake_case() -> None:
    assert by_name("path") == by_name("chain") == Chain()
    assert "path" not in names()
    assert {"od_equi_dyn", "d_equi_static", "base_graph", "moshpit_grid", "random_regular"} <= set(names())


def test_random_integers_are_uniform() -> None:
    count = [sum(uniform(5, 3, k) == value for k in range(5000)) for value in range(5)]
    assert sum(count) == 5000
    assert max(abs(c - 1000) for c in count) < 4.5 * math.sqrt(1000)
    assert lambda_min(Lazy(Ring()).matrix(8)) > 0
