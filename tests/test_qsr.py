"""The quadratic synchronization rule: lengths of rounds, counts, resume, and what is refused."""

from __future__ import annotations

import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from problems import SHAPES, mosaic_simulation, p2, sgd

from lightning_dopt import QSR, After, Drifted, Every, Plan, Simulation, Sync, plans
from lightning_dopt.forecast import forecast
from lightning_dopt.strategies.start import refuse_metric_schedulers


def cosine(peak: float, steps: int, t: int) -> float:
    return 0.5 * peak * (1 + math.cos(math.pi * t / steps))


def ends(when: QSR, rate: object, steps: int) -> list[int]:
    found, t = [], 0
    while t < steps:
        t += when.length(rate(t), t)  # type: ignore[operator]
        found.append(t)
    return found


def simulated(when: QSR, rates: list[float], n: int = 2) -> tuple[Simulation, list[int]]:
    """Rates by completed steps; the scheduler moves after the tick, as Lightning's does."""
    sim = p2().simulate(Plan([Sync(when)]), sgd(rates[0]), n=n)
    rounds = []
    for t, rate in enumerate(rates):
        for opt in sim.optimizers:
            opt.param_groups[0]["lr"] = rate
        before = (
            sim.worlds[0].ledger.entries["parameters"].messages if "parameters" in sim.worlds[0].ledger.entries else 0
        )
        sim.run(1)
        after = (
            sim.worlds[0].ledger.entries["parameters"].messages if "parameters" in sim.worlds[0].ledger.entries else 0
        )
        if after > before:
            rounds.append(t + 1)
    return sim, rounds


def test_counts_of_the_papers_schedule() -> None:
    """Cosine from 0.008 over 93600 steps: 23400 rounds of 4 steps, 8073 with alpha 0.0175."""
    steps = 93600
    assert len(ends(QSR(0.0, 4, steps=steps), lambda t: cosine(0.008, steps, t), steps)) == 23400
    mine = ends(QSR(0.0175, 4, steps=steps), lambda t: cosine(0.008, steps, t), steps)
    assert len(mine) == 8073
    assert mine[-1] == steps


def test_constant_rates_make_constant_rounds_and_half_the_rate_four_times_the_length() -> None:
    assert ends(QSR(0.2, 4), lambda t: 0.05, 64) == [16, 32, 48, 64]
    assert QSR(0.2, 4).length(0.025, 0) == 4 * QSR(0.2, 4).length(0.05, 0) == 64
    assert QSR(0.2, 4, power=1.0).length(0.01, 0) == 20
    assert QSR(0.2, 4, power=3.0).length(0.1, 0) == 8
    assert [QSR(0.0, 4).length(r, 0) for r in (1e-9, 1.0, math.inf)] == [4, 4, 4]
    assert QSR(0.2, 4).length(1e-300, 0) >= 10**8
    assert QSR(0.2, 4).length(0.0, 0) == 4
    assert QSR(0.2, 4, warmup=10).length(0.01, 9) == 4 < QSR(0.2, 4, warmup=10).length(0.01, 10)
    assert QSR(0.2, 4, steps=100).length(0.001, 97) == 3


def test_the_engine_reads_the_rate_of_the_coming_step() -> None:
    steps, when = 90, QSR(0.3, 2, steps=90)
    rates = [cosine(0.2, steps, t) for t in range(steps)]
    _, rounds = simulated(when, rates)
    expected = ends(when, lambda t: rates[t], steps)
    assert rounds == expected
    assert expected[-1] == steps
    assert max(b - a for a, b in itertools.pairwise(expected)) > 10


def test_forecast_follows_the_rate_and_is_dense_without_one() -> None:
    rates = [cosine(0.2, 90, t) for t in range(90)]
    plan = plans.qsr(0.3, 2, steps=90)
    told = forecast(plan, 2, SHAPES, 90, lr=lambda t: rates[t])
    assert told.rounds["parameters"] == len(ends(QSR(0.3, 2, steps=90), lambda t: rates[t], 90))
    assert forecast(plan, 2, SHAPES, 90).rounds["parameters"] == 45


def test_constant_rates_are_local_sgd() -> None:
    mine = mosaic_simulation(plans.qsr(0.1, 4, steps=24), 4).run(24)  # rate 0.05: (0.1 / 0.05)^2 = 4
    ref = mosaic_simulation(plans.local_sgd(4), 4).run(24)
    assert all(torch.equal(mine.stacked(name), ref.stacked(name)) for name in SHAPES)
    assert mine.bytes == ref.bytes


def test_buffers_follow_and_stops_are_voted_on_rarely() -> None:
    sim = mosaic_simulation(plans.qsr(0.1, 4, steps=24), 2).run(5)
    engine = sim.engines[0]
    for _ in engine.before_step():
        raise AssertionError
    assert [engine.communicates(s) for s in (6, 7, 8)] == [False, False, True]


def test_a_resumed_round_has_the_length_it_began_with() -> None:
    rates = [cosine(0.2, 60, t) for t in range(60)]

    def start() -> Simulation:
        return p2().simulate(plans.qsr(0.3, 2, steps=60), sgd(0.2), n=2)

    def go(sim: Simulation, first: int, last: int) -> Simulation:
        for t in range(first, last):
            for opt in sim.optimizers:
                opt.param_groups[0]["lr"] = rates[t]
            sim.run(1)
        return sim

    whole, first, again = go(start(), 0, 60), go(start(), 0, 41), start()
    for k in range(2):
        again.engines[k].load_state_dict(copy.deepcopy(first.engines[k].state_dict()))
        again.replicas[k]["x"].data.copy_(first.replicas[k]["x"].data)
    assert torch.equal(go(again, 41, 60).stacked(), whole.stacked())
    assert again.bytes == whole.bytes


def test_without_a_last_step_the_plan_ends_in_an_average() -> None:
    sim = p2().simulate(plans.qsr(0.3, 3), sgd(0.1), n=2).run(10).finish()
    assert sim.distance() == 0.0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: QSR(-1.0), r"QSR\(alpha=-1.0\)"),
        (lambda: plans.qsr(base=0), r"qsr\(base=0\)"),
        (lambda: plans.qsr(power=0.0), r"qsr\(power=0.0\)"),
        (lambda: After(5, QSR(0.1)), "rounds differ in length"),
        (lambda: Drifted(1.0, QSR(0.1)), "rounds differ in length"),
        (lambda: Sync(QSR(0.1), "gradients"), "replicas would drift apart"),
    ],
)
def test_bad_options_are_refused_in_one_line(make: object, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        make()  # type: ignore[operator]
    assert "\n" not in str(caught.value)


def test_schedulers_that_follow_a_metric_are_refused() -> None:
    plateau = SimpleNamespace(reduce_on_plateau=True, scheduler=object())
    steps = SimpleNamespace(reduce_on_plateau=False, scheduler=object())
    refuse_metric_schedulers(plans.qsr(), [steps])
    refuse_metric_schedulers(Plan([Sync(Every(4))]), [plateau])
    with pytest.raises(ValueError, match=r"^Sync\(when=QSR\(.*follows a metric[^\n]*$"):
        refuse_metric_schedulers(plans.qsr(), [steps, plateau])
