"""Messages over the complete graph: averaged in chunks and packed twice, gathered, or summed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import SHAPES, mosaic_simulation
from torch import Tensor

from lightning_dopt import (
    EF21,
    EControl,
    ErrorFeedback,
    Gradients,
    Identity,
    Int8,
    Link,
    LowRank,
    MajorityVote,
    Median,
    Plan,
    Ring,
    Sign,
    Simulation,
    Sync,
    TopK,
)
from lightning_dopt.comm import SimulatedWorld, lockstep
from lightning_dopt.comm.ledger import all_reduce_bytes
from lightning_dopt.compress.base import Codec, Compressor
from lightning_dopt.compress.memory import DGC, DIANA, Memory
from lightning_dopt.engine import Engine
from lightning_dopt.forecast import forecast

Ranks = Callable[..., list[Any]]


def gradients(codec: Codec, transport: str = "two_phase", bucket_mb: float = 0.0, **fields: Any) -> Plan:
    return Plan([Sync(what=Gradients(bucket_mb=bucket_mb), codec=codec, transport=transport, **fields)])  # type: ignore[arg-type]


def signal(rank: int, d: int, step: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(d, generator=torch.Generator().manual_seed(1000 * step + rank), dtype=dtype)


def engines(plan: Plan, n: int, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[Engine]:
    return [
        Engine(plan, {k: torch.zeros(s, dtype=dtype).requires_grad_() for k, s in shapes.items()}, world)
        for world in SimulatedWorld.create(n)
    ]


def mean_of(made: list[Engine], values: Callable[[int, str], Tensor]) -> list[dict[str, Tensor]]:
    for e in made:
        for name, p in e.parameters.items():
            p.grad = values(e.world.rank, name).view(p.shape).clone()
    with torch.no_grad():
        lockstep([e.on_gradients() for e in made])
        lockstep([e.after_step() for e in made])
    return [{name: p.grad for name, p in e.parameters.items()} for e in made]  # type: ignore[misc]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("codec", [Identity(), ErrorFeedback(Identity()), EF21(Identity()), TopK(1.0)], ids=repr)
def test_exact_messages_give_the_mean(n: int, dtype: torch.dtype, codec: Codec) -> None:
    made = engines(gradients(codec), n, {"x": (7, 3), "y": (10,), "z": ()}, dtype)
    for step in range(3):
        got = mean_of(made, lambda rank, name: signal(rank, made[0].parameters[name].numel(), step, dtype))  # noqa: B023
        for name in "xyz":
            d = made[0].parameters[name].numel()
            expected = torch.stack([signal(rank, d, step, dtype) for rank in range(n)]).mean(0)
            for g in got:
                torch.testing.assert_close(g[name].view(-1), expected)


CODECS = [Int8(block=64), Sign(block=32), TopK(0.1), ErrorFeedback(Sign(block=32)), EF21(TopK(0.2)), DGC(TopK(0.2))]


@pytest.mark.parametrize("codec", [*CODECS, EControl(TopK(0.2), eta=0.1), ErrorFeedback(LowRank(2))], ids=repr)
@pytest.mark.parametrize("bucket_mb", [0.0, 0.0005])
@pytest.mark.filterwarnings("ignore:.*drops much")
def test_all_ranks_hold_the_same_bits(codec: Codec, bucket_mb: float) -> None:
    made = engines(gradients(codec, bucket_mb=bucket_mb), 3, {"w": (20, 11), "v": (9, 16), "b": (11,)})
    for step in range(4):
        got = mean_of(made, lambda rank, name: signal(rank, made[0].parameters[name].numel(), step))  # noqa: B023
        for g in got[1:]:
            assert all(torch.equal(g[name], got[0][name]) for name in g)


@pytest.mark.parametrize("n", [1, 3])
def test_unbiased_codecs_stay_unbiased(n: int) -> None:
    d, draws = 96, 300
    made = engines(gradients(Int8(block=32, stochastic=True)), n, {"x": (d,)})
    total, one = torch.zeros(d), torch.zeros(d)
    for _ in range(draws):
        one = mean_of(made, lambda rank, name: signal(rank, d))[0]["x"]
        total += one
    expected = torch.stack([signal(rank, d) for rank in range(n)]).mean(0)
    spread = (one - expected).norm() / draws**0.5
    assert (total / draws - expected).norm() < 2 * spread
    assert (one - expected).norm() > 0


def descend(codec: Codec, steps: int = 150) -> float:
    """Distance from the optimum of three quadratics of unlike curvature and centre, after small steps."""
    n, d = 3, 24
    centre = [3.0 * signal(rank, d) for rank in range(n)]
    curve = [1.0 + 0.5 * signal(rank + 50, d).abs() for rank in range(n)]
    best = sum(c * a for c, a in zip(curve, centre, strict=True)) / sum(curve)

    def backward(rank: int, parameters: Any, step: int) -> None:
        parameters["x"].grad = curve[rank] * (parameters["x"].detach() - centre[rank])

    run = Simulation(
        gradients(codec), n, lambda rank: {"x": torch.zeros(d)}, backward, lambda ps: torch.optim.SGD(ps, lr=0.1)
    )
    run.run(steps)
    assert all(torch.equal(r["x"], run.replicas[0]["x"]) for r in run.replicas)
    return float((run.replicas[0]["x"].detach() - best).norm())


class Forgetful(ErrorFeedback):
    """What the owner of a chunk would be without a residual."""

    def sent(self, own: Tensor, state: dict[str, Tensor]) -> None:
        """Forget."""
        state["residual"].zero_()


class FirstLegOnly(EF21):
    """EF21 on the first leg alone."""

    def relay(self) -> Memory:
        """None to speak of."""
        return Forgetful(self.codec)


@pytest.mark.parametrize("codec", [TopK(0.3), Int8(block=8)], ids=repr)
def test_feedback_on_both_legs_finds_the_optimum(codec: Compressor) -> None:
    both, first, none = (descend(c) for c in (EF21(codec), FirstLegOnly(codec), codec))
    assert both < 1e-4
    assert first > 20 * both
    assert none > 20 * both


def test_what_the_owner_keeps_and_what_it_sent_add_up() -> None:
    """The sum of all results and of all residuals is the sum of all mean gradients."""
    n, d, steps = 3, 50, 30
    made = engines(gradients(ErrorFeedback(TopK(0.1))), n, {"x": (d,)})
    applied, given = torch.zeros(d), torch.zeros(d)
    for step in range(steps):
        applied += mean_of(made, lambda rank, name: signal(rank, d, step))[0]["x"]  # noqa: B023
        given += torch.stack([signal(rank, d, step) for rank in range(n)]).mean(0)
    channels = [e.gradients[0][0].runner.lanes[0].channel for e in made]
    left = torch.stack([c.memory_state["residual"] for c in channels]).mean(0)
    for c in channels:
        left[c.two_phase.mine.first : c.two_phase.mine.last] += c.two_phase.state["residual"]
    torch.testing.assert_close(applied + left, given, atol=1e-4, rtol=1e-5)


def test_estimates_of_ef21_are_off_by_the_owners_residual() -> None:
    n, d = 3, 40
    made = engines(gradients(EF21(TopK(0.2))), n, {"x": (d,)})
    for step in range(10):
        mean_of(made, lambda rank, name: signal(rank, d, step))  # noqa: B023
    channels = [e.gradients[0][0].runner.lanes[0].channel for e in made]
    estimate = channels[0].memory_state["mean"].clone()
    for c in channels:
        estimate[c.two_phase.mine.first : c.two_phase.mine.last] += c.two_phase.state["residual"]
    torch.testing.assert_close(estimate, torch.stack([c.memory_state["own"] for c in channels]).mean(0))


def test_votes_of_an_odd_number_are_exact() -> None:
    made = engines(gradients(Sign(block=16), combine=MajorityVote()), 3, {"x": (96,)})
    got = mean_of(made, lambda rank, name: signal(rank, 96))
    votes = torch.stack([signal(rank, 96).sign() for rank in range(3)]).sum(0).sign()
    assert all(torch.equal(g["x"], votes) for g in got)


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("codec", [Int8(block=32), ErrorFeedback(Sign(block=32)), Identity()], ids=repr)
def test_bytes_are_those_of_the_formula(n: int, codec: Codec) -> None:
    d = 32 * n * 5
    made = engines(gradients(codec), n, {"x": (d,)})
    mean_of(made, lambda rank, name: signal(rank, d))
    p = made[0].gradients[0][0].runner.lanes[0].channel.message_bytes
    assert [e.world.ledger.bytes for e in made] == [2 * (n - 1) * p // n] * n


PLANS = {
    "int8": lambda: gradients(Int8(block=64)),
    "buckets": lambda: gradients(ErrorFeedback(Sign(block=32)), bucket_mb=0.0005),
    "tensors": lambda: gradients(ErrorFeedback(LowRank(2))),
    "deltas": lambda: Plan([Sync(codec=EF21(TopK(0.2)), transport="two_phase")]),
    "exact": lambda: Plan([Sync(codec=Identity(), transport="two_phase")]),
    "gathered": lambda: Plan([Sync(codec=Identity(), transport="all_gather")]),
    "median": lambda: gradients(Identity(), combine=Median()),
}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("n", [2, 3, 5])
def test_forecast_is_exact(name: str, n: int) -> None:
    link = Link(mbit=0.05, ms=7.0)
    run = mosaic_simulation(PLANS[name](), n, link=link)
    run.run(4)
    told = forecast(PLANS[name](), n, SHAPES, 4, link, 0.01)
    assert told.bytes == run.bytes
    assert told.seconds == pytest.approx(max(w.clock.now for w in run.worlds))


def three_steps(world: Any, codec: Codec) -> tuple[Tensor, int]:
    engine = Engine(
        gradients(codec), {"x": torch.zeros(320, requires_grad=True), "y": torch.zeros(7, requires_grad=True)}, world
    )
    for step in range(3):
        for p in engine.parameters.values():
            p.grad = signal(world.rank, p.numel(), step)
        engine.run(engine.on_gradients())
        engine.run(engine.after_step())
    return torch.cat([p.grad for p in engine.parameters.values()]), world.ledger.bytes  # type: ignore[misc]


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("codec", [Int8(block=64), ErrorFeedback(Sign(block=32))], ids=repr)
def test_processes_do_what_the_simulation_does(ranks: Ranks, n: int, codec: Codec) -> None:
    real = ranks(three_steps, n, codec)
    made = engines(gradients(codec), n, {"x": (320,), "y": (7,)})
    for step in range(3):
        expected = mean_of(made, lambda rank, name: signal(rank, made[0].parameters[name].numel(), step))  # noqa: B023
    for (grad, nbytes), e, g in zip(real, made, expected, strict=True):
        assert torch.equal(grad, torch.cat([g["x"], g["y"]]))
        assert nbytes == e.world.ledger.bytes


@pytest.mark.parametrize("codec", [ErrorFeedback(Sign(block=32)), EF21(TopK(0.2))], ids=repr)
def test_resumes_exactly(codec: Codec) -> None:
    shapes = {"x": (50,), "y": (3, 5)}
    whole, first, second = (engines(gradients(codec), 3, shapes) for _ in range(3))

    def turn(made: list[Engine], step: int) -> list[dict[str, Tensor]]:
        return mean_of(made, lambda rank, name: signal(rank, made[0].parameters[name].numel(), step))

    for step in range(3):
        turn(whole, step)
        turn(first, step)
    for old, new in zip(first, second, strict=True):
        new.load_state_dict(old.state_dict())
    for a, b in zip(turn(whole, 3), turn(second, 3), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in shapes)


# ---------------------------------------------------------------------- which one


@pytest.mark.parametrize(
    ("codec", "n", "way"),
    [
        (Identity(), 8, "all_reduce"),
        (Int8(), 4, "all_gather"),  # 3 p < 6 d
        (Int8(stochastic=True), 8, "two_phase"),  # 7 p > 7 d
        (Int8(), 8, "all_gather"),  # biased, nothing remembers: left as it is
        (ErrorFeedback(Int8()), 8, "two_phase"),
        (ErrorFeedback(Sign()), 8, "all_gather"),
        (ErrorFeedback(Sign()), 65, "two_phase"),
        (TopK(0.5), 8, "all_gather"),  # biased, nothing remembers: left as it is
    ],
)
@pytest.mark.filterwarnings("ignore:.*drops much")
def test_auto_goes_by_bytes(codec: Codec, n: int, way: str) -> None:
    told = forecast(gradients(codec, "auto"), n, {"x": (64_000,)}, 1)
    (ways,) = told.transports.values()
    assert next(iter(ways)) == way
    assert ways[way] == max(told.bytes)
    if way == "two_phase":
        assert ways["two_phase"] < all_reduce_bytes(4 * 64_000, n) <= ways["all_gather"]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: gradients(Int8(), "all_reduce"), "only linear messages can be summed"),
        (lambda: gradients(Identity(), "all_reduce", combine=Median()), "only linear messages can be summed"),
        (lambda: gradients(Int8(), "ring"), "must be one of 'auto', 'all_reduce'"),
        (lambda: Plan([Sync(peers=Ring(), transport="two_phase")]).check(6), "go to neighbours"),
    ],
)
def test_refused(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match) as error:
        make()
    assert "\n" not in str(error.value)


def test_every_memory_has_a_second_leg_or_is_refused() -> None:
    with pytest.raises(ValueError, match="no second leg"):
        gradients(DIANA(Int8(stochastic=True)))


@pytest.mark.parametrize(
    ("n", "ratio", "link", "way"),
    [
        (4, 0.25, None, "all_gather"),  # 3 messages of 0.5 are no more than 2 (n - 1) / n = 1.5
        (4, 0.25, Link(), "all_gather"),
        (4, 0.25, Link(mbit=10), "two_phase"),  # 1.5 messages take less time than 3
        (2, 0.25, Link(mbit=10), "all_gather"),
        (4, 0.25, Link(ms=10), "two_phase"),  # two times the latency, not three
        (3, 0.001, Link(mbit=1, ms=10), "all_gather"),  # as many latencies, and chunks of one element are not smaller
    ],
)
def test_over_a_link_the_faster_way_is_taken(n: int, ratio: float, link: Link | None, way: str) -> None:
    plan = gradients(ErrorFeedback(TopK(ratio)), "auto")
    told = forecast(plan, n, {"w": (1000,)}, 1, link)
    assert next(iter(told.transports["gradients"])) == way
    if link is not None:
        each = [gradients(ErrorFeedback(TopK(ratio)), w) for w in ("all_gather", "two_phase")]
        assert told.seconds == min(forecast(p, n, {"w": (1000,)}, 1, link).seconds for p in each)
    run = Simulation(
        plan, n, lambda _: {"w": torch.zeros(1000)}, lambda *_: None, lambda ps: torch.optim.SGD(ps, lr=0.1), link=link
    )
    assert {e.gradients[0][0].runner.lanes[0].channel.transport for e in run.engines} == {way}


def test_the_reason_is_told() -> None:
    over = forecast(gradients(ErrorFeedback(TopK(0.25)), "auto"), 4, {"w": (1000,)}, 1, Link(mbit=8, ms=10)).reasons
    # chunks of 250 elements take one byte for a position, not two
    assert over == {"gradients": "over this link a message takes 34.5 ms gathered, 21.9 ms in two phases"}
    linear = forecast(gradients(LowRank(2), "auto"), 4, {"w": (100, 100)}, 1).reasons
    assert linear == {"gradients": "linear messages are summed"}
    assert forecast(gradients(Int8(), "two_phase"), 4, {"w": (10,)}, 1).reasons == {"gradients": "as told"}
