"""What an optimizer step does under a Trainer: equal to stock DDP, or to a loop written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from trainer_tools import Regressor, Trace, adam, flat, mlp, on_ranks, regression, sgd, shares, trainer

from lightning_dopt import Identity, Int8, Plan, ReplicaStrategy, Sync, TopK, plans

pytestmark = pytest.mark.trainer


def fitted(plan: Plan | str, module: Any, data: Any = None, **options: Any) -> tuple[Trace, Any]:
    """One fit of two epochs on one of two ranks."""
    trace = Trace()
    strategy = plan if isinstance(plan, str) else ReplicaStrategy(plan=plan, **options.pop("strategy", {}))
    fitter = trainer(strategy, callbacks=[trace], **({"max_epochs": 2} | options))
    fitter.fit(module, data or regression(shuffle=True))
    return trace, fitter


# ---------------------------------------------------------------------- against stock DDP


class Tied(nn.Module):
    """One matrix used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(torch.tanh(self.first(x))))


def two_groups(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam([{"params": parameters[:2], "lr": 0.03}, {"params": parameters[2:], "lr": 0.01}])


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "adam": ({"optimizer": adam, "decay": 0.9}, {"gradient_clip_val": 0.3, "accumulate_grad_batches": 2}),
    "groups": ({"optimizer": two_groups}, {"gradient_clip_val": 0.2, "gradient_clip_algorithm": "value"}),
    "tied": ({"net": Tied, "optimizer": adam}, {}),
    "bf16": ({"optimizer": adam, "decay": 0.9}, {"precision": "bf16-mixed"}),
}


def test_gradient_sync_is_ddp_bit_for_bit() -> None:
    """Adam with clipping, scheduler and accumulation; parameter groups; tied weights; bf16-mixed."""

    def job(rank: int) -> Any:
        out = {}
        for name, (module, options) in CASES.items():
            ddp, _ = fitted("ddp", Regressor(**module), **options)
            ours, fitter = fitted(Plan([Sync(what="gradients")]), Regressor(**module), **options)
            out[name] = ddp.stacked(), ours.stacked(), fitter.strategy.world.ledger.bytes
        return out

    for answer in on_ranks(job):
        for name, (ddp, ours, _) in answer.items():
            assert torch.equal(ddp, ours), name
            assert (ddp[-1] - ddp[0]).abs().max() > 1e-2
    size = 4 * (4 * 8 + 8 + 8 + 1)
    assert answer["adam"][2] == 4 * size  # four steps, two halves of a ring all-reduce between two ranks each
    assert answer["groups"][2] == 8 * size
    assert answer["tied"][2] == 8 * 4 * (16 + 4 + 4 + 4 + 1)  # the tied matrix once


def test_averaging_parameters_after_every_sgd_step_is_ddp() -> None:
    """With momentum and weight decay, too: both are linear in the gradient."""

    def momentum(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)

    def job(rank: int) -> Any:
        out = []
        for precision, optimizer in (("32-true", sgd), ("64-true", momentum)):
            module = {"optimizer": optimizer, "decay": 0.9}
            pair = [fitted(p, Regressor(**module), precision=precision)[0].stacked() for p in ("ddp", Plan([Sync()]))]
            out.append(pair)
        return out

    for single, double in on_ranks(job):
        torch.testing.assert_close(*single, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(*double, rtol=1e-12, atol=1e-12)


def test_unused_and_frozen_parameters() -> None:
    """A parameter without a gradient anywhere stays as it is, one with a gradient on one rank does not.

    Frozen ones are neither changed nor sent.
    """

    class Partly(Regressor):
        def __init__(self) -> None:
            super().__init__(optimizer=adam)
            self.unused, self.sometimes = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(5))
            self.net[0].weight.requires_grad_(False)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            extra = self.sometimes.square().sum() if self.global_rank == 1 else 0.0
            return self.loss(batch) + extra

    def job(rank: int) -> Any:
        out = []
        for plan in (Plan([Sync(what="gradients")]), plans.compressed_ddp(Int8()), plans.local_sgd(1)):
            module = Partly()
            frozen = module.net[0].weight.clone()
            _, fitter = fitted(plan, module, max_steps=3)
            assert torch.equal(module.unused, torch.ones(3))
            assert torch.equal(module.net[0].weight, frozen)
            out.append((flat(module), module.sometimes.detach(), fitter.strategy.world.ledger.bytes))
        return out

    a, b = on_ranks(job)
    trainable = 8 + 8 + 1 + 3 + 5
    for k in range(3):
        assert torch.equal(a[k][0], b[k][0])
        assert (a[k][1] < 0.99).all()
    assert a[0][2] == 3 * 4 * trainable
    assert a[1][2] == 3 * (trainable + 4)
    assert a[2][2] == 3 * 4 * trainable


# ---------------------------------------------------------------------- against loops by hand


def by_hand(
    plan: Callable[[int, list[nn.Module]], None], clip: float = 0.0, accumulate: int = 1, net: Any = mlp
) -> list[Tensor]:
    """Two models in float64 trained on their shares of the data; ``plan(step, models)`` after every step."""
    models = [Regressor(net).double() for _ in range(2)]
    optimizers = [sgd(m.parameters()) for m in models]
    rows = []
    for step in range(1, 8 // accumulate + 1):
        for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            for k in range(accumulate):
                epoch, batch = divmod((step - 1) * accumulate + k, 4)
                x, y = shares(regression(), rank, epoch)[batch]
                (model.loss((x.double(), y.double())) / accumulate).backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
        plan(step, models)
        rows.append(torch.stack([flat(m) for m in models]))
    return rows


@torch.no_grad()
def average(models: list[nn.Module]) -> None:
    for pair in zip(*(m.parameters() for m in models), strict=True):
        mean = torch.stack(pair).mean(0)
        for p in pair:
            p.copy_(mean)


def test_local_steps_count_optimizer_steps() -> None:
    """Averages every three steps, over two epochs of four batches; accumulation halves the steps; clipping is local."""
    settings = [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}]

    def job(rank: int) -> Any:
        out = []
        for options in settings:
            trace, fitter = fitted(plans.local_sgd(3), Regressor(), regression(), precision="64-true", **options)
            engine = fitter.strategy.engine
            out.append((list(trace.rows.values()), engine.step, engine.runners[0].rounds))
        return out

    answers = on_ranks(job)
    for k, options in enumerate(settings):
        clip, window = options.get("gradient_clip_val", 0.0), options.get("accumulate_grad_batches", 1)
        expected = by_hand(lambda step, models: average(models) if step % 3 == 0 else None, clip, window)
        for rank, answer in enumerate(answers):
            rows, steps, rounds = answer[k]
            assert (steps, rounds) == (8 // window, 8 // window // 3)
            for row, want in zip(rows, expected, strict=True):
                torch.testing.assert_close(row, want[rank], rtol=1e-12, atol=1e-12)
        assert (expected[0][0] - expected[0][1]).abs().max() > 1e-3


class TwoNets(LightningModule):
    """``one`` learns every batch, ``two`` follows it every second batch, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.one, self.two = Regressor(seed=1).net, Regressor(seed=2).net

    def losses(self, batch: Any) -> tuple[Tensor, Tensor]:
        x, y = batch
        return mse_loss(self.one(x), y), mse_loss(self.two(x), self.one(x).detach())

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        loss = self.losses(batch)[0]
        first.zero_grad()
        self.manual_backward(loss)
        first.step()
        if batch_idx % 2 == 1:
            second.zero_grad()
            self.manual_backward(self.losses(batch)[1])
            second.step()

    def configure_optimizers(self) -> Any:
        return sgd(self.one.parameters()), sgd(self.two.parameters())


def two_nets_by_hand(gradients: bool, clock: int) -> Tensor:
    models = [TwoNets().double() for _ in range(2)]
    for step in range(8):
        for part in (0, 1) if step % 2 else (0,):
            grads = []
            for rank, model in enumerate(models):
                batch = [t.double() for t in shares(regression(), rank, step // 4)[step % 4]]
                net = (model.one, model.two)[part]
                grads.append(torch.autograd.grad(model.losses(batch)[part], list(net.parameters())))
            for rank, model in enumerate(models):
                net = (model.one, model.two)[part]
                with torch.no_grad():
                    for k, p in enumerate(net.parameters()):
                        p -= 0.1 * ((grads[0][k] + grads[1][k]) / 2 if gradients else grads[rank][k])
            if not gradients and part == clock:
                average(models)
    return torch.stack([flat(m) for m in models])


def test_manual_optimization_with_two_optimizers() -> None:
    """Gradients are shared by whichever optimizer steps, parameters when the one that ``clock`` names has stepped."""

    def job(rank: int) -> Any:
        out = []
        for plan, clock in ((Plan([Sync(what="gradients")]), 0), (Plan([Sync()]), 0), (Plan([Sync()]), 1)):
            module = TwoNets()
            strategy = {"clock": clock, "evaluate": "local"}
            _, fitter = fitted(plan, module, regression(), strategy=strategy, precision="64-true")
            out.append((flat(module), fitter.strategy.engine.step, fitter.strategy.world.ledger.bytes))
        return out

    answers = on_ranks(job)
    size = 8 * (4 * 8 + 8 + 8 + 1)
    for rank, (shared, by_first, by_second) in enumerate(answers):
        for answer, hand in (
            (shared, two_nets_by_hand(True, 0)),
            (by_first, two_nets_by_hand(False, 0)),
            (by_second, two_nets_by_hand(False, 1)),
        ):
            torch.testing.assert_close(answer[0], hand[rank], rtol=1e-12, atol=1e-12)
        assert [a[1] for a in (shared, by_first, by_second)] == [8, 8, 4]
        assert [a[2] for a in (shared, by_first, by_second)] == [12 * size, 8 * 2 * size, 4 * 2 * size]
    assert not torch.equal(answers[0][1][0], answers[1][1][0])  # the second net moved after the last average
    assert torch.equal(answers[0][2][0], answers[1][2][0])


# ---------------------------------------------------------------------- fp16


class Overflowing(Regressor):
    """The loss of rank 1 is not finite at one batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        bad = self.global_rank == 1 and batch_idx == 2
        return self.loss(batch) * (float("inf") if bad else 1.0)


def half(start: float = 1024.0) -> MixedPrecision:
    scaler = torch.amp.GradScaler("cpu", init_scale=start, growth_interval=1000)
    return MixedPrecision("16-mixed", "cpu", scaler)


def test_an_overflow_on_one_rank_makes_all_skip_when_gradients_are_shared() -> None:
    """Also when the scale is 1; memories stay finite and free of the scale."""

    def job(rank: int) -> Any:
        out = []
        for codec, start in ((Identity(), 1.0), (TopK(0.5), 1.0), (TopK(0.5), 1024.0)):
            plugin = half(start)
            trace, fitter = fitted(
                plans.compressed_ddp(codec), Overflowing(optimizer=adam), regression(), max_epochs=1, plugins=[plugin]
            )
            state = [r for g in fitter.strategy.engine.gradients[0] for r in g.runner.lanes]
            memory = [t for r in state for t in r.channel.memory_state.values()]
            out.append((trace.stacked(), plugin.scaler.get_scale(), memory))
        return out

    a, b = on_ranks(job)
    for k, start in enumerate((1.0, 1.0, 1024.0)):
        assert torch.equal(a[k][0], b[k][0])
        rows, scale, memory = a[k]
        assert scale == b[k][1] == start / 2
        assert torch.equal(rows[2], rows[1])  # skipped
        assert (rows[3] - rows[2]).abs().max() > 1e-3  # and gone on
        assert all(torch.isfinite(m).all() for m in (*memory, *b[k][2]))
    assert a[1][2][0].abs().max() > 1e-4
    assert a[2][2][0].abs().max() < 10.0  # gradients are below that, scaled ones far above
    torch.testing.assert_close(a[1][2][0], a[2][2][0], rtol=0.05, atol=1e-2)


def test_an_overflow_on_one_rank_is_its_own_affair_when_parameters_are_shared() -> None:
    """That rank skips, the tick comes all the same: the averages after steps 2 and 4 take place."""

    def job(rank: int) -> Any:
        plugin = half()
        trace, fitter = fitted(plans.local_sgd(2), Overflowing(), regression(), max_epochs=1, plugins=[plugin])
        return trace.stacked(), plugin.scaler.get_scale(), fitter.strategy.engine.step

    (a, scale_a, step_a), (b, scale_b, step_b) = on_ranks(job)
    assert (scale_a, scale_b, step_a, step_b) == (1024.0, 512.0, 4, 4)
    assert torch.equal(a[1], b[1])
    assert torch.equal(b[2], b[1])
    assert not torch.equal(a[2], a[1])
    assert torch.equal(a[3], b[3])
    assert not torch.equal(a[3], a[2])


# ---------------------------------------------------------------------- buffers


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))


@torch.no_grad()
def average_norms(models: list[Any]) -> None:
    """Means are averaged, variances follow the law of total variance."""
    norms = [m.net[1] for m in models]
    mean = torch.stack([n.running_mean for n in norms]).mean(0)
    var = torch.stack([n.running_var + (n.running_mean - mean) ** 2 for n in norms]).mean(0)
    for norm in norms:
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)


def test_batch_norm_statistics() -> None:
    """Averaged with the parameters, or left alone, as told; in either case averaged in the model that remains."""

    def job(rank: int) -> Any:
        out = []
        for policy in ("average", "local"):
            module = Regressor(normed)
            trace, fitter = fitted(
                plans.local_sgd(3), module, regression(), precision="64-true", strategy={"buffers": policy}
            )
            out.append((trace.stacked(), flat(module), fitter.strategy.world.ledger.bytes))
        return out

    def hand(policy: str) -> list[Tensor]:
        def plan(step: int, models: list[Any]) -> None:
            if step % 3 == 0:
                average(models)
                if policy == "average":
                    average_norms(models)
            if step == 8:
                ends.append(torch.stack([flat(m) for m in models]))
                average(models)
                average_norms(models)

        ends: list[Tensor] = []
        rows = by_hand(plan, net=normed)
        return [*rows[:-1], *ends, rows[-1]]

    answers = on_ranks(job)
    size = 8 * (4 * 8 + 8 + 8 + 8 + 8 + 1)
    for k, policy in enumerate(("average", "local")):
        *rows, end = hand(policy)
        for rank, answer in enumerate(answers):
            torch.testing.assert_close(answer[k][0], torch.stack(rows)[:, rank], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(answer[k][1], end[rank], rtol=1e-12, atol=1e-12)
            assert answer[k][2] == 2 * (size + (8 * 16 if policy == "average" else 0))
        assert (rows[-1][0, -16:] - rows[-1][1, -16:]).abs().max() > 1e-3
