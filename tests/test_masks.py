"""Fixed sparse selections: what is trained, what is sent, and that nothing else moves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from problems import SHAPES, mosaic, mosaic_simulation, p2
from torch import Tensor

from lightning_dopt import (
    SAM,
    Complete,
    Delay,
    Drifted,
    Every,
    FisherMask,
    Int8,
    Link,
    Nesterov,
    NeuronMask,
    Parameters,
    Plan,
    Ring,
    Simulation,
    Sync,
    Until,
    plans,
)
from lightning_dopt.comm.ledger import all_reduce_bytes
from lightning_dopt.forecast import forecast


def masked(plan: Plan, *corrections: object) -> Plan:
    return Plan(plan.syncs, [*plan.corrections, *corrections], plan.seed)  # type: ignore[list-item]


def decayed(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1)


def values(sim: Simulation, rank: int) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in sim.replicas[rank].values()])


def same(a: Simulation, b: Simulation) -> None:
    for i in range(len(a.replicas)):
        assert torch.equal(values(a, i), values(b, i))


EVERYWHERE = {
    "gradients": plans.compressed_ddp(Int8()),
    "local": plans.local_sgd(2),
    "outer": plans.diloco(2, codec=Int8()),
    "gossip": plans.gossip(Ring(), Int8()),
}


@pytest.mark.parametrize("name", EVERYWHERE)
def test_a_mask_of_everything_is_the_plain_method(name: str) -> None:
    plan = EVERYWHERE[name]
    plain = mosaic_simulation(plan, 4, decayed).run(7).finish()
    sim = mosaic_simulation(masked(plan, NeuronMask(1.0)), 4, decayed).run(7).finish()
    same(sim, plain)
    assert sim.bytes == plain.bytes
    tracker = Sync(Until(1, Every(1)), "tracker")
    fisher = Plan([*plan.syncs, tracker], [FisherMask(1.0)], plan.seed)
    same(mosaic_simulation(fisher, 4, decayed).run(1), mosaic_simulation(plan, 4, decayed).run(1))


@pytest.mark.parametrize("name", EVERYWHERE)
def test_what_is_not_chosen_never_moves(name: str) -> None:
    """With momentum and weight decay, on every rank; what is chosen does."""
    sim = mosaic_simulation(masked(EVERYWHERE[name], NeuronMask(0.25)), 4, decayed).run(6).finish()
    start = mosaic(0)
    for replica in sim.replicas:
        for key, p in replica.items():
            moved = p.detach() != start[key]
            if p.dim() < 2:
                assert moved.all()
                continue
            kept = max(1, int(0.25 * p.shape[1] + 0.5))
            assert (moved.sum(1) == kept).all()
            largest = start[key].abs().topk(kept).values.min(1, keepdim=True).values
            assert torch.equal(moved, start[key].abs() >= largest)


def test_one_row_for_each_chosen_element_is_sent() -> None:
    k = sum(s[0] * max(1, s[1] // 4) if len(s) == 2 else torch.Size(s).numel() for s in SHAPES.values())
    for plan in (Plan([Sync(what="gradients")]), plans.local_sgd(1)):
        sim = mosaic_simulation(masked(plan, NeuronMask(0.25)), 4, decayed).run(3)
        assert sim.bytes == [3 * all_reduce_bytes(4 * k, 4)] * 4
        assert forecast(sim.engines[0].plan, 4, SHAPES, 3).bytes == sim.bytes


def test_scores_are_the_squared_gradients_and_choose_the_largest() -> None:
    """Quadratics: nothing moves before the choice, so the gradients are A_i (x0 - c_i) in each step."""
    problem, start = p2(), torch.linspace(-1, 1, 5, dtype=torch.float64)
    plan = Plan([Sync(Every(5)), Sync(Until(3, Every(3)), "tracker")], [FisherMask(0.4)])
    sim = problem.simulate(plan, 0.05, start).run(2)
    for i, engine in enumerate(sim.engines):
        score = engine.corrections[0].state()["scores0"]
        torch.testing.assert_close(score, 2 * problem.gradient(i, start).square())
    assert torch.equal(sim.stacked(), start.expand(8, 5))
    fisher = torch.stack([problem.gradient(i, start).square() for i in range(8)]).mean(0)
    sim.run(1)
    for engine in sim.engines:
        assert torch.equal(engine.positions[0], fisher.topk(2).indices.sort().values)
    moved = (sim.run(4).stacked() != start).any(0)
    assert torch.equal(moved.nonzero().view(-1), fisher.topk(2).indices.sort().values)


def refreshed(codec: Int8 | None = None) -> Plan:
    when = plans.fish_mask(0.2, 2, 2, 2).syncs[1].when
    local = Sync(plans.fish_mask(0.2, 2, 2, 2).syncs[0].when, codec=codec, outer=Nesterov(0.5, 0.5))
    return Plan([local, Sync(when, "tracker")], [FisherMask(0.2, "scale")])


@pytest.mark.parametrize("codec", [None, Int8()], ids=repr)
def test_a_new_choice_is_the_same_everywhere_and_leaves_replicas_equal_outside(codec: Int8 | None) -> None:
    sim = mosaic_simulation(refreshed(codec), 3, decayed)
    seen = []
    for pair in range(7):
        sim.run(2)
        chosen = sim.engines[0].positions[0]
        assert all(torch.equal(e.positions[0], chosen) for e in sim.engines)
        assert all(torch.equal(values(sim, i), values(sim, 0)) for i in range(3))  # just averaged
        for engine in sim.engines if pair else []:  # nothing is averaged before the first choice
            assert torch.equal(engine.runners[0].lanes[0].anchor, engine.flat.lanes[0].live[chosen])
        seen.append(chosen.clone())
    assert len({tuple(s.tolist()) for s in seen}) > 1
    assert all(not torch.equal(r["scale"].detach(), mosaic(0)["scale"]) for r in sim.replicas)


def test_a_run_goes_on_from_its_state() -> None:
    for plan in (refreshed(Int8()), masked(plans.compressed_ddp(Int8()), NeuronMask(0.3))):
        whole, first = (mosaic_simulation(plan, 3, torch_sgd).run(k) for k in (13, 7))
        second = mosaic_simulation(plan, 3, torch_sgd)
        for rank in range(3):
            with torch.no_grad():
                for key, p in second.replicas[rank].items():
                    p.copy_(first.replicas[rank][key])
            second.engines[rank].load_state_dict(first.engines[rank].state_dict())
            second.engines[rank].world.step = 7
        same(second.run(6), whole)


def torch_sgd(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def test_forecast_is_exact() -> None:
    plan, link = refreshed(), Link(mbit=10.0, ms=5.0)
    sim = mosaic_simulation(plan, 4, decayed, link).run(11).finish()
    told = forecast(plan, 4, SHAPES, 11, link, step_seconds=0.01)
    assert told.bytes == sim.bytes
    assert told.seconds == max(w.clock.now for w in sim.worlds if w.clock is not None)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: FisherMask(0.0), r"FisherMask\(ratio=0.0\)"),
        (lambda: NeuronMask(1.5), r"NeuronMask\(ratio=1.5\)"),
        (lambda: FisherMask(always=""), "always=''"),
        (lambda: Plan([Sync()], [FisherMask()]), "needs one sync of what='tracker'"),
        (lambda: Plan([Sync(what=Parameters("a.*"))], [NeuronMask()]), "needs syncs of all parameters"),
        (lambda: Plan([Sync(Every(4), apply=Delay(1))], [NeuronMask()]), r"apply=Blocking\(\)"),
        (lambda: Plan([Sync()], [NeuronMask(), SAM()]), "not with SAM"),
        (lambda: Plan([Sync(Drifted(1.0)), Sync(Every(6), "tracker")], [FisherMask()]), "must be known beforehand"),
        (lambda: Plan([Sync(Every(4)), Sync(Every(6), "tracker")], [FisherMask()]), "chooses anew where"),
    ],
)
def test_refused(make: Callable[[], object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


def test_refused_for_workers_and_parameters() -> None:
    gossip = Plan([Sync(peers=Ring()), Sync(Every(4), "tracker", peers=Complete())], [FisherMask()])
    with pytest.raises(ValueError, match="replicas differ where the choice changes"):
        gossip.check(4)
    with pytest.raises(ValueError, match="these are 64 elements"):
        mosaic_simulation(plans.fish_mask(0.1, always="body.a.*"), 2)
