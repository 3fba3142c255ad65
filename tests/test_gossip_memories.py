"""Compressed gossip: what each memory keeps, how near ranks come, and which methods are exact on unequal data."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from problems import Quadratics, momentum_sgd, mosaic_run, mosaic_simulation
from torch import Tensor

from lightning_dopt import (
    Blocking,
    Complete,
    Difference,
    Identity,
    Int8,
    LowRank,
    Median,
    OnePeerExponential,
    Plan,
    RandK,
    RandomPairs,
    Ring,
    Sign,
    Simulation,
    Star,
    Sync,
    TopK,
    plans,
)
from lightning_dopt.combine import Repeated
from lightning_dopt.compress import DeepSqueeze, Memory, MoniQua, by_name
from lightning_dopt.compress.modulo import Modulo
from lightning_dopt.local import GradientTracking, Prox
from lightning_dopt.topology.base import Topology

N, D = 8, 40


def noise(n: int = N, d: int = D, seed: int = 1) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixing(codec: Memory, peers: Topology | None = None, start: Tensor | None = None, **more: Any) -> Simulation:
    """Ranks that only talk: row ``i`` of ``start`` is where rank ``i`` begins."""

    def still(rank: int, replica: dict[str, Tensor], step: int) -> None:
        replica["x"].grad = torch.zeros_like(replica["x"])

    begin = noise() if start is None else start
    plan = Plan([Sync(codec=codec, peers=peers or Ring(), **more)])
    return Simulation(plan, len(begin), lambda i: {"x": begin[i]}, still, lambda ps: torch.optim.SGD(ps, lr=0.1))


def spread(x: Tensor, start: Tensor | None = None) -> float:
    """Squared distance to the mean, relative to the beginning's."""
    begin = noise() if start is None else start
    return float((x - x.mean(0)).square().sum() / (begin - begin.mean(0)).square().sum())


def drift(x: Tensor, start: Tensor | None = None) -> float:
    """How far the mean has moved, relative to its norm."""
    begin = (noise() if start is None else start).mean(0)
    return float((x.mean(0) - begin).norm() / begin.norm())


# ---------------------------------------------------------------------- near or there: P3, the ring of 8


@pytest.mark.parametrize(
    ("gamma", "early", "late"),
    [(0.05, (1e-3, 3e-2), (1e-7, 1e-5)), (0.1, (1e-5, 1e-3), (1e-14, 1e-10)), (0.2, (1e-10, 1e-6), (1e-28, 1e-18))],
)
def test_difference_converges_at_the_speed_of_gamma(
    gamma: float, early: tuple[float, float], late: tuple[float, float]
) -> None:
    sim = mixing(Difference(TopK(0.1), gamma)).run(200)
    assert early[0] < spread(sim.stacked()) < early[1]
    x = sim.run(400).stacked()
    assert late[0] < spread(x) < late[1]
    assert drift(x) < 1e-12


def test_too_large_a_gamma_diverges() -> None:
    x = mixing(Difference(TopK(0.1), 0.4)).run(600).stacked()
    assert spread(x) > 1e-1
    assert drift(x) < 1e-10  # even then


@pytest.mark.parametrize(("eta", "level"), [(0.05, 1.1e-3), (0.1, 4.6e-3), (0.3, 4.9e-2)])
def test_deep_squeeze_comes_near_as_eta_says(eta: float, level: float) -> None:
    x = mixing(DeepSqueeze(TopK(0.1), eta)).run(600).stacked()
    assert level / 3 < spread(x) < level * 3
    assert drift(x) < 1e-12


@pytest.mark.parametrize(
    ("bits", "level"), [(3, 0.13), (4, 3.7e-2), (6, 2.2e-3), (8, 1.4e-4), (12, 4.6e-7), (16, 2.1e-9)]
)
def test_moniqua_comes_as_near_as_its_bits(bits: int, level: float) -> None:
    start = noise()
    theta = float((start - start.roll(1, 0)).abs().max()) / 0.85
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = mixing(MoniQua(bits, theta)).run(60).stacked()
    assert level / 2 < spread(x) < level * 2
    assert drift(x) < 1e-12


def test_moniqua_with_too_small_a_theta_fails_and_says_so() -> None:
    with pytest.warns(
        UserWarning, match=r"MoniQua\(bits=8, theta=0.3\): a coordinate is 0.\d+ from a neighbour's, [^\n]*larger"
    ):
        x = mixing(MoniQua(8, 0.3)).run(300).stacked()
    assert 0.1 < spread(x) < 10


@pytest.mark.parametrize("bits", range(1, 17))
def test_moniqua_is_wrong_by_half_a_quantum_at_most(bits: int) -> None:
    memory, mine = MoniQua(bits, 0.5), 10.0 * noise(1, 1000)[0]
    theirs = mine + torch.linspace(-0.5, 0.5, 1000, dtype=torch.float64) * 0.9
    heard = memory.localise(memory.codec.roundtrip(memory.load(theirs, {})), mine)
    quantum = memory.modulus / 2**bits
    assert memory.modulus == pytest.approx(2 * 0.5 / (1 - 2.0**-bits))
    assert float((heard - theirs).abs().max()) <= quantum / 2 + 1e-7
    assert float((heard - theirs).abs().max()) > quantum / 4  # and no better
    other = memory.localise(memory.codec.roundtrip(memory.load(theirs, {})), theirs)
    assert torch.equal(heard, other)  # all receivers make the same number of it


def test_naive_compression_loses_the_mean() -> None:
    """What the engine refuses: averages of compressed models, here beside the memories that make up for it."""
    x, codec = noise(), TopK(0.1)
    w = Ring().matrix(N).double()
    for _ in range(600):
        x = w @ torch.stack([codec.roundtrip(row) for row in x])
    assert float(x.mean(0).norm() / noise().mean(0).norm()) < 0.7
    with pytest.raises(
        ValueError, match=r"^Sync\(signal='value', codec=TopK\(ratio=0.1\)\): packing the weights [^\n]*$"
    ):
        Sync(codec=codec, peers=Ring())


# ---------------------------------------------------------------------- limiting cases, and everywhere


@pytest.mark.parametrize("memory", [DeepSqueeze(Identity(), 1.0), Difference(Identity(), 1.0)], ids=repr)
@pytest.mark.parametrize("peers", [Ring(), Star(), Complete(), OnePeerExponential()], ids=repr)
def test_exact_messages_are_plain_gossip(memory: Memory, peers: Topology) -> None:
    x, expected = mixing(memory, peers).run(4).stacked(), noise()
    for t in range(4):
        expected = peers.matrix(N, t).double() @ expected
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "codec", [TopK(0.1), RandK(0.2), Sign(block=8), Int8(stochastic=True), LowRank(1, 1.0)], ids=repr
)
@pytest.mark.parametrize("peers", [Ring(), Complete(), OnePeerExponential(), RandomPairs(seed=3)], ids=repr)
@pytest.mark.parametrize(
    "memory", [lambda c: DeepSqueeze(c, 0.2), lambda c: Difference(c, 0.1)], ids=["squeeze", "choco"]
)
def test_any_compressor_over_any_graph_keeps_the_mean(
    memory: Callable[[Any], Memory], peers: Topology, codec: Any
) -> None:
    x = mixing(memory(codec), peers).run(60).stacked()
    assert drift(x) < 1e-12
    assert spread(x) < 0.8


@pytest.mark.parametrize("peers", [OnePeerExponential(), RandomPairs(seed=3), Complete(), Star()], ids=repr)
@pytest.mark.parametrize(("bits", "floor"), [(8, 3e-2), (4, 0.4)])
def test_moniqua_over_other_graphs(peers: Topology, bits: int, floor: float) -> None:
    start = noise()
    theta = float((start[:, None] - start[None]).abs().max()) / 0.85
    x = mixing(MoniQua(bits, theta), peers).run(60).stacked()
    assert drift(x) < 1e-12
    assert spread(x) ** 0.5 < floor


def test_deep_squeeze_does_not_mind_a_changing_graph() -> None:
    levels = [
        spread(mixing(DeepSqueeze(TopK(0.1), 0.1), p).run(300).stacked())
        for p in (Ring(), OnePeerExponential(), RandomPairs())
    ]
    assert all(level < 2e-2 for level in levels)


def test_copies_by_edge_converge_over_a_changing_graph() -> None:
    x = mixing(Difference(TopK(0.2), 0.3), OnePeerExponential()).run(600).stacked()
    assert spread(x) < 1e-10
    assert drift(x) < 1e-12


def test_several_exchanges_are_as_many_rounds() -> None:
    for memory in (DeepSqueeze(TopK(0.2), 0.2), MoniQua(6, 8.0)):
        three = mixing(memory, combine=Repeated(3)).run(2).stacked()
        torch.testing.assert_close(three, mixing(memory).run(6).stacked(), rtol=0, atol=1e-14)


def test_the_median_of_completed_values() -> None:
    start = noise(4, 6, seed=2)
    x = mixing(MoniQua(16, 8.0), Complete(), start, combine=Median()).run(1).stacked()
    middle = start.sort(0).values[1:3].mean(0)
    torch.testing.assert_close(x, middle.expand(4, 6), rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match=r"^Sync\(codec=DeepSqueeze[^\n]*: this memory needs a weighted sum$"):
        Sync(codec=DeepSqueeze(TopK(0.1), 0.1), peers=Ring(), combine=Median())


@pytest.mark.parametrize("memory", [DeepSqueeze(TopK(0.1), 0.1), MoniQua(8, 1.0)], ids=repr)
def test_values_over_the_complete_graph_and_never_deltas(memory: Memory) -> None:
    assert Sync(codec=memory).signal == "value"
    with pytest.raises(
        ValueError, match=rf"^Sync\(signal='delta', codec={type(memory).__name__}\([^\n]*use signal='value'$"
    ):
        Sync(codec=memory, signal="delta")
    assert by_name(type(memory).__name__, **memory.arguments()) == memory


# ---------------------------------------------------------------------- bytes


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("d", [1, 7, 8, 9, 1001, (1 << 17) + 5])
def test_remainders_are_packed_to_the_bit(bits: int, d: int) -> None:
    codec = Modulo(bits)
    x = (3.0 * noise(1, d)[0] * 2**18).round().float() / 2**18  # x + 2 is exact
    payload = codec.encode(x)
    assert payload.numel() == codec.payload_bytes((d,)) == -(-bits * d // 8)
    q = codec.decode(payload, (d,)).double()
    assert float(q.min()) >= -0.5
    assert float(q.max()) < 0.5
    assert torch.equal(q * 2**bits, (q * 2**bits).round())
    off = x.double() - q
    assert float((off - off.round()).abs().max()) <= 2.0 ** -(bits + 1) + 1e-6
    assert torch.equal(codec.encode(x + 2.0), payload)


def test_remainders_add_up_in_any_layout() -> None:
    codec, x = Modulo(5), noise(6, 9).float()
    out = torch.ones(9, 6).T
    codec.decode_add(codec.encode(x), out, 2.0)
    torch.testing.assert_close(out, 1.0 + 2.0 * codec.roundtrip(x), rtol=0, atol=1e-6)
    assert codec.encode(torch.zeros(0)).numel() == 0
    with pytest.raises(ValueError, match=r"^Modulo\(bits=5\): a message of 3 bytes, but shape \(6, 9\) takes 34$"):
        codec.decode_add(torch.zeros(3, dtype=torch.uint8), torch.zeros(6, 9))


@pytest.mark.parametrize(
    ("memory", "message"),
    [(MoniQua(4, 8.0), D // 2), (MoniQua(3, 8.0), 15), (DeepSqueeze(TopK(0.1), 0.1), 4 * 5), (DeepSqueeze(Sign(), 0.1), 9)],
    ids=repr,
)  # fmt: skip
def test_bytes_are_those_of_the_compressor(memory: Memory, message: int) -> None:
    assert memory.codec.payload_bytes((D,)) == message
    assert mixing(memory).run(3).bytes == [3 * 2 * message] * N


# ---------------------------------------------------------------------- training on unequal data


def unequal() -> Quadratics:
    """Eight least squares problems in forty dimensions with solutions that have nothing in common."""
    rng = np.random.default_rng(0)
    a, solutions = rng.normal(size=(N, 60, D)), rng.normal(size=(N, D))
    b = np.einsum("nij,nj->ni", a, solutions) + 0.1 * rng.normal(size=(N, 60))
    best = np.stack([np.linalg.lstsq(m, v, rcond=None)[0] for m, v in zip(a, b, strict=True)])
    return Quadratics(torch.from_numpy(np.einsum("nij,nik->njk", a, a) / 60), torch.from_numpy(best))


PROBLEM = unequal()
BEST = PROBLEM.optimum()


def error(plan: Plan, steps: int, lr: float = 0.02) -> float:
    x = PROBLEM.simulate(plan, lr).run(steps).stacked()
    return float((x - BEST).square().sum() / (N * BEST.square().sum()))


def cdproxsgt(l1: float, lr: float, steps: int) -> Tensor:
    wire = Difference(TopK(0.2), 0.3)
    syncs = [Sync(what="gradients", codec=wire, peers=Ring()), Sync(codec=wire, peers=Ring())]
    return PROBLEM.simulate(Plan(syncs, [GradientTracking(), Prox(l1)]), lr).run(steps).stacked()


def test_choco_and_plain_gossip_stay_away_from_the_optimum() -> None:
    assert 5e-3 < error(plans.gossip(Ring(), order="awc"), 600) < 5e-2
    assert 5e-2 < error(plans.gossip(Ring(), Difference(TopK(0.2), 0.3)), 600) < 5e-1


def test_beer_is_exact() -> None:
    assert error(plans.beer(Ring(), TopK(0.2), 0.3), 600, lr=0.05) < 1e-11


def test_cdproxsgt_finds_the_sparse_optimum_on_all_ranks() -> None:
    l1, lr = 0.3, 0.05
    x = torch.zeros(D, dtype=torch.float64)
    for _ in range(2000):
        x = x - 0.2 * torch.stack([PROBLEM.gradient(i, x) for i in range(N)]).mean(0)
        x = x.sign() * (x.abs() - 0.2 * l1).clamp(min=0.0)
    assert 0 < int((x == 0).sum()) < D
    got = cdproxsgt(l1, lr, 900)
    torch.testing.assert_close(got, x.expand(N, D), rtol=0, atol=1e-9)


def test_beer_is_its_recursion_and_tracks_the_sum() -> None:
    codec, gamma, lr = TopK(0.2), 0.3, 0.05
    mean_of = Ring().matrix(N).double()
    x = torch.zeros(N, D, dtype=torch.float64)
    g = v = torch.stack([PROBLEM.gradient(i, x[i]) for i in range(N)])
    pack = lambda rows: torch.stack([codec.roundtrip(row) for row in rows])  # noqa: E731
    big_g, h = pack(v), pack(x)
    sim = PROBLEM.simulate(plans.beer(Ring(), codec, gamma), lr)
    for _ in range(40):
        x = x + gamma * (mean_of @ h - h) - lr * v
        h = h + pack(x - h)
        new = torch.stack([PROBLEM.gradient(i, x[i]) for i in range(N)])
        v = v + gamma * (mean_of @ big_g - big_g) + new - g
        big_g, g = big_g + pack(v - big_g), new
        torch.testing.assert_close(sim.run(1).stacked(), x, rtol=0, atol=1e-12)
        tracked = sum(e.corrections[0].state()["y.x"] for e in sim.engines)
        seen = sum(e.corrections[0].state()["g.x"] for e in sim.engines)
        torch.testing.assert_close(tracked, seen, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("peers", [Ring(), OnePeerExponential()], ids=repr)
def test_memories_without_tracking_follow_the_mean_gradient(peers: Topology) -> None:
    """Mean of the ranks = mean of the steps: with equal curvatures that is centralized descent, whatever is lost on the way."""
    eye = torch.eye(5, dtype=torch.float64).expand(4, 5, 5)
    problem = Quadratics(eye, noise(4, 5))
    path = problem.centralized(50, 0.1)
    for memory in (DeepSqueeze(TopK(0.2), 0.3), MoniQua(8, 10.0)):
        x = problem.simulate(Plan([Sync(codec=memory, peers=peers)]), 0.1).run(50).stacked()
        torch.testing.assert_close(x.mean(0), path[-1], rtol=0, atol=1e-12)


# ---------------------------------------------------------------------- real processes

WIRED = {
    "moniqua ring": Plan([Sync(codec=MoniQua(7, 30.0), peers=Ring())]),
    "moniqua awc pairs": Plan([Sync(codec=MoniQua(8, 30.0), peers=RandomPairs(seed=2), apply=Blocking("awc"))]),
    "moniqua complete": Plan([Sync(codec=MoniQua(16, 30.0))]),
    "deep squeeze ring": Plan([Sync(codec=DeepSqueeze(TopK(0.2), 0.3), peers=Ring())]),
    "deep squeeze one-peer": Plan([Sync(codec=DeepSqueeze(Int8(stochastic=True), 0.5), peers=OnePeerExponential())]),
    "deep squeeze complete": Plan([Sync(codec=DeepSqueeze(TopK(0.3), 0.5))]),
    "choco one-peer": Plan([Sync(codec=Difference(TopK(0.3), 0.3), peers=OnePeerExponential())]),
    "beer": plans.beer(Ring(), TopK(0.3), 0.3),
}


@pytest.mark.parametrize("name", WIRED)
def test_processes_do_what_the_simulation_does(ranks: Callable[..., list[Any]], name: str) -> None:
    sim = mosaic_simulation(WIRED[name], 4).run(6).finish()
    for rank, (weights, ledger, _) in enumerate(ranks(mosaic_run, 4, WIRED[name], 6, momentum_sgd, None)):
        for key, value in weights.items():
            assert torch.equal(value, sim.replicas[rank][key].detach()), key
        expected = sim.worlds[rank].ledger.state_dict()
        for label, numbers in ledger.items():
            assert numbers | {"stall_s": 0.0} == expected[label]
