"""Messages that end with a checksum: damage is found before anything is decoded, and what structure alone tells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import mosaic, mosaic_backward, mosaic_simulation, sgd
from torch import Tensor

from lightning_dopt import (
    BF16,
    EF21,
    Delay,
    Difference,
    Directed,
    ErrorFeedback,
    Every,
    Gradients,
    Identity,
    Int8,
    LowRank,
    OneRound,
    Plan,
    PushSum,
    RandomPairs,
    Ring,
    Sign,
    Simulation,
    Sync,
    TopK,
    plans,
)
from lightning_dopt.comm import ProcessGroupWorld, SimulatedWorld, SyncError
from lightning_dopt.comm.seal import SEAL, digest, is_whole, sealed
from lightning_dopt.compress import Phases, registry
from lightning_dopt.compress.base import Compressor
from lightning_dopt.engine import Engine
from lightning_dopt.forecast import forecast

Ranks = Callable[..., list[Any]]
Damage = Callable[[Tensor], Tensor]


def noise(length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (length,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------- the digest


@pytest.mark.parametrize("length", [1, 7, 8, 9, 64, 101])
@pytest.mark.parametrize("fill", ["zeros", "ones", "noise"])
def test_every_flipped_bit_changes_the_digest(length: int, fill: str) -> None:
    data = {"zeros": torch.zeros, "ones": torch.ones}.get(fill, lambda n: noise(n))(length).to(torch.uint8)
    if fill == "ones":
        data.fill_(255)
    seen = {int(digest(data))}
    for place in range(length):
        for bit in range(8):
            other = data.clone()
            other[place] ^= 1 << bit
            seen.add(int(digest(other)))
    assert len(seen) == 1 + 8 * length  # all different, from each other, too


def test_bits_flipped_in_many_tiles_are_seen() -> None:
    data = noise(600_011)  # three tiles and a tail
    before = int(digest(data))
    for place in (0, 262_143, 262_144, 524_287, 524_288, 600_007, 600_008, 600_010):
        for bit in (0, 7):
            data[place] ^= 1 << bit
            assert int(digest(data)) != before
            data[place] ^= 1 << bit
    assert int(digest(data)) == before


def test_order_length_and_stuck_lines_are_seen() -> None:
    data = noise(4096)
    before = int(digest(data))
    for i, j in [(0, 1), (0, 8), (3, 4000), (16, 24), (7, 4095)]:
        swapped = data.clone()
        swapped[i], swapped[j] = data[j].item(), data[i].item()
        assert (int(digest(swapped)) != before) == (data[i] != data[j])
    words = data.view(torch.int64)
    assert int(digest(words.flip(0).view(torch.uint8))) != before
    assert len({int(digest(data[:n])) for n in range(4080, 4097)}) == 17
    assert len({int(digest(torch.zeros(n, dtype=torch.uint8))) for n in range(40)}) == 40  # a lost tail of zeros
    for bit in range(64):  # one line of the bus stuck: the same bit of every word, of two words, or of one
        for chosen in (slice(None), slice(0, 2), slice(5, 300, 7), slice(9, 10)):
            flipped = words.clone()
            flipped[chosen] ^= -(2**63) if bit == 63 else 1 << bit
            assert int(digest(flipped.view(torch.uint8))) != before, (bit, chosen)
    inverted = words.clone()
    inverted[3] ^= -1
    assert int(digest(inverted.view(torch.uint8))) != before


def test_position_in_memory_changes_nothing_and_the_stamp_does() -> None:
    data = noise(1000)
    shifted = torch.cat([noise(3), data])[3:]
    assert int(digest(data, 5)) == int(digest(shifted, 5)) != int(digest(data, 6))
    message = sealed(data, 5)
    assert message.numel() == 1000 + SEAL
    assert torch.equal(message[:-SEAL], data)
    assert bool(is_whole(message, 5))
    assert not bool(is_whole(message, 6))
    for place in range(1000, 1000 + SEAL):  # the seal itself
        message[place] ^= 1
        assert not bool(is_whole(message, 5))
        message[place] ^= 1


# ---------------------------------------------------------------------- damage on the way


def tamper(world: SimulatedWorld | ProcessGroupWorld, damage: Damage, spared: int = 0) -> None:
    """From now on one message of this rank is damaged on the way, after some that are ``spared``."""
    exchange, gather, left = world.exchange, world.all_gather, [damage] + [torch.Tensor.clone] * spared

    def hit(message: Tensor) -> Tensor:
        return left.pop()(message.clone()) if left and message.numel() else message

    def bad_exchange(send: Any, receive: Any, label: str, boxes: Any = None) -> Any:
        return exchange({j: hit(t) for j, t in sorted(send.items())}, receive, label, boxes)

    world.exchange = bad_exchange  # type: ignore[method-assign]
    world.all_gather = lambda payload, label: gather(hit(payload), label)  # type: ignore[method-assign,assignment]


def flip(bit: int) -> Damage:
    def damage(message: Tensor) -> Tensor:
        message[bit // 8] ^= 1 << bit % 8
        return message

    return damage


def two_tensors(plan: Plan, n: int = 4, lr: float = 0.05) -> Simulation:
    def start(rank: int) -> dict[str, Tensor]:
        return {
            "x": torch.linspace(-1, 1, 30).view(5, 6),
            "y": torch.linspace(0.2, 2, 10, dtype=torch.float64),
        }

    def backward(rank: int, parameters: dict[str, Tensor], step: int) -> None:
        for p in parameters.values():
            p.grad = (p.detach() * (rank + 1) - torch.arange(p.numel()).view(p.shape) / 7 + step).to(p.dtype)

    return Simulation(plan, n, start, backward, sgd(lr))


MADE: dict[str, dict[str, Any]] = {
    "threshold": {"threshold": 0.1, "capacity": 0.3},
    "compose": {"first": TopK(0.3), "second": Int8(block=8)},
    "phases": {"codecs": [TopK(0.3), Sign(8)], "lengths": [2]},
    "gaussian_noise": {"sigma": 0.1},
    "dense_below": {"codec": TopK(0.3), "size": 20},
    "l_greco": {"codec": TopK(0.3), "every": 100},
    "byte_budget": {"codec": TopK(0.3), "nbytes": 150, "every": 100},
    "low_rank": {"rank": 1, "min_ratio": 1.0},
    "econtrol": {"codec": TopK(0.3), "eta": 0.1},
    "deep_squeeze": {"codec": TopK(0.3), "eta": 0.1},
    "moni_qua": {"bits": 8, "theta": 50.0},
    "gmf": {"codec": TopK(0.3)},
    "diana": {"codec": Int8(block=8, stochastic=True)},
    "factors": {"lowrank": LowRank(1, 1.0), "codec": Int8(block=8)},
}


def made(name: str) -> Any:
    kind = registry.classes()[name]
    if name in MADE:
        return kind(**MADE[name])
    options = [{"ratio": 0.3}, {"codec": TopK(0.3)}, {"rank": 1}, {}]
    for arguments in options:
        try:
            return kind(**arguments)
        except TypeError:
            continue
    raise AssertionError(f"say in MADE how to make {name}")


def plan_with(codec: Any) -> Plan:
    """One in which this codec's messages are not summed."""
    if isinstance(codec, Compressor):
        codec = Difference(codec, 0.3)
    if codec.codes_values:
        return Plan([Sync(peers=Ring(), codec=codec)])
    return Plan([Sync(what="gradients", codec=codec)])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", registry.names())
def test_every_flipped_bit_of_every_codec_is_found(name: str) -> None:
    plan = plan_with(made(name)).guarded(on_nonfinite="ignore")
    lengths: list[int] = []

    def note(message: Tensor) -> Tensor:
        lengths.append(message.numel())
        return message

    sim = two_tensors(plan)
    tamper(sim.worlds[1], note)
    sim.run(1)
    bits = sorted({int(b) for b in torch.linspace(0, 8 * lengths[0] - 1, 11)})
    for bit in bits:
        sim = two_tensors(plan)
        tamper(sim.worlds[1], flip(bit))
        with pytest.raises(
            SyncError, match=r"^rank [023], step 1, sync '\w+': the message of rank\(s\) 1 arrived damaged"
        ):
            sim.run(1)


SCALED = [
    n for n in registry.names() if n not in ("compose", "dense_below") and issubclass(registry.classes()[n], Compressor)
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [n for n in SCALED if made(n).floats_at((40,)) is not None])
def test_scales_and_values_that_are_not_finite_are_found_without_a_checksum(name: str) -> None:
    def damage(message: Tensor) -> Tensor:
        start, count = codec.floats_at((5, 6) if codec.layerwise else (30,))
        assert count > 0
        message[start : start + 4] = torch.tensor([float("nan")]).view(torch.uint8)
        return message

    codec = made(name)
    sim = two_tensors(plan_with(codec))
    tamper(sim.worlds[1], damage)
    with pytest.raises(
        SyncError, match=r"the message of rank\(s\) 1 cannot be used .*a scale or value that is not finite"
    ):
        sim.run(1)


TRANSPORTS = {
    "gathered": Plan([Sync(what="gradients", codec=ErrorFeedback(Int8(block=8)), transport="all_gather")]),
    "two phases": Plan([Sync(what="gradients", codec=ErrorFeedback(Int8(block=8)), transport="two_phase")]),
    "two phases of one vector": Plan(
        [Sync(when=Every(1), codec=EF21(Int8(block=8)), signal="delta", transport="two_phase")]
    ),
    "neighbours": Plan([Sync(peers=Ring(), codec=Difference(TopK(0.3), 0.5))]),
    "changing neighbours": Plan([Sync(peers=RandomPairs(), codec=Difference(TopK(0.3), 0.5))]),
    "plain gossip": plans.gossip(Ring()),
    "push-sum": Plan([Sync(peers=Directed([[1, 2], [2], [3], [0]], weights="push"), combine=PushSum())]),
    "relays": plans.relay_sgd(),
    "late": Plan([Sync(when=Every(3), codec=ErrorFeedback(Int8(block=8)), apply=Delay(1))]),
    "one round late": Plan([Sync(when=Every(2), codec=ErrorFeedback(Int8(block=8)), apply=OneRound())]),
    "phases": Plan([Sync(what="gradients", codec=ErrorFeedback(Phases([TopK(0.3), Int8()], [2])))]),
}


@pytest.mark.parametrize("name", TRANSPORTS)
def test_nothing_is_applied_to_weights_or_memories(name: str) -> None:
    """Damage in a late message: weights are those of the inner steps, every memory is as before the round was sent."""
    plan, n = TRANSPORTS[name].guarded(), 4
    sim, reference = two_tensors(plan, n), two_tensors(plan, n)
    sim.run(6)
    reference.run(6)
    for world in sim.worlds:
        tamper(world, flip(77))
    with pytest.raises(SyncError, match=r"arrived damaged") as caught:
        sim.run(6)
    rank = int(str(caught.value).split(",")[0].removeprefix("rank "))
    reference.run({"late": 2, "one round late": 1}.get(name, 0))  # up to the step before the damaged round is sent
    mine, theirs = (
        [lane.channel.tensors() for r in (*e.runners, *(g.runner for g in e.gradients[0])) for lane in r.lanes]
        for e in (sim.engines[rank], reference.engines[rank])
    )
    assert any(mine) == (name != "plain gossip")
    for one, other in zip(mine, theirs, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(t, other[k]) for k, t in one.items())
    if "late" in name:
        return  # the inner steps taken meanwhile are others
    reference.optimizers[rank].zero_grad()
    reference.backward(rank, reference.replicas[rank], 7)
    if not any(sync.what.slot == "gradients" for sync in plan):
        reference.optimizers[rank].step()
    for k, p in sim.replicas[rank].items():
        assert torch.equal(p, reference.replicas[rank][k])


def test_no_lane_is_touched_if_another_is_damaged() -> None:
    """Two lanes, float32 and float64: the damage is in the second message of the sync."""
    count = [0]

    def second(message: Tensor) -> Tensor:
        return flip(9)(message)

    plan = plans.gossip(Ring()).guarded()
    sim = two_tensors(plan)
    world = sim.worlds[1]
    exchange = world.exchange

    def counted(send: Any, receive: Any, label: str, boxes: Any = None) -> Any:
        count[0] += 1
        bad = {j: second(t.clone()) if count[0] == 2 else t for j, t in send.items()}
        return exchange(bad, receive, label, boxes)

    world.exchange = counted  # type: ignore[method-assign]
    alone = two_tensors(Plan()).run(1)
    with pytest.raises(SyncError, match="rank 0, step 1"):
        sim.run(1)
    assert all(torch.equal(p, alone.replicas[0][k]) for k, p in sim.replicas[0].items())


# ---------------------------------------------------------------------- what it costs, and that it changes nothing

COUNTED = {
    "ring": (Plan([Sync(peers=Ring(), codec=Difference(TopK(0.3), 0.5))]), lambda n: 2 * SEAL),
    "gathered": (Plan([Sync(what="gradients", codec=BF16(), transport="all_gather")]), lambda n: (n - 1) * SEAL),
    "two phases": (
        Plan([Sync(what=Gradients(bucket_mb=0), codec=Int8(block=8), transport="two_phase")]),
        lambda n: 2 * (n - 1) * SEAL,
    ),
    "push-sum": (plans.sgp(), lambda n: SEAL),
    "summed": (Plan([Sync(what="gradients", codec=ErrorFeedback(LowRank(1)))]), lambda n: 0),
}


@pytest.mark.parametrize("name", COUNTED)
def test_eight_bytes_per_message_in_ledger_and_forecast(name: str) -> None:
    plan, extra = COUNTED[name]
    n, steps = 4, 3
    bare, guarded = (mosaic_simulation(p, n).run(steps).finish() for p in (plan, plan.guarded()))
    assert guarded.bytes == [b + steps * extra(n) for b in bare.bytes]
    assert all(
        torch.equal(a, b)
        for mine, theirs in zip(bare.replicas, guarded.replicas, strict=True)
        for a, b in zip(mine.values(), theirs.values(), strict=True)
    )
    told = forecast(plan.guarded(), n, {k: tuple(t.shape) for k, t in mosaic(0).items()}, steps)
    assert told.bytes == guarded.bytes
    assert [ledger.overhead for ledger in told.ledgers] == [w.ledger.overhead for w in guarded.worlds]


def test_sums_must_be_finite() -> None:
    """They carry no checksum. The weights that would have been replaced in place are still there."""
    plan = plans.local_sgd(2)

    def backward(rank: int, parameters: dict[str, Tensor], step: int) -> None:
        parameters["x"].grad = torch.full((3,), float("inf") if (rank, step) == (1, 2) else 1.0)

    def run(p: Plan) -> Simulation:
        return Simulation(p, 3, lambda rank: {"x": torch.full((3,), float(rank))}, backward, sgd(0.5))

    assert not run(plan).run(2).stacked().isfinite().any()
    sim = run(plan.guarded(on_nonfinite="ignore"))
    with pytest.raises(SyncError, match=r"^rank 0, step 2, sync 'parameters': the sum over all ranks is not finite; "):
        sim.run(2)
    assert sim.stacked()[0].tolist() == [-1.0] * 3
    assert sim.stacked()[2].tolist() == [1.0] * 3


# ---------------------------------------------------------------------- real processes


def trained(world: ProcessGroupWorld, plan: Plan, bad: bool) -> Any:
    parameters = {k: t.requires_grad_() for k, t in mosaic(world.rank).items()}
    opt = sgd(0.05)(list(parameters.values()))
    engine = Engine(plan, parameters, world)
    for step in range(1, 4):
        if bad and step == 3 and world.rank == 1:
            tamper(
                world, flip(63), spared=3 if plan.syncs[0].transport == "two_phase" else 0
            )  # in the second leg: all answer
        before = {k: p.detach().clone() for k, p in parameters.items()}
        try:
            mosaic_backward(world.rank, parameters, step)
            engine.run(engine.on_gradients())
            opt.step()
            engine.run(engine.after_step())
        except SyncError as error:
            return str(error), all(torch.equal(p, before[k]) for k, p in parameters.items())
    return {k: p.detach() for k, p in parameters.items()}


REAL = {
    "gathered": plans.compressed_ddp(Int8()),
    "two phases": Plan([Sync(what="gradients", codec=ErrorFeedback(Sign()), transport="two_phase")]),
    "neighbours": plans.gossip(Ring()),
}


@pytest.mark.parametrize("name", REAL)
def test_real_processes_find_it_too(ranks: Ranks, name: str) -> None:
    plan = REAL[name]
    bare, sound = (ranks(trained, 4, p, False) for p in (plan, plan.guarded()))
    for mine, theirs in zip(bare, sound, strict=True):
        assert all(torch.equal(t, theirs[k]) for k, t in mine.items())
    zero = ranks(trained, 4, plan.guarded(), True)[0]
    label = "parameters" if name == "neighbours" else "gradients"
    text, same = zero
    assert text == (
        f"rank 0, step 3, sync '{label}': the message of rank(s) 1 arrived damaged (checksum); nothing of it was applied"
    )
    assert same == (name != "neighbours")  # gossip comes after the inner step


def test_identity_in_phases_is_checked_as_bytes() -> None:
    """A codec that changes with the rounds: what is packed in no way has a checksum as well."""
    plan = Plan([Sync(peers=Ring(), codec=Difference(Phases([TopK(0.3), Identity()], [1])))]).guarded()
    sim = two_tensors(plan).run(1)
    tamper(sim.worlds[1], flip(500))
    with pytest.raises(SyncError, match=r"step 2, .* arrived damaged"):
        sim.run(1)
