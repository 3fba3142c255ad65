"""A hub between real processes: against the synchronous method, the virtual clock, and the sum of what was pushed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import lightning_dopt as dopt
from lightning_dopt import LocalSteps, ProcessGroupWorld, Simulation
from lightning_dopt.asynchronous import (
    AsyncLocal,
    Count,
    HubRule,
    OnArrival,
    Timer,
    delayed_nesterov,
    fedasync,
    fedbuff,
)
from lightning_dopt.comm import SyncError
from lightning_dopt.outer import SGD, Nesterov

Ranks = Callable[..., list[Any]]
SHORT = timedelta(seconds=20)


def start(lr: float = 0.05) -> tuple[dict[str, Tensor], torch.optim.Optimizer]:
    x = {"x": torch.zeros(8, dtype=torch.float64, requires_grad=True)}
    return x, torch.optim.SGD(x.values(), lr=lr)


def backward(rank: int, x: dict[str, Tensor], step: int) -> None:
    x["x"].grad = (rank + 1.0) * (x["x"].detach() - torch.arange(8.0, dtype=torch.float64) * (rank + 1))


def train(
    world: ProcessGroupWorld, rule: HubRule, steps: list[int], local_steps: int = 5, nap: float = 0.0
) -> dict[str, Any]:
    x, optimizer = start()
    local = AsyncLocal(x, rule, local_steps, timeout=SHORT)
    local.start()
    for step in range(steps[world.rank]):
        if nap:  # equally fast on a busy machine, too: the hub weighs pushes, not workers
            dist.barrier(group=world.group)
            time.sleep(nap)
        backward(world.rank, x, step)
        optimizer.step()
        local.local_step()
    local.stop()
    hub = local.desk.hub if local.desk is not None else None
    return {
        "x": x["x"].detach().clone(),
        "bytes": local.ledger.bytes,
        "pushes": local.pushes,
        "hub": (hub.version, hub.pushes, hub.steps) if hub is not None else None,
    }


def test_waiting_for_all_is_diloco(ranks: Ranks) -> None:
    """To rounding: the hub adds up in another order than an all-reduce."""
    out = ranks(train, 3, HubRule(Count(3, wait=True), outer=Nesterov(0.7, 0.9)), [20, 20, 20])
    simulation = Simulation(
        dopt.plans.diloco(5, 0.7, 0.9),
        n=3,
        init=lambda rank: {"x": torch.zeros(8, dtype=torch.float64)},
        backward=backward,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    ).run(20)
    for found in out:
        torch.testing.assert_close(found["x"], simulation.stacked()[0], rtol=1e-12, atol=1e-12)
        assert torch.equal(found["x"], out[0]["x"])
    assert out[0]["hub"] == (4, [4, 4, 4], [20, 20, 20])
    assert out[1]["bytes"] == 4 * 8 * 8  # to the hub: floats of four pushes
    assert out[0]["bytes"] == 2 * (4 + 1) * 8 * 8  # to two workers: the reference after each, and at the end


def pushed(world: ProcessGroupWorld, rule: HubRule, steps: list[int]) -> dict[str, Any]:
    """Every rank adds what it likes; the sum of it all."""
    x = {"x": torch.zeros(8, dtype=torch.float64)}
    local = AsyncLocal(x, rule, LocalSteps(4), timeout=SHORT)
    local.start()
    generator, added = torch.Generator().manual_seed(world.rank), torch.zeros(8, dtype=torch.float64)
    for step in range(steps[world.rank]):
        time.sleep(0.001 * ((3 * world.rank + step) % 4))
        u = torch.randn(8, generator=generator, dtype=torch.float64)
        x["x"].add_(u)
        added += u
        local.local_step()
    local.stop()
    return {"x": x["x"], "added": added, "hub": local.desk.hub.steps if local.desk is not None else None}


@pytest.mark.parametrize(
    "rule", [HubRule(outer=SGD(0.25)), HubRule(OnArrival(grace=0.01), outer=SGD(0.25))], ids=["arrival", "grace"]
)
def test_every_push_counts_once_whatever_the_order(ranks: Ranks, rule: HubRule) -> None:
    steps = [30, 5, 17, 0]
    out = ranks(pushed, 4, rule, steps)
    total = sum(r["added"] for r in out)
    for found in out:
        torch.testing.assert_close(found["x"], 0.25 * total, rtol=1e-12, atol=1e-12)
    assert out[0]["hub"] == steps  # the rest of a phase is pushed at the end


@pytest.mark.parametrize(
    "rule",
    [delayed_nesterov(4), fedasync(), HubRule(Timer(0.02), outer=SGD(1.0))],
    ids=["nesterov", "fedasync", "timer"],
)
def test_training_comes_near_the_optimum(ranks: Ranks, rule: HubRule) -> None:
    def goal() -> Tensor:
        weights = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
        return torch.arange(8.0, dtype=torch.float64) * (weights * weights).sum() / weights.sum()

    out = ranks(train, 4, rule, [200] * 4, 3, 0.003)
    assert all(torch.equal(r["x"], out[0]["x"]) for r in out)
    torch.testing.assert_close(out[0]["x"], goal(), rtol=0.25, atol=0.1)


def test_a_buffer_keeps_what_is_too_few(ranks: Ranks) -> None:
    out = ranks(train, 2, fedbuff(3), [5, 5])  # two pushes, three wanted
    assert out[0]["hub"] == (0, [0, 0], [0, 0])
    assert out[0]["x"].abs().max() == 0.0


def hurried(world: ProcessGroupWorld) -> tuple[int, int, int]:
    x, _ = start()
    rule, steps = delayed_nesterov(3), LocalSteps(4, dynamic=True)
    local = AsyncLocal(x, rule, steps, total_steps=400, timeout=SHORT)
    local.start()
    quotas = []
    while not local.done:
        time.sleep((0.002, 0.002, 0.016)[world.rank])
        if local.local_step():
            quotas.append(local._quota)
    local.stop()
    return local.steps, local.pushes, quotas[1]


def test_slow_workers_take_fewer_steps_and_training_ends_with_the_sum(ranks: Ranks) -> None:
    (a, _, qa), (b, _, qb), (c, pushes, qc) = ranks(hurried, 3)
    assert 400 <= a + b + c <= 400 + 3 * 4
    assert c < min(a, b) / 2
    assert pushes >= 3
    assert qc == 1 < min(qa, qb)  # an eighth of the speed: dynamic local steps


def compressed(world: ProcessGroupWorld, steps: int) -> tuple[Tensor, int]:
    x, optimizer = start()
    local = AsyncLocal(
        x, HubRule(Count(2, wait=True), outer=SGD(1.0)), 5, dopt.ErrorFeedback(dopt.TopK(0.25)), timeout=SHORT
    )
    local.start()
    for step in range(steps):
        backward(world.rank, x, step)
        optimizer.step()
        local.local_step()
    local.stop()
    return x["x"].detach().clone(), local.ledger.bytes


def test_packed_pushes_with_feedback_find_the_limit_of_unpacked_ones(ranks: Ranks) -> None:
    out = ranks(compressed, 2, 600)
    full = ranks(train, 2, HubRule(Count(2, wait=True), outer=SGD(1.0)), [600, 600])
    assert (out[0][0] - full[0]["x"]).norm() < 0.1 * full[0]["x"].norm()
    assert out[1][1] == 120 * dopt.TopK(0.25).payload_bytes((8,))


def resumed(world: ProcessGroupWorld, rule: HubRule) -> list[Tensor]:
    """Two runs of ten steps each, with all that is saved in between, and one of twenty with a pause in the middle."""

    def run(local: AsyncLocal, x: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        local.start()
        for step in range(10):
            backward(world.rank, x, step)
            optimizer.step()
            local.local_step()
        local.stop()

    options: Any = {"local_steps": 4, "codec": dopt.ErrorFeedback(dopt.Int8()), "timeout": SHORT}
    x, optimizer = start()
    local = AsyncLocal(x, rule, **options)
    run(local, x, optimizer)
    state, weights = local.state_dict(), x["x"].detach().clone()
    run(local, x, optimizer)
    y, optimizer = start()
    with torch.no_grad():
        y["x"].copy_(weights)
    again = AsyncLocal(y, rule, **options)
    again.load_state_dict(state)
    run(again, y, optimizer)
    return [x["x"].detach(), y["x"].detach()]


def test_a_resumed_run_is_the_run_that_paused(ranks: Ranks) -> None:
    for whole, again in ranks(resumed, 2, HubRule(Count(2, wait=True), outer=Nesterov(0.7, 0.9))):
        assert torch.equal(whole, again)


def dies(world: ProcessGroupWorld, who: int) -> None:
    x, _ = start()
    local = AsyncLocal(x, HubRule(Count(3, wait=True)), 2, timeout=timedelta(seconds=30))
    local.start()
    for step in range(10_000):
        if world.rank == who and step == 21:
            os._exit(1)
        time.sleep(0.001)
        local.local_step()


@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_that_dies_is_named_by_all_others_at_once(ranks: Ranks, who: int) -> None:
    began = time.monotonic()
    with pytest.raises(AssertionError) as caught:
        ranks(dies, 3, who)
    assert time.monotonic() - began < 10
    told = {line for line in str(caught.value).splitlines() if "SyncError" in line}
    named = "lost rank 1" if who else "no answer from rank 0, the hub"
    assert len([line for line in told if named in line]) >= 2, told


def comes_late(world: ProcessGroupWorld) -> str:
    x, _ = start()
    local = AsyncLocal(x, HubRule(Count(2, wait=True)), 2, timeout=timedelta(seconds=1))
    local.start()
    time.sleep(2.5 * (world.rank == 1))
    local.local_step()
    with pytest.raises(SyncError) as caught:
        local.local_step()
    return str(caught.value)


def test_a_worker_that_does_not_come_in_time(ranks: Ranks) -> None:
    told = ranks(comes_late, 2)
    assert told[0] == "rank 0: not all ranks came to the hub within 1 s"
    assert told[1] == "rank 1: the hub has given up"


def bad_options(world: ProcessGroupWorld) -> list[str]:
    x, _ = start()
    found = []
    for options in (
        {"codec": dopt.EF21(dopt.TopK(0.1))},
        {"codec": dopt.Int8(), "rule": fedasync()},
        {"total_steps": -1},
        {"local_steps": LocalSteps(4, True, [1.0, 2.0, 3.0])},
    ):
        with pytest.raises(ValueError, match=r"AsyncLocal|LocalSteps") as caught:
            AsyncLocal(x, **{"rule": delayed_nesterov(2), "local_steps": 4, **options})  # type: ignore[arg-type]
        found.append(str(caught.value))
    return found


def test_bad_options_are_refused_on_all_ranks(ranks: Ranks) -> None:
    one, other = ranks(bad_options, 2)
    assert one == other
    assert one[0].endswith("must be a compressor, or ErrorFeedback(...) around one")
    assert "packs changes" in one[1]
    assert one[2].startswith("AsyncLocal(total_steps=-1)")
    assert one[3].endswith("must be 2 numbers, one per worker")
