"""Gradients that are not finite: all ranks raise the same error or skip the same step, and no memory keeps a trace."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import momentum_sgd, mosaic, mosaic_backward
from torch import Tensor, nn

from lightning_dopt import (
    EF21,
    ErrorFeedback,
    Gradients,
    Int8,
    LowRank,
    Plan,
    Ring,
    Sign,
    Simulation,
    Sync,
    TopK,
    plans,
)
from lightning_dopt.comm import ProcessGroupWorld, SyncError
from lightning_dopt.compress import DGC
from lightning_dopt.engine import Engine

Ranks = Callable[..., list[Any]]
LINE = "step {}, sync 'gradients': the gradients of rank(s) {} are not finite; parameters are as before the step, memories finite"

CODECS = {
    "top-k": ErrorFeedback(TopK(0.1)),
    "int8": EF21(Int8()),
    "low rank": ErrorFeedback(LowRank(1, 1.0)),
    "momentum": DGC(TopK(0.1)),
    "no memory": Int8(),
}


def poisoned(bad: dict[int, list[int]], value: float = math.nan) -> Callable[[int, dict[str, Tensor], int], None]:
    """One element of one gradient of the given ranks is ``value`` at the given steps."""

    def backward(rank: int, parameters: dict[str, Tensor], step: int) -> None:
        mosaic_backward(rank, parameters, step)
        if rank in bad.get(step, []):
            grad = parameters["body.a.weight"].grad
            assert grad is not None
            grad[3, 5] = value

    return backward


def run(plan: Plan, bad: dict[int, list[int]], steps: int, value: float = math.nan, n: int = 3) -> Simulation:
    return Simulation(plan, n, mosaic, poisoned(bad, value), momentum_sgd).run(steps)


def everything(sim: Simulation) -> list[Tensor]:
    """Weights, momentum and memories of all ranks."""
    found = []
    for engine, opt in zip(sim.engines, sim.optimizers, strict=True):
        found += [p.detach() for p in engine.parameters.values()]
        found += [s["momentum_buffer"] for s in opt.state.values() if s.get("momentum_buffer") is not None]
        found += [t for g in engine.gradients[0] for lane in g.runner.lanes for t in lane.channel.tensors().values()]
    return found


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", CODECS)
def test_all_raise_the_same_line_and_nothing_has_changed(name: str, value: float) -> None:
    plan = plans.compressed_ddp(CODECS[name])
    sim = Simulation(plan, 3, mosaic, poisoned({4: [0, 2]}, value), momentum_sgd).run(3)
    before = [t.clone() for t in everything(sim)]
    with pytest.raises(FloatingPointError, match="^" + re.escape(LINE.format(4, "0, 2"))):
        sim.run(1)
    assert same(everything(sim), before)
    assert all(t.isfinite().all() for t in before)


@pytest.mark.parametrize("name", CODECS)
def test_skipping_is_as_if_the_step_had_not_been(name: str) -> None:
    """After steps 1, 2, skipped 3, 4 all is as after 1, 2, 4 with the same numbers of rounds."""
    plan = plans.compressed_ddp(CODECS[name]).guarded(False, "skip")
    with pytest.warns(
        UserWarning, match=r"step 3, sync 'gradients': the gradients of rank\(s\) 1 are not finite; the step is skipped"
    ):
        sim = run(plan, {3: [1]}, 3)
    assert [e.skipped for e in sim.engines] == [1, 1, 1]
    assert same(everything(sim), everything(run(plan, {}, 2)))
    sim.run(1)
    jump = Simulation(plan, 3, mosaic, lambda r, p, s: mosaic_backward(r, p, s if s < 3 else s + 1), momentum_sgd).run(
        3
    )
    assert same(everything(sim), everything(jump))
    assert sim.engines[0].step == 4


def test_exact_sums_behave_as_ddp_does_unless_asked() -> None:
    plan = plans.compressed_ddp(plans.compressed_ddp(Int8()).syncs[0].codec)
    exact = Plan([Sync(what="gradients")])
    assert (plan.nonfinite(3), exact.nonfinite(3), Plan([Sync(peers=Ring())]).nonfinite(3)) == (
        "raise",
        "ignore",
        "ignore",
    )
    sim = run(exact, {2: [1]}, 2)
    assert all(sim.replicas[r]["body.a.weight"].isnan().any() for r in range(3))
    assert sim.worlds[0].ledger.overhead == 0
    with pytest.raises(FloatingPointError, match=re.escape(LINE.format(2, "1"))):
        run(exact.guarded(False), {2: [1]}, 2)
    asked = run(exact.guarded(False), {}, 4)
    assert [w.ledger.overhead for w in asked.worlds] == [4 * 16] * 3  # 2 (n - 1) / n of three floats in each of 4 steps
    assert same(everything(asked), everything(run(exact, {}, 4)))


def test_ranks_without_gradient_syncs_decide_alone() -> None:
    plan = plans.local_sgd(4).guarded(False, "skip")
    with pytest.warns(UserWarning, match=r"step 2, sync 'none': the gradients of rank\(s\) 1 are"):
        sim = run(plan, {2: [1]}, 3)
    assert [e.skipped for e in sim.engines] == [0, 1, 0]
    free = run(plans.local_sgd(4), {}, 3)
    for rank in (0, 2):
        assert torch.equal(sim.replicas[rank]["scale"], free.replicas[rank]["scale"])
    assert not torch.equal(sim.replicas[1]["scale"], free.replicas[1]["scale"])
    assert all(w.ledger.overhead == 0 for w in sim.worlds)


def test_corrections_do_not_see_them() -> None:
    plan = plans.gossip(Ring(), correction="gradient_tracking").guarded(False, "skip")
    with pytest.warns(UserWarning, match="is skipped"):
        sim = run(plan, {2: [3]}, 6, n=4)
    assert all(t.isfinite().all() for e in sim.engines for c in e.corrections for t in c.state().values())
    assert all(p.isfinite().all() for r in sim.replicas for p in r.values())


def test_ignored_they_go_where_they_went_before() -> None:
    """A NaN among the values of top-k: nobody looks at gradients, receivers refuse the message."""

    with pytest.raises(
        SyncError, match=r"the message of rank\(s\) 1 cannot be used .* not finite; damaged, or its sender's"
    ):
        run(plans.compressed_ddp(TopK(0.1)).guarded(False, "ignore"), {2: [1]}, 2)


# ---------------------------------------------------------------------- buckets that have left when it is found


def model() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 3))


def trained(world: ProcessGroupWorld, plan: Plan, bad: int, steps: int) -> Any:
    """In step ``bad`` the first layer's gradient of rank 1, the last to be known, is not finite."""
    net = model()
    parameters = dict(net.named_parameters())
    engine = Engine(plan, parameters, world)
    opt = torch.optim.SGD(parameters.values(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    early, text = 0, ""
    for step in range(1, steps + 1):
        opt.zero_grad()
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(100 * step + world.rank))
        if step == bad and world.rank == 1:
            handle = parameters["0.weight"].register_hook(lambda g: g.clone().fill_(math.inf))
        engine.watch_gradients()
        scaler.scale(net(x).square().mean()).backward()
        early = sum(g._sent for g in engine.gradients[0])
        if step == bad and world.rank == 1:
            handle.remove()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                engine.run(engine.on_gradients())
        except FloatingPointError as error:
            text = str(error)
            break
        opt.step()
        engine.run(engine.after_step())
    memory = [t.clone() for g in engine.gradients[0] for r in g.runner.lanes for t in r.channel.tensors().values()]
    engine.close()
    return [p.detach().clone() for p in parameters.values()] + memory, early, text, engine.skipped


@pytest.mark.parametrize(
    "codec", [ErrorFeedback(TopK(0.1)), EF21(Int8()), ErrorFeedback(LowRank(2)), ErrorFeedback(Sign())], ids=repr
)
def test_buckets_that_have_left_are_taken_back(ranks: Ranks, codec: Any) -> None:
    plan = Plan([Sync(what=Gradients(bucket_mb=0.001), codec=codec)])
    stopped = ranks(trained, 2, plan, 3, 5)
    sound = ranks(trained, 2, plan, 0, 2)
    for (state, early, text, _), (other, _, _, _) in zip(stopped, sound, strict=True):
        assert early >= 2
        assert text.startswith(LINE.format(3, "1"))
        assert same(state[:6], other[:6])  # the parameters
        assert all(t.isfinite().all() for t in state)
    skipped = ranks(trained, 2, plan.guarded(False, "skip"), 3, 3)
    for (state, _, _, count), (other, _, _, _) in zip(skipped, sound, strict=True):
        assert count == 1
        assert same(state, other)


# ---------------------------------------------------------------------- loss scaling


def scaled(world: ProcessGroupWorld, codec: Any, start: float) -> Any:
    """Rank 1 overflows in step 3 of 5."""
    net = model()
    parameters = dict(net.named_parameters())
    engine = Engine(plans.compressed_ddp(codec), parameters, world)
    opt = torch.optim.SGD(parameters.values(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=start, growth_interval=1000)
    weights, memories = [], []
    for step in range(1, 6):
        opt.zero_grad()
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(100 * step + world.rank))
        loss = net(x).square().mean() * (math.inf if step == 3 and world.rank == 1 else 1.0)
        scaler.scale(loss).backward()
        engine.run(engine.on_gradients(scaler.get_scale()))
        scaler.step(opt)
        scaler.update()
        engine.run(engine.after_step())
        weights.append(torch.cat([p.detach().reshape(-1).clone() for p in parameters.values()]))
        lanes = [r.channel for g in engine.gradients[0] for r in g.runner.lanes]
        memories.append(torch.cat([t.reshape(-1).clone() for c in lanes for t in c.memory_state.values()]))
    return weights, memories, scaler.get_scale()


def test_with_loss_scaling_all_skip_and_memories_carry_no_scale(ranks: Ranks) -> None:
    """A power of two as scale changes no bit: memories are in the units of the gradients, before and after it falls."""
    one, many = (ranks(scaled, 2, ErrorFeedback(TopK(0.1)), start) for start in (1.0, 1024.0))
    for runs, start in ((one, 1.0), (many, 1024.0)):
        assert [r[2] for r in runs] == [start / 2] * 2
        for weights, memories, _ in runs:
            assert torch.equal(weights[2], weights[1])
            assert torch.equal(memories[2], memories[1])
            assert not torch.equal(weights[3], weights[2])
    for a, b in zip(one, many, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[0] + a[1], b[0] + b[1], strict=True))


def test_what_may_be_asked_for() -> None:
    with pytest.raises(
        ValueError, match=r"^Plan\(on_nonfinite='stop'\): must be one of 'auto', 'raise', 'skip', 'ignore'$"
    ):
        Plan(on_nonfinite="stop")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^Plan\(checksum=1\): must be True or False$"):
        Plan(checksum=1)  # type: ignore[arg-type]
    assert Plan([Sync()]).guarded() == Plan([Sync()], checksum=True, on_nonfinite="raise")
