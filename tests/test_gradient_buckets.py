"""Gradients sent in buckets while backward goes on: the same result, one order on all ranks, nothing that hangs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dopt import ErrorFeedback, Gradients, Int8, LowRank, Plan, ProcessGroupWorld, Sync, TopK, plans
from lightning_dopt.compress.base import Codec
from lightning_dopt.engine import Engine
from lightning_dopt.slots import FlatTensors, buckets
from lightning_dopt.topology import Ring

Ranks = Callable[..., list[Any]]
SMALL = 0.002  # buckets of 2 kB


def net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 3), nn.Linear(3, 1)
        )


def train(
    world: ProcessGroupWorld, plan: Plan, watch: bool, steps: int = 5, unused: bool = False
) -> tuple[Tensor, list[int], int]:
    """Weights at the end, the sizes of the messages of the last step in the order sent, and how many left in backward."""
    model = net()
    parameters = dict(model.named_parameters())
    engine = Engine(plan, parameters, world)
    opt = torch.optim.SGD(parameters.values(), lr=0.05)
    sent: list[int] = []
    for name in ("all_reduce", "all_gather", "exchange"):
        _record(world, name, sent)
    early = 0
    for step in range(steps):
        sent.clear()
        engine.run(engine.before_step())
        opt.zero_grad()
        g = torch.Generator().manual_seed(100 * step + world.rank)
        x = torch.randn(8, 16, generator=g)
        skip = unused and (step + world.rank) % 2 == 0  # ranks differ in what they use
        if watch:
            engine.watch_gradients()
        out = model[:3](x).sum(1) if skip else model(x)
        out.square().mean().backward()
        early = len(sent)
        engine.run(engine.on_gradients())
        opt.step()
        engine.run(engine.after_step())
    engine.close()
    return torch.cat([p.detach().flatten() for p in parameters.values()]), list(sent), early


def _record(world: ProcessGroupWorld, name: str, sent: list[int]) -> None:
    original = getattr(world, name)

    def noted(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.nbytes if isinstance(tensor, Tensor) else sum(t.nbytes for t in tensor.values()))
        return original(tensor, *args, **kwargs)

    setattr(world, name, noted)


PLANS: dict[str, Plan] = {
    "exact": Plan([Sync(what=Gradients(bucket_mb=SMALL))]),
    "int8": Plan([Sync(what=Gradients(bucket_mb=SMALL), codec=ErrorFeedback(Int8()))]),
    "top-k": Plan([Sync(what=Gradients(bucket_mb=SMALL), codec=ErrorFeedback(TopK(0.1)))]),
    "low rank": Plan([Sync(what=Gradients(bucket_mb=SMALL), codec=ErrorFeedback(LowRank(2)))]),
    "beside gossip": Plan([Sync(what=Gradients(bucket_mb=SMALL), peers=Ring()), Sync(peers=Ring())]),
    "two parts": Plan(
        [Sync(what=Gradients("[01]*", SMALL)), Sync(what=Gradients("[!01]*", SMALL), codec=ErrorFeedback(Int8()))]
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_watching_changes_the_time_of_sending_and_nothing_else(ranks: Ranks, name: str) -> None:
    plan = PLANS[name]
    late, soon = (ranks(train, 4, plan, watch) for watch in (False, True))
    for (weights, order, early), (again, same, before) in zip(late, soon, strict=True):
        assert torch.equal(weights, again)
        assert early == 0
        if name != "two parts":
            if plan.nonfinite(4) != "ignore":  # four numbers, before all buckets or after them
                assert order[0] == 16
                order.remove(16)
                same.remove(16)
            assert order == same
        assert before >= 2  # most buckets have left when backward ends
    if name != "beside gossip":
        assert all(torch.equal(weights, late[0][0]) for weights, _, _ in late)
    assert len({tuple(order) for _, order, _ in soon}) == 1


@pytest.mark.parametrize("name", ["exact", "top-k", "low rank"])
def test_tensors_that_some_ranks_do_not_use_hold_nobody_up(ranks: Ranks, name: str) -> None:
    late, soon = (ranks(train, 4, PLANS[name], watch, 6, True) for watch in (False, True))
    for (weights, _, _), (again, _, _) in zip(late, soon, strict=True):
        assert torch.equal(weights, again)


def many_powersgd_steps(world: ProcessGroupWorld, steps: int) -> float:
    plan = Plan([Sync(what=Gradients(bucket_mb=SMALL), codec=ErrorFeedback(LowRank(1)))])
    return float(train(world, plan, True, steps)[0].sum())


def test_two_rounds_per_bucket_do_not_hang_in_two_hundred_steps(ranks: Ranks) -> None:
    assert len(set(ranks(many_powersgd_steps, 4, 200))) == 1


def backward_twice(world: ProcessGroupWorld) -> str:
    model = net()
    engine = Engine(PLANS["exact"], dict(model.named_parameters()), world)
    engine.watch_gradients()
    loss = model(torch.ones(2, 16)).sum()
    loss.backward(retain_graph=True)
    try:
        loss.backward()
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_second_backward_after_sending_is_an_error_not_a_wrong_gradient(ranks: Ranks) -> None:
    for message in ranks(backward_twice, 2):
        assert "changed after it had been sent" in message
        assert "bucket_mb=0" in message


def test_buckets_hold_whole_tensors_and_everything_once() -> None:
    tensors = {f"t{k}": torch.randn(k + 1, 7) for k in range(12)}
    (lane,) = FlatTensors(tensors).lanes
    for nbytes in (1, 100, 700, 10**6):
        parts = buckets(lane, nbytes)
        assert sum(p.numel for p in parts) == lane.numel
        names = [f.name for p in parts for f in p.fields]
        assert sorted(names) == sorted(tensors)
        for part in parts:
            assert len(part.fields) == 1 or part.live.nbytes <= nbytes
            for field, view in zip(part.fields, part.views(part.live), strict=True):
                assert torch.equal(view, tensors[field.name])
    assert buckets(lane, 0) == [lane]


def test_the_bucket_that_backward_completes_first_is_small() -> None:
    tensors = {name: torch.zeros(n) for name, n in {"a": 2_000_000, "b": 200_000, "c": 200_000, "d": 50_000}.items()}
    (lane,) = FlatTensors(tensors).lanes

    def sizes(nbytes: float) -> list[int]:
        return [part.live.nbytes for part in buckets(lane, nbytes)]

    assert sizes(25e6) == [8_800_000, 1_000_000]  # c and d: at most 2^20 bytes
    assert sizes(8e6) == [8_000_000, 800_000, 1_000_000]
    assert sizes(500_000) == [8_000_000, 800_000, 800_000, 200_000]
    (small,) = FlatTensors({"a": torch.zeros(100), "b": torch.zeros(100)}).lanes
    assert len(buckets(small, 25e6)) == 1


@pytest.mark.parametrize("codec", [None, Int8()])
def test_the_size_of_buckets_does_not_matter_where_codecs_work_piece_by_piece(codec: Codec | None) -> None:
    """Exact sums do not see where a bucket ends; a codec of flat messages sees it and stays near."""
    from problems import mosaic_simulation

    wire = ErrorFeedback(codec) if codec is not None else None  # type: ignore[arg-type]
    whole, cut = (
        mosaic_simulation(Plan([Sync(what=Gradients(bucket_mb=size), codec=wire)]), 3).run(20) for size in (0.0, 1e-4)
    )
    for name in whole.replicas[0]:
        close = 0.05 if isinstance(codec, Int8) else 1e-9
        torch.testing.assert_close(whole.stacked(name), cut.stacked(name), rtol=0, atol=close)
    assert len(cut.engines[0].gradients[0][0].runner.lanes) > len(whole.engines[0].gradients[0][0].runner.lanes)


def test_buckets_are_checked_and_default_to_25_mb() -> None:
    with pytest.raises(ValueError, match=r"Gradients\(bucket_mb=-1"):
        Gradients(bucket_mb=-1)
    assert plans.compressed_ddp().syncs[0].what == Gradients(bucket_mb=25.0)
