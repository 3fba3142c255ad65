"""Fixed sparse masks under a Trainer, on real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from trainer_tools import Regressor, Trace, flat, on_ranks, regression, trainer

from lightning_dopt import Int8, NeuronMask, Plan, ReplicaStrategy, plans

pytestmark = pytest.mark.trainer
STEPS = 12
TOTAL = 4 * 8 + 8 + 8 + 1
PLANS = {
    "fish": plans.fish_mask(0.25, batches=3, sync_every=2, refresh=2),
    "neurons": Plan(plans.compressed_ddp(Int8()).syncs, [NeuronMask(0.25)]),
}


def fit(plan: Plan, path: Any = None, callbacks: Any = ()) -> tuple[Trace, Any]:
    module = Regressor(optimizer=lambda ps: torch.optim.AdamW(ps, lr=0.02, weight_decay=0.1))
    trace = Trace()
    fitter = trainer(ReplicaStrategy(plan=plan), callbacks=[trace, *callbacks], max_steps=STEPS, max_epochs=-1)
    fitter.fit(module, regression(shuffle=True), ckpt_path=path)
    return trace, fitter


@pytest.mark.parametrize("name", PLANS)
def test_few_elements_move_and_travel_and_resume_is_exact(name: str, tmp_path: Path) -> None:
    plan = PLANS[name]

    def job(rank: int) -> tuple[Tensor, float]:
        saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        full, fitter = fit(plan, callbacks=[saver])
        for step in (5, 8):
            rest, _ = fit(plan, tmp_path / f"step={step}.ckpt")
            assert list(rest.rows) == list(range(step + 1, STEPS + 1))
            assert all(torch.equal(row, full.rows[k]) for k, row in rest.rows.items())
        return full.stacked(), float(fitter.callback_metrics["comm/bytes"])

    (a, sent), (b, _) = on_ranks(job)
    start = flat(Regressor())
    moved = (a != start).any(0)
    assert torch.equal(moved, (b != start).any(0))
    if name == "fish":
        k, synced = 12, [5, 7, 9, 11]  # 0.25 of 49; chosen at steps 3, 7 and 11
        assert torch.equal(a[:3], start.expand(3, TOTAL))
        assert all(torch.equal(a[s - 1], b[s - 1]) for s in synced)
        assert (a[6] != start).sum() == k
        assert sent == len(synced) * 4 * k + 3 * 4 * TOTAL
    else:
        assert torch.equal(a, b)
        assert moved.sum() == 8 * 1 + 8 + 2 + 1  # one of four inputs of a hidden unit, biases, two of eight of the last
