"""A hub and workers of unequal speed on the virtual clock: what must equal something simpler, and what is conserved."""

from __future__ import annotations

import warnings
from math import ceil

import pytest
import torch
from problems import Quadratics, sgd
from torch import Tensor

from lightning_dopt import Every, Int8, Link, Plan, Simulation, Sync, outer, plans
from lightning_dopt.asynchronous import (
    Count,
    EqualWeights,
    Hub,
    HubRule,
    HubSimulation,
    LocalSteps,
    OnArrival,
    Push,
    StalenessWeights,
    StepWeights,
    TimeCorrected,
    Timer,
    delayed_nesterov,
    fedasync,
    fedbuff,
    fedfix,
)
from lightning_dopt.optim import DelayedNesterov
from lightning_dopt.pace import Turns
from lightning_dopt.topology import WeightedMean

SPEEDS = [0.58, 0.75, 1.51, 3.33]
"""Seconds per step of the paper's toy."""


def problem() -> Quadratics:
    generator = torch.Generator().manual_seed(1)
    half = torch.randn(4, 3, 3, generator=generator, dtype=torch.float64)
    return Quadratics(half @ half.transpose(1, 2) / 3 + 0.5 * torch.eye(3), torch.randn(4, 3, generator=generator))


def simulate(
    rule: HubRule,
    local_steps: LocalSteps | int = 3,
    seconds: float | list[float] = 1.0,
    *,
    p: Quadratics | None = None,
    lr: float = 0.05,
    link_seconds: float = 0.0,
) -> HubSimulation:
    p = p if p is not None else problem()
    start = torch.ones(p.d, dtype=torch.float64)
    return HubSimulation(rule, p.n, lambda rank: {"x": start}, p.backward, sgd(lr), local_steps, seconds, link_seconds)


def position(run: HubSimulation) -> Tensor:
    return run.reference["x"]


def diloco(rounds: int, lr: float = 0.05) -> Tensor:
    return problem().simulate(plans.diloco(3), lr, 1.0).run(3 * rounds).stacked()[0]


# ------------------------------------------------------------------ delayed Nesterov


def test_delay_one_is_the_nesterov_momentum_of_torch() -> None:
    x, y = torch.ones(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    ours = DelayedNesterov([x], lr=0.3, momentum=0.8)
    theirs = torch.optim.SGD([y], lr=0.3, momentum=0.8, nesterov=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(7):
        x.grad = torch.randn(5, generator=generator, dtype=torch.float64)
        y.grad = x.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(x, y, rtol=1e-12, atol=0.0)


def test_gradients_of_one_point_are_one_nesterov_step_along_their_mean() -> None:
    x, y = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    ours = DelayedNesterov([x], lr=0.3, momentum=0.8, delay=4)
    theirs = torch.optim.SGD([y], lr=0.3, momentum=0.8, nesterov=True)
    gradients = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for round_ in gradients:
        for g in round_:
            x.grad = g.clone()
            ours.step()
        y.grad = round_.mean(0)
        theirs.step()
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


def test_a_spread_momentum_acts_in_equal_parts_and_as_a_whole_by_the_formula() -> None:
    x = torch.zeros(1, dtype=torch.float64)
    opt = DelayedNesterov([x], lr=1.0, momentum=0.5, delay=2, spread=0.25)
    path, m, a = [], 0.0, 0.0
    for k, g in enumerate([1.0, 3.0, 2.0, 0.0, 5.0]):
        x.grad = torch.tensor([g], dtype=torch.float64)
        opt.step()
        if k % 2 == 1:  # second of two: m takes in the mean of both, and acts with 1 - 2 c + c
            m = 0.5 * m + {1: 2.0, 3: 1.0}[k]
            a -= 0.75 * 0.5 * m + g / 2
        else:
            a -= 0.25 * 0.5 * m + g / 2
        path.append((float(x), a))
    assert all(mine == pytest.approx(formula, abs=1e-12) for mine, formula in path)


@pytest.mark.parametrize("rule", [delayed_nesterov(4, grace=0.5), HubRule(Count(4, wait=True), outer=outer.Nesterov())])
def test_equally_fast_workers_that_wait_for_each_other_are_diloco(rule: HubRule) -> None:
    run = simulate(rule).run(15.0)
    torch.testing.assert_close(position(run), diloco(5), rtol=1e-12, atol=1e-14)


def test_grace_gathers_those_that_are_a_little_late() -> None:
    late = simulate(delayed_nesterov(4, grace=0.5), seconds=[1.0, 1.0, 1.1, 1.15]).run(3.45)
    torch.testing.assert_close(position(late), diloco(1), rtol=1e-12, atol=1e-14)
    assert late.clock.now >= 3.45
    assert dict(late.hub.staleness) == {0: 1, 1: 1, 2: 1, 3: 1}  # steps one after the other, all from one base
    hasty = simulate(delayed_nesterov(4, grace=0.1), seconds=[1.0, 1.0, 1.1, 1.15])
    assert hasty.run(3.39).hub.pushes == [1, 1, 0, 0]  # 3.0 and 3.0 waited till 3.1; 3.3 waits till 3.4
    assert hasty.run(0.11).hub.pushes == [1, 1, 1, 0]  # and 3.45 is too late for that
    assert dict(hasty.hub.staleness) == {0: 1, 1: 1, 2: 1}


def test_the_slowest_sets_the_pace_of_a_hub_that_waits_for_all() -> None:
    run = simulate(HubRule(Count(4, wait=True), outer=outer.Nesterov()), seconds=SPEEDS).run(50.0)
    assert run.hub.version == int(50.0 / (3 * 3.33))
    torch.testing.assert_close(position(run), diloco(run.hub.version), rtol=1e-12, atol=1e-14)


def test_an_outer_optimizer_of_a_plan_is_the_same_class() -> None:
    plan = Plan([Sync(Every(3), outer=outer.DelayedNesterov(0.7, 0.9))])
    ours = problem().simulate(plan, 0.05, 1.0).run(15).stacked()[0]
    torch.testing.assert_close(ours, diloco(5), rtol=1e-12, atol=1e-14)


# ------------------------------------------------------------------ dynamic local updates


def test_local_steps_follow_the_speed_and_phases_take_equally_long() -> None:
    run = simulate(delayed_nesterov(4), LocalSteps(50, dynamic=True), SPEEDS).run(170.0)  # all have been measured
    steps = [run.hub.steps_of(j) for j in range(4)]
    assert steps == [50, 38, 19, 8]
    assert steps == [int(50 * 0.58 / s) for s in SPEEDS]
    durations = [h * s for h, s in zip(steps, SPEEDS, strict=True)]
    assert all(max(durations) - d < s for d, s in zip(durations, SPEEDS, strict=True))


def test_known_speeds_are_used_from_the_start_and_replaced_by_measured_ones() -> None:
    wrong = [1.0, 2.0, 1.0, 1.0]
    run = simulate(delayed_nesterov(4), LocalSteps(12, dynamic=True, speeds=wrong), [1.0, 1.0, 1.0, 0.5])
    assert [run.hub.steps_of(j) for j in range(4)] == [6, 12, 6, 6]
    run.run(30.0)
    assert [run.hub.steps_of(j) for j in range(4)] == [6, 6, 6, 12]


def test_a_worker_that_slows_down_gets_fewer_steps() -> None:
    run = simulate(delayed_nesterov(4), LocalSteps(10, dynamic=True)).run(20.0)
    assert run.hub.steps_of(2) == 10
    run.seconds[2] = 5.0
    assert run.run(100.0).hub.steps_of(2) == 2


# ------------------------------------------------------------------ unequal numbers of steps, meetings in common


def paced(plan: Plan, steps: int, *, link: Link | None = None) -> Simulation:
    p, start = problem(), torch.ones(3, dtype=torch.float64)
    pace = LocalSteps(10, dynamic=True)
    return Simulation(plan, 4, lambda r: {"x": start}, p.backward, sgd(0.05), link, step_seconds=SPEEDS, pace=pace).run(
        steps
    )


def waiting(weights: object) -> HubRule:
    return HubRule(Count(4, wait=True), weights, outer.Nesterov())  # type: ignore[arg-type]


@pytest.mark.parametrize("by_steps", [False, True])
def test_a_plan_at_an_unequal_pace_is_a_hub_that_waits_for_all(by_steps: bool) -> None:
    counts = [10, 7, 3, 1]
    peers = WeightedMean(counts=counts) if by_steps else None
    plan = Plan([Sync(Every(10), signal="value", peers=peers, outer=outer.Nesterov())])
    run = paced(plan, 50)
    assert run.round_steps == counts
    pace = LocalSteps(10, dynamic=True, speeds=[1 / s for s in SPEEDS])
    hub = simulate(waiting(StepWeights() if by_steps else EqualWeights()), pace, SPEEDS).run(29.01)  # 5 rounds of 5.8 s
    assert hub.hub.version == 5
    assert hub.gradients == [5 * h for h in counts]
    torch.testing.assert_close(run.stacked(), position(hub).expand(4, 3), rtol=1e-12, atol=1e-14)


def test_an_unequal_pace_saves_waiting() -> None:
    """Links that take no time: a round lasts as long as the longest of the ranks' shares of it."""
    link = Link()
    ends = [world.clock.now for world in paced(plans.diloco(10), 50, link=link).worlds if world.clock is not None]
    assert ends == pytest.approx([5 * max(h * s for h, s in zip([10, 7, 3, 1], SPEEDS, strict=True))] * 4)


def test_no_rank_may_leave_out_a_step_at_which_others_wait() -> None:
    engine = paced(plans.diloco(5), 10).engines[0]
    engine.skip(4)
    with pytest.raises(ValueError, match=r"^Engine.skip\(steps=1\): ranks talk at step 15, which none may leave out$"):
        engine.skip(1)
    with pytest.raises(ValueError, match=r"^Engine.skip\(steps=1\): corrections count every step"):
        paced(plans.k_gt(sync_every=10), 10)


@pytest.mark.parametrize("share", [1, 3, 7, 10])
def test_a_rank_takes_every_step_at_which_ranks_talk_and_its_share_evenly(share: int) -> None:
    """Rounds of ten with talk at steps 5, 6 and 10; from the second one on that is known."""
    turns, taken = Turns(10), []
    for step in range(1, 41):
        talks = step % 10 in (5, 6, 0)
        assert turns.takes(step, share, talks) == turns.takes(step, share, talks)  # asking twice changes nothing
        if turns.takes(step, share, talks):
            taken.append(step)
        assert not talks or step in taken
    rounds = [[step for step in taken if 10 * k < step <= 10 * k + 10] for k in range(1, 4)]
    assert [len(r) for r in rounds] == [max(3, share)] * 3
    first, second = (sum(step % 10 in half for step in rounds[0]) for half in ((1, 2, 3, 4), (7, 8, 9)))
    assert abs(first / 4 - second / 3) <= 0.34


def test_turns_go_on_where_they_were_saved() -> None:
    def ask(turns: Turns, steps: range) -> list[bool]:
        return [turns.takes(step, 4, step % 10 in (5, 0)) for step in steps]

    whole, first, again = Turns(10), Turns(10), Turns(10)
    expected = ask(whole, range(1, 41))
    ask(first, range(1, 18))
    again.load_state_dict(first.state_dict())
    assert ask(again, range(18, 41)) == expected[17:]


def test_a_streaming_plan_at_an_unequal_pace_keeps_its_anchors_equal() -> None:
    def backward(rank: int, parameters: dict[str, Tensor], step: int) -> None:
        for name, goal in (("x", rank + 1.0), ("y", -rank)):
            parameters[name].grad = parameters[name].detach() - goal

    run = Simulation(
        plans.streaming_diloco(10, 2, 3, outer_momentum=0.3, codec=Int8()),
        4,
        lambda rank: {"x": torch.ones(3), "y": torch.ones(2)},
        backward,
        sgd(0.05),
        step_seconds=SPEEDS,
        pace=LocalSteps(10, dynamic=True),
    ).run(60)
    for runners in zip(*(engine.runners for engine in run.engines), strict=True):
        anchors = [runner.lanes[0].anchor for runner in runners]
        assert all(torch.equal(anchors[0], anchor) for anchor in anchors)  # type: ignore[arg-type]
    assert run.distance() > 0.0


# ------------------------------------------------------------------ conservation and determinism


def test_every_batch_is_in_one_push_and_every_push_is_a_version() -> None:
    run = simulate(delayed_nesterov(4), LocalSteps(7, dynamic=True), SPEEDS).run(200.0)
    assert run.hub.steps == run.gradients
    assert run.hub.version == sum(run.hub.pushes) == run.hub.staleness.total()
    assert run.bytes == [2 * pushes * 3 * 8 for pushes in run.hub.pushes]  # 3 numbers of 8 bytes, up and down


def test_without_inner_momentum_the_reference_moves_by_all_pushes() -> None:
    """SGD(1) and changes: what the hub has moved is the sum of what workers have done, whatever the order."""
    moved = torch.zeros(3, dtype=torch.float64)
    run = simulate(HubRule(), 2, SPEEDS)
    receive = run.hub.receive

    def watched(push: Push) -> float | None:
        moved.add_(push.message[0])
        return receive(push)

    run.hub.receive = watched  # type: ignore[method-assign]
    run.run(40.0)
    torch.testing.assert_close(position(run), 1.0 - moved, rtol=1e-12, atol=1e-13)


def test_runs_repeat_exactly_and_in_pieces() -> None:
    def whole() -> Tensor:
        return position(simulate(delayed_nesterov(4), LocalSteps(7, dynamic=True), SPEEDS).run(120.0))

    pieces = simulate(delayed_nesterov(4), LocalSteps(7, dynamic=True), SPEEDS)
    for _ in range(240):
        pieces.run(0.5)
    assert torch.equal(whole(), whole())
    assert torch.equal(whole(), position(pieces))


def test_links_delay_pushes_and_replies() -> None:
    run = simulate(HubRule(), 2, link_seconds=0.5).run(2.49)
    assert run.hub.version == 0
    assert run.run(0.02).hub.version == 4  # 2 s of work, 0.5 s up
    assert run.run(2.97).hub.version == 4
    assert run.run(0.03).hub.version == 8  # 0.5 s down, 2 s, 0.5 s up


def test_a_dead_worker_is_absent() -> None:
    run = simulate(HubRule(Count(4, wait=True), outer=outer.Nesterov()), seconds=[1.0, 1.0, 1.0, 50.0]).run(10.0)
    assert run.hub.version == 0  # all wait for the slow one
    run.kill(3).run(5.0)
    assert run.hub.version == 2  # at once with the three that are there, then three seconds later
    assert run.gradients == [6, 6, 6, 0]


def test_the_inner_optimizer_is_kept_or_made_anew() -> None:
    def run(inner_state: str) -> Tensor:
        start, p = torch.ones(3, dtype=torch.float64), problem()
        made = HubSimulation(
            HubRule(), 1, lambda r: {"x": start}, p.backward, sgd(0.05, 0.9), 3, inner_state=inner_state
        )  # type: ignore[arg-type]
        return position(made.run(9.0))

    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    kept = torch.optim.SGD([x], lr=0.05, momentum=0.9)
    for _ in range(9):
        x.grad = problem().gradient(0, x.detach())
        kept.step()
    torch.testing.assert_close(run("keep"), x.detach(), rtol=1e-12, atol=1e-14)
    assert not torch.allclose(run("reset"), x.detach())


# ------------------------------------------------------------------ FedAsync, FedBuff, FedFix


def push(worker: int, x: list[float], base: int = 0) -> Push:
    return Push(worker, [torch.tensor(x, dtype=torch.float64)], base, 1, 1.0)


def hub(rule: HubRule, n: int = 3) -> Hub:
    return Hub(rule, [torch.tensor([10.0], dtype=torch.float64)], n, LocalSteps(1))


def test_fedasync_mixes_models_by_their_age() -> None:
    h, a = hub(fedasync(lr=0.6, power=0.5)), 10.0
    for age, x in enumerate([4.0, -2.0, 7.0]):  # all began with version 0
        assert h.receive(push(age, [x])) == 0.0
        h.step()
        w = 0.6 * (1 + age) ** -0.5
        a = (1 - w) * a + w * x
        assert float(h.reference[0]) == pytest.approx(a, rel=1e-12)


def test_fedbuff_steps_along_the_discounted_mean_of_its_buffer() -> None:
    h = hub(fedbuff(pushes=2, lr=0.5))
    assert h.receive(push(0, [1.0])) is None
    assert h.receive(push(1, [2.0])) == 0.0
    h.step()
    assert float(h.reference[0]) == pytest.approx(10.0 - 0.5 * 1.5)
    h.receive(push(2, [4.0], base=0))
    h.receive(push(1, [1.0], base=1))
    h.step()
    assert float(h.reference[0]) == pytest.approx(9.25 - 0.5 * (4.0 / 2**0.5 + 1.0) / 2)
    assert h.version == 2


def test_nobody_waits_for_a_buffer() -> None:
    run = simulate(fedbuff(pushes=3), 1, SPEEDS).run(30.0)
    pushes = [int(30.0 / s + 1e-9) for s in SPEEDS]
    assert run.gradients == pushes
    assert run.hub.version == sum(pushes) // 3


def fedavg(rounds: int) -> Tensor:
    plan = Plan([Sync(Every(3))])
    return problem().simulate(plan, 0.05, 1.0).run(3 * rounds).stacked()[0]


def test_a_slow_clock_is_fedavg() -> None:
    run = simulate(fedfix(seconds=10.0), 3, SPEEDS).run(40.0)  # the slowest takes 9.99
    torch.testing.assert_close(position(run), fedavg(4), rtol=1e-12, atol=1e-14)


def test_what_arrives_at_the_moment_of_a_step_belongs_to_it() -> None:
    run = simulate(fedfix(seconds=3.5), 3, link_seconds=0.25)  # down, three steps, up: 3.5 s
    assert run.run(7.0).hub.pushes == [2, 2, 2, 2]


def test_a_fast_clock_steps_on_every_arrival() -> None:
    """Empty ticks change nothing but the count of versions, which equal weights do not read."""
    fine = simulate(HubRule(Timer(0.01)), 1, SPEEDS).run(20.0)
    each = simulate(HubRule(OnArrival()), 1, SPEEDS).run(20.0)
    assert fine.hub.pushes == each.hub.pushes == [int(20.0 / s + 1e-9) for s in SPEEDS]


@pytest.mark.parametrize("when", [OnArrival(), Count(2, wait=True), Count(4, wait=True), Timer(3.0)], ids=repr)
@pytest.mark.parametrize("weights", [EqualWeights(), StalenessWeights(0.0), TimeCorrected()], ids=repr)
def test_equal_durations_and_one_group_are_fedavg(when: object, weights: object) -> None:
    run = simulate(HubRule(when, weights), 3).run(12.0)  # type: ignore[arg-type]
    if when in (Count(4, wait=True), Timer(3.0)):
        torch.testing.assert_close(position(run), fedavg(4), rtol=1e-12, atol=1e-14)
    assert run.hub.pushes == [4] * 4


def test_weights_of_a_clock_are_the_published_ones() -> None:
    seen: dict[int, set[float]] = {}

    class Watched(TimeCorrected):
        def weights(self, arrivals, n):  # type: ignore[no-untyped-def]
            out = super().weights(arrivals, n)
            for arrival, weight in zip(arrivals, out, strict=True):
                seen.setdefault(arrival.worker, set()).add(round(weight, 12))
            return out

    simulate(HubRule(Timer(1.0), Watched([0.1, 0.2, 0.3, 0.4])), 1, SPEEDS).run(60.0)
    for j, (duration, share) in enumerate(zip(SPEEDS, [0.1, 0.2, 0.3, 0.4], strict=True)):
        assert seen[j] == {round(ceil(duration / 1.0) * share, 12)}


@pytest.mark.parametrize("when", [OnArrival(), Count(3), Count(3, wait=True), Timer(0.8)], ids=repr)
def test_corrected_weights_of_a_worker_sum_to_its_share_of_the_steps(when: object) -> None:
    totals, last = [0.0] * 4, [0] * 4

    class Watched(TimeCorrected):
        def weights(self, arrivals, n):  # type: ignore[no-untyped-def]
            out = super().weights(arrivals, n)
            for arrival, weight in zip(arrivals, out, strict=True):
                totals[arrival.worker] += weight
                last[arrival.worker] = run.hub.version
            return out

    run = simulate(HubRule(when, Watched([0.1, 0.2, 0.3, 0.4])), 1, SPEEDS)  # type: ignore[arg-type]
    run.run(50.0)
    assert min(last) > 0
    assert totals == pytest.approx([share * v for share, v in zip([0.1, 0.2, 0.3, 0.4], last, strict=True)])


def test_corrected_weights_remove_the_bias_towards_fast_workers() -> None:
    p = Quadratics.scalar([1.0, 2.0, 3.0], [0.0, 1.0, 2.0])

    def limit(rule: HubRule) -> float:
        run = simulate(rule, 1, [1.0, 2.0, 5.0], p=p, lr=0.005).run(2000.0)
        places = [float(position(run.run(0.5))) for _ in range(200)]  # a cycle has 10 seconds
        return abs(sum(places) / len(places) - float(p.optimum()))

    plain, corrected = limit(HubRule()), limit(HubRule(weights=TimeCorrected()))
    assert plain > 0.3
    assert corrected < 0.02 * plain
    assert limit(fedfix(seconds=1.0)) < 0.02 * plain


# ------------------------------------------------------------------ state and refusals


def test_a_saved_hub_goes_on_exactly() -> None:
    def feed(h: Hub, k: int) -> None:
        h.receive(push(k % 3, [float(k)], base=max(0, h.version - 1)))
        if k % 3 == 2:
            h.step()

    rule = HubRule(Count(3), TimeCorrected(), outer.DelayedNesterov(0.7, 0.9, delay=2))
    whole, first, second = hub(rule), hub(rule), hub(rule)
    for k in range(10):
        feed(whole, k)
    for k in range(4):  # one push lies there
        feed(first, k)
    second.load_state_dict(first.state_dict())
    for k in range(4, 10):
        feed(second, k)
    assert torch.equal(whole.reference[0], second.reference[0])
    assert (whole.version, whole.pushes, whole.staleness) == (second.version, second.pushes, second.staleness)
    with pytest.raises(ValueError, match=r"^Hub\(rule=.*saved with [^\n]*$"):
        hub(fedbuff()).load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: OnArrival(-1.0), r"OnArrival\(grace=-1.0\)"),
        (lambda: Count(0), r"Count\(pushes=0\)"),
        (lambda: Timer(0.0), r"Timer\(seconds=0.0\)"),
        (lambda: StalenessWeights(-0.5), r"StalenessWeights\(power=-0.5\)"),
        (lambda: TimeCorrected([0.5, 0.6]), r"TimeCorrected\(shares=\[0.5, 0.6\]\)"),
        (lambda: simulate(HubRule(weights=TimeCorrected([0.5, 0.5]))), r"must be 4 numbers"),
        (lambda: LocalSteps(0), r"LocalSteps\(steps=0\)"),
        (lambda: LocalSteps(5, speeds=[1.0]), r"no effect without dynamic=True"),
        (lambda: simulate(HubRule(), LocalSteps(5, dynamic=True, speeds=[1.0])), r"must be 4 numbers"),
        (lambda: HubRule(signal="both"), r"HubRule\(signal='both'\)"),
        (lambda: fedasync(lr=1.5), r"fedasync\(lr=1.5\)"),
        (lambda: simulate(HubRule(), seconds=[1.0]), r"HubSimulation\(seconds=\[1.0\]\)"),
        (lambda: outer.DelayedNesterov(delay=4, spread=0.3), r"DelayedNesterov\(spread=0.3\)"),
    ],
)
def test_bad_arguments_are_named_in_one_line(call: object, text: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*" + text):
        call()  # type: ignore[operator]


def test_momentum_on_every_arrival_warns() -> None:
    with pytest.warns(
        UserWarning, match=r"outer=Nesterov\(\)\): momentum .* 4 workers.*use outer=DelayedNesterov\(delay=4\)$"
    ):
        simulate(HubRule(OnArrival(), outer=outer.Nesterov()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        simulate(delayed_nesterov(4))
        simulate(fedasync())
        simulate(HubRule(Count(4, wait=True), outer=outer.Nesterov()))
