"""The forecast says exactly what the simulation counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from problems import SHAPES, adam, mosaic, mosaic_backward, mosaic_simulation

from lightning_dopt import (
    EF21,
    FP16,
    After,
    AtEnd,
    Bernoulli,
    Blocking,
    Buffers,
    Complete,
    Delay,
    Difference,
    ErrorFeedback,
    Every,
    Gradients,
    Int8,
    Lerp,
    Link,
    LowRank,
    Median,
    Nesterov,
    OneRound,
    OptimizerState,
    Parameters,
    Plan,
    RandK,
    RandomPairs,
    Rebase,
    Ring,
    Sign,
    Simulation,
    Star,
    Sync,
    TopK,
    Until,
    plans,
)
from lightning_dopt.comm import SimulatedWorld, lockstep
from lightning_dopt.engine import Engine
from lightning_dopt.forecast import forecast, square_layers
from lightning_dopt.outer import Adam
from lightning_dopt.topology import DirectedRing, ErdosRenyi

LINK = Link(mbit=0.05, ms=7.0)
P = sum(torch.Size(s).numel() for s in SHAPES.values())

PLANS: dict[str, Callable[[], Plan]] = {
    "alone": Plan,
    "local_sgd": lambda: plans.local_sgd(3),
    "diloco": lambda: plans.diloco(4, codec=Int8()),
    "diloco_random_pairs": lambda: plans.diloco(3, outer_momentum=0.5, topology=RandomPairs(seed=3)),
    "gossip": plans.gossip,
    "gossip_star": lambda: plans.gossip(Star()),
    "gossip_star_cta": lambda: plans.gossip(Star(), order="cta"),
    "gossip_ring_awc": lambda: plans.gossip(Ring(), order="awc"),
    "gossip_drawn": lambda: plans.gossip(ErdosRenyi(0.7, seed=1)),
    "gossip_one_way": lambda: plans.gossip(DirectedRing()),
    "choco": lambda: plans.gossip(Ring(), codec=Difference(TopK(0.1), 0.3)),
    "exact_diffusion": lambda: plans.gossip(Ring(), correction="exact_diffusion"),
    "gradient_tracking": lambda: plans.gossip(Ring(), correction="gradient_tracking"),
    "compressed_ddp": plans.compressed_ddp,
    "power_sgd": lambda: plans.compressed_ddp(LowRank(1, min_ratio=1.0)),
    "random_k": lambda: plans.compressed_ddp(RandK(0.2)),
    "ef21": lambda: plans.compressed_ddp(EF21(TopK(0.2))),
    "lo_fi": plans.lo_fi,
    "ddp": lambda: Plan([Sync(what="gradients")]),
    "delay": lambda: Plan([Sync(when=Every(4), outer=Nesterov(0.5, 0.5), codec=Int8(), apply=Delay(3, Lerp(0.5)))]),
    "streaming": lambda: plans.streaming_diloco(5, 3, 2),
    "streaming_pairs": lambda: plans.streaming_diloco(5, 3, 2, outer_momentum=0.3, topology=RandomPairs()),
    "noloco": lambda: plans.noloco(4, gamma=0.3, overlap=2, fragments=2),
    "co2": lambda: plans.co2(3, gap_aware=True),
    "desloc": lambda: plans.desloc(2, clip=1.0),
    "eager_fragments": lambda: plans.eager_diloco(4, 0.3, 0.5, fragments=2),
    "delay_star": lambda: Plan([Sync(when=Every(3), peers=Star(), apply=Delay(2))]),
    "one_round": lambda: Plan([Sync(when=Every(3), outer=Nesterov(0.2, 0.5), codec=Int8(), apply=OneRound())]),
    "eager": lambda: Plan([Sync(when=Every(3), outer=Nesterov(0.2, 0.5), apply=OneRound("own_share"))]),
    "low_rank_delay": lambda: Plan(
        [Sync(when=Every(4), codec=ErrorFeedback(LowRank(2, min_ratio=1.0)), outer=Nesterov(0.5, 0.5), apply=Delay(2))]
    ),
    "parts": lambda: Plan(
        [
            Sync(when=Every(2), what=Parameters("body.*"), codec=Int8(), outer=Nesterov(0.5, 0.5), apply=Delay(1)),
            Sync(when=Every(4, offset=1), what=Parameters("head.*"), apply=Delay(3, Rebase())),
            Sync(when=Bernoulli(0.4, seed=2), what=Parameters("scale")),
        ]
    ),
    "phases": lambda: Plan([Sync(when=Until(3, Every(1))), Sync(when=After(3, Every(2))), Sync(when=AtEnd())]),
    "gradients_and_end": lambda: Plan(
        [Sync(what=Gradients("body.*"), codec=ErrorFeedback(Sign())), Sync(when=AtEnd())]
    ),
    "states": lambda: Plan(
        [Sync(when=Every(2), peers=Star()), Sync(when=Every(4), what=OptimizerState("exp_avg"), peers=Ring())]
    ),
    "median": lambda: Plan(
        [Sync(what="gradients", combine=Median()), Sync(when=Every(3), codec=FP16(), combine=Median())]
    ),
    "mixed_peers": lambda: Plan([Sync(peers=Star()), Sync(when=Every(3), apply=Blocking()), Sync(peers=RandomPairs())]),
}


@pytest.mark.parametrize("n", [1, 2, 5, 8])
@pytest.mark.parametrize("name", PLANS)
def test_bytes_and_time_equal_the_simulation(name: str, n: int) -> None:
    plan = PLANS[name]()
    if n == 5 and name == "exact_diffusion":
        n = 6
    steps = 11
    simulation = mosaic_simulation(plan, n, adam, LINK).run(steps).finish()
    told = forecast(plan, n, SHAPES, steps, LINK, step_seconds=0.01)
    assert [w.ledger.entries for w in simulation.worlds] == [ledger.entries for ledger in told.ledgers]
    assert told.bytes == simulation.bytes
    clocks = [w.clock for w in simulation.worlds if w.clock is not None]
    assert told.seconds == max(c.now for c in clocks)
    assert told.stall_s == max(c.stall_s for c in clocks)


@pytest.mark.parametrize("name", PLANS)
def test_links_of_unequal_speed_equal_the_simulation(name: str) -> None:
    plan, n, steps = PLANS[name](), 6, 11
    links = [Link(mbit=0.02 * (rank + 1), ms=float(7 - rank)) for rank in range(n)]
    simulation = Simulation(plan, n, mosaic, mosaic_backward, adam, link=links, step_seconds=0.01).run(steps).finish()
    told = forecast(plan, n, SHAPES, steps, links, step_seconds=0.01)
    clocks = [w.clock for w in simulation.worlds if w.clock is not None]
    assert told.bytes == simulation.bytes
    assert told.seconds == pytest.approx(max(c.now for c in clocks), rel=1e-12)
    assert told.stall_s == pytest.approx(max(c.stall_s for c in clocks), rel=1e-12)


def test_a_slow_link_holds_up_all_in_a_sum_and_its_neighbours_in_gossip() -> None:
    """Eight ranks on a ring, one round: after it only the slow rank and those it talks to have waited for its link."""
    n, links = 8, [Link(mbit=0.001 if rank == 3 else 1.0) for rank in range(8)]
    for plan, slow in ((Plan([Sync(peers=Ring())]), {2, 3, 4}), (Plan([Sync()]), set(range(n)))):
        run = Simulation(plan, n, mosaic, mosaic_backward, adam, link=links, step_seconds=0.01).run(1)
        waited = {w.rank for w in run.worlds if w.clock is not None and w.clock.stall_s > 0.1}
        assert waited == slow
    even = forecast(Plan([Sync()]), n, SHAPES, 5, [Link(0.001)] * n, 0.01)
    assert forecast(Plan([Sync()]), n, SHAPES, 5, links, 0.01).seconds == pytest.approx(even.seconds)
    with pytest.raises(ValueError, match=r"^forecast\(link=<2 of them>\): must be one Link"):
        forecast(Plan([Sync()]), n, SHAPES, 5, links[:2], 0.01)


def test_slow_ranks_equal_the_simulation() -> None:
    seconds = [0.01, 0.05, 0.02, 0.03]
    for plan in (plans.gossip(Ring()), plans.diloco(3), Plan([Sync(when=Every(3), peers=Star(), apply=Delay(2))])):
        simulation = Simulation(plan, 4, mosaic, mosaic_backward, adam, LINK, seconds).run(9).finish()
        told = forecast(plan, 4, SHAPES, 9, LINK, seconds)
        clocks = [w.clock for w in simulation.worlds if w.clock is not None]
        assert (told.seconds, told.stall_s) == (max(c.now for c in clocks), max(c.stall_s for c in clocks))


@pytest.mark.parametrize("what", [None, Buffers()])
def test_buffers_equal_the_engine(what: Buffers | None) -> None:
    plan = Plan([Sync(when=Every(2)), *([Sync(when=Every(3), what=what, peers=Ring())] if what else [])])
    worlds = SimulatedWorld.create(4, LINK)
    engines = [Engine(plan, mosaic(i), world, buffers={"b": torch.ones(21)}) for i, world in enumerate(worlds)]
    with torch.no_grad():
        for _ in range(7):
            lockstep([e.before_step() for e in engines])
            lockstep([e.on_gradients() for e in engines])
            lockstep([e.after_step() for e in engines])
        lockstep([e.finish() for e in engines])
    told = forecast(plan, 4, SHAPES, 7, LINK, buffers=21)
    assert [w.ledger.entries for w in worlds] == [ledger.entries for ledger in told.ledgers]
    assert told.rounds["buffers"] == (2 if what else 3)
    assert told.seconds == max(w.clock.now for w in worlds if w.clock is not None)


def test_closed_forms() -> None:
    shapes = square_layers(1_000_000)
    whole = Sync(what=Gradients(bucket_mb=0))
    ddp = forecast(Plan([whole]), 4, shapes, 10, Link(mbit=8.0, ms=10.0), step_seconds=0.5)
    assert ddp.bytes == [10 * 6_000_000] * 4  # 2 (n-1)/n of 4 MB
    assert ddp.peak_step_bytes == 6_000_000
    assert ddp.seconds == pytest.approx(10 * (0.5 + 2 * 3 * (0.01 + 1.0)))
    assert ddp.stall_s == pytest.approx(10 * 6.06)
    diloco = forecast(plans.diloco(5), 4, shapes, 10)
    assert diloco.rounds == {"parameters": 2}
    assert (diloco.sync_bytes("parameters"), diloco.bytes_per_step) == (12_000_000, 1_200_000.0)
    assert diloco.seconds == 0.0
    assert forecast(plans.lo_fi(), 4, shapes, 10).peak_step_bytes == 6_000_000  # at the end


def test_memory_is_what_the_engine_holds() -> None:
    def used(plan: Plan) -> dict[str, float]:
        return {k: v / (4 * P) for k, v in forecast(plan, 4, SHAPES, 1).memory.items()}

    assert used(plans.local_sgd(3)) == {}
    assert used(plans.diloco(3)) == {"anchors": 1.0, "outer optimizer": 1.0, "in flight": 1.0}
    ef21 = {"gradient copy": 1.0, "codec memory": 2.0, "in flight": 1.0}
    assert used(plans.compressed_ddp(EF21(TopK(0.1)))) == ef21
    assert used(plans.compressed_ddp(EF21(TopK(0.1))).guarded(False, "skip")) == {**ef21, "kept for undo": 2.0}
    assert used(plans.compressed_ddp(EF21(TopK(0.1))).guarded(False, "ignore")) == ef21
    assert used(plans.gossip(Ring(), correction="exact_diffusion")) == {"corrections": 1.0, "in flight": 2.0}
    adaptive = forecast(Plan([Sync(outer=Adam())]), 4, SHAPES, 1).memory["outer optimizer"]
    assert adaptive == 2 * 4 * P + 4 * len(SHAPES)  # two moments, and a step count per tensor
    eager = Plan([Sync(when=Every(3), outer=Nesterov(0.2, 0.5), apply=OneRound("own_share"))])
    assert used(eager)["in flight"] == 4.0  # two rounds, each with its message and the own share


def test_many_workers_are_quick() -> None:
    told = forecast(plans.gossip(Star()), 300, square_layers(10_000_000), 20, Link(20, 25))
    assert told.bytes[0] == 299 * told.bytes[1] == 299 * 20 * 40_000_000
    assert len(forecast(plans.diloco(50), 4096, square_layers(10_000_000), 200).bytes) == 4096


def test_square_layers_sum_up() -> None:
    for count in (1, 511, 512, 300_000, 10_000_000):
        assert sum(torch.Size(s).numel() for s in square_layers(count).values()) == count


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "forecast(steps=0): must be an integer of at least 1"),
        ({"n": 0}, "forecast(n=0): must be an integer of at least 1"),
        ({"buffers": -1}, "forecast(buffers=-1): must be an integer of at least 0"),
        ({"step_seconds": -1.0}, "forecast(step_seconds=-1.0): must be one number of at least 0, or 2 of them"),
        ({"step_seconds": [1.0, 1.0, 1.0]}, "must be one number of at least 0, or 2 of them"),
    ],
)
def test_bad_input(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match="forecast") as caught:
        forecast(**{"plan": plans.gossip(), "n": 2, "parameters": SHAPES, **arguments})  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pattern_that_selects_nothing_is_refused() -> None:
    plan = Plan([Sync(what=Parameters("none.*")), Sync(peers=Complete())])
    with pytest.raises(ValueError, match="selects none of the 6 trainable parameters"):
        forecast(plan, 2, SHAPES)
