"""Gossip that goes on without a dead neighbour, and lets the link to a slow one rest."""

from __future__ import annotations

import json
import re
import signal
import time
import warnings
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from broken import Processes, die, say
from problems import p1, sgd
from torch import Tensor

from lightning_dopt import (
    AtEnd,
    DeepSqueeze,
    Difference,
    Engine,
    Int8,
    MoniQua,
    NodeWeighted,
    Plan,
    ProcessGroupWorld,
    RandomPairs,
    Ring,
    Simulation,
    Sync,
    SyncError,
    TopK,
    plans,
)
from lightning_dopt.topology import Hypercube, OnePeerHypercube
from lightning_dopt.topology.base import Topology

pytestmark = pytest.mark.filterwarnings("ignore:rank .* lost rank")


def still(plan: Plan, n: int, **options: Any) -> Simulation:
    """Six random numbers per rank that only mixing changes."""
    g = torch.Generator().manual_seed(3)
    start = torch.randn(n, 6, generator=g, dtype=torch.float64)

    def backward(rank: int, parameters: dict[str, Tensor], step: int) -> None:
        parameters["x"].grad = torch.zeros(6, dtype=torch.float64)

    return Simulation(
        plan, n, lambda r: {"x": start[r].clone()}, backward, lambda p: torch.optim.SGD(p, 0.1), **options
    )


def mean(simulation: Simulation, weights: list[float] | None = None) -> Tensor:
    """Of those that are left."""
    x = simulation.stacked()
    w = torch.zeros(len(x), dtype=torch.float64)
    for rank in simulation.alive:
        w[rank] = 1.0 if weights is None else weights[rank]
    return (w / w.sum()) @ x


# ---------------------------------------------------------------------- a neighbour that is lost: many workers in one process

CODECS = [None, Difference(TopK(0.5), 0.4), DeepSqueeze(Int8(), 0.5), MoniQua(12, 10.0)]
GRAPHS: list[Topology] = [Ring(), RandomPairs(), OnePeerHypercube(), Hypercube()]


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("peers", GRAPHS, ids=str)
def test_the_mean_of_the_survivors_is_kept(peers: Topology, codec: Any) -> None:
    simulation = still(Plan([Sync(codec=codec, peers=peers)]), 8, on_lost_peer="continue").run(1)
    simulation.kill(2).kill(3)
    before = mean(simulation)
    apart = simulation.distance()
    simulation.run(60)
    torch.testing.assert_close(mean(simulation), before, rtol=0, atol=1e-12)
    assert simulation.distance() < 0.1 * apart


@pytest.mark.parametrize("codec", CODECS[:3], ids=str)
def test_the_weighted_mean_of_the_survivors_is_kept(codec: Any) -> None:
    shares = [0.4, 0.1, 0.2, 0.1, 0.1, 0.1]
    plan = Plan([Sync(codec=codec, peers=NodeWeighted(Ring(), shares))])
    simulation = still(plan, 6, on_lost_peer="continue").run(2).kill(3)
    before = mean(simulation, shares)
    simulation.run(120)
    torch.testing.assert_close(mean(simulation, shares), before, rtol=0, atol=1e-12)
    if codec is None:
        for rank in simulation.alive:
            torch.testing.assert_close(simulation.stacked()[rank], before, rtol=0, atol=1e-4)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_nothing_changes_while_nobody_is_lost(codec: Any) -> None:
    """``Difference`` keeps a copy per neighbour then, with the same results up to rounding."""
    plan = Plan([Sync(codec=codec, peers=Ring())])
    usual, going_on = still(plan, 5).run(30), still(plan, 5, on_lost_peer="continue").run(30)
    torch.testing.assert_close(usual.stacked(), going_on.stacked(), rtol=0, atol=1e-13)
    assert usual.bytes == going_on.bytes


def test_survivors_of_a_complete_ring_do_not_count_the_dead() -> None:
    """A ring of three is the complete graph, whose mean would otherwise be one sum over all."""
    simulation = still(Plan([Sync(peers=Ring())]), 3, on_lost_peer="continue").kill(0)
    before = mean(simulation)
    simulation.run(40)
    torch.testing.assert_close(simulation.stacked()[1], before, rtol=0, atol=1e-12)


def test_survivors_reach_their_own_optimum() -> None:
    """Four scalars with curvature and minimum 1 to 4; without the last the optimum is 14/6 instead of 3."""
    problem = p1()
    start = torch.zeros(1, dtype=torch.float64)
    simulation = Simulation(
        plans.gossip(Ring()), 4, lambda r: {"x": start.clone()}, problem.backward, sgd(0.1), on_lost_peer="continue"
    )
    simulation.run(30).kill(3)
    for lr in (0.05, 0.01, 0.002):
        for one in simulation.optimizers:
            one.param_groups[0]["lr"] = lr
        simulation.run(round(4 / lr))
    for rank in range(3):
        assert float(simulation.stacked()[rank]) == pytest.approx(14 / 6, abs=0.01)


def test_what_is_counted_and_said() -> None:
    simulation = still(Plan([Sync(peers=Ring())]), 5, on_lost_peer="continue").run(2).kill(3)
    with pytest.warns(UserWarning, match="lost rank 3") as seen:
        simulation.run(4)
    lines = sorted(str(w.message) for w in seen)
    assert lines == [f"rank {r}, step 3: lost rank 3, goes on without it (it never came)" for r in (2, 4)]
    assert [w.ledger.skipped for w in simulation.worlds] == [0, 0, 4, 0, 4]
    assert [w.lost for w in simulation.worlds] == [[], [], [3], [], [3]]
    simulation.distance()  # a sum over all tells everybody
    assert [simulation.worlds[r].lost for r in simulation.alive] == [[3]] * 4


def test_a_last_merge_is_over_the_survivors() -> None:
    plan = Plan([Sync(peers=Ring()), Sync(when=AtEnd())])
    simulation = still(plan, 5, on_lost_peer="continue").run(2).kill(1).run(2)
    expected = mean(simulation)
    simulation.finish()
    for rank in simulation.alive:
        torch.testing.assert_close(simulation.stacked()[rank], expected, rtol=0, atol=1e-12)


def test_by_default_a_lost_peer_ends_the_run() -> None:
    simulation = still(Plan([Sync(peers=Ring())]), 4).run(2).kill(1)
    with pytest.raises(SyncError, match=r"step 3, sync 'parameters': rank\(s\) 1 never took part"):
        simulation.run(1)


# ---------------------------------------------------------------------- a neighbour that is lost: real processes


def train(rank: int, plan: Plan, bad: int, at: int, when: str, steps: int = 80) -> None:
    """Scalars ``(x - rank)^2 / 2`` on gloo; rank ``bad`` is killed in step ``at``. Says what it ended with."""
    warnings.simplefilter("always")
    warnings.showwarning = lambda message, *_: say(str(message))  # the forked test runner records them
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    world = ProcessGroupWorld(timeout=timedelta(seconds=50), on_lost_peer="continue")
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    engine = Engine(plan, {"x": x}, world)

    def step(lr: float) -> None:
        if (rank, engine.step + 1, when) == (bad, at, "before"):
            die()
        engine.run(engine.before_step())
        if (rank, engine.step + 1, when) == (bad, at, "between"):
            time.sleep(0.5)
            die()
        with torch.no_grad():
            x.sub_(lr * (x - rank))
        engine.run(engine.after_step())

    for _ in range(steps):
        step(0.3)
    distance, means = engine.run(engine.consensus())
    mixed = []
    for _ in range(20):
        mixed.append(x.detach().clone())
        step(0.0)
    moved = engine.run(engine.consensus())[1]
    engine.run(engine.finish())
    say(
        json.dumps(
            {
                "mean": float(means[0][0]),
                "moved": float(moved[0][0] - means[0][0]),
                "distance": [float(distance), float(engine.run(engine.consensus())[0])],
                "x": float(x[0]),
                "lost": world.lost,
                "skipped": world.ledger.skipped,
            }
        )
    )


def survivors(plan: Plan, n: int, bad: int, at: int, when: str = "before") -> tuple[dict[int, Any], dict[int, str]]:
    """What the ranks said that were not killed, and all of what is on their standard error."""
    with Processes(lambda rank: train(rank, plan, bad, at, when), n) as processes:
        ended = processes.join(40)
    assert ended.pop(bad).code == -signal.SIGKILL
    assert {r: e.code for r, e in ended.items()} == dict.fromkeys(ended, 0), ended
    said = {r: next(line for line in e.text.splitlines() if line.startswith("{")) for r, e in ended.items()}
    return {r: json.loads(said[r]) for r in sorted(said)}, {r: e.text for r, e in ended.items()}


PLANS = {
    "ring": plans.gossip(Ring()),
    "random pairs": plans.gossip(RandomPairs()),
    "hypercube": plans.gossip(OnePeerHypercube()),
    "choco": Plan([Sync(peers=RandomPairs(), codec=Difference(TopK(0.34), 0.5))]),
    "in flight": plans.gossip(Ring(), order="awc"),
    "merged": Plan([Sync(peers=Ring()), Sync(when=AtEnd())]),
}


@pytest.mark.parametrize("name", PLANS)
def test_one_of_four_processes_is_killed(name: str) -> None:
    """Equal curvatures: the survivors' mean goes to the mean of their minima, 4/3, wherever they are apart."""
    said, texts = survivors(PLANS[name], 4, bad=2, at=9, when="between" if name == "in flight" else "before")
    for rank, ended in said.items():
        assert ended["mean"] == pytest.approx(4 / 3, abs=1e-9)
        assert abs(ended["moved"]) < 1e-12
        assert ended["distance"][1] < 0.2 * ended["distance"][0]
        assert ended["lost"] == [2]
        assert len(re.findall(rf"rank {rank}, step \d+: lost rank 2, goes on without it \(.*\)", texts[rank])) <= 1
        assert "lost rank 2" in texts[0] + texts[1] + texts[3]
        if name == "merged":
            assert ended["x"] == pytest.approx(4 / 3, abs=1e-9)
    if name in ("ring", "in flight"):
        first = 9 if name == "ring" else 10  # what was in flight has arrived
        assert {r: ended["skipped"] for r, ended in said.items()} == {0: 0, 1: 101 - first, 3: 101 - first}
        assert all(f"rank {r}, step {first}: lost rank 2" in texts[r] for r in (1, 3))


def test_rank_0_is_killed() -> None:
    """Its neighbours go on; the first sum over all ends the run and says why."""
    with Processes(lambda rank: train(rank, PLANS["ring"], 0, 9, "before"), 4) as processes:
        ended = processes.join(40)
    for rank in (1, 2, 3):
        assert ended[rank].code == 1
        assert re.search(
            rf"SyncError: rank {rank}, step 80, sync 'consensus': no answer .* from rank 0", ended[rank].text
        )
