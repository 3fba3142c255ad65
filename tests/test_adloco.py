"""AdLoCo: the norm test, batches that grow under a Trainer, and models that merge."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from problems import Quadratics, p2
from test_local_updates import close, path
from torch import Tensor
from trainer_tools import Regressor, Trace, on_ranks, regression, trainer

from lightning_dopt import Complete, Plan, ReplicaStrategy, plans
from lightning_dopt.callbacks import AdaptiveBatch
from lightning_dopt.noise_test import largest_ratio, noise_ratio
from lightning_dopt.topology import Groups, Switch

# ---------------------------------------------------------------------- the test


def rows(count: int, noise: float, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.ones(count, 50, dtype=torch.float64) + noise * torch.randn(count, 50, generator=g, dtype=torch.float64)


def test_equal_gradients_ask_for_nothing_and_twice_the_noise_for_four_times_the_batch() -> None:
    assert noise_ratio(rows(4, 0.0), 0.8) == 0.0
    base = torch.ones(4, 50, dtype=torch.float64)
    noise = rows(4, 1.0) - base
    noise -= noise.mean(0)  # so that the mean stays
    one, two = (noise_ratio(base + k * noise, 0.8) for k in (1.0, 2.0))
    assert one is not None
    assert two == pytest.approx(4 * one, rel=1e-12)


def test_the_ratio_is_the_variance_of_the_mean_over_its_square() -> None:
    """Per-element noise ``s`` in ``d`` elements: ``s^2 d / (M eta^2 d)`` with a mean of ones."""
    ratio = noise_ratio(rows(20_000, 0.5), 0.1)
    assert ratio == pytest.approx(0.25 / (20_000 * 0.01), rel=0.02)


def test_two_workers_that_differ_by_a_known_amount() -> None:
    pair = torch.stack([torch.full((50,), 1.0 + 0.3), torch.full((50,), 1.0 - 0.3)]).double()
    assert noise_ratio(pair, 0.5) == pytest.approx(0.3**2 / 0.5**2)


def test_one_worker_or_no_gradient_says_nothing_and_the_worst_group_decides() -> None:
    assert noise_ratio(rows(1, 1.0), 0.8) is None
    assert noise_ratio(torch.zeros(3, 4), 0.8) is None
    calm, wild = rows(2, 0.1, 1), rows(2, 3.0, 2)
    both = torch.cat([calm, wild])
    assert largest_ratio(both, [[0, 1], [2, 3]], 0.5) == noise_ratio(wild, 0.5)
    assert largest_ratio(both, [[0], [1]], 0.5) == 0.0


# ---------------------------------------------------------------------- under a Trainer


class Spy(Callback):
    """The gradients, the accumulation and the batches of every optimizer step."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []
        self.accumulated: list[int] = []
        self.ready: list[int] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append(torch.cat([p.grad.reshape(-1).double().clone() for p in pl_module.parameters()]))
        self.accumulated.append(trainer.accumulate_grad_batches)
        self.ready.append(trainer.fit_loop.epoch_loop.batch_progress.current.ready)


def run(plan: Plan, adaptive: AdaptiveBatch | None, steps: int, **options: Any) -> tuple[Spy, Tensor, Any]:
    spy, trace = Spy(), Trace()
    callbacks = [spy, trace, *([adaptive] if adaptive else [])]
    fitter = trainer(ReplicaStrategy(plan=plan), max_steps=steps, max_epochs=-1, callbacks=callbacks, **options)
    fitter.fit(Regressor(), regression(160))
    return spy, trace.stacked(), adaptive and adaptive.state_dict()


def test_batches_grow_as_the_norm_test_says_and_only_between_windows() -> None:
    """Two ranks, a round of three steps: the numbers by hand from the gradients that both ranks saw."""

    def job(rank: int) -> Any:
        return run(plans.adloco(sync_every=3), AdaptiveBatch(eta=0.15, largest=6), 14)

    spies, weights, states = zip(*on_ranks(job), strict=True)
    assert spies[0].accumulated == spies[1].accumulated
    assert states[0] == states[1]
    taken, requested, now, ready = [], 1.0, 1, 0
    for step, pair in enumerate(zip(spies[0].gradients, spies[1].gradients, strict=True), 1):
        taken.append(now)
        ready = (ready + now) if ready + now <= 20 else 20  # the loader has 20 batches per rank
        if step % 3 == 0 and ready % now == 0:
            requested = max(requested, now * (noise_ratio(torch.stack(pair), 0.15) or 0.0))
        asked = min(6, -int(-requested // 1))
        if ready == 20 or (ready % now == 0 and ready % asked == 0):
            now = asked
        ready = 0 if ready == 20 else ready
    assert taken == spies[0].accumulated
    assert 1 == taken[0] < taken[-1]
    assert taken == sorted(taken)
    assert states[0]["requested"] == pytest.approx(requested, rel=1e-5)
    assert torch.equal(weights[0][2], weights[1][2])
    assert not torch.equal(weights[0][3], weights[1][3])


def test_batches_that_may_not_grow_are_plain_diloco() -> None:
    def job(rank: int) -> Any:
        still = run(plans.adloco(sync_every=3, outer_lr=0.5), AdaptiveBatch(largest=1), 8)[1]
        plain = run(plans.diloco(3, 0.5, 0.0, nesterov=False), None, 8)[1]
        patient = run(plans.adloco(sync_every=3), AdaptiveBatch(eta=0.5, threshold=1e9), 8)[0]
        return still, plain, patient.accumulated

    for still, plain, accumulated in on_ranks(job):
        torch.testing.assert_close(still, plain, rtol=1e-6, atol=1e-7)
        assert accumulated == [1] * 8


def test_what_it_cannot_work_with_is_refused() -> None:
    def job(rank: int) -> list[str]:
        said = []
        for plan, options in (
            (plans.compressed_ddp(), {}),
            (plans.fedspeed(3), {}),
            (None, {}),
        ):
            strategy = ReplicaStrategy(plan=plan) if plan is not None else "auto"
            try:
                trainer(strategy, 1, max_steps=2, callbacks=[AdaptiveBatch()], **options).fit(Regressor(), regression())
            except ValueError as error:
                said.append(str(error))
        return said

    (said,) = on_ranks(job, 1)
    wanted = [
        "the plan averages gradients",
        "takes two passes on one batch",
        "needs replicas with gradients of their own",
    ]
    assert len(said) == 3
    for line, part in zip(said, wanted, strict=True):
        assert re.fullmatch(rf"AdaptiveBatch: .*{part}.*", line)
    for bad in ({"eta": 0.0}, {"largest": 0}, {"threshold": 0.5}):
        ((name, value),) = bad.items()
        with pytest.raises(ValueError, match=rf"^AdaptiveBatch\({name}={value}\): must be"):
            AdaptiveBatch(**bad)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- merging


def test_one_trainer_is_diloco_with_plain_sgd_outside() -> None:
    problem = p2()
    reference = path(problem, plans.diloco(4, 0.5, 0.0, nesterov=False), 40, 0.1)
    close(path(problem, plans.adloco(sync_every=4), 40, 0.1), reference)
    together = plans.adloco([list(range(8))], 4)
    assert together == plans.adloco(sync_every=4)


def test_the_two_smallest_groups_merge_until_there_is_one() -> None:
    plan = plans.adloco([[0, 1, 2], [3], [4, 5], [6]], 10, merge_every=3)
    assert plan.syncs[0].peers == Switch(
        [
            (3, Groups([[0, 1, 2], [3], [4, 5], [6]])),
            (6, Groups([[0, 1, 2], [3, 6], [4, 5]])),
            (9, Groups([[0, 1, 2], [3, 4, 5, 6]])),
            (None, Complete()),
        ]
    )
    with pytest.raises(ValueError, match=r"^Groups\(members=.*8"):
        plan.check(8)
    with pytest.raises(ValueError, match=r"^adloco\(trainers=\[\[0\], \[2\]\]\): must name every rank from 0 on"):
        plans.adloco([[0], [2]])


def test_a_merge_keeps_the_mean_weighted_by_ranks_and_makes_the_group_equal() -> None:
    """By hand: within groups DiLoCo; in the first round of a larger group anchors are averaged as well."""
    h, lr, problem = 2, 0.1, p2()
    plan = plans.adloco([[0, 1, 2, 3, 4], [5], [6, 7]], h, 0.5, merge_every=2)
    live = path(problem, plan, 16, lr)
    x, anchor = (torch.zeros(8, 5, dtype=torch.float64) for _ in range(2))
    stages = [[[0, 1, 2, 3, 4], [5], [6, 7]]] * 2 + [[[0, 1, 2, 3, 4], [5, 6, 7]]] * 2 + [[list(range(8))]] * 4
    for k, groups in enumerate(stages):
        for _ in range(h):
            x = x - lr * torch.stack([problem.gradient(i, x[i]) for i in range(8)])
        before = anchor.mean(0) - 0.5 * (anchor - x).mean(0)
        for group in groups:
            middle = anchor[group].mean(0)
            anchor[group] = middle - 0.5 * (middle - x[group].mean(0))
        x = anchor.clone()
        close(live[(k + 1) * h], x)
        close(x.mean(0), before)
        assert all(torch.allclose(x[group], x[group[0]], rtol=0, atol=1e-14) for group in groups)


def test_trainers_know_nothing_of_each_other_before_they_merge() -> None:
    problem = p2()
    alone = Quadratics(problem.A[5:6], problem.c[5:6])
    both = path(problem, plans.adloco([[0, 1, 2, 3, 4, 6, 7], [5]], 3, merge_every=4), 9, 0.1)
    single = path(alone, plans.diloco(3, 0.5, 0.0, nesterov=False), 9, 0.1)
    close(both[:, 5], single[:, 0])


def test_batches_go_on_growing_from_a_checkpoint(tmp_path: Path) -> None:
    """Saved in the middle of an epoch: the resumed run takes the same windows and ends in the same weights."""

    def job(rank: int) -> Any:
        def one(steps: int, **options: Any) -> tuple[list[int], Tensor]:
            spy, module = Spy(), Regressor()
            callbacks = [spy, AdaptiveBatch(eta=0.15, largest=6), *options.pop("savers", [])]
            fitter = trainer(
                ReplicaStrategy(plan=plans.adloco(sync_every=3)), max_steps=steps, max_epochs=-1, callbacks=callbacks
            )
            fitter.fit(module, regression(160), **options)
            return spy.accumulated, torch.cat([p.detach().reshape(-1) for p in module.parameters()])

        saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=7, save_top_k=-1)
        whole, weights = one(14, savers=[saver])
        again, resumed = one(14, ckpt_path=str(tmp_path / "step=7.ckpt"))
        return whole, again, torch.equal(weights, resumed)

    for whole, again, same in on_ranks(job):
        assert whole[6] > 1
        assert again == whole[7:]
        assert same
