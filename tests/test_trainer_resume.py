"""A run that stops and resumes equals the uninterrupted one bit for bit, on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from trainer_tools import Regressor, Trace, adam, flat, on_ranks, regression, trainer

from lightning_dopt import (
    Bernoulli,
    Delay,
    Difference,
    Drifted,
    ErrorFeedback,
    Every,
    Int8,
    LowRank,
    Nesterov,
    OnePeerExponential,
    OneRound,
    Parameters,
    Plan,
    RandK,
    ReplicaStrategy,
    Ring,
    Sync,
    TopK,
    outer,
    plans,
)
from lightning_dopt.compress import GaussianNoise
from lightning_dopt.topology import Lazy
from lightning_dopt.topology.thinned import Thinned

pytestmark = pytest.mark.trainer

STEPS = 8  # two epochs of four batches


def noisy_net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1))


def delta(apply: Any, **options: Any) -> Plan:
    return Plan([Sync(when=Every(3), signal="delta", outer=outer.SGD(0.7, 0.5), apply=apply, **options)])


PLANS = {
    "local_sgd": plans.local_sgd(3),
    "diloco_int8": plans.diloco(3, codec=Int8()),
    "diloco_pairs": plans.diloco(3, outer_momentum=0.5, topology=OnePeerExponential(), codec=None),
    "exact_diffusion": plans.gossip(correction="exact_diffusion"),
    "tracking": plans.gossip(Lazy(OnePeerExponential()), correction="gradient_tracking"),
    "awc": plans.gossip(order="awc"),
    "choco": plans.gossip(Ring(), codec=TopK(0.3)),
    "topk_ef": plans.compressed_ddp(TopK(0.1)),
    "powersgd": plans.compressed_ddp(LowRank(2)),
    "randk": plans.compressed_ddp(RandK(0.2)),
    "lowrank_delta": Plan([Sync(when=Every(3), signal="delta", codec=ErrorFeedback(LowRank(1)))]),
    "delay_value": Plan([Sync(when=Every(3), apply=Delay(2))]),
    "delay_delta_int8": delta(Delay(2), codec=Int8()),
    "one_round": delta(OneRound()),
    "one_round_own": delta(OneRound("own_share"), codec=Int8()),
    "extra": plans.extra(Lazy(Ring())),
    "k_gt": plans.k_gt(Lazy(Ring()), 3),
    "quasi_global": plans.qg_dsgdm(Lazy(Ring())),
    "decentlam": plans.decentlam(Lazy(Ring())),
    "by_edge": plans.gossip(Thinned(Ring(), 0.6), Int8()),
    "deep_squeeze": plans.deep_squeeze(Lazy(Ring())),
    "robust": plans.robust_tracking(Lazy(Ring()), GaussianNoise(0.01)),
    "sam": plans.dfedsam(Lazy(Ring()), 2, rounds=2),
    "drifted": Plan([Sync(Drifted(0.3))]),
    "parts": Plan(
        [
            Sync(when=Every(2), what=Parameters("net.0.*")),
            Sync(when=Bernoulli(0.5), what=Parameters("net.4.*"), outer=Nesterov(0.5, 0.5)),
            Sync(when=Every(4), what="optimizer.exp_avg"),
        ]
    ),
}


def make(plan: Plan, callbacks: list[Any], **options: Any) -> tuple[Any, Any]:
    module = Regressor(noisy_net, adam, decay=0.9)
    options = {"max_steps": STEPS, "max_epochs": -1, "gradient_clip_val": 0.5} | options
    return trainer(ReplicaStrategy(plan=plan), callbacks=callbacks, **options), module


def run(plan: Plan, path: Any = None, folder: Any = None, more: Any = (), **options: Any) -> tuple[Trace, Tensor, Any]:
    """One fit; returns the trace, the weights at the end and the trainer."""
    torch.manual_seed(3)
    trace = Trace()
    callbacks: list[Any] = [trace, *more]
    if folder is not None:
        callbacks.append(ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1))
    fitter, module = make(plan, callbacks, **options)
    fitter.fit(module, regression(shuffle=True), regression(8, seed=5), ckpt_path=path)
    return trace, flat(module), fitter


def same_from(full: Trace, rest: Trace, step: int, last: int = STEPS) -> None:
    assert list(rest.rows) == list(range(step + 1, last + 1))
    for k, row in rest.rows.items():
        assert torch.equal(row, full.rows[k]), f"step {k} differs by {(row - full.rows[k]).abs().max():.2e}"


@pytest.mark.parametrize("name", PLANS)
def test_resume_is_exact(name: str, tmp_path: Path) -> None:
    """From checkpoints written by a callback during training, and from one saved after a fit that ended there.

    The module has dropout and BatchNorm, the loader shuffles, gradients are clipped, the learning rate decays.
    """
    plan = PLANS[name]

    def job(rank: int) -> Tensor:
        full, end, _ = run(plan, folder=tmp_path / "all")
        for step in (4, 5):  # messages of Delay plans are on their way at 4 and 7, 4 is the end of an epoch
            rest, again, _ = run(plan, tmp_path / "all" / f"step={step}.ckpt")
            same_from(full, rest, step)
            assert torch.equal(again, end)
        part, _, fitter = run(plan, max_steps=7)
        same_from(full, part, 0, 7)
        fitter.save_checkpoint(tmp_path / "7.ckpt")
        rest, again, _ = run(plan, tmp_path / "7.ckpt")
        same_from(full, rest, 7)
        assert torch.equal(again, end)
        return full.stacked()

    a, b = on_ranks(job)
    assert a.shape == (STEPS, 4 * 8 + 8 + 8 + 8 + 8 + 1 + 16)
    ddp = plan.syncs and plan.syncs[0].what.slot == "gradients" and not plan.corrections
    assert torch.equal(a[:, :65], b[:, :65]) == bool(ddp)  # the replicas were different unless gradients are shared


INSIDE = ("diloco_int8", "delay_value", "delay_delta_int8", "one_round_own", "choco", "lowrank_delta", "tracking")


@pytest.mark.parametrize("name", [*INSIDE, "delay_mixed"])
def test_saving_during_validation_changes_nothing(name: str, tmp_path: Path) -> None:
    """With the mean model swapped in and messages on their way (Lightning then runs in inference mode)."""
    mixed = Plan([Sync(when=Every(3), peers=Lazy(OnePeerExponential()), codec=Difference(TopK(0.3)), apply=Delay(2))])
    plan = PLANS.get(name, mixed)

    def job(rank: int) -> None:
        full, end, _ = run(plan)
        saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, save_on_train_epoch_end=False)
        often, again, _ = run(plan, val_check_interval=1, more=[saver])
        same_from(full, often, 0)
        assert torch.equal(end, again)
        rest, again, _ = run(plan, tmp_path / "step=4.ckpt")
        same_from(full, rest, 4)
        assert torch.equal(end, again)

    on_ranks(job)


class SaveAt(Callback):
    """Saves after one batch, whether the optimizer stepped or not."""

    def __init__(self, path: Path, batch: int) -> None:
        self.path, self.batch, self.seen = path, batch, 0

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.seen += 1
        if self.seen == self.batch:
            trainer.save_checkpoint(self.path)


def test_resume_within_a_window_of_accumulation(tmp_path: Path) -> None:
    """Messages of order awc have left by then, and gradients have been summed in part."""

    def job(rank: int) -> None:
        for order in ("cta", "awc"):
            plan, path = plans.gossip(Lazy(OnePeerExponential()), order=order), tmp_path / f"{order}.ckpt"
            options = {"accumulate_grad_batches": 2, "max_steps": 4}
            full, end, _ = run(plan, more=[SaveAt(path, 3)], **options)
            rest, again, _ = run(plan, path, **options)
            assert {k for k, row in rest.rows.items() if torch.equal(row, full.rows[k])} == {2, 3, 4}
            assert torch.equal(end, again)

    on_ranks(job)


def test_the_training_data_can_be_looked_at_after_the_fit() -> None:
    def job(rank: int) -> int:
        fitter = trainer(ReplicaStrategy(plan=plans.local_sgd(2)), max_steps=3)
        fitter.fit(Regressor(), regression())
        return sum(1 for _ in fitter.train_dataloader)  # type: ignore[union-attr]

    assert on_ranks(job) == [4, 4]
