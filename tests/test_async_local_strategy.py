"""The hub under a Trainer: against DiLoCo, with unequal speeds, through checkpoints, from YAML."""

from __future__ import annotations

import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import StrategyRegistry
from trainer_tools import Regressor, flat, on_ranks, regression, trainer

import lightning_dopt as dopt
from lightning_dopt import AsyncLocalStrategy, LocalSteps, plans
from lightning_dopt.asynchronous import AsyncLocal, Count, HubRule, OnArrival, fedasync
from lightning_dopt.outer import Nesterov

WAIT = HubRule(Count(2, wait=True), outer=Nesterov(0.7, 0.9))


def fit(strategy: Any, steps: int, **options: Any) -> torch.Tensor:
    module = Regressor()
    trainer(strategy, max_steps=steps, **options).fit(module, regression(128))
    return flat(module)


def test_waiting_for_all_is_the_diloco_strategy() -> None:
    def job(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        hub = fit(AsyncLocalStrategy(WAIT, LocalSteps(4)), 12)
        return hub, fit(dopt.ReplicaStrategy(plan=plans.diloco(4, 0.7, 0.9)), 12)

    (hub_0, diloco_0), (hub_1, diloco_1) = on_ranks(job)
    assert torch.equal(hub_0, hub_1)
    torch.testing.assert_close(hub_0, diloco_0, rtol=1e-5, atol=1e-6)
    assert torch.equal(diloco_0, diloco_1)


class Slow(Regressor):
    def __init__(self, nap: float) -> None:
        super().__init__()
        self.nap, self.calls = nap, 0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.calls += 1
        time.sleep(self.nap)
        return super().training_step(batch, batch_idx)


def test_training_ends_with_the_sum_of_all_steps_and_no_rank_waits_for_a_slow_one() -> None:
    def job(rank: int) -> tuple[int, torch.Tensor, int, float]:
        module = Slow((0.003, 0.06)[rank])
        strategy = AsyncLocalStrategy(
            local_steps=LocalSteps(8, dynamic=True), total_steps=160, codec=dopt.ErrorFeedback(dopt.Int8())
        )
        fitter = trainer(strategy, max_epochs=-1, max_steps=-1)
        fitter.fit(module, regression(2048), regression(16))  # ranks come together where an epoch ends
        assert fitter.callback_metrics["val_loss"] < 1.0
        stalled = float(fitter.callback_metrics["comm/stall_s"])
        return module.calls, flat(module), fitter.global_step, stalled

    (fast, weights, steps, stalled), (slow, other, _, _) = on_ranks(job)
    assert fast == steps
    assert 160 <= fast + slow <= 160 + 2 * 8
    assert slow < fast / 2
    assert torch.equal(weights, other)
    assert stalled < 2.0, "ten rounds of eight slow steps take 4.8 seconds"


def test_resume_equals_the_run_that_was_saved(tmp_path: Path) -> None:
    """Ranks come together for the checkpoint: the uninterrupted run pauses there, too."""

    def run(steps: int, resume: str | None = None) -> torch.Tensor:
        module = Regressor(optimizer=lambda p: torch.optim.AdamW(p, lr=0.02))
        save = [ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=6, save_top_k=-1)] if resume is None else []
        strategy = AsyncLocalStrategy(WAIT, LocalSteps(4), dopt.ErrorFeedback(dopt.TopK(0.5)))
        trainer(strategy, max_steps=steps, callbacks=save).fit(module, regression(128), ckpt_path=resume)
        return flat(module)

    def job(rank: int) -> bool:
        return torch.equal(run(12), run(12, f"{tmp_path}/step=6.ckpt"))

    assert on_ranks(job) == [True, True]


def test_the_inner_state_can_be_forgotten() -> None:
    def job(rank: int) -> list[int]:
        seen: list[int] = []

        class Watched(Regressor):
            def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
                seen.append(len(self.optimizers().optimizer.state))  # type: ignore[union-attr]

        module = Watched(optimizer=lambda p: torch.optim.AdamW(p, lr=0.02))
        strategy = AsyncLocalStrategy(WAIT, LocalSteps(2), inner_state="reset")
        trainer(strategy, max_steps=5).fit(module, regression(128))
        return seen

    assert on_ranks(job)[0] == [0, 4, 0, 4, 0]


def test_names_and_pickles() -> None:
    assert {"async_local", "async_local_notebook"} <= set(StrategyRegistry.available_strategies())
    strategy = pickle.loads(pickle.dumps(AsyncLocalStrategy(fedasync(), LocalSteps(5), total_steps=7)))
    assert (strategy.rule, strategy.local_steps, strategy.total_steps) == (fedasync(), LocalSteps(5), 7)
    assert isinstance(trainer("async_local").strategy, AsyncLocalStrategy)
    assert AsyncLocalStrategy(local_steps=7).local_steps == LocalSteps(7, dynamic=True)


def test_on_one_rank_it_is_the_outer_optimizer_alone() -> None:
    def job(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        rule = HubRule(OnArrival(), outer=Nesterov(0.7, 0.9))
        hub = fit(AsyncLocalStrategy(rule, LocalSteps(4)), 8, devices=1)
        return hub, fit(dopt.ReplicaStrategy(plan=plans.diloco(4, 0.7, 0.9)), 8, devices=1)

    hub, diloco = on_ranks(job, 1)[0]
    torch.testing.assert_close(hub, diloco, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": -1}, r"^AsyncLocalStrategy\(total_steps=-1\)"),
        ({"local_steps": 0}, r"^AsyncLocalStrategy\(local_steps=0\): must be an integer of at least 1"),
        ({"inner_state": "lost"}, r"^AsyncLocalStrategy\(inner_state='lost'\)"),
        ({"codec": dopt.EF21(dopt.TopK(0.1))}, r"^AsyncLocalStrategy\(codec=EF21\(.*must be a compressor"),
        ({"codec": dopt.Int8(), "rule": fedasync()}, r"^AsyncLocalStrategy\(codec=Int8\(.*packs changes"),
        ({"local_steps": LocalSteps(4, True, [1.0, 2.0])}, r"must be 4 numbers, one per worker$"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(AsyncLocalStrategy(**options), devices=4)


def test_the_exchange_is_there_during_a_fit_only() -> None:
    def job(rank: int) -> tuple[bool, bool]:
        strategy = AsyncLocalStrategy(WAIT, LocalSteps(2))
        found: list[bool] = []

        class Look(Regressor):
            def on_train_batch_end(self, *_: Any) -> None:
                found.append(isinstance(strategy.exchange, AsyncLocal))

        trainer(strategy, max_steps=2).fit(Look(), regression())
        return all(found), strategy.exchange is None

    assert on_ranks(job) == [(True, True)] * 2
