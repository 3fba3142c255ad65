"""What holds for every plan, checked on many."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from problems import Quadratics, adam, momentum_sgd, mosaic, mosaic_backward, mosaic_simulation, sgd
from torch import Tensor
from zoo import PLANS, sample

from lightning_dopt import (
    BF16,
    AtEnd,
    Blocking,
    Complete,
    Delay,
    Difference,
    Engine,
    ErrorFeedback,
    Every,
    Identity,
    Int8,
    Lerp,
    Link,
    LowRank,
    OneRound,
    Parameters,
    Plan,
    RandK,
    Rebase,
    Ring,
    Sign,
    SimulatedWorld,
    Simulation,
    Sync,
    TopK,
    outer,
    plans,
)
from lightning_dopt.comm import lockstep
from lightning_dopt.compress import Budget, Compressor
from lightning_dopt.compress.memory import as_compressor
from lightning_dopt.what import OptimizerState

pytestmark = pytest.mark.filterwarnings("ignore:Sync")

NAMED = [pytest.param(plan, id=name) for name, plan in PLANS.items()]
MIXED = [pytest.param(plan, id=f"mix{k}") for k, plan in enumerate(sample(30))]
ALL = NAMED + MIXED


def first(sim: Simulation) -> list[Any]:
    """The lane of the first sync on every rank."""
    return [engine.runners[0].lanes[0] for engine in sim.engines]


def all_equal(tensors: list[Tensor]) -> bool:
    return all(torch.equal(t, tensors[0]) for t in tensors)


# ---------------------------------------------------------------------- agreement


def agrees_completely(sync: Sync, n: int) -> bool:
    """Whether a round of this sync makes all replicas equal: all hear all and take the result as it is."""
    whole = sync.apply == Blocking() and not isinstance(sync.codec, Difference)
    return whole and sync.peers.is_mean(n) and sync.what == Parameters()


@pytest.mark.parametrize("plan", ALL)
def test_replicas_are_bit_equal_after_a_complete_round(plan: Plan) -> None:
    sim, checked = mosaic_simulation(plan, 4), 0
    if any(s.what.slot == "gradients" and s.what.match == "*" and s.peers.is_mean(4) for s in plan):  # type: ignore[attr-defined]
        assert all(all_equal(list(sim.run(2).stacked(name))) for name in mosaic(0))
    for step in range(sim.engines[0].step + 1, 7):
        sim.run(1)
        if any(s.when.due(step) and agrees_completely(s, 4) for s in plan):
            checked += 1
            assert all(all_equal(list(sim.stacked(name))) for name in mosaic(0))
    sim.finish()
    if any(s.when.at_end and agrees_completely(s, 4) for s in plan):
        assert sim.distance() == 0.0


@pytest.mark.parametrize("plan", ALL)
def test_shared_anchors_are_bit_equal_at_all_times(plan: Plan) -> None:
    """Wherever changes since the anchor are sent, unless ranks move their anchor by their own share at once."""
    sim = mosaic_simulation(plan, 4)
    for _ in range(7):
        sim.run(1)
        for k, runner in enumerate(sim.engines[0].runners):
            own_share = isinstance(runner.sync.apply, OneRound) and runner.sync.apply.inflight != 0.0
            if runner.sync.signal == "delta" and not own_share:
                assert all_equal([e.runners[k].lanes[0].anchor for e in sim.engines])  # type: ignore[misc]


def scattered(plan: Plan, n: int, momentum: float = 0.0) -> Simulation:
    """Float64 quadratics of equal curvature; the anchors are shared, the live weights differ from the start."""
    g = torch.Generator().manual_seed(7)
    problem = Quadratics(
        torch.eye(6).expand(n, 6, 6) * torch.tensor([0.5, 1, 1.5, 2, 2.5, 3]),
        torch.randn(n, 6, generator=g, dtype=torch.float64),
    )
    sim = problem.simulate(plan, sgd(0.1, momentum))
    for rank, replica in enumerate(sim.replicas):
        replica["x"].data.copy_(problem.c[(rank + 1) % n] * 2)
    return sim


def keeps_the_mean(plan: Plan) -> bool:
    """Exact or difference-coded parameters, taken as they are or rebased, without an outer optimizer."""
    return all(
        s.what.slot == "parameters"
        and s.what == Parameters()
        and (isinstance(s.codec, (Identity, Difference)) and s.outer in (None, outer.SGD()))
        and not isinstance(s.apply, OneRound)
        and (s.apply.delay == 0 or (s.apply.merge == Rebase() and s.signal == "value" and s.outer is None))
        and (s.apply.merge == Rebase() or not isinstance(s.apply.merge, Lerp) or s.signal == "value")
        and (getattr(s.apply, "order", "atc") == "atc" or (s.signal == "value" and s.outer is None))
        for s in plan
    )


MEANS = [p for p in [*NAMED, *(pytest.param(q, id=f"mix{k}") for k, q in enumerate(sample(400)))]
         if keeps_the_mean(p.values[0]) and not p.values[0].corrections]  # type: ignore[attr-defined]  # fmt: skip


@pytest.mark.parametrize("plan", MEANS)
def test_the_mean_does_not_depend_on_the_plan(plan: Plan) -> None:
    """Linear invariance: with equal curvatures the mean over workers is that of workers who never talk."""
    sim, free = scattered(plan, 4, 0.5), scattered(Plan(), 4, 0.5)
    for _ in range(8):
        torch.testing.assert_close(sim.run(1).stacked().mean(0), free.run(1).stacked().mean(0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sim.finish().stacked().mean(0), free.stacked().mean(0), rtol=1e-9, atol=1e-9)
    assert (not plan.syncs) or not torch.equal(sim.stacked(), free.stacked())


def test_enough_plans_keep_the_mean() -> None:
    assert len(MEANS) > 40


# ---------------------------------------------------------------------- one worker, no sync


@pytest.mark.parametrize("plan", ALL)
def test_a_lone_worker_that_sends_exact_values_trains_as_without_a_plan(plan: Plan) -> None:
    plan.check(1) if not plan.syncs else None
    exact = all(isinstance(s.codec, Identity) and s.outer is None and s.signal == "value" for s in plan)
    alone = mosaic_simulation(Plan(), 1).run(7)
    sim = mosaic_simulation(plan, 1).run(7).finish()
    assert sim.bytes == [0]
    for name in mosaic(0):
        if exact and not plan.corrections:
            assert torch.equal(sim.stacked(name), alone.stacked(name))
        elif plan.corrections and exact:
            torch.testing.assert_close(sim.stacked(name), alone.stacked(name))


def test_a_lone_worker_that_sends_changes_trains_as_without_a_plan_to_rounding() -> None:
    for apply in (Blocking(), Delay(1), Blocking("cta")):
        plan = Plan([Sync(when=Every(3), signal="delta", apply=apply)])
        sim, alone = mosaic_simulation(plan, 1).run(8).finish(), mosaic_simulation(Plan(), 1).run(8)
        for name in mosaic(0):
            torch.testing.assert_close(sim.stacked(name), alone.stacked(name), rtol=1e-5, atol=1e-6)


def test_no_sync_is_local_training() -> None:
    sim = mosaic_simulation(Plan(), 3).run(9).finish()
    for rank in range(3):
        parameters = {k: t.requires_grad_() for k, t in mosaic(rank).items()}
        opt = momentum_sgd(list(parameters.values()))
        for step in range(1, 10):
            mosaic_backward(rank, parameters, step)
            opt.step()
        for name, value in parameters.items():
            assert torch.equal(sim.replicas[rank][name], value)
    assert sim.bytes == [0, 0, 0]


# ---------------------------------------------------------------------- bytes


def ring_sum(nbytes: int, n: int) -> int:
    """A ring all-reduce: ``2 (n - 1) / n`` of the message, rounded up."""
    return -(-2 * (n - 1) * nbytes // n)


def message(codec: Compressor, shapes: list[torch.Size]) -> int:
    numel = sum(s.numel() for s in shapes)
    if isinstance(codec, Identity):
        return 4 * numel
    if isinstance(codec, LowRank):
        return sum(codec.payload_bytes(s) for s in shapes)
    return codec.payload_bytes((numel,))


def round_bytes(sync: Sync, n: int, rank: int, round_: int, shapes: list[torch.Size]) -> int:
    codec, _ = as_compressor(sync.codec)
    size = message(codec, shapes)
    if not sync.peers.is_mean(n):
        return len(sync.peers.receivers(n, rank, round_)) * size
    if not (codec.linear and sync.combine.linear):
        return (n - 1) * size
    if isinstance(codec, LowRank):
        thin = [(f[1], f[2]) for s in shapes if (f := codec.factors(s))]
        second = 4 * sum(b * r for b, r in thin)
        return ring_sum(size - second, n) + ring_sum(second, n)
    return ring_sum(size, n)


def expected_bytes(plan: Plan, n: int, rank: int, steps: int) -> int:
    shapes = {name: t.shape for name, t in mosaic(0).items()}
    total = 0
    for sync in plan:
        names = sync.what.select({name: shape.numel() for name, shape in shapes.items()})  # type: ignore[attr-defined]
        chosen = [shapes[name] for name in names]
        rounds = sum(sync.when.due(t) for t in range(1, steps + 1)) + sync.when.at_end
        total += sum(round_bytes(sync, n, rank, k, chosen) for k in range(rounds))
    return total


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("plan", ALL)
def test_bytes_follow_the_formula(plan: Plan, n: int) -> None:
    if any(isinstance(as_compressor(sync.codec)[0], Budget) for sync in plan):
        pytest.skip("chosen anew during the run: see test_budgets.py")
    sim = mosaic_simulation(plan, n).run(6).finish()
    assert sim.bytes == [expected_bytes(plan, n, rank, 6) for rank in range(n)]
    flags = 0 if plan.nonfinite(n) == "ignore" else 6 * ring_sum(4 * n, n)  # one number per rank and step
    assert [w.ledger.overhead for w in sim.worlds] == [flags] * n
    assert set(sim.worlds[0].ledger.entries) <= set(plan.labels())


def test_bytes_in_numbers() -> None:
    """236 weights: a ring sum of 944 bytes among 4 is 1416; all-gather sends 3 messages."""
    numel = sum(t.numel() for t in mosaic(0).values())
    assert numel == 24 + 3 + 64 + 128 + 1 + 16
    assert mosaic_simulation(plans.local_sgd(2), 4).run(4).bytes == [2 * 2 * 3 * 4 * numel // 4] * 4
    assert mosaic_simulation(plans.gossip(Ring()), 4).run(3).bytes == [3 * 2 * 4 * numel] * 4
    assert mosaic_simulation(plans.gossip(), 4).run(3).bytes == [3 * 4 * numel] * 4
    int8 = mosaic_simulation(plans.compressed_ddp(Int8()), 4).run(1).bytes[0]
    assert 3 * numel < int8 < 3 * numel * 1.1


def test_optimizer_states_are_counted_under_their_own_label() -> None:
    plan = Plan([Sync(when=Every(2)), Sync(when=Every(3), what=OptimizerState("exp_avg"), peers=Ring())])
    entries = mosaic_simulation(plan, 4, adam).run(6).worlds[1].ledger.entries
    numel = sum(t.numel() for t in mosaic(0).values())
    assert entries["parameters"].bytes == 3 * 6 * numel
    assert entries["optimizer.exp_avg"].bytes == 2 * 8 * numel
    assert entries["optimizer.exp_avg"].messages == 2


# ---------------------------------------------------------------------- resume


def save(sim: Simulation) -> bytes:
    lockstep([engine.land() for engine in sim.engines])
    state = [
        {"weights": {k: t.detach() for k, t in r.items()}, "optimizer": o.state_dict(), "engine": e.state_dict()}
        for r, o, e in zip(sim.replicas, sim.optimizers, sim.engines, strict=True)
    ]
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def load(sim: Simulation, data: bytes) -> Simulation:
    state = torch.load(io.BytesIO(data), weights_only=True)
    for replica, opt, engine, saved in zip(sim.replicas, sim.optimizers, sim.engines, state, strict=True):
        for name, tensor in replica.items():
            tensor.data.copy_(saved["weights"][name])
        opt.load_state_dict(saved["optimizer"])
        engine.load_state_dict(saved["engine"])
    return sim


def assert_same(a: Simulation, b: Simulation) -> None:
    for rank in range(len(a.replicas)):
        for name, value in a.replicas[rank].items():
            assert torch.equal(value, b.replicas[rank][name]), (rank, name)
    assert a.bytes == b.bytes
    assert [e.step for e in a.engines] == [e.step for e in b.engines]


RESUMED = [
    *ALL[: len(NAMED) + 15],
    pytest.param(
        Plan([Sync(when=Every(3)), Sync(when=Every(2), what="optimizer.exp_avg"), Sync(what="optimizer.exp_avg_sq")]),
        id="optimizer states",
    ),
    pytest.param(
        Plan(
            [Sync(when=Every(4), outer=outer.Adam(), codec=ErrorFeedback(LowRank(1, 1.0)), apply=Delay(3, Lerp(0.5)))]
        ),
        id="delayed low rank",
    ),
    pytest.param(
        Plan([Sync(when=Every(2), outer=outer.FromOptimizer(lambda ps: torch.optim.Adagrad(ps, lr=0.1)))]),
        id="function",
    ),
]


@pytest.mark.parametrize("plan", RESUMED)
def test_a_run_resumed_at_any_step_is_the_same_run(plan: Plan) -> None:
    """Also while a message is under way; and landing for a checkpoint changes nothing."""
    steps = 7 if "steps=3" in repr(plan) else 5
    reference = mosaic_simulation(plan, 4, adam).run(steps).finish()
    going, files = mosaic_simulation(plan, 4, adam), []
    for _ in range(steps):
        files.append(save(going))
        going.run(1)
    files.append(save(going))
    assert_same(going.finish(), reference)
    for step, data in enumerate(files):
        assert_same(load(mosaic_simulation(plan, 4, adam), data).run(steps - step).finish(), reference)


def test_a_message_is_under_way_at_some_checkpoint() -> None:
    """The test above means something: between send and apply the state holds the message."""
    for plan in (PLANS["eager"], PLANS["streaming"]):
        sim = mosaic_simulation(plan, 2).run(5)
        save(sim)
        flights = sim.engines[0].state_dict()["runners"][0]["lanes"][0]["flights"]
        assert len(flights) == 1
        assert flights[0]["result"].abs().sum() > 0


def test_a_checkpoint_of_another_plan_is_refused() -> None:
    state = mosaic_simulation(plans.diloco(3), 2).run(2).engines[0].state_dict()
    with pytest.raises(ValueError, match="written by another plan"):
        mosaic_simulation(plans.diloco(4), 2).engines[0].load_state_dict(state)


# ---------------------------------------------------------------------- error feedback on changes


@pytest.mark.parametrize("codec", [TopK(0.1), RandK(0.2), Sign(), Int8(), LowRank(1, 1.0), BF16()], ids=repr)
def test_changes_lose_nothing_with_error_feedback(codec: Compressor) -> None:
    """Anchor less mean residual moves by exactly the mean of the local changes."""
    sim = scattered(Plan([Sync(when=Every(2), codec=ErrorFeedback(codec))]), 4)
    before_sync: list[Tensor] = [torch.empty(0)] * 4
    for rank, opt in enumerate(sim.optimizers):
        opt.register_step_post_hook(
            lambda o, a, k, rank=rank: before_sync.__setitem__(rank, o.param_groups[0]["params"][0].detach().clone())
        )
    residual = torch.zeros(6, dtype=torch.float64)
    for _ in range(20):
        sim.run(2)
        mean_residual = torch.stack([lane.channel.memory_state["residual"] for lane in first(sim)]).mean(0)
        left = first(sim)[0].anchor - mean_residual
        torch.testing.assert_close(left, torch.stack(before_sync).mean(0) - residual, rtol=1e-6, atol=1e-6)
        residual = mean_residual


@pytest.mark.parametrize("codec", [RandK(0.3), TopK(0.2), Int8(), Identity()], ids=repr)
def test_own_share_under_compression_does_not_drift(codec: Compressor) -> None:
    """The share taken at once and given back later is what the others decode, so anchors stay together."""
    plan = Plan([Sync(when=Every(2), codec=ErrorFeedback(codec), outer=outer.SGD(0.5), apply=OneRound("own_share"))])
    sim = scattered(plan, 4)
    spreads = []
    for _ in range(40):
        sim.run(2)
        anchors = torch.stack([lane.anchor for lane in first(sim)])
        own = torch.stack([lane.flights[0].own for lane in first(sim)])
        common = anchors + 0.5 * own / 4
        torch.testing.assert_close(common, common.mean(0).expand(4, 6), rtol=1e-7, atol=1e-7)
        spreads.append(float((anchors - anchors.mean(0)).norm()))
    assert spreads[0] > 0.01


# ---------------------------------------------------------------------- odd optimizers, scaled and missing gradients


class Replacing(torch.optim.Optimizer):
    """Puts a new tensor in place of each parameter's storage, as some optimizers and loaders do."""

    def __init__(self, parameters: list[Tensor]) -> None:
        super().__init__(parameters, {"lr": 0.05})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p.data = p.data - 0.05 * p.grad


@pytest.mark.parametrize("apply", [Blocking(), Blocking("cta"), Blocking("awc"), Delay(1)], ids=repr)
def test_replaced_storage_is_noticed(apply: Blocking | Delay) -> None:
    plan = Plan([Sync(when=Every(3), peers=Ring(), apply=apply)])
    a, b = mosaic_simulation(plan, 4, Replacing).run(8), mosaic_simulation(plan, 4, sgd(0.05)).run(8)
    for name in mosaic(0):
        torch.testing.assert_close(a.stacked(name), b.stacked(name))


def engines(plan: Plan, n: int, **kw: Any) -> tuple[list[Engine], list[dict[str, Tensor]]]:
    replicas = [{"x": torch.zeros(4).requires_grad_(), "y": torch.zeros(2).requires_grad_()} for _ in range(n)]
    worlds = SimulatedWorld.create(n)
    return [Engine(plan, r, w, **kw) for r, w in zip(replicas, worlds, strict=True)], replicas


def test_scaled_gradients_leave_messages_and_memories_unscaled() -> None:
    plan = plans.compressed_ddp(ErrorFeedback(TopK(0.3)))
    results = []
    for scale in (1.0, 1024.0):
        made, replicas = engines(plan, 3)
        for rank, r in enumerate(replicas):
            r["x"].grad = scale * torch.arange(4.0) * (rank + 1)
            r["y"].grad = scale * torch.ones(2)
        with torch.no_grad():
            lockstep([e.on_gradients(scale) for e in made])
        memory = made[1].gradients[0][0].runner.lanes[0].channel.memory_state["residual"]
        results.append((replicas[0]["x"].grad / scale, memory.clone()))  # type: ignore[operator]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][1].abs().sum() > 0


def test_one_overflow_makes_all_ranks_skip_and_leaves_the_memory_alone() -> None:
    made, replicas = engines(plans.compressed_ddp(ErrorFeedback(TopK(0.3))), 3)
    for r in replicas:
        r["x"].grad, r["y"].grad = torch.ones(4), torch.ones(2)
    replicas[2]["y"].grad = torch.tensor([1.0, float("nan")])
    with torch.no_grad():
        lockstep([e.on_gradients(8.0) for e in made])
    assert all(bool(torch.isinf(r[k].grad).all()) for r in replicas for k in "xy")  # type: ignore[arg-type]
    assert made[0].gradients[0][0].runner.lanes[0].channel.memory_state["residual"].abs().sum() == 0
    assert made[0].world.ledger.bytes == 0
    assert made[0].world.ledger.overhead > 0


def test_a_gradient_that_one_rank_lacks_counts_as_zero_and_one_that_all_lack_stays_away() -> None:
    made, replicas = engines(Plan([Sync(what="gradients")]), 2)
    replicas[0]["x"].grad = torch.full((4,), 3.0)
    with torch.no_grad():
        lockstep([e.on_gradients() for e in made])
    for r in replicas:
        assert torch.equal(r["x"].grad, torch.full((4,), 1.5))  # type: ignore[arg-type]
        assert r["y"].grad is None
    replicas[0]["x"].grad, replicas[1]["x"].grad = None, torch.full((4,), 8.0)  # what was there before is gone
    with torch.no_grad():
        lockstep([e.on_gradients() for e in made])
    assert [float(r["x"].grad[0]) for r in replicas] == [4.0, 4.0]  # type: ignore[index]


def test_gradient_groups_are_sent_when_their_optimizer_steps() -> None:
    made, replicas = engines(Plan([Sync(what="gradients")]), 2, gradient_groups=[["x"], ["y"]])
    for rank, r in enumerate(replicas):
        r["x"].grad, r["y"].grad = torch.full((4,), float(rank)), torch.full((2,), float(rank))
    with torch.no_grad():
        lockstep([e.on_gradients(group=1) for e in made])
    assert [float(r["y"].grad[0]) for r in replicas] == [0.5, 0.5]  # type: ignore[index]
    assert [float(r["x"].grad[0]) for r in replicas] == [0.0, 1.0]  # type: ignore[index]


# ---------------------------------------------------------------------- virtual time


def test_a_straggler_delays_those_who_hear_it_only() -> None:
    """On a ring of six the news of a slow rank travels one neighbour per step; an all-reduce waits at once."""

    def now(plan: Plan, steps: int) -> list[float]:
        sim = Simulation(plan, 6, mosaic, mosaic_backward, sgd(0.1), Link(), [1.0, 1.0, 1.0, 5.0, 1.0, 1.0])
        return [w.clock.now for w in sim.run(steps).worlds]  # type: ignore[union-attr]

    assert now(plans.gossip(Ring()), 1) == [1.0, 1.0, 5.0, 5.0, 5.0, 1.0]
    assert now(plans.gossip(Ring()), 2) == [2.0, 6.0, 10.0, 10.0, 10.0, 6.0]
    assert now(plans.local_sgd(1), 2) == [10.0] * 6
    assert now(plans.local_sgd(2), 2) == [10.0] * 6
    assert now(Plan(), 2) == [2.0, 2.0, 2.0, 10.0, 2.0, 2.0]


def test_a_link_takes_the_time_it_should() -> None:
    """944 bytes at 1 Mbit/s and 2 ms: a ring sum of four is 6 (2 ms + 1.888 ms), one message 2 + 7.552 ms."""
    link = Link(mbit=1.0, ms=2.0)

    def stall(plan: Plan) -> float:
        return mosaic_simulation(plan, 4, link=link).run(1).worlds[0].clock.stall_s  # type: ignore[union-attr]

    assert stall(plans.local_sgd(1)) == pytest.approx(6 * (0.002 + 236e-6 * 8))
    assert stall(plans.gossip()) == pytest.approx(0.002 + 944e-6 * 8)
    assert stall(plans.gossip(Ring())) == pytest.approx(0.002 + 2 * 944e-6 * 8)
    assert stall(plans.gossip(order="awc")) == 0.0  # 9.6 ms pass while 10 ms are computed
    overlapped = Plan([Sync(when=Every(4), apply=Delay(3))])
    assert mosaic_simulation(overlapped, 4, link=link).run(7).worlds[0].clock.stall_s == 0.0  # type: ignore[union-attr]
    assert stall(Plan([Sync(when=AtEnd(), peers=Complete())])) == 0.0


def test_messages_of_one_step_queue_on_the_link() -> None:
    """192 + 44 weights: after the second send the link is busy for as long as both take."""
    parts = [Sync(when=Every(4), what=Parameters(match), apply=Delay(3)) for match in ("body.*w*", "[!b]*")]
    clock = mosaic_simulation(Plan(parts), 4, link=Link(mbit=1.0, ms=2.0)).run(4).worlds[2].clock
    assert clock is not None
    assert clock.now == pytest.approx(0.04)
    assert clock.free == pytest.approx(0.04 + 6 * (0.002 + 192e-6 * 8) + 6 * (0.002 + 28e-6 * 8))


# ---------------------------------------------------------------------- the mean replica


def test_consensus_is_the_root_mean_square_distance_and_the_mean() -> None:
    sim = scattered(Plan(), 4)
    rows = sim.stacked()
    expected = ((rows - rows.mean(0)).square().sum(1).mean()).sqrt()
    with torch.no_grad():
        views = lockstep([e.consensus() for e in sim.engines])
    for distance, means in views:
        torch.testing.assert_close(distance, expected.view(1))
        torch.testing.assert_close(means[0], rows.mean(0))
    assert sim.distance() == pytest.approx(float(expected))
    assert torch.equal(sim.stacked(), rows)
    assert sim.bytes == [0] * 4
    assert sim.worlds[0].ledger.overhead > 0
