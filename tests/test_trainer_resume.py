"""A run that stops and resumes equals the uninterrupted one bit for bit, on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from trainer_tools import Regressor, Trace, adam, flat, on_ranks, regression, trainer

from lightning_dopt import (
    Bernoulli,
    Delay,
    ErrorFeedback,
    Every,
    Int8,
    LowRank,
    Nesterov,
    OnePeerExponential,
    OneRound,
    Parameters,
    Plan,
    ReplicaStrategy,
    Ring,
    Sync,
    TopK,
    outer,
    plans,
)
from lightning_dopt.topology import Lazy

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
    "lowrank_delta": Plan([Sync(when=Every(3), signal="delta", codec=ErrorFeedback(LowRank(1)))]),
    "delay_value": Plan([Sync(when=Every(3), apply=Delay(2))]),
    "delay_delta_int8": delta(Delay(2), codec=Int8()),
    "one_round": delta(OneRound()),
    "one_round_own": delta(OneRound("own_share"), codec=Int8()),
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


def run(plan: Plan, path: Any = None, folder: Any = None, **options: Any) -> tuple[Trace, Tensor, Any]:
    """One fit; returns the trace, the weights at the end and the trainer."""
    torch.manual_seed(3)
    trace = Trace()
    callbacks: list[Any] = [trace]
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
