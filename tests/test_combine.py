"""The rules by which messages become one: repeated and accelerated gossip, push-sum, relayed sums, copies by edge."""

from __future__ import annotations

import math

import pytest
import torch
from problems import Quadratics, p1, p2
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_dopt import Difference, Identity, Int8, Plan, Simulation, Sync, TopK, plans
from lightning_dopt.combine import Chebyshev, Combine, Mixing, MomentumGossip, PushSum, RelaySum, Repeated
from lightning_dopt.comm import SimulatedWorld
from lightning_dopt.comm.simulated import lockstep
from lightning_dopt.engine import Engine
from lightning_dopt.forecast import forecast
from lightning_dopt.topology import (
    Chain,
    Complete,
    Directed,
    Exponential,
    Hypercube,
    Lazy,
    OnePeerExponential,
    OnePeerHypercube,
    RandomPairs,
    Ring,
    Star,
)
from lightning_dopt.topology.base import Topology


def mixing(plan: Plan, n: int, values: Tensor, steps: int) -> Simulation:
    """Only mixing: zero gradients; row ``i`` of ``values`` is where rank ``i`` starts."""

    def still(rank: int, replica: dict[str, Tensor], step: int) -> None:
        replica["x"].grad = torch.zeros_like(replica["x"])

    start = values.double()
    return Simulation(plan, n, lambda i: {"x": start[i]}, still, lambda ps: torch.optim.SGD(ps, lr=0.1)).run(steps)


def contraction(combine: Combine, peers: Topology, n: int) -> float:
    """The largest factor by which one round shrinks any disagreement; the mean's own is checked to be one."""
    plan = Plan([Sync(peers=peers, combine=combine)])
    matrix = mixing(plan, n, torch.eye(n), 1).stacked()
    torch.testing.assert_close(matrix.sum(0), torch.ones(n).double(), rtol=0, atol=1e-12)
    return float(torch.linalg.matrix_norm(matrix - 1 / n, 2))


def noise(n: int, d: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------- several exchanges


@pytest.mark.parametrize(("rounds", "error"), [(1, 0.18933), (2, 0.036679), (4, 0.0037416)])
def test_repeated_gossip_shrinks_the_bias_as_the_closed_form_says(rounds: int, error: float) -> None:
    sim = p1().simulate(Plan([Sync(peers=Ring(), combine=Repeated(rounds))]), 0.1).run(600)
    assert float((sim.stacked() - 3).abs().max()) == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("peers", [Ring(), OnePeerExponential(), Star()])
def test_repeated_gossip_is_a_power_of_the_matrix(peers: Topology) -> None:
    values, n = noise(6), 6
    got = mixing(Plan([Sync(peers=peers, combine=Repeated(3))]), n, values, 2).stacked()
    expected = values
    for t in range(6):  # a changing graph goes on with every exchange
        expected = peers.matrix(n, t) @ expected
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)


def test_repeated_gossip_over_the_complete_graph_sends_once() -> None:
    once, often = (mixing(Plan([Sync(combine=c)]), 4, noise(4), 1) for c in (Mixing(), Repeated(5)))
    assert torch.equal(once.stacked(), often.stacked())
    assert once.bytes == often.bytes


def test_repeated_lossy_gossip_is_as_many_steps_of_the_memory() -> None:
    values = noise(5, 40)
    codec = Difference(TopK(0.3), 0.3)
    often = mixing(Plan([Sync(peers=Ring(), codec=codec, combine=Repeated(3))]), 5, values, 4)
    alone = mixing(Plan([Sync(peers=Ring(), codec=codec)]), 5, values, 12)
    torch.testing.assert_close(often.stacked(), alone.stacked(), rtol=0, atol=1e-13)
    assert often.bytes == alone.bytes


@pytest.mark.parametrize(
    ("n", "rounds", "rate"),
    [(8, 2, 0.478856), (8, 4, 0.129499), (16, 2, 0.819971), (16, 4, 0.506424), (32, 8, 0.512915)],
)
def test_chebyshev_contracts_as_published(n: int, rounds: int, rate: float) -> None:
    assert contraction(Chebyshev(rounds), Ring(), n) == pytest.approx(rate, abs=2e-6)


@pytest.mark.parametrize("rounds", [1, 2, 3, 7])
@pytest.mark.parametrize("peers", [Chain(), Hypercube(), Lazy(Ring())])
def test_chebyshev_contracts_by_its_closed_form(peers: Topology, rounds: int) -> None:
    rho = contraction(Mixing(), peers, 8)
    assert contraction(Chebyshev(rounds), peers, 8) == pytest.approx(
        1 / math.cosh(rounds * math.acosh(1 / rho)), rel=1e-9
    )


def test_chebyshev_where_one_round_is_exact() -> None:
    assert contraction(Chebyshev(4), Complete(), 5) < 1e-12
    assert (
        mixing(Plan([Sync(combine=Chebyshev(4))]), 5, noise(5), 1).bytes == mixing(Plan([Sync()]), 5, noise(5), 1).bytes
    )


def test_momentum_gossip_accelerates_on_a_large_ring() -> None:
    values = noise(32)
    far = values - values.mean(0)

    def left(combine: Combine) -> float:
        x = mixing(Plan([Sync(peers=Ring(), combine=combine)]), 32, values, 1).stacked()
        torch.testing.assert_close(x.mean(0), values.mean(0), rtol=0, atol=1e-12)
        return float((x - values.mean(0)).square().sum() / far.square().sum())

    plain, fast = left(Repeated(200)), left(MomentumGossip(200))
    assert 1e-6 < plain < 1e-2
    assert fast < 1e-13
    assert left(MomentumGossip(1)) == pytest.approx(
        float(((torch.eye(32) - (torch.eye(32) - Ring().matrix(32)) * 0.75) @ far).square().sum() / far.square().sum())
    )


def test_momentum_gossip_over_a_changing_graph_with_a_given_condition() -> None:
    values = noise(8)
    got = mixing(Plan([Sync(peers=RandomPairs(), combine=MomentumGossip(60, chi=8.0))]), 8, values, 1).stacked()
    torch.testing.assert_close(got.mean(0), values.mean(0), rtol=0, atol=1e-12)
    assert float((got - values.mean(0)).square().sum() / (values - values.mean(0)).square().sum()) < 1e-2


# ---------------------------------------------------------------------- relayed sums


def test_relayed_models_arrive_one_link_per_round() -> None:
    values = torch.arange(5.0).view(5, 1)
    sim = mixing(Plan([Sync(peers=Chain(), combine=RelaySum())]), 5, values, 1)
    counts = [
        1 + sum(float(t) for k, t in e.runners[0].lanes[0].channel.combine_state.items() if "count" in k)
        for e in sim.engines
    ]
    assert counts == [2, 3, 3, 3, 2]
    assert sim.stacked().flatten().tolist() == pytest.approx(
        [(1 + 4 * 0) / 5, (0 + 2 + 3) / 5, (1 + 3 + 6) / 5, (2 + 4 + 9) / 5, (3 + 16) / 5]
    )
    assert sim.bytes == [16, 32, 32, 32, 16]  # a number and a count to each neighbour


@pytest.mark.parametrize("peers", [Chain(), Star()])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_relayed_sums_leave_no_bias(peers: Topology, momentum: float) -> None:
    problem = p2()
    sim = problem.simulate(
        Plan([Sync(peers=peers, combine=RelaySum())]), lambda ps: torch.optim.SGD(ps, lr=0.04, momentum=momentum)
    ).run(1500 if momentum else 3000)
    torch.testing.assert_close(sim.stacked(), problem.optimum().expand(8, 5), rtol=0, atol=1e-12)
    plain = problem.simulate(Plan([Sync(peers=peers)]), 0.04).run(200)
    assert float((plain.stacked() - problem.optimum()).abs().max()) > 1e-2


# ---------------------------------------------------------------------- push-sum


@pytest.mark.parametrize("peers", [Exponential(), OnePeerExponential(), Ring()])
def test_push_sum_is_plain_gossip_where_rows_sum_to_one(peers: Topology) -> None:
    pushed, plain = (p2().simulate(Plan([Sync(peers=peers, combine=c)]), 0.05).run(30) for c in (PushSum(), Mixing()))
    assert torch.equal(pushed.stacked(), plain.stacked())
    assert pushed.bytes == plain.bytes


# ---------------------------------------------------------------------- public copies by edge


@pytest.mark.parametrize("peers", [OnePeerExponential(), OnePeerHypercube(), RandomPairs()])
def test_differences_over_changing_graphs_with_exact_codes_are_plain_gossip(peers: Topology) -> None:
    coded, plain = (
        p2().simulate(Plan([Sync(peers=peers, codec=c)]), 0.1).run(40).stacked()
        for c in (Difference(Identity()), Identity())
    )
    torch.testing.assert_close(coded, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("peers", [OnePeerExponential(), OnePeerHypercube(), RandomPairs()])
@pytest.mark.parametrize(("codec", "gamma"), [(Int8(), 1.0), (TopK(0.2), 0.25)])
def test_differences_over_changing_graphs_agree_on_the_mean(peers: Topology, codec: Int8 | TopK, gamma: float) -> None:
    values = noise(8, 40)
    sim = mixing(Plan([Sync(peers=peers, codec=Difference(codec, gamma))]), 8, values, 600)
    torch.testing.assert_close(sim.stacked().mean(0), values.mean(0), rtol=0, atol=1e-12)
    assert sim.distance() < 1e-3


def test_lossy_gossip_by_edge_trains_like_exact_gossip() -> None:
    problem = p2()
    exact = problem.simulate(plans.gossip(OnePeerExponential()), 0.05).run(400).stacked()
    lossy = problem.simulate(plans.gossip(OnePeerExponential(), Int8()), 0.05).run(400)
    assert float((lossy.stacked() - exact).abs().max()) < 1e-3
    sent = problem.simulate(plans.gossip(OnePeerExponential()), 0.05).run(400).bytes[0]
    assert lossy.bytes[0] < 0.5 * sent


# ---------------------------------------------------------------------- speed


class Allocations(TorchDispatchMode):
    """Counts results of at least ``numel`` elements that own new memory."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.seen, self.names = numel, 0, []  # type: int, int, list[str]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.numel() >= self.numel and t.untyped_storage().data_ptr() not in known:
                self.seen += 1
                self.names.append(str(func))
        return out


@pytest.mark.parametrize("order", ["atc", "cta", "awc"])
@pytest.mark.parametrize("peers", [Ring(), OnePeerExponential(), RandomPairs()])
def test_gossip_allocates_nothing_in_the_steady_state(peers: Topology, order: str) -> None:
    size = 1000
    engine = Engine(plans.gossip(peers, order=order), {"x": torch.zeros(size, requires_grad=True)}, LoneWorld(4))  # type: ignore[arg-type]

    def step() -> None:
        engine.run(engine.before_step())
        engine.run(engine.on_gradients())
        engine.run(engine.after_step())

    for _ in range(12):
        step()
    with Allocations(size) as counted:
        for _ in range(12):
            step()
    assert counted.names == []


class LoneWorld(SimulatedWorld):
    """One of ``n`` ranks whose neighbours answer at once with what it sent itself, into the buffers that it lent."""

    def __init__(self, n: int) -> None:
        base = SimulatedWorld.create(n)[0]
        super().__init__(base.hub, 0, n, None)

    def exchange(self, send, receive, label, boxes=None):  # type: ignore[no-untyped-def]
        assert boxes is not None
        for j in receive:
            boxes[j].copy_(next(iter(send.values())))
        return _Ready(dict(boxes))

    def run(self, talk):  # type: ignore[no-untyped-def]
        with torch.no_grad():
            try:
                pending = next(talk)
                while True:
                    pending = talk.send(pending.wait())
            except StopIteration as stop:
                return stop.value


class _Ready:
    def __init__(self, result: dict[int, Tensor]) -> None:
        self.result = result

    def wait(self) -> dict[int, Tensor]:
        return self.result


def test_messages_of_one_peer_graphs_do_not_grow_with_the_number_of_ranks() -> None:
    sent = {
        n: Quadratics(torch.eye(3).expand(n, 3, 3), torch.zeros(n, 3)).simulate(plans.gossip(), 0.1).run(8).bytes
        for n in (4, 16, 32)
    }
    assert {b for each in sent.values() for b in each} == {8 * 3 * 8}


def test_buffers_beside_push_sum_are_averaged_not_scaled() -> None:
    digraph = Directed([[1, 2], [2], [3], [4, 0], [0]], "push")
    worlds = SimulatedWorld.create(5)
    buffers = [torch.full((3,), 7.0) for _ in worlds]
    engines = [
        Engine(plans.sgp(digraph), {"x": torch.zeros(2, requires_grad=True)}, world, buffers={"mean": b})
        for world, b in zip(worlds, buffers, strict=True)
    ]
    for _ in range(3):
        with torch.no_grad():
            lockstep([e.after_step() for e in engines])
    for b in buffers:
        torch.testing.assert_close(b, torch.full((3,), 7.0))


def test_copies_by_edge_are_forecast_and_warned_of() -> None:
    shapes = {"x": (1000,)}

    def copies(peers: Topology, n: int) -> float:
        return forecast(plans.gossip(peers, Int8()), n, shapes, steps=4).memory["codec memory"] / 4000

    assert copies(OnePeerExponential(), 16) == 8  # four ranks to send to, four to hear
    assert copies(OnePeerHypercube(), 8) == 6
    assert copies(Ring(), 16) == 2
    with pytest.warns(UserWarning, match="two copies of the parameters for every other of the 16 workers"):
        assert copies(RandomPairs(), 16) == 30
    sim = mixing(plans.gossip(OnePeerExponential(), Int8()), 16, noise(16), 8)
    assert len(sim.engines[0].runners[0].lanes[0].channel.memory_state) == 8
