"""Ranks of unequal speed under a Trainer: how many steps they take, what comes out, and what is refused."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from trainer_tools import Regressor, Trace, on_ranks, regression, sgd, trainer

import lightning_dopt as dopt
from lightning_dopt import LocalSteps, Simulation, plans

H = 4
PACE = LocalSteps(H, dynamic=True, speeds=[4.0, 2.0])


class Steady(Regressor):
    """Every gradient is the same, another one on each rank; counts its steps. The slow rank is slow.

    Args:
        rank: Gradient ``rank + 1`` in every element.
        nap: Seconds per step.
    """

    def __init__(self, rank: int, nap: float = 0.0) -> None:
        super().__init__()
        self.rank, self.nap, self.calls = rank, nap, 0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.calls += 1
        time.sleep(self.nap)
        return sum((p.sum() for p in self.parameters()), torch.zeros(())) * (self.rank + 1.0)


def paced(pace: LocalSteps, plan: dopt.Plan | None = None) -> dopt.ReplicaStrategy:
    return dopt.ReplicaStrategy(plan=plan if plan is not None else plans.local_sgd(H), pace=pace)


def fit(rank: int, pace: LocalSteps, steps: int, nap: float = 0.0, **options: Any) -> tuple[int, torch.Tensor, float]:
    module = Steady(rank, nap)
    start = torch.cat([p.detach().reshape(-1) for p in module.parameters()])
    strategy = paced(pace)
    t = trainer(strategy, max_steps=steps, **options)
    t.fit(module, regression(samples=256))
    assert t.global_step == steps  # on every rank, whatever it took
    moved = torch.cat([p.detach().reshape(-1) for p in module.parameters()]) - start
    return module.calls, moved, strategy.pacer.taken if strategy.pacer is not None else -1


def test_a_slow_rank_takes_part_of_a_round_and_the_mean_is_of_what_was_done() -> None:
    def job(rank: int) -> tuple[int, torch.Tensor, float]:
        return fit(rank, PACE, H)

    (calls_0, moved_0, taken_0), (calls_1, moved_1, taken_1) = on_ranks(job)
    assert (calls_0, calls_1) == (taken_0, taken_1) == (4, 2)
    expected = -0.1 * (4 * 1.0 + 2 * 2.0) / 2  # lr, and the mean of (steps times gradient)
    torch.testing.assert_close(moved_0, torch.full_like(moved_0, expected))
    assert torch.equal(moved_0, moved_1)


def test_it_equals_the_simulation_with_the_same_pace() -> None:
    def backward(rank: int, parameters: dict[str, torch.Tensor], step: int) -> None:
        parameters["x"].grad = torch.full((1,), rank + 1.0)

    pace = LocalSteps(H, dynamic=True, speeds=[4.0, 2.0])
    run = Simulation(
        plans.local_sgd(H),
        n=2,
        init=lambda rank: {"x": torch.zeros(1)},
        backward=backward,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        pace=pace,
    ).run(H)
    _, moved, _ = on_ranks(lambda rank: fit(rank, pace, H))[0]
    torch.testing.assert_close(moved[:1], run.stacked()[0])


def test_the_pace_follows_the_measured_speed() -> None:
    """The second rank needs six times as long per step, so from the second round on it takes one or two of eight."""

    def job(rank: int) -> int:
        module = Steady(rank, (0.01, 0.06)[rank])
        strategy = paced(LocalSteps(8, dynamic=True), plans.local_sgd(8))
        trainer(strategy, max_steps=24).fit(module, regression(samples=256))
        return module.calls

    fast, slow = on_ranks(job)
    assert fast == 24
    assert 8 + 2 <= slow <= 8 + 2 * 4, slow  # the first round is whole; a busy machine may slow the fast rank down


def test_with_accumulation_whole_windows_are_left_out() -> None:
    calls = [r[0] for r in on_ranks(lambda rank: fit(rank, PACE, H, accumulate_grad_batches=3))]
    assert calls == [12, 6]


def test_a_static_pace_is_no_pace() -> None:
    assert [r[0] for r in on_ranks(lambda rank: fit(rank, LocalSteps(H), 2 * H))] == [8, 8]


def test_resume_within_a_round_is_exact(tmp_path: Path) -> None:
    """At step 1 the slow rank is about to leave two steps out."""

    def run(steps: int, resume: str | None = None) -> tuple[Trace, int]:
        trace, module = Trace(), Regressor(optimizer=sgd)
        callbacks: list[Any] = [trace]
        if resume is None:
            callbacks.append(ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1))
        strategy = paced(PACE)
        trainer(strategy, max_steps=steps, callbacks=callbacks).fit(module, regression(), ckpt_path=resume)
        assert strategy.pacer is not None
        return trace, strategy.pacer.taken

    def job(rank: int) -> None:
        whole, taken = run(H)
        rest, taken_after = run(H, f"{tmp_path}/step=1.ckpt")
        assert taken == taken_after == (4, 2)[rank]
        for step, weights in rest.rows.items():
            assert torch.equal(weights, whole.rows[step]), (rank, step)

    on_ranks(job)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"^ReplicaStrategy\(pace=4\): must be None or LocalSteps"):
        dopt.ReplicaStrategy(plan=plans.local_sgd(4), pace=4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"GradientTracking\(.*\) counts every step$"):
        paced(PACE, plans.gossip(correction="gradient_tracking"))
    with pytest.raises(ValueError, match=r"must have 4 speeds, one per rank$"):
        trainer(paced(PACE), devices=4)


def test_streaming_with_four_bits_at_an_unequal_pace() -> None:
    """A rank with time for one step of eight takes those at which ranks talk: 8, then 11 and 15 (arrivals), 12 and 16."""
    plan = plans.streaming_diloco(8, 2, 3, outer_momentum=0.3)

    def job(rank: int) -> tuple[int, list[torch.Tensor]]:
        module = Regressor()
        strategy = paced(LocalSteps(8, dynamic=True, speeds=[8.0, 1.0]), plan)
        trainer(strategy, max_steps=16).fit(module, regression(256))
        anchors = [lane.anchor for runner in strategy.engine.runners for lane in runner.lanes]  # type: ignore[union-attr]
        return strategy.pacer.taken, anchors  # type: ignore[union-attr, return-value]

    (fast, anchors), (slow, others) = on_ranks(job)
    assert (fast, slow) == (16, 5)
    assert all(torch.equal(a, b) for a, b in zip(anchors, others, strict=True))
