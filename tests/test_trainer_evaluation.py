"""Validation on the mean model, what remains after ``fit``, and the numbers that are logged."""

from __future__ import annotations

import math
import warnings
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch import Callback, callbacks
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from packaging.version import Version
from test_trainer_resume import same_from
from torch import Tensor, nn
from trainer_tools import Regressor, Trace, adam, counted_calls, fit, flat, on_ranks, regression, sgd, trainer

from lightning_dopt import (
    Delay,
    Every,
    Int8,
    Link,
    LocalSGDStrategy,
    OnePeerExponential,
    Plan,
    ReplicaStrategy,
    Simulation,
    Sync,
    plans,
)
from lightning_dopt.topology import Lazy

pytestmark = pytest.mark.trainer


def set_flat(module: nn.Module, values: Tensor) -> nn.Module:
    start = 0
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(values[start : start + p.numel()].view(p.shape))
            start += p.numel()
    return module


def loss_of(values: Tensor, data: Any) -> float:
    """Mean over the whole validation set."""
    with torch.no_grad():
        return float(set_flat(Regressor(), values).loss(data.dataset.tensors))


def delayed(every: int, steps: int) -> Plan:
    return Plan([Sync(when=Every(every), signal="delta", apply=Delay(steps))])


class Twice(torch.optim.SGD):
    """Evaluates the loss twice per step."""

    def step(self, closure: Any = None) -> Any:
        closure()
        return super().step(closure)


def twice(parameters: Any) -> torch.optim.Optimizer:
    return Twice(parameters, lr=0.1)


class Seen(Callback):
    """Validation losses as they come."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.distances: list[float] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["val_loss"]))
        self.distances.append(float(trainer.callback_metrics.get("consensus/distance", -1.0)))


def test_validation_measures_the_mean_model_and_fit_leaves_it() -> None:
    """Equal on all ranks and equal to the loss of the mean of the weights; ``"local"`` is the mean of the losses."""
    val = regression(16, seed=5)

    def job(rank: int) -> Any:
        out = []
        for evaluate in ("consensus", "local"):
            trace, seen = Trace(), Seen()
            module = Regressor()
            fitter = trainer(
                LocalSGDStrategy(3, evaluate=evaluate), max_epochs=2, callbacks=[trace, seen], num_sanity_val_steps=1
            )
            fitter.fit(module, regression(), val)
            out.append((trace.stacked(), seen.losses, seen.distances, flat(module)))
        return out

    (mean_a, own_a), (mean_b, own_b) = on_ranks(job)
    assert torch.equal(mean_a[0], own_a[0])  # evaluation leaves training alone
    assert mean_a[1] == mean_b[1]
    assert own_a[1] == own_b[1]
    for k, step in enumerate((4, 8), 1):  # entry 0 is the sanity check
        a, b = mean_a[0][step - 1], mean_b[0][step - 1]
        mean = (a + b) / 2
        assert (a - b).abs().max() > 1e-2
        assert mean_a[1][k] == pytest.approx(loss_of(mean, val), rel=1e-5)
        assert mean_a[2][k] == pytest.approx(float((a - mean).norm()), rel=1e-5)
        halves = [[t[r::2] for t in val.dataset.tensors] for r in range(2)]
        with torch.no_grad():
            losses = [float(set_flat(Regressor(), w).loss(half)) for w, half in zip((a, b), halves, strict=True)]
        assert own_a[1][k] == pytest.approx(sum(losses) / 2, rel=1e-5)
        assert abs(own_a[1][k] - mean_a[1][k]) > 1e-5
    assert mean_a[2][0] == 0.0
    assert own_a[2] == [-1.0] * 3  # nobody measured
    assert torch.equal(mean_a[3], mean_b[3])
    torch.testing.assert_close(mean_a[3], mean, rtol=1e-6, atol=1e-6)
    assert torch.equal(own_a[3], own_a[0][-1])
    assert torch.equal(own_b[3], own_b[0][-1])


def test_what_is_in_flight_lands_before_fit_ends() -> None:
    """Sent at step 3 to be applied at step 5; training ends at step 4."""
    plan = Plan([Sync(when=Every(3), apply=Delay(2))])

    def job(rank: int) -> Any:
        trace, module = Trace(), Regressor()
        trainer(ReplicaStrategy(plan=plan, evaluate="local"), max_steps=4, callbacks=[trace]).fit(module, regression())
        return trace.stacked(), flat(module)

    answers = on_ranks(job)
    rows = torch.stack([rows for rows, _ in answers])
    sent = rows[:, 2]
    for rank, (own, end) in enumerate(answers):
        torch.testing.assert_close(end, own[3] + sent.mean(0) - sent[rank], rtol=1e-6, atol=1e-6)


def test_logged_numbers() -> None:
    """Bytes by the formula, distance by definition, all of them in the bar; floats stay exact beyond 16 million."""
    hidden = 100
    size = 4 * hidden + hidden + hidden + 1
    blocks = math.ceil(size / 256)

    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 1))

    class Reads(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            rows.append({k: float(v) for k, v in trainer.logged_metrics.items()})
            bars.append(set(trainer.progress_bar_metrics))

    rows: list[dict[str, float]] = []
    bars: list[set[str]] = []

    def job(rank: int) -> Any:
        trace = Trace()
        strategy = ReplicaStrategy(
            plan=plans.diloco(3, codec=Int8()), measure_every=2, link=Link(mbit=1.0, ms=5.0), evaluate="local"
        )
        fitter = trainer(strategy, max_steps=7, max_epochs=-1, callbacks=[trace, Reads()])
        fitter.fit(Regressor(net), regression())
        return trace.stacked(), rows, bars, dict(fitter.callback_metrics), strategy.world.ledger.entries

    answers = on_ranks(job)
    (a, rows_a, bars_a, metrics, entries), (b, *_) = answers
    assert [int(r["comm/bytes"]) for r in rows_a] == [(size + 4 * blocks) * (s // 3) for s in range(1, 8)]
    per_round = 0.005 + (size + 4 * blocks) * 8e-6
    for step, row in enumerate(rows_a, 1):
        assert row["comm/link_s"] >= (step // 3) * per_round
        assert row["comm/stall_s"] >= 0.0
        if step >= 2:
            last = step - step % 2
            distance = ((a[last - 1] - b[last - 1]) / 2).norm()
            assert row["consensus/distance"] == pytest.approx(float(distance), rel=1e-5, abs=1e-12)
    assert {"comm/bytes", "comm/stall_s", "consensus/distance"} <= bars_a[-1]
    assert "comm/link_s" not in bars_a[-1]
    assert float(metrics["comm/bytes"]) == 2 * (size + 4 * blocks)
    assert metrics["comm/bytes"].dtype == torch.float64
    assert entries["consensus"].bytes == 0
    assert entries["consensus"].overhead > 0


@pytest.mark.parametrize(
    "plan",
    [plans.diloco(3), plans.diloco(2, codec=Int8()), plans.gossip(), plans.gossip(order="cta"), delayed(3, 2)],
    ids=["diloco", "diloco_int8", "gossip", "gossip_cta", "delayed"],
)
def test_virtual_time_with_steps_of_given_length(plan: Plan) -> None:
    """Bit-equal in two runs, and what ``Simulation`` says; one step for two micro-batches or two closures."""
    link, seconds, steps = Link(mbit=0.01, ms=30.0), 0.07, 7

    class Reads(Callback):
        def __init__(self) -> None:
            self.rows: list[tuple[float, float]] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step > len(self.rows):
                metrics = trainer.logged_metrics
                self.rows.append((float(metrics["comm/link_s"]), float(metrics["comm/link_stall_s"])))

    def job(rank: int) -> Any:
        out = []
        for batches, optimizer in ((1, sgd), (2, sgd), (1, twice)):
            reads = Reads()
            strategy = ReplicaStrategy(plan=plan, link=link, link_step_seconds=seconds)
            fitter = trainer(
                strategy, max_steps=steps, max_epochs=-1, callbacks=[reads], accumulate_grad_batches=batches
            )
            fitter.fit(Regressor(optimizer=optimizer), regression(128))
            out.append(reads.rows)
        return out

    def no_gradient(rank: int, parameters: dict[str, Tensor], step: int) -> None:
        for p in parameters.values():
            p.grad = torch.zeros_like(p)

    (a, accumulated, looked_twice), (b, *_) = on_ranks(job)
    assert a == b == accumulated == looked_twice
    simulation = Simulation(plan, 2, lambda rank: dict(Regressor().named_parameters()), no_gradient, sgd, link, seconds)
    clock = simulation.worlds[0].clock
    assert clock is not None
    expected = []
    for _ in range(steps):
        simulation.run(1)
        expected.append((clock.now, clock.stall_s))
    assert len(a) == steps
    assert a[-1][1] > 0.03
    assert a[-1][0] == pytest.approx(steps * seconds + a[-1][1], rel=1e-12)
    for got, want in zip(a, expected, strict=True):
        assert got == want


@pytest.mark.skipif(
    Version(lightning.__version__) < Version("2.5.2"),
    reason="Lightning broadcasts SIGTERM since 2.5.2; before, ranks stop alone",
)
def test_a_local_step_calls_nothing_in_torch_distributed() -> None:
    """Neither the engine nor Lightning's broadcast per batch; a communicating step does."""
    plans_ = {
        "local_sgd": plans.local_sgd(4),
        "delayed": Plan([Sync(when=Every(4), apply=Delay(1))]),
        "gossip": Plan([Sync(when=Every(4), peers=Lazy(OnePeerExponential()))]),
        "always": plans.compressed_ddp(),
    }

    class Count(Callback):
        def __init__(self, calls: list[str]) -> None:
            self.calls, self.by_step = calls, []

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            self.calls.clear()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.by_step.append(list(self.calls))
            self.calls.clear()

    def job(rank: int) -> Any:
        out = {}
        for name, plan in plans_.items():
            with counted_calls() as calls:
                count = Count(calls)
                fitter = trainer(ReplicaStrategy(plan=plan), max_steps=6, max_epochs=-1, callbacks=[count])
                fitter.fit(Regressor(), regression(64))
                out[name] = count.by_step
        return out

    for answer in on_ranks(job):
        said = {name: [bool(calls) for calls in by_step] for name, by_step in answer.items()}
        assert said["local_sgd"] == [False, False, False, True, False, False]
        assert said["delayed"] == [False, False, False, True, True, False]
        assert said["gossip"] == [False, False, False, True, False, False]
        assert all(said["always"])
        assert answer["local_sgd"][3].count("all_reduce") == 1
        assert answer["gossip"][3].count("batch_isend_irecv") == 1


def test_users_own_metrics() -> None:
    """``self.log(sync_dist=True)`` in the training step gives the mean of the ranks, on local steps too."""

    class Logs(Regressor):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("rank", float(self.global_rank), sync_dist=True)
            self.log("mine", float(self.global_rank))
            return super().training_step(batch, batch_idx)

    got = fit(LocalSGDStrategy(3, start_method="fork"), Logs(), regression(), max_steps=2)
    assert [float(r["metrics"]["rank"]) for r in got] == [0.5, 0.5]
    assert [float(r["metrics"]["mine"]) for r in got] == [0.0, 1.0]
    assert got[0]["step"] == 2


def test_progress_bar_shows_the_numbers(capfd: pytest.CaptureFixture[str]) -> None:
    fit(
        LocalSGDStrategy(2, start_method="fork"),
        Regressor(),
        regression(),
        regression(8),
        max_epochs=1,
        enable_progress_bar=True,
        callbacks=[TQDMProgressBar()],
    )
    out = "".join(capfd.readouterr())
    assert f"comm/bytes={2 * 4 * 49}" in out
    assert "comm/stall_s=" in out


@pytest.mark.skipif(not hasattr(callbacks, "EMAWeightAveraging"), reason="Lightning has it since 2.6")
def test_weight_averaging_callback() -> None:
    """Resume is exact with it; a warning says what it does; in the end all ranks hold the mean of the averages."""

    def one(rank: int, folder: Any, plan: Plan, path: Any = None) -> Any:
        trace, ema = Trace(), callbacks.EMAWeightAveraging(decay=0.5)
        saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        fitter = trainer(ReplicaStrategy(plan=plan), max_steps=6, max_epochs=-1, callbacks=[trace, ema, saver])
        module = Regressor(optimizer=adam)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fitter.fit(module, regression(), ckpt_path=path)
        said = [str(w.message) for w in caught if "WeightAveraging" in str(w.message)]
        averages = flat(ema._average_model.module)
        return trace, flat(module), averages, said

    def job(rank: int) -> Any:
        import tempfile

        folders: list[Any] = [tempfile.mkdtemp()] * 2
        torch.distributed.broadcast_object_list(folders)
        full, end, averages, said = one(rank, folders[0], plans.local_sgd(3))
        rest, again, _, _ = one(rank, folders[1], plans.local_sgd(3), f"{folders[0]}/step=4.ckpt")
        same_from(full, rest, 4, 6)
        assert torch.equal(end, again)
        _, _, _, unsaid = one(rank, folders[1] + "/b", plans.compressed_ddp())
        return end, averages, said, unsaid

    (a, average_a, said, unsaid), (b, average_b, *_) = on_ranks(job)
    assert torch.equal(a, b)
    assert not torch.equal(average_a, average_b)
    torch.testing.assert_close(a, (average_a + average_b) / 2, rtol=1e-6, atol=1e-6)
    assert len(said) == 1
    assert "rank 0's average" in said[0]
    assert unsaid == []


class TwoSets(Regressor):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log(f"val_{dataloader_idx}", self.loss(batch), sync_dist=True, add_dataloader_idx=False)


def test_several_validation_sets_log_one_distance() -> None:
    def job(rank: int) -> dict[str, float]:
        made = trainer(ReplicaStrategy(), max_epochs=1)
        made.fit(TwoSets(), regression(), [regression(seed=1, samples=8), regression(seed=2, batch=3)])
        return {name: float(value) for name, value in made.callback_metrics.items()}

    for metrics in on_ranks(job):
        assert metrics["consensus/distance"] > 0
        assert {"val_0", "val_1"} <= set(metrics)
