"""Messages that take several sums or legs: what follows the first one leaves while training goes on."""

from __future__ import annotations

import pytest
import torch

import lightning_dopt as dopt
from lightning_dopt import Delay, Every, Link, OneRound, Plan, Simulation, Sync
from lightning_dopt.combine import Repeated
from lightning_dopt.forecast import forecast
from lightning_dopt.outer import SGD
from lightning_dopt.runners import LaneRunner

N, H, TAU = 4, 6, 4
DELTA = {"signal": "delta", "outer": SGD(0.7), "apply": Delay(TAU)}
MESSAGES = {
    "two legs": Sync(Every(H), codec=dopt.ErrorFeedback(dopt.Int8()), transport="two_phase", **DELTA),  # type: ignore[arg-type]
    "two sums": Sync(Every(H), codec=dopt.ErrorFeedback(dopt.LowRank(2)), **DELTA),  # type: ignore[arg-type]
    "two exchanges": Sync(Every(H), peers=dopt.Ring(), combine=Repeated(2), apply=Delay(TAU)),
}


def run(sync: Sync, mbit: float = 0.0, ms: float = 0.0, steps: int = 3 * H + TAU) -> Simulation:
    generator = torch.Generator().manual_seed(0)
    goals = torch.randn(N, 32, 24, generator=generator)

    def backward(rank: int, parameters: dict[str, torch.Tensor], step: int) -> None:
        parameters["x"].grad = parameters["x"].detach() - goals[rank]

    return Simulation(
        Plan([sync]),
        n=N,
        init=lambda rank: {"x": torch.zeros(32, 24)},
        backward=backward,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        link=Link(mbit=mbit, ms=ms),
        step_seconds=1.0,
    ).run(steps)


def stall(simulation: Simulation) -> float:
    clock = simulation.worlds[0].clock
    assert clock is not None
    return clock.stall_s


def seconds_in_flight(sync: Sync, ms: float) -> float:
    """Of one message, when everybody waits for it."""
    blocking = Sync(**{**sync.arguments(), "apply": dopt.Blocking()})  # type: ignore[arg-type]
    return stall(run(blocking, ms=ms, steps=H))


@pytest.mark.parametrize("name", MESSAGES)
def test_both_halves_of_a_message_travel_while_training_goes_on(name: str) -> None:
    sync = MESSAGES[name]
    ms = 3800.0 / seconds_in_flight(sync, 1000.0)
    assert seconds_in_flight(sync, ms) == pytest.approx(3.8)  # of the four seconds that a message has
    assert stall(run(sync, ms=ms)) == 0.0
    assert stall(run(sync, ms=1.2 * ms)) > 0.5  # with 4.56 of four seconds it must be waited for


@pytest.mark.parametrize("name", MESSAGES)
def test_when_a_half_is_sent_changes_no_number(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    early = run(MESSAGES[name]).stacked()
    monkeypatch.setattr(LaneRunner, "_hops_by", lambda *_: 0)  # everything that follows waits for the apply half
    late = run(MESSAGES[name])
    assert torch.equal(early, late.stacked())
    assert stall(run(MESSAGES[name], ms=100.0)) > 0.0  # and that is what it would cost


def test_a_message_of_a_whole_round_is_spread_over_it() -> None:
    sync = Sync(**{**MESSAGES["two legs"].arguments(), "apply": OneRound()})  # type: ignore[arg-type]
    ms = 1e3 * (H - 0.2) / seconds_in_flight(sync, 1000.0)
    assert stall(run(sync, ms=ms)) == 0.0


def test_steps_with_a_second_half_communicate() -> None:
    sent, half = (run(MESSAGES["two legs"], steps=steps).engines[0] for steps in (H, H + TAU // 2))
    assert [sent.communicates(H + k) for k in (1, 2)] == [False, True]
    assert [half.communicates(H + k) for k in (3, 4)] == [False, True]


@pytest.mark.parametrize("name", MESSAGES)
def test_the_forecast_knows(name: str) -> None:
    simulation = run(MESSAGES[name], mbit=0.001, ms=600.0)
    steps = 3 * H + TAU
    plan = Plan([MESSAGES[name]])
    told = forecast(plan, N, {"x": (32, 24)}, steps, Link(mbit=0.001, ms=600.0), step_seconds=1.0)
    clocks = [w.clock for w in simulation.finish().worlds if w.clock is not None]
    assert told.stall_s == pytest.approx(max(c.stall_s for c in clocks)) != 0.0
    assert told.seconds == pytest.approx(max(c.now for c in clocks))
