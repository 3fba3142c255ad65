"""Gossip's parts under a Trainer: steps of two passes, weighted losses, mergeability."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainer_tools import Regressor, Trace, adam, flat, on_ranks, regression, sgd, shares, trainer

from lightning_dopt import (
    SAM,
    Complete,
    Every,
    Int8,
    LocalSGDStrategy,
    LossWeights,
    NodeWeighted,
    Plan,
    ReplicaStrategy,
    Ring,
    Sync,
    plans,
)
from lightning_dopt.callbacks import Mergeability

pytestmark = pytest.mark.trainer


def norm_net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))


def run(strategy: Any, module: Any = None, callbacks: Any = (), val: Any = None, **options: Any) -> tuple[Any, Any]:
    module = module or Regressor()
    fitter = trainer(strategy, callbacks=list(callbacks), **({"max_steps": 4} | options))
    fitter.fit(module, regression(), val)
    return module, fitter


def test_sam_under_a_trainer_is_the_loop_written_out() -> None:
    """Two replicas that average in every step; BatchNorm's statistics are those of the first pass."""
    rho, lr = 0.1, 0.1

    def job(rank: int) -> tuple[Tensor, Tensor, float]:
        module, fitter = run(
            ReplicaStrategy(Sync(), plan=None) if rho == 0 else ReplicaStrategy(plan=sam(rho)), Logged(norm_net)
        )
        return flat(module, False), module.net[1].running_mean.clone(), float(fitter.logged_metrics["train_loss"])

    got = on_ranks(job)
    nets = [Regressor(norm_net) for _ in range(2)]
    for step in range(4):
        losses = []
        for rank, net in enumerate(nets):
            batch = shares(regression(), rank)[step]
            loss = net.loss(batch)
            losses.append(float(loss.detach()))
            grads = torch.autograd.grad(loss, list(net.parameters()))
            kept = [b.clone() for b in net.buffers()]
            norm = torch.sqrt(sum(g.square().sum() for g in grads))  # type: ignore[arg-type]
            with torch.no_grad():
                for p, g in zip(net.parameters(), grads, strict=True):
                    p.add_(rho * g / norm)
            second = torch.autograd.grad(net.loss(batch), list(net.parameters()))
            with torch.no_grad():
                for p, g, up in zip(net.parameters(), grads, second, strict=True):
                    p.sub_(rho * g / norm).sub_(lr * up)
                for b, before in zip(net.buffers(), kept, strict=True):
                    b.copy_(before)
        mean = (flat(nets[0], False) + flat(nets[1], False)) / 2
        for net in nets:
            start = 0
            with torch.no_grad():
                for p in net.parameters():
                    p.copy_(mean[start : start + p.numel()].view(p.shape))
                    start += p.numel()
    for weights, running, _ in got:
        torch.testing.assert_close(weights, mean, rtol=0, atol=1e-5)
        assert torch.equal(running, got[0][1])
    assert [loss for _, _, loss in got] == pytest.approx(losses, abs=1e-5)  # of the first pass, not uphill


def sam(rho: float) -> Plan:
    return Plan([Sync()], [SAM(rho)])


class Logged(Regressor):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        return loss


def test_sam_is_refused_where_a_step_cannot_be_repeated() -> None:
    def job(rank: int) -> str:
        with pytest.raises(ValueError, match="SAM") as caught:
            run(ReplicaStrategy(plan=sam(0.1)), accumulate_grad_batches=2)
        return str(caught.value)

    assert set(on_ranks(job)) == {"Trainer(accumulate_grad_batches=2): SAM takes both passes on one batch, use 1"}


@pytest.mark.parametrize(("optimizer", "clip", "warns"), [(sgd, None, False), (adam, None, True), (sgd, 0.5, True)])
def test_weighted_losses_warn_where_their_weights_are_lost(optimizer: Any, clip: Any, warns: bool) -> None:
    plan = Plan([Sync(peers=Complete())], [LossWeights([0.25, 0.75])])

    def job(rank: int) -> bool:
        import warnings

        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            run(ReplicaStrategy(plan=plan), Regressor(optimizer=optimizer), gradient_clip_val=clip, max_steps=1)
        return any("LossWeights" in str(w.message) for w in seen)

    assert on_ranks(job)[0] is warns


def test_the_consensus_model_of_weighted_mixing_is_the_weighted_mean() -> None:
    shares_ = [0.25, 0.75]

    def job(rank: int) -> tuple[Tensor, Tensor]:
        trace = Trace()
        module, _ = run(ReplicaStrategy(Sync(Every(50), peers=NodeWeighted(Ring(), shares_))), callbacks=[trace])
        return trace.rows[4], flat(module)

    (a, end), (b, again) = on_ranks(job)
    assert torch.equal(end, again)
    assert not torch.equal(a, b)
    torch.testing.assert_close(end, 0.25 * a + 0.75 * b, rtol=0, atol=1e-6)


def test_mergeability_measures_replicas_and_their_average_and_changes_nothing() -> None:
    val = regression(8, seed=5)

    def job(rank: int) -> tuple[Tensor, dict[str, float], Tensor]:
        plain = Trace()
        run(LocalSGDStrategy(100), Regressor(norm_net), [plain], val, max_epochs=2, max_steps=-1)
        trace = Trace()
        _, fitter = run(
            LocalSGDStrategy(100), Regressor(norm_net), [trace, Mergeability()], val, max_epochs=2, max_steps=-1
        )
        assert torch.equal(trace.stacked(), plain.stacked())
        seen = {k: float(v) for k, v in fitter.callback_metrics.items() if k.startswith("merge/")}
        return trace.rows[max(trace.rows)], seen, torch.tensor(float(fitter.callback_metrics["val_loss"]))

    (a, seen, merged), (b, others, _) = on_ranks(job)
    assert seen == others
    assert seen["merge/merged/val_loss"] == pytest.approx(float(merged), rel=1e-5)
    assert seen["merge/gain/val_loss"] == pytest.approx(
        seen["merge/local/val_loss"] - seen["merge/merged/val_loss"], rel=1e-4
    )
    local = []
    for rank, values in enumerate((a, b)):
        net, start = Regressor(norm_net).eval(), 0
        with torch.no_grad():
            for t in (*net.parameters(), *(t for t in net.buffers() if t.is_floating_point())):
                t.copy_(values[start : start + t.numel()].view(t.shape))
                start += t.numel()
            local.append(float(net.loss([t[rank::2] for t in val.dataset.tensors])))  # its half of the validation data
    assert seen["merge/local/val_loss"] == pytest.approx(sum(local) / 2, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "pattern"), [({"metric": ""}, "metric=''"), ({"batches": -1}, "batches=-1.*at least 0")]
)
def test_mergeability_refuses_bad_options(options: Any, pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        Mergeability(**options)


def test_mergeability_refuses_unknown_metrics() -> None:
    def job(rank: int) -> str:
        with pytest.raises(ValueError, match="logs no such name") as caught:
            run(LocalSGDStrategy(2), callbacks=[Mergeability("val_acc")], val=regression(8), max_epochs=1, max_steps=-1)
        return str(caught.value)

    assert "it logs ['consensus/distance', 'val_loss']" in on_ranks(job)[0]


@pytest.mark.parametrize(
    "name", ["extra", "k_gt", "relay_sgd", "moniqua", "single_merge", "qg_dsgdm", "gradient_tracking"]
)
def test_gossip_by_its_published_names_under_a_trainer(name: str) -> None:
    """Four replicas; what the Trainer does is what the plan does, and the loss falls."""
    arguments: dict[str, dict[str, Any]] = {
        "k_gt": {"sync_every": 3},
        "single_merge": {"sync_every": 2},
        "gradient_tracking": {"codec": Int8()},
    }
    plan = getattr(plans, name)(**arguments.get(name, {}))

    def job(rank: int) -> tuple[float, float, float]:
        module = Regressor(optimizer=lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.5))
        whole = regression().dataset.tensors
        before = float(module.loss(whole))
        _, fitter = run(ReplicaStrategy(plan=plan), module, devices=4, max_epochs=6, max_steps=-1)
        return before, float(module.loss(whole)), float(fitter.callback_metrics["comm/bytes"])

    results = on_ranks(job, 4)
    assert len({after for _, after, _ in results}) == 1  # all hold the consensus model
    assert results[0][1] < 0.7 * results[0][0]
    assert all(sent > 0 for _, _, sent in results)
