"""The same plan on real processes (gloo) and in the simulated world gives the same numbers, bytes and virtual times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import Optimizer, adam, momentum_sgd, mosaic_run, mosaic_simulation, sgd
from torch import Tensor, nn
from zoo import PLANS

from lightning_dopt import (
    Engine,
    Every,
    Int8,
    Link,
    Plan,
    Ring,
    Sync,
    SyncError,
    outer,
    plans,
)
from lightning_dopt.comm import ProcessGroupWorld, SimulatedWorld

Ranks = Callable[..., list[Any]]
LINK = Link(mbit=1.0, ms=2.0)


def compare(ranks: Ranks, plan: Plan, n: int, optimizer: Optimizer) -> None:
    """Weights, ledgers and clocks of both worlds; sums of more than two numbers may differ in the last bits."""
    sim = mosaic_simulation(plan, n, optimizer, LINK).run(7).finish()
    answers = ranks(mosaic_run, n, plan, 7, optimizer, LINK)
    tolerance = {"rtol": 0, "atol": 0} if n == 2 else {"rtol": 2e-5, "atol": 2e-5}
    for rank, (weights, ledger, clock) in enumerate(answers):
        for name, value in weights.items():
            torch.testing.assert_close(value, sim.replicas[rank][name].detach(), **tolerance)
        mine = sim.worlds[rank].ledger.state_dict()
        for label, entry in mine.items():
            assert {**ledger[label], "stall_s": 0.0} == entry
        expected = sim.worlds[rank].clock.state_dict()  # type: ignore[union-attr]
        if len(set(sim.bytes)) == 1:
            assert clock == pytest.approx(expected)
        else:  # where ranks send unequally much, only the simulation knows how long others take
            assert clock["now"] <= expected["now"] + 1e-9
    assert len({str(sorted(ledger)) for _, ledger, _ in answers}) == 1


@pytest.mark.parametrize("name", PLANS)
def test_two_ranks_equal_the_simulation_to_the_bit(ranks: Ranks, name: str) -> None:
    compare(ranks, PLANS[name], 2, momentum_sgd)


@pytest.mark.parametrize("name", PLANS)
def test_four_ranks_equal_the_simulation(ranks: Ranks, name: str) -> None:
    compare(ranks, PLANS[name], 4, momentum_sgd)


def test_optimizer_states_are_averaged(ranks: Ranks) -> None:
    plan = Plan([Sync(when=Every(2)), Sync(when=Every(3), what="optimizer.exp_avg"), Sync(what="optimizer.exp_avg_sq")])
    compare(ranks, plan, 2, adam)
    sim = mosaic_simulation(plan, 4, adam).run(3)
    for replica, opt in zip(sim.replicas, sim.optimizers, strict=True):
        for name, first in sim.replicas[0].items():
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(opt.state[replica[name]][key], sim.optimizers[0].state[first][key])
    assert sim.distance() > 1e-3


COMPLETE = [
    "dense gradients",
    "int8",
    "top-k",
    "rand-k",
    "low rank",
    "local sgd",
    "diloco",
    "diloco int8",
    "diloco low rank",
]


@pytest.mark.parametrize("name", COMPLETE)
def test_after_a_complete_blocking_sync_all_ranks_are_bit_equal(ranks: Ranks, name: str) -> None:
    answers = ranks(mosaic_run, 4, PLANS[name], 6, momentum_sgd, None)
    for weights, _, _ in answers[1:]:
        for key, value in weights.items():
            assert torch.equal(value, answers[0][0][key])


# ---------------------------------------------------------------------- modules


class Net(nn.Module):
    """BatchNorm, a tied weight and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.first.weight
        self.frozen = nn.Parameter(torch.ones(6), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(torch.relu(self.norm(self.first(x)))) * self.frozen


def net(rank: int, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net()
    with torch.no_grad():
        model.frozen.fill_(rank + 1.0)
    return model


def data(rank: int, step: int) -> Tensor:
    g = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(8, 6, generator=g) * (rank + 1) + rank


def train_net(world: ProcessGroupWorld, plan: Plan, steps: int) -> dict[str, Tensor]:
    model = net(world.rank)
    parameters = {k: p for k, p in model.named_parameters() if p.requires_grad}
    engine = Engine(plan, parameters, world, buffers=dict(model.named_buffers()))
    opt = torch.optim.SGD(parameters.values(), lr=0.05)
    for step in range(steps):
        engine.run(engine.before_step())
        opt.zero_grad()
        model(data(world.rank, step)).square().mean().backward()
        engine.run(engine.on_gradients())
        opt.step()
        engine.run(engine.after_step())
    engine.run(engine.finish())
    assert model.tied.weight.data_ptr() == model.first.weight.data_ptr()
    assert isinstance(model.tied.weight, nn.Parameter)
    assert model.tied.weight is model.first.weight
    return {k: v.clone() for k, v in model.state_dict().items()}


def test_batch_norm_buffers_follow_the_law_of_total_variance(ranks: Ranks) -> None:
    alone = ranks(train_net, 4, Plan(), 5)
    merged = ranks(train_net, 4, plans.lo_fi(), 5)
    mean = torch.stack([s["norm.running_mean"] for s in alone]).mean(0)
    second = torch.stack([s["norm.running_var"] + s["norm.running_mean"] ** 2 for s in alone]).mean(0)
    for rank, state in enumerate(merged):
        torch.testing.assert_close(state["norm.running_mean"], mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state["norm.running_var"], second - mean**2, rtol=1e-4, atol=1e-5)
        assert int(state["norm.num_batches_tracked"]) == 5
        assert torch.equal(state["frozen"], torch.full((6,), rank + 1.0))
        assert torch.equal(state["first.weight"], state["tied.weight"])
        expected = torch.stack([s["first.weight"] for s in alone]).mean(0)
        torch.testing.assert_close(state["first.weight"], expected, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(s["norm.running_var"], merged[0]["norm.running_var"]) for s in merged)
    naive = torch.stack([s["norm.running_var"] for s in alone]).mean(0)
    assert (merged[0]["norm.running_var"] - naive).abs().max() > 0.02


@pytest.mark.parametrize("plan", [plans.local_sgd(2), plans.compressed_ddp(Int8())], ids=["weights", "gradients"])
def test_buffers_follow_the_syncs_of_weights_and_gradients(ranks: Ranks, plan: Plan) -> None:
    states = ranks(train_net, 2, plan, 4)
    for key in ("norm.running_mean", "norm.running_var", "first.weight", "tied.bias"):
        assert torch.equal(states[0][key], states[1][key])


def halves(world: ProcessGroupWorld, plan: Plan, values: list[list[float]]) -> Tensor:
    """One step without a gradient on bfloat16 weights."""
    x = torch.zeros(1, dtype=torch.bfloat16)
    engine = Engine(plan, {"x": x.requires_grad_()}, world)
    x.data.copy_(torch.tensor(values[world.rank]))
    engine.run(engine.before_step())
    engine.run(engine.after_step())
    return x.detach().clone()


@pytest.mark.parametrize("plan", [plans.local_sgd(1), plans.diloco(1, 1.0, 0.0, nesterov=False), plans.gossip(Ring())])
def test_bfloat16_weights_are_summed_in_float32(ranks: Ranks, plan: Plan) -> None:
    """``256 + 1 + 1 + 1`` is 256 in bfloat16 arithmetic; the mean 64.75 rounds to 65 only once at the end."""
    values = [[256.0], [1.0], [1.0], [1.0]]
    expected = [65.0] * 4 if plan.syncs[0].peers != Ring() else [86.0, 86.0, 1.0, 86.0]
    got = ranks(halves, 4, plan, values)
    assert [float(x) for x in got] == expected
    assert all(x.dtype == torch.bfloat16 for x in got)


def small_steps(world: ProcessGroupWorld) -> tuple[float, float]:
    """An anchor in float32 collects outer steps that are too small for bfloat16."""
    x = torch.ones(1, dtype=torch.bfloat16).requires_grad_()
    engine = Engine(Plan([Sync(signal="delta", outer=outer.SGD(0.1))]), {"x": x}, world)
    for _ in range(10):
        x.data.sub_(2**-7)
        engine.run(engine.after_step())
    anchor = engine.runners[0].lanes[0].anchor
    assert anchor is not None
    return float(anchor), float(x)


def test_anchors_of_bfloat16_weights_are_float32(ranks: Ranks) -> None:
    for anchor, live in ranks(small_steps, 2):
        assert anchor < 0.995
        assert live == float(torch.tensor(anchor).bfloat16())


# ---------------------------------------------------------------------- failures


def fail_on_one(world: ProcessGroupWorld) -> None:
    if world.rank == 1:
        raise RuntimeError("rank one is unwell")
    world.run(iter_all_reduce(world))


def iter_all_reduce(world: ProcessGroupWorld):  # type: ignore[no-untyped-def]
    yield world.all_reduce(torch.ones(1), "test")


def test_the_error_of_a_rank_is_reported_and_the_next_call_works(ranks: Ranks) -> None:
    with pytest.raises(AssertionError, match="rank one is unwell"):
        ranks(fail_on_one, 2)
    assert ranks(rank_of, 2) == [0, 1]


def rank_of(world: ProcessGroupWorld) -> int:
    return world.rank


def lonely(world: ProcessGroupWorld) -> str:
    """Rank 1 leaves; rank 0 waits in vain, for a second."""
    from datetime import timedelta

    short = ProcessGroupWorld(timeout=timedelta(seconds=1))
    short.step = 7
    if world.rank == 1:
        return ""
    try:
        short.run(iter_all_reduce(short))
    except SyncError as error:
        return str(error)
    return "no error"


def test_a_missing_rank_is_named(ranks: Ranks) -> None:
    message = ranks(lonely, 2)[0]
    assert message.startswith("rank 0, step 7, sync 'test': no answer")
    assert "from some rank" in message
    assert "\n" not in message


def test_the_optimizer_argument_is_used() -> None:
    a = mosaic_simulation(Plan(), 2, sgd(0.1)).run(1).stacked("scale")
    b = mosaic_simulation(Plan(), 2, sgd(0.2)).run(1).stacked("scale")
    assert not torch.equal(a, b)


def test_gossip_meets_all_ranks_only_now_and_then() -> None:
    """A slow rank must delay its neighbours only: nothing but every 32nd step is common to all ranks."""

    def meeting(plan: Plan, n: int = 8) -> list[int]:
        engine = Engine(plan, {"x": torch.zeros(3, requires_grad=True)}, SimulatedWorld.create(n)[0])
        return [step for step in range(1, 65) if engine.meets(step)]

    assert meeting(plans.gossip()) == [32, 64]
    assert meeting(plans.diloco(20)) == [20, 40, 60]
    assert meeting(plans.compressed_ddp()) == list(range(1, 65))
    assert meeting(plans.lo_fi()) == []
