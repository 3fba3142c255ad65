"""Gradients that are not finite, in Trainers of two processes without loss scaling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from trainer_tools import Regressor, Trace, adam, on_ranks, regression, trainer

from lightning_dopt import ErrorFeedback, ReplicaStrategy, TopK, plans

pytestmark = pytest.mark.trainer


class Failing(Regressor):
    """The loss of rank 1 is not finite at the third batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch) * (float("nan") if self.global_rank == 1 and batch_idx == 2 else 1.0)


def fitted(on_nonfinite: Any) -> tuple[Tensor, list[Tensor], str]:
    trace, text = Trace(), ""
    plan = plans.compressed_ddp(ErrorFeedback(TopK(0.5))).guarded(False, on_nonfinite)
    strategy = ReplicaStrategy(plan=plan)
    fitter = trainer(strategy, callbacks=[trace], max_epochs=1, gradient_clip_val=1.0)
    try:
        fitter.fit(Failing(optimizer=adam), regression())
    except FloatingPointError as error:
        text = str(error)
    assert strategy.engine is not None
    lanes = [r for g in strategy.engine.gradients[0] for r in g.runner.lanes]
    return trace.stacked(), [t.clone() for r in lanes for t in r.channel.memory_state.values()], text


@pytest.mark.filterwarnings("ignore")
def test_all_ranks_skip_or_stop_at_the_same_step() -> None:
    def job(rank: int) -> Any:
        return fitted("skip"), fitted("auto")

    (skip_a, stop_a), (skip_b, stop_b) = on_ranks(job)
    rows = skip_a[0]
    assert torch.equal(rows, skip_b[0])
    assert len(rows) == 4
    assert torch.equal(rows[2], rows[1])
    assert (rows[3] - rows[2]).abs().max() > 1e-3
    assert all(m.isfinite().all() and m.any() for m in (*skip_a[1], *skip_b[1]))
    assert skip_a[2] == ""
    assert stop_a[2] == stop_b[2]
    assert stop_a[2].startswith("step 3, sync 'gradients': the gradients of rank(s) 1 are not finite; ")
    assert torch.equal(stop_a[0], rows[:2])
    assert torch.equal(stop_b[0], rows[:2])
