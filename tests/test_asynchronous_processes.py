"""Pairwise gossip between real processes: nothing is lost, nothing hangs, whoever is missing is named."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from problems import p1
from torch import Tensor

from lightning_dopt import ProcessGroupWorld
from lightning_dopt.asynchronous import Acid, AsyncGossip, Averaging, Matchings, PairExchange
from lightning_dopt.comm import SyncError
from lightning_dopt.topology import Chain, Ring, Star
from lightning_dopt.topology.base import Topology

Momentum = Literal["none", "acid"]
Ranks = Callable[..., list[Any]]
SHORT = timedelta(seconds=20)


def jitter(rank: int, step: int, scale: float) -> float:
    """Seconds that a step takes: different on every rank and step."""
    return scale * ((7 * rank + 3 * step) % 5)


def sums(
    world: ProcessGroupWorld, topology: Topology, momentum: Momentum, counts: list[int], rate: float, seed: int
) -> dict[str, Any]:
    """Every rank adds numbers of its own as often as it is told; what it has at the end, and what it has added."""
    generator = torch.Generator().manual_seed(world.rank)
    p = {
        "a": torch.ones(3, 2, dtype=torch.float64).requires_grad_(),
        "b": torch.full((5,), 2.0, dtype=torch.float64).requires_grad_(),
    }
    gossip = AsyncGossip(p, topology, rate=rate, seed=seed, timeout=SHORT, momentum=momentum)
    gossip.start()
    added = 0.0
    for step in range(counts[world.rank]):
        time.sleep(jitter(world.rank, step, 0.001))
        for t in p.values():
            u = torch.randn(t.shape, generator=generator, dtype=torch.float64)
            t.data.add_(u)
            added += float(u.sum())
        gossip.local_step()
    gossip.stop()
    final = sum(float(t.detach().sum()) for t in p.values())
    second = sum(float(s.xt.sum()) for s in gossip._states if s.xt is not None)
    return {
        "x": final,
        "xt": second,
        "added": added,
        "meetings": gossip.meetings,
        "bytes": gossip.ledger.bytes,
        "staleness": gossip.staleness,
        "index": gossip.state_dict()["index"],
    }


@pytest.mark.parametrize("momentum", ["none", "acid"])
@pytest.mark.parametrize(
    ("topology", "counts", "rate"),
    [
        (Ring(), [40, 40, 40, 40], 1.0),
        (Ring(), [5, 60, 20, 0], 1.5),
        (Star(), [30, 10, 20, 25], 0.6),
        (Chain(), [0, 0, 0, 30], 2.0),
        (Ring(hops=2), [25, 30, 35, 40], 1.0),
    ],
    ids=lambda v: v.__class__.__name__ if isinstance(v, Topology) else None,
)
def test_every_change_is_counted_whatever_the_order(
    ranks: Ranks, topology: Topology, counts: list[int], rate: float, momentum: Momentum
) -> None:
    out = ranks(sums, 4, topology, momentum, counts, rate, 3)
    start, added = 4 * (6 * 1.0 + 5 * 2.0), sum(r["added"] for r in out)
    total = sum(r["x"] for r in out)
    if momentum == "none":
        assert total == pytest.approx(start + added, abs=1e-10)
    else:
        assert total + sum(r["xt"] for r in out) == pytest.approx(2 * (start + added), abs=1e-10)
    matchings = Matchings(topology, 4, seed=3)
    last = int(max(counts) * matchings.indexes_per_gradient(rate))
    held = [sum(matchings.partner(i, k) is not None for k in range(last)) for i in range(4)]
    fastest = counts.index(max(counts))  # decides how many there are; ranks that have stopped answer, but do not ask
    assert out[fastest]["meetings"] == held[fastest]
    assert all(r["meetings"] <= most for r, most in zip(out, held, strict=True))
    if len(set(counts)) == 1:
        assert [r["meetings"] for r in out] == held
    assert [r["bytes"] for r in out] == [11 * 8 * r["meetings"] for r in out]
    assert [sum(r["staleness"].values()) for r in out] == counts
    assert last <= max(r["index"] for r in out) <= last + matchings.colours


def train(world: ProcessGroupWorld, momentum: Momentum) -> tuple[float, float]:
    """P1 with SGD, no two ranks in step."""
    p = p1()
    x = {"x": torch.zeros(1, dtype=torch.float64, requires_grad=True)}
    optimizer = torch.optim.SGD(x.values(), lr=0.03)
    gossip = AsyncGossip(x, Ring(), rate=3.0, timeout=SHORT, momentum=momentum)
    gossip.start()
    for step in range(120):
        time.sleep(jitter(world.rank, step, 0.0005))
        p.backward(world.rank, x, step)
        optimizer.step()
        gossip.local_step()
    gossip.stop()
    distance = gossip.average()
    return float(x["x"]), distance


@pytest.mark.parametrize("momentum", ["none", "acid"])
def test_training_finds_the_common_optimum(ranks: Ranks, momentum: Momentum) -> None:
    out = ranks(train, 4, momentum)
    assert len(set(out)) == 1  # average() leaves the same on all ranks
    assert out[0][0] == pytest.approx(3.0, abs=0.15)
    assert out[0][1] < 0.5


def unequal(x: dict[str, Tensor], momentum: Momentum, value: float) -> AsyncGossip:
    """Gossip on a ring whose ranks start from unequal values."""
    gossip = AsyncGossip(x, Ring(), timeout=SHORT, momentum=momentum)
    first = {name: torch.full_like(t, value) for name, t in x.items()}
    second = {name: torch.full_like(t, 1.0) for name, t in x.items()}
    gossip.load_state_dict({"steps": 0, "index": 0, "momentum": momentum, "x": first, "xt": second})
    return gossip


def meet_and_look(world: ProcessGroupWorld, momentum: Momentum, steps: int) -> list[tuple[float, float]]:
    """Two ranks meet once per step and stop after each; the states after every meeting."""
    gossip = unequal({"x": torch.zeros(1, dtype=torch.float64)}, momentum, 4.0 * world.rank)
    out = []
    for _ in range(steps):
        gossip.start()
        gossip.local_step()
        gossip.stop()
        state = gossip.state_dict()
        out.append((float(state["x"]["x"]), float(state["xt"].get("x", 0.0))))
    return out


def test_two_ranks_follow_the_rules_by_hand(ranks: Ranks) -> None:
    assert ranks(meet_and_look, 2, "none", 1) == [[(2.0, 0.0)], [(2.0, 0.0)]]
    rule = Acid.of(Ring(), 2)
    pair = [rule.begin(torch.tensor([v], dtype=torch.float64)) for v in (0.0, 4.0)]
    for state in pair:
        assert state.xt is not None
        state.xt.fill_(1.0)
    expected: list[list[tuple[float, float]]] = [[], []]
    for k in range(3):
        difference = pair[0].x - pair[1].x
        rule.meet(pair[0], difference)
        rule.meet(pair[1], -difference)
        for path, state in zip(expected, pair, strict=True):
            rule.drift(state, k + 1.0)
            assert state.xt is not None
            path.append((float(state.x), float(state.xt)))
    for got, wanted in zip(ranks(meet_and_look, 2, "acid", 3), expected, strict=True):
        assert got == [pytest.approx(w) for w in wanted]


def averaged(world: ProcessGroupWorld) -> tuple[float, list[float]]:
    x = {"x": torch.zeros(3)}
    gossip = unequal(x, "acid", float(world.rank))
    return gossip.average(), x["x"].tolist()


def test_average_gives_the_mean_and_the_distance_before(ranks: Ranks) -> None:
    distance = (3 * (2 * 1.5**2 + 2 * 0.5**2) / 4) ** 0.5
    assert ranks(averaged, 4) == [(pytest.approx(distance), [1.5] * 3)] * 4


def slow_answers(world: ProcessGroupWorld) -> int:
    """Rank 1's only gradient lasts until rank 0 has taken 50 steps, with a meeting each."""
    gossip = AsyncGossip({"x": torch.zeros(4)}, Ring(), timeout=SHORT)
    gossip.start()
    for _ in range(50 if world.rank == 0 else 0):
        gossip.local_step()
    dist.barrier()
    held = gossip.meetings
    gossip.local_step()
    gossip.stop()
    assert gossip.meetings == 51
    return held


def test_a_slow_rank_answers_from_the_background(ranks: Ranks) -> None:
    busy, slow = ranks(slow_answers, 2)
    assert busy >= 50 - 8  # all but those that local_step need not wait for
    assert slow >= busy - 1  # which may not have counted yet what the other has


def bounded(world: ProcessGroupWorld) -> list[int]:
    """Rank 1's background is held up; how far rank 0 gets ahead."""
    x = {"x": torch.zeros(4)}
    gossip = AsyncGossip(x, Ring(), timeout=SHORT, max_ahead=3)
    gossip.start()
    dist.barrier()
    ahead = []
    if world.rank == 1:
        with gossip._lock:
            time.sleep(0.3)
    else:
        for step in range(20):
            gossip.local_step()
            ahead.append(step + 1 - gossip.meetings)
        stalled = gossip.ledger.stall_s
        assert stalled > 0.01
    gossip.stop()
    return ahead


def test_a_rank_never_runs_ahead_of_its_meetings(ranks: Ranks) -> None:
    ahead = ranks(bounded, 2)[0]
    assert max(ahead) == 3


# ------------------------------------------------------------------ what is saved


def saved(world: ProcessGroupWorld, momentum: Momentum) -> tuple[float, float, int, int]:
    def run(gossip: AsyncGossip, x: dict[str, Tensor], steps: int) -> None:
        gossip.start()
        for _ in range(steps):
            x["x"].add_(world.rank + 1.0)
            gossip.local_step()
        gossip.stop()

    first = {"x": torch.zeros(2, dtype=torch.float64)}
    gossip = AsyncGossip(first, Ring(), timeout=SHORT, momentum=momentum)
    run(gossip, first, 3 + world.rank)
    state = gossip.state_dict()
    second = {"x": torch.zeros(2, dtype=torch.float64)}
    again = AsyncGossip(second, Ring(), timeout=SHORT, momentum=momentum)
    again.load_state_dict(state)
    assert torch.equal(first["x"], second["x"])
    run(again, second, 4)
    xt = again.state_dict()["xt"].get("x", second["x"])
    return float(second["x"][0] + xt[0]) / 2, float(second["x"][1]), again.steps, again.state_dict()["index"]


@pytest.mark.parametrize("momentum", ["none", "acid"])
def test_a_saved_run_goes_on_where_it_stopped(ranks: Ranks, momentum: Momentum) -> None:
    out = ranks(saved, 4, momentum)
    wanted = sum((rank + 1.0) * (3 + rank + 4) for rank in range(4))
    assert sum(r[0] for r in out) == pytest.approx(wanted)
    assert [r[2] for r in out] == [7, 8, 9, 10]
    assert min(r[3] for r in out) >= 6 + 4  # the list of meetings goes on from the furthest rank's place


def misuse(world: ProcessGroupWorld) -> list[str]:
    x = {"x": torch.zeros(2)}
    gossip = AsyncGossip(x, Ring(), timeout=SHORT, momentum="none")
    said = []

    def expect(error: type[Exception], call: Callable[[], Any]) -> None:
        with pytest.raises(error) as caught:
            call()
        said.append(str(caught.value))

    expect(RuntimeError, gossip.local_step)
    expect(RuntimeError, gossip.stop)
    expect(RuntimeError, gossip.state_dict)
    gossip.start()
    expect(RuntimeError, gossip.start)
    expect(RuntimeError, gossip.average)
    expect(RuntimeError, lambda: gossip.load_state_dict({}))
    gossip.stop()
    state = gossip.state_dict()
    expect(ValueError, lambda: gossip.load_state_dict({**state, "momentum": "acid"}))
    expect(ValueError, lambda: gossip.load_state_dict({**state, "x": {"y": torch.zeros(2)}}))
    if world.rank == 0:
        fresh = AsyncGossip(x, Ring(), timeout=SHORT)
        fresh.load_state_dict(state)
    else:
        fresh = AsyncGossip(x, Ring(), timeout=SHORT)
    expect(ValueError, fresh.start)
    other = AsyncGossip({"x": torch.zeros(2 + world.rank)}, Ring(), timeout=SHORT)
    expect(ValueError, other.start)
    expect(ValueError, lambda: AsyncGossip(x, Ring(), rate=0.0))
    expect(ValueError, lambda: AsyncGossip(x, Ring(), momentum="much"))  # type: ignore[arg-type]
    expect(ValueError, lambda: AsyncGossip(x, Ring(), timeout=timedelta(0)))
    expect(ValueError, lambda: AsyncGossip(x, Ring(), max_ahead=0))
    expect(ValueError, lambda: PairExchange(Matchings(Ring(), 5), lambda k: [], lambda got: None))
    return said


def test_misuse_is_refused_in_one_line(ranks: Ranks) -> None:
    for said in ranks(misuse, 2):
        assert len(said) == 15
        assert all("\n" not in line for line in said)


def low_precision(world: ProcessGroupWorld) -> float:
    """Steps too small for bfloat16 to show one by one; the vector behind the parameters keeps what meetings do."""
    x = {"half": torch.ones(4, dtype=torch.bfloat16), "single": torch.ones(3)}
    gossip = AsyncGossip(x, Ring(), timeout=SHORT)
    gossip.start()
    for _ in range(4):
        x["half"].add_(2.0**-7 if world.rank == 0 else 0.0)
        gossip.local_step()
    gossip.stop()
    assert all(state.x.dtype == torch.float32 for state in gossip._states)
    gossip.average()
    return float(x["half"][0])


def test_half_precision_parameters_have_a_vector_of_full_precision(ranks: Ranks) -> None:
    out = ranks(low_precision, 2)
    assert out[0] == out[1] == pytest.approx(1 + 4 * 2.0**-7 / 2, abs=2.0**-8)


def alone(world: ProcessGroupWorld) -> float:
    x = {"x": torch.zeros(1)}
    gossip = AsyncGossip(x, Ring(), timeout=SHORT, momentum="acid")
    gossip.start()
    for _ in range(20):
        x["x"].add_(1.0)
        gossip.local_step()
    gossip.stop()
    return float(x["x"]) + gossip.average()


def test_one_rank_trains_alone(ranks: Ranks) -> None:
    assert ranks(alone, 1) == [20.0]


# ------------------------------------------------------------------ what can go wrong


def dies(world: ProcessGroupWorld) -> None:
    x = {"x": torch.zeros(1000)}
    gossip = AsyncGossip(x, Chain(), timeout=timedelta(seconds=30))
    gossip.start()
    for step in range(10_000):
        if world.rank == 0 and step == 20:
            os._exit(1)
        time.sleep(0.001)
        gossip.local_step()


def test_a_rank_that_dies_is_named_by_all_others_at_once(ranks: Ranks) -> None:
    begin = time.monotonic()
    with pytest.raises(AssertionError) as caught:
        ranks(dies, 3)
    assert time.monotonic() - begin < 10
    said = {line for line in str(caught.value).splitlines() if "SyncError" in line}
    assert any("lost rank 0" in line for line in said), said
    assert any("rank 2" in line and "rank 1 says that rank 0 is lost" in line for line in said), said


def hangs(world: ProcessGroupWorld, where: str) -> str:
    x = {"x": torch.zeros(4)}
    gossip = AsyncGossip(x, Ring(), timeout=SHORT, max_ahead=2)
    gossip.start()
    gossip._exchange.timeout = timedelta(seconds=0.5)
    dist.barrier()
    if world.rank == 1:
        with gossip._lock:
            time.sleep(1.2 if where == "step" else 0.0)
        if where == "stop":
            time.sleep(1.2)
        return ""

    def go_on() -> None:
        for _ in range(10):
            gossip.local_step()
        gossip.stop()

    with pytest.raises(SyncError) as caught:
        go_on()
    with pytest.raises(SyncError):
        gossip.local_step()
    return str(caught.value)


@pytest.mark.parametrize("where", ["step", "stop"])
def test_a_rank_that_hangs_is_named_after_the_timeout(ranks: Ranks, where: str) -> None:
    assert "no answer after 0.5 s from rank(s) 1" in ranks(hangs, 2, where)[0]


def gives_up(world: ProcessGroupWorld) -> str:
    gossip = AsyncGossip({"x": torch.zeros(4)}, Ring(), timeout=SHORT)
    gossip.start()
    if world.rank == 1:
        gossip.abort()
    begin = time.monotonic()
    with pytest.raises(SyncError) as caught:
        gossip.stop()
    assert time.monotonic() - begin < 5
    return str(caught.value)


def test_a_rank_that_gives_up_says_so(ranks: Ranks) -> None:
    first, second = ranks(gives_up, 2)
    assert "rank 1 gave up" in first
    assert "this rank gave up" in second


def closes(world: ProcessGroupWorld) -> None:
    gossip = AsyncGossip({"x": torch.zeros(4)}, Ring(), timeout=SHORT)
    gossip.start()
    gossip.close()  # not while meetings are held
    gossip.stop()
    gossip.close()
    with pytest.raises(SyncError, match="closed"):
        gossip.start()


def test_connections_are_given_back(ranks: Ranks) -> None:
    ranks(closes, 2)


def late(world: ProcessGroupWorld) -> str:
    gossip = AsyncGossip({"x": torch.zeros(4)}, Ring(), timeout=timedelta(seconds=0.3))
    if world.rank == 1:
        time.sleep(0.8)
        return ""
    with pytest.raises(SyncError) as caught:
        gossip.start()
    return str(caught.value)


def test_a_rank_that_does_not_start_ends_the_wait(ranks: Ranks) -> None:
    assert "not all ranks came within 0.3 s" in ranks(late, 2)[0]


def test_the_rule_without_momentum_keeps_no_second_vector() -> None:
    assert Averaging().begin(torch.zeros(2)).xt is None
