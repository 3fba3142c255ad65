"""Syncs that wait until replicas have drifted apart."""

from __future__ import annotations

import pytest
import torch
from problems import p2

from lightning_dopt import After, Drifted, Every, Plan, Ring, Sync, Until
from lightning_dopt.apply import Blocking
from lightning_dopt.comm import SimulatedWorld
from lightning_dopt.comm.simulated import lockstep
from lightning_dopt.distance import sketched_distance
from lightning_dopt.slots import FlatTensors


def test_the_sketch_is_right_on_average_and_the_same_on_all_ranks() -> None:
    n, torch_seed = 4, torch.Generator().manual_seed(0)
    x = torch.randn(n, 3000, generator=torch_seed)
    x[:, 0] += 100.0  # a large mean must not drown the distance
    exact = float((x - x.mean(0)).double().square().sum(1).mean().sqrt())
    found = []
    for seed in range(30):
        worlds = SimulatedWorld.create(n)
        lanes = [FlatTensors({"a": row[:1000].clone(), "b": row[1000:].clone()}).lanes for row in x]
        each = lockstep([sketched_distance(lane, world, seed) for lane, world in zip(lanes, worlds, strict=True)])
        assert len(set(each)) == 1
        assert {w.ledger.bytes for w in worlds} == {0}
        found.append(each[0])
    distances = torch.tensor([d for d, _ in found])
    assert float(distances.square().mean().sqrt()) == pytest.approx(exact, rel=0.03)
    assert float((distances / exact - 1).abs().max()) < 0.25
    assert found[0][1] == pytest.approx(float(x.mean(0).norm()), rel=0.25)


def test_ranks_sync_exactly_when_they_are_farther_apart_than_allowed() -> None:
    plan = Plan([Sync(Drifted(0.5))])
    sim, before = p2().simulate(plan, 0.05), 0
    for _ in range(60):
        sim.run(1)
        rounds = sim.engines[0].runners[0].rounds
        assert {e.runners[0].rounds for e in sim.engines} == {rounds}
        if rounds > before:
            assert sim.distance() < 1e-12
        else:
            assert sim.distance() <= 0.5 * 1.6  # five coordinates: the estimate is coarse, but not that coarse
        before = rounds
    assert 3 < before < 40


def test_limits_are_every_step_and_never() -> None:
    often, always = (p2().simulate(Plan([Sync(w)]), 0.05).run(20) for w in (Drifted(1e-12), Every(1)))
    assert torch.equal(often.stacked(), always.stacked())
    never, alone = (p2().simulate(plan, 0.05).run(20) for plan in (Plan([Sync(Drifted(1e9))]), Plan()))
    assert torch.equal(never.stacked(), alone.stacked())
    assert never.bytes[0] == 0


def test_measuring_follows_its_own_schedule_and_relative_thresholds() -> None:
    sim = p2().simulate(Plan([Sync(Drifted(1e-9, After(10, Every(5))), peers=Ring())]), 0.05)
    seen = [sim.run(1).engines[0].runners[0].rounds for _ in range(25)]
    assert [k + 1 for k in range(1, 25) if seen[k] > seen[k - 1]] == [15, 20, 25]
    near = p2().simulate(Plan([Sync(Drifted(0.999, relative=True))]), 0.05, 1000.0).run(5)
    assert near.engines[0].runners[0].rounds == 0


@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        (lambda: Drifted(0.0), r"Drifted\(threshold=0.0\)"),
        (lambda: After(3, Drifted(1.0)), "After.*put it inside"),
        (lambda: Until(3, Drifted(1.0)), "Until.*put it inside"),
        (lambda: Sync(Drifted(1.0), "buffers"), "what='parameters'"),
        (lambda: Sync(Drifted(1.0), apply=Blocking("cta")), r"apply=Blocking\(\)"),
    ],
)
def test_what_cannot_work_is_refused(make, pattern) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=pattern):
        make()
