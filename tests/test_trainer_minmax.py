"""Min-max problems under a Trainer, on real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from trainer_tools import Regressor, Trace, on_ranks, regression, shares, trainer

from lightning_dopt import Ascend, ErrorFeedback, Extragradient, Plan, RandK, ReplicaStrategy, Sync, TopK, plans
from lightning_dopt._random import uniform

pytestmark = [pytest.mark.trainer, pytest.mark.filterwarnings("ignore:Sync")]
LR, STEPS = 0.1, 8


class Noise(nn.Module):
    """A linear model whose opponent shifts the inputs, at a price."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 1)
        self.shift = nn.Parameter(torch.full((4,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x + self.shift)
        return out


class Robust(Regressor):
    """``min_net max_shift |net(x + shift) - y|^2 - |shift|^2``."""

    def __init__(self) -> None:
        super().__init__(Noise, lambda ps: torch.optim.SGD(ps, lr=LR))

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) - 2 * self.net.shift.square().sum()


def operator(module: Robust, at: Tensor, batch: Any) -> Tensor:
    """By hand, at any point."""
    torch.nn.utils.vector_to_parameters(at, module.parameters())
    parts = torch.autograd.grad(module.loss(batch), list(module.parameters()))
    signs = [-1.0 if name.endswith("shift") else 1.0 for name, _ in module.named_parameters()]
    return torch.cat([s * g.reshape(-1) for s, g in zip(signs, parts, strict=True)])


def vector(module: nn.Module) -> Tensor:
    return torch.nn.utils.parameters_to_vector(module.parameters()).detach()


def fit(plan: Plan, path: Any = None, **options: Any) -> tuple[Robust, Trace, Any]:
    module, trace = Robust(), Trace()
    options = {"max_steps": STEPS, "max_epochs": -1} | options
    callbacks = [trace, *options.pop("callbacks", ())]
    fitter = trainer(ReplicaStrategy(plan=plan), callbacks=callbacks, **options)
    fitter.fit(module, regression(), ckpt_path=path)
    return module, trace, fitter


def test_masha_under_a_trainer_is_the_loop_written_out() -> None:
    """Two replicas; a dense refresh is a second pass over the batch at the new reference point."""
    refresh, plan = 0.4, plans.masha(TopK(0.5), 0.4, "*shift", seed=3)

    def job(rank: int) -> tuple[Tensor, float]:
        module, _, fitter = fit(plan)
        return vector(module), float(fitter.callback_metrics["comm/bytes"])

    got = on_ranks(job)
    module = Robust()
    z = w = vector(module)
    errors, own = [torch.zeros_like(z)] * 2, [torch.zeros_like(z)] * 2
    batches = [[b for epoch in range(2) for b in shares(regression(), rank, epoch)] for rank in range(2)]
    heads = 0
    for step in range(1, STEPS + 1):
        if step == 1 or uniform(3, step) < refresh:
            heads, w = heads + 1, z
            own = [operator(module, w, batches[i][step - 1]) for i in range(2)]
        mean = (own[0] + own[1]) / 2
        bar = (1 - refresh) * z + refresh * w
        sent = []
        for i in range(2):
            v = operator(module, bar - LR * mean, batches[i][step - 1]) - own[i] + errors[i]
            kept = torch.zeros_like(v)
            top = v.abs().topk(5).indices  # 0.5 of 9, rounded half up
            kept[top] = v[top]
            errors[i] = v - kept
            sent.append(kept)
        z = bar - LR * (mean + (sent[0] + sent[1]) / 2)
    assert torch.equal(got[0][0], got[1][0])
    torch.testing.assert_close(got[0][0], z, rtol=1e-5, atol=1e-6)
    assert 1 < heads < STEPS
    assert got[0][1] == heads * 36 + STEPS * 5 * (4 + 1)  # dense float32; values and positions of one byte


def test_resume_is_exact(tmp_path: Path) -> None:
    plan = plans.masha(TopK(0.5), 0.4, "*shift", seed=3)

    def job(rank: int) -> None:
        saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        _, full, _ = fit(plan, callbacks=[saver])
        for step in (3, 5):
            _, rest, _ = fit(plan, tmp_path / f"step={step}.ckpt")
            assert list(rest.rows) == list(range(step + 1, STEPS + 1))
            assert all(torch.equal(row, full.rows[k]) for k, row in rest.rows.items())

    on_ranks(job)


def test_ascending_players_climb_with_any_plan() -> None:
    def job(rank: int) -> tuple[float, float]:
        up, _, _ = fit(Plan(plans.local_sgd(2).syncs, [Ascend("*shift")]))
        down, _, _ = fit(plans.local_sgd(2))
        return float(up.net.shift.norm()), float(down.net.shift.norm())

    assert len(set(on_ranks(job))) == 1


def test_refused_where_a_step_cannot_be_repeated() -> None:
    def job(rank: int) -> str:
        with pytest.raises(ValueError, match="Extragradient") as caught:
            fit(plans.masha(RandK(0.5)), accumulate_grad_batches=2)
        return str(caught.value)

    text = "Trainer(accumulate_grad_batches=2): Extragradient takes both passes on one batch, use 1"
    assert set(on_ranks(job)) == {text}


def test_parts_and_plan_are_the_same() -> None:
    plan = plans.masha(TopK(0.1), 0.25, "*shift", seed=2)
    syncs = [Sync(when=plan.syncs[0].when, what="reference"), Sync(what="gradients", codec=ErrorFeedback(TopK(0.1)))]
    assert plan == Plan(syncs, [Ascend("*shift"), Extragradient(0.75)])
