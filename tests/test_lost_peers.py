"""Gossip that goes on without a dead neighbour, and lets the link to a slow one rest."""

from __future__ import annotations

import json
import re
import signal
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from broken import Processes, Troubled, crash, die, say
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from problems import p1, sgd
from torch import Tensor
from trainer_tools import Regressor, flat, regression, trainer

from lightning_dopt import (
    AtEnd,
    DeepSqueeze,
    Delay,
    Difference,
    Drifted,
    Engine,
    Every,
    GossipStrategy,
    Int8,
    Link,
    Median,
    MoniQua,
    NodeWeighted,
    OnePeerExponential,
    Plan,
    ProcessGroupWorld,
    PushSum,
    RandomPairs,
    RelaySum,
    ReplicaStrategy,
    Ring,
    Simulation,
    Sync,
    SyncError,
    TopK,
    Tree,
    plans,
)
from lightning_dopt.comm.links import HELD, SLOW, Links
from lightning_dopt.compress.memory import Averaged
from lightning_dopt.lost_peers import check_links
from lightning_dopt.strategies.survivors import warn_of_launcher
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


# ---------------------------------------------------------------------- a neighbour that is slow


def skips(simulation: Simulation, steps: int, late: dict[int, dict[int, float]]) -> list[list[int]]:
    """Run; ``late[step][rank]`` are seconds of that step. Returns for each rank the steps in which it left a link out."""
    out: list[list[int]] = [[] for _ in simulation.worlds]
    for step in range(1, steps + 1):
        simulation.seconds = [late.get(step, {}).get(r, 0.01) for r in range(len(out))]
        before = [w.ledger.skipped for w in simulation.worlds]
        simulation.run(1)
        for rank, world in enumerate(simulation.worlds):
            out[rank] += [step] * (world.ledger.skipped - before[rank])
    return out


PATIENT = {"link": Link(ms=1.0), "patience": 0.1, "rest": 4}


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_links_rest_at_both_ends_in_the_same_rounds(codec: Any) -> None:
    """Slow in step 3, told in step 4, at rest from step 5 to 8. Who waited is late himself, and is not found slow."""
    simulation = still(Plan([Sync(peers=Ring(), codec=codec)]), 6, **PATIENT)
    start = mean(simulation)
    resting = [5, 6, 7, 8]
    assert skips(simulation, 12, {3: {0: 0.5}}) == [sorted(resting * 2), resting, [], [], [], resting]
    torch.testing.assert_close(mean(simulation), start, rtol=0, atol=1e-12)


def test_a_link_between_two_slow_ranks_rests_once() -> None:
    """Ranks 0 and 1 are equally late, so neither waits for the other; their links to the outside rest."""
    simulation = still(Plan([Sync(peers=Ring())]), 6, **PATIENT)
    assert skips(simulation, 12, {3: {0: 0.5, 1: 0.5}}) == [[5, 6, 7, 8]] * 3 + [[], [], [5, 6, 7, 8]]


def test_a_link_goes_on_resting_while_the_rank_stays_slow() -> None:
    """It meets to find out (step 9), tells (10) and rests again."""
    simulation = still(Plan([Sync(peers=Ring())]), 5, **PATIENT)
    late = {step: {2: 0.5} for step in range(3, 30)}
    start = mean(simulation)
    resting = [5, 6, 7, 8, 11, 12, 13, 14, 17, 18]
    assert skips(simulation, 18, late) == [[], resting, sorted(resting * 2), resting, []]
    torch.testing.assert_close(mean(simulation), start, rtol=0, atol=1e-12)


def test_a_changing_graph_counts_the_meetings_of_the_pair() -> None:
    """One partner per step, the same again after two steps: slow in step 3, told in 5, at rest in 7 and 9.

    The partner of step 4 was not held up in step 3, so it finds the same rank slow.
    """
    simulation = still(Plan([Sync(peers=OnePeerHypercube())]), 4, **PATIENT | {"rest": 2})
    start, told = mean(simulation), skips(simulation, 13, {3: {0: 0.5}})
    (first,), (second,) = (OnePeerHypercube().neighbors(4, 0, t) for t in (2, 3))
    assert told == [{0: [7, 8, 9, 10], first: [7, 9], second: [8, 10]}.get(r, []) for r in range(4)]
    torch.testing.assert_close(mean(simulation), start, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "peers", [RandomPairs(), Hypercube(), NodeWeighted(Ring(), [0.3, 0.2] + [0.1, 0.05] * 3 + [0.05])]
)
def test_rests_at_random_keep_the_mean(peers: Topology) -> None:
    """Every rank is slow now and then."""
    n = 9 if isinstance(peers, NodeWeighted) else 8
    simulation = still(Plan([Sync(peers=peers)]), n, **PATIENT)
    weights = peers.stationary(n)
    start, g = mean(simulation, weights), torch.Generator().manual_seed(0)
    late = {s: {int(torch.randint(n, (), generator=g)): 0.5} for s in range(2, 60, 3)}
    left_out = skips(simulation, 60, late)
    assert sum(map(len, left_out)) > 20
    for step in range(60):
        assert sum(row.count(step) for row in left_out) % 2 == 0  # two ends of every link
    torch.testing.assert_close(mean(simulation, weights), start, rtol=0, atol=1e-12)


IN_FLIGHT = {
    "sent before the step": plans.gossip(Ring(), order="awc"),
    "combined before the step": plans.gossip(RandomPairs(), order="cta"),
    "a step late": Plan([Sync(when=Every(2), peers=Ring(), apply=Delay(1))]),
    "several exchanges": plans.gossip(OnePeerHypercube(), rounds=3),
    "copies per neighbour": Plan([Sync(peers=RandomPairs(), codec=Difference(TopK(0.5), 0.4))]),
}


@pytest.mark.parametrize("name", IN_FLIGHT)
def test_slow_and_dead_at_once(name: str) -> None:
    """While ranks are slow in turn one dies; from then on the mean of the others stays."""
    simulation = still(IN_FLIGHT[name], 8, on_lost_peer="continue", **PATIENT)
    start = mean(simulation)
    early = skips(simulation, 20, {s: {s % 8: 0.5} for s in range(2, 20, 3)})
    torch.testing.assert_close(mean(simulation), start, rtol=0, atol=1e-12)
    simulation.kill(5)
    simulation.run(1)  # what was in flight lands
    before, apart = mean(simulation), simulation.distance()
    skips(simulation, 60, {s: {s % 8: 0.5} for s in range(2, 30, 3)})
    torch.testing.assert_close(mean(simulation), before, rtol=0, atol=1e-12)
    assert sum(map(len, early)) > 0
    assert simulation.distance() <= 0.5 * apart + 1e-12


def test_gradient_tracking_stays_exact() -> None:
    """Scalars with unequal curvatures; a rank that is always slow."""
    simulation = Simulation(
        plans.gossip(Ring(), correction="gradient_tracking"),
        4,
        lambda r: {"x": torch.zeros(1, dtype=torch.float64)},
        p1().backward,
        sgd(0.05),
        step_seconds=[0.01, 0.01, 0.01, 0.4],
        **PATIENT,
    )
    simulation.run(700)
    assert simulation.worlds[3].ledger.skipped > 400
    torch.testing.assert_close(simulation.stacked(), torch.full((4, 1), 3.0, dtype=torch.float64), rtol=0, atol=1e-9)


def test_a_step_of_several_messages_rests_as_one() -> None:
    """Both dtypes of a model, and both exchanges of a round, count as one meeting; the second exchange tells already."""
    plan = plans.gossip(Ring(), rounds=2)
    simulation = Simulation(
        plan,
        4,
        lambda r: {"x": torch.full((2,), float(r), dtype=torch.float64), "y": torch.full((3,), float(r))},
        lambda r, p, t: [setattr(v, "grad", torch.zeros_like(v)) for v in p.values()] and None,
        sgd(0.1),
        **PATIENT,
    )
    assert skips(simulation, 10, {3: {0: 0.5}})[1] == [step for step in (4, 5, 6, 7) for _ in range(4)]


def doze(rank: int) -> None:
    """Rank 0 sleeps 0.5 s in each of steps 3 to 5."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    world = ProcessGroupWorld(timeout=timedelta(seconds=50), patience=0.25, rest=4)
    x = torch.full((3,), float(rank), dtype=torch.float64, requires_grad=True)
    engine = Engine(Plan([Sync(peers=Ring())]), {"x": x}, world)
    counts = []
    for step in range(1, 13):
        if rank == 0 and step in (3, 4, 5):
            time.sleep(0.5)
        before = world.ledger.skipped
        engine.run(engine.before_step())
        engine.run(engine.after_step())
        counts += [step] * (world.ledger.skipped - before)
    say(json.dumps([counts, float(engine.run(engine.consensus())[1][0][0]), world.ledger.entries["parameters"].bytes]))


def test_a_slow_process_is_left_alone() -> None:
    """Told in step 4, at rest from 5 to 8; the wait at step 9 is for the nap of step 5 and tells again."""
    with Processes(doze, 4) as processes:
        ended = processes.join(30)
    said = [json.loads(ended[r].text.splitlines()[-1]) for r in range(4)]
    resting = [5, 6, 7, 8, 11, 12]
    assert [row[0] for row in said] == [sorted(resting * 2), resting, [], resting]
    for _, average, _ in said:
        assert average == pytest.approx(1.5, abs=1e-12)
    assert [row[2] for row in said] == [24 * (24 - len(row[0])) for row in said]


# ---------------------------------------------------------------------- links by themselves


def test_a_complaint_needs_a_reason_and_an_answer() -> None:
    links = Links(0, 3, patience=1.0, rest=2)
    assert links.flag(1, 1) == 0
    links.met(1, 1, 0, HELD, 5.0)  # held up by others: not its fault
    assert links.flag(1, 2) == HELD  # but this rank was late, too
    links.met(1, 2, HELD, 0, 0.5)
    assert links.flag(1, 3) == 0
    links.met(1, 3, 0, 0, 1.5)
    assert links.flag(1, 4) == SLOW | HELD
    assert links.flag(2, 4) == HELD
    links.met(1, 4, SLOW | HELD, 0, 0.0)
    assert [links.open([1, 2], step) for step in (4, 5, 5, 6, 7)] == [[1, 2], [2], [2], [2], [1, 2]]
    links.met(2, 7, 0, SLOW, 0.0)
    assert links.open([1, 2], 8) == [1]


# ---------------------------------------------------------------------- what is refused

GOES_ON = Links(0, 4, "continue")
CANNOT: dict[str, tuple[Plan, str]] = {
    "everybody": (Plan([Sync()]), r"Sync\(peers=Complete\(\).*neighbour topology"),
    "directed": (Plan([Sync(peers=OnePeerExponential())]), r"reversible weights.*OnePeerHypercube"),
    "push-sum": (Plan([Sync(peers=Ring(), combine=PushSum())]), r"PushSum\(\)\): loses mass"),
    "relay": (Plan([Sync(peers=Tree(), combine=RelaySum())]), r"RelaySum\(\)\): loses mass"),
    "median": (Plan([Sync(peers=Ring(), combine=Median())]), r"Median\(\)\): loses mass"),
    "memory": (plans.robust_tracking(Ring(), Averaged(Int8(), 0.1)), "RobustTracking"),
    "tracking": (plans.gossip(Ring(), correction="gradient_tracking"), r"GradientTracking\(.*remembers"),
    "diffusion": (plans.gossip(Ring(), correction="exact_diffusion"), r"ExactDiffusion\(.*remembers"),
    "measured": (Plan([Sync(when=Drifted(0.1), peers=Ring())]), "needs all ranks to decide"),
    "change at the end": (Plan([Sync(when=AtEnd(), signal="delta", codec=Int8())]), "needs every rank"),
}


@pytest.mark.parametrize("name", CANNOT)
def test_what_cannot_go_on_is_refused(name: str) -> None:
    plan, pattern = CANNOT[name]
    plan.check(4)
    with pytest.raises(ValueError, match=pattern) as error:
        check_links(plan, 4, GOES_ON)
    assert "\n" not in str(error.value)
    check_links(plan, 1, Links(0, 1, "continue"))


def test_slow_ranks_are_refused_less() -> None:
    patient = Links(0, 4, patience=1.0)
    check_links(CANNOT["tracking"][0], 4, patient)
    check_links(CANNOT["measured"][0], 4, patient)
    with pytest.raises(ValueError, match=r"patience=1\.0: ExactDiffusion"):
        check_links(CANNOT["diffusion"][0], 4, patient)


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"on_lost_peer": "resume"}, r"on_lost_peer='resume'\): must be one of 'end', 'continue'"),
        ({"patience": 0.0}, r"patience=0\.0\): must be a number in \(0"),
        ({"patience": 1.0, "rest": 0}, r"rest=0\): must be an integer of at least 1"),
        ({"rest": 3}, r"rest=3\): links rest only with patience"),
        ({"patience": 1.0}, r"virtual time passes only with link"),
    ],
)
def test_bad_options(options: dict[str, Any], pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        still(Plan([Sync(peers=Ring())]), 4, **options)


# ---------------------------------------------------------------------- with Lightning, processes started one by one


def by_hand(rank: int, n: int, port: int) -> dict[str, str]:
    """One process per node."""
    return {"NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def fit(
    module: Regressor, folder: Path, n: int = 3, epochs: int = 3, resume: Path | None = None
) -> Callable[[int], None]:
    """Epochs of eight steps with validation, early stopping and a checkpoint each; says how it ended."""

    def job(rank: int) -> None:
        strategy = GossipStrategy(Ring(), timeout=timedelta(seconds=60), on_lost_peer="continue")
        kept = ModelCheckpoint(folder, monitor="val_loss", save_top_k=-1, save_last=True)
        calls = [kept, EarlyStopping("val_loss", patience=9)]
        fitter = trainer(strategy, 1, num_nodes=n, max_epochs=epochs, callbacks=calls)
        warnings.showwarning = lambda message, *_: say(str(message))
        fitter.fit(module, regression(32 * n), regression(8 * n), ckpt_path=resume)
        logged = {k: float(v) for k, v in fitter.callback_metrics.items()}
        assert strategy.world is not None
        ended = {
            "steps": fitter.global_step,
            "weights": flat(module).tolist(),
            "val_loss": logged["val_loss"],
            "lost": [strategy.world.lost, logged["comm/lost_peers"]],
            "skipped": logged["comm/skipped"],
            "best": kept.best_model_path,
        }
        say(json.dumps(ended))

    return job


@pytest.mark.trainer
@pytest.mark.parametrize(
    ("what", "where", "step"),
    [
        (die, "training_step", 5),
        (crash, "training_step", 5),
        (die, "validation_step", 8),
        (die, "on_save_checkpoint", 8),
    ],
    ids=["killed", "raised", "in validation", "while saving"],
)
def test_a_fit_goes_on(tmp_path: Path, what: Callable[[], None], where: str, step: int) -> None:
    with Processes(fit(Troubled(what, 2, step, where), tmp_path), 3, environment=by_hand) as processes:
        ended = processes.join(60)
    assert ended[2].code == (1 if what is crash else -signal.SIGKILL)
    assert (ended[0].code, ended[1].code) == (0, 0), ended[0].text + ended[1].text
    said = [json.loads(next(t for t in ended[r].text.splitlines() if t.startswith("{"))) for r in (0, 1)]
    assert said[0] == said[1]
    assert said[0]["steps"] == 24
    assert said[0]["lost"] == [[2], 1.0]
    assert said[0]["skipped"] == 24 - step
    last = torch.load(tmp_path / "last.ckpt", weights_only=False)
    module = Regressor()
    module.load_state_dict(last["state_dict"])
    torch.testing.assert_close(flat(module).tolist(), said[0]["weights"], rtol=1e-6, atol=1e-7)
    assert Path(said[0]["best"]).exists()


@pytest.mark.trainer
def test_the_next_run_starts_from_the_survivors(tmp_path: Path) -> None:
    with Processes(fit(Troubled(die, 2, 5), tmp_path, epochs=1), 3, environment=by_hand) as processes:
        assert [e.code for _, e in sorted(processes.join(60).items())] == [0, 0, -signal.SIGKILL]
    again = fit(Regressor(), tmp_path, epochs=2, resume=tmp_path / "last.ckpt")
    with Processes(again, 3, environment=by_hand) as processes:
        ended = processes.join(60)
    assert "replicas of rank(s) 2 are missing" in ended[0].text
    for rank in range(3):
        assert ended[rank].code == 0, ended[rank].text
        said = json.loads(next(t for t in ended[rank].text.splitlines() if t.startswith("{")))
        assert (said["steps"], said["lost"], said["skipped"]) == (16, [[], 0.0], 0.0)


@pytest.mark.trainer
def test_a_fit_ends_without_rank_0(tmp_path: Path) -> None:
    with Processes(fit(Troubled(die, 0, 5), tmp_path), 3, environment=by_hand) as processes:
        ended = processes.join(60)
    for rank in (1, 2):
        assert ended[rank].code == 1
        assert len(ended[rank].errors) == 1
        assert "rank 0, which is gone" in ended[rank].errors[0]


def test_the_strategy_refuses_before_any_process_starts() -> None:
    for strategy, pattern in [
        (lambda: GossipStrategy(on_lost_peer="continue"), "reversible weights"),
        (lambda: ReplicaStrategy(Sync(), on_lost_peer="continue"), "neighbour topology"),
        (lambda: GossipStrategy(Ring(), correction="exact_diffusion", patience=1.0), "remembers"),
        (lambda: GossipStrategy(Ring(), rest=3), r"GossipStrategy\(rest=3\)"),
        (lambda: ReplicaStrategy(on_lost_peer="go"), r"ReplicaStrategy\(on_lost_peer='go'\)"),  # type: ignore[arg-type]
    ]:
        with pytest.raises(ValueError, match=pattern):
            trainer(strategy(), 4)


def test_launchers_that_kill_all_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_launcher(False)
    with pytest.warns(UserWarning, match="Lightning ends all processes"):
        warn_of_launcher(True)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.warns(UserWarning, match="torchrun ends all processes"):
        warn_of_launcher(False)


def test_copies_of_neighbours_are_not_mixed_up() -> None:
    plan = Plan([Sync(peers=Ring(), codec=Difference(TopK(0.5), 0.4))])
    kinds = [still(plan, 4).run(3), still(plan, 4, on_lost_peer="continue").run(3)]
    for one, other in (kinds, kinds[::-1]):
        saved = one.engines[0].state_dict()
        with pytest.raises(ValueError, match="sync 'parameters': the checkpoint's copies of neighbours are from a run"):
            other.engines[0].load_state_dict(saved)
        again = still(plan, 4, on_lost_peer="continue" if one is kinds[1] else "end")
        again.engines[0].load_state_dict(saved)
        for name, tensor in one.engines[0].runners[0].lanes[0].channel.tensors().items():
            assert torch.equal(again.engines[0].runners[0].lanes[0].channel.tensors()[name], tensor)
