"""PipelineStrategy: an untouched module in stages trains as it does in one process."""

from __future__ import annotations

import inspect
import re
import signal
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from broken import Processes, Troubled, crash, die, terminate
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from packaging.version import Version
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import SumMetric
from torchmetrics.classification import MulticlassAccuracy
from trainer_tools import on_ranks, regression, trainer

from lightning_dopt import Drifted, Int4, PipelineStrategy, Plan, ReplicaStrategy, Ring, Sync, plans
from lightning_dopt.pipeline import AQSGD, Clapping, Direct, Replay, SimulatedPipeline, cut, one_f_one_b
from lightning_dopt.pipeline.torch_schedules import available
from lightning_dopt.strategies import collectives
from lightning_dopt.strategies.pipeline_lazy import LazyBatches
from lightning_dopt.strategies.pipeline_replicas import MEAN_GRADIENT
from lightning_dopt.strategies.watch import Watch
from recipes.llm import ByteGPT

pytestmark = pytest.mark.trainer
SAVER = inspect.signature(ModelCheckpoint).parameters  # older Lightning saves nothing on exceptions


def data(samples: int = 22, seed: int = 0, dtype: torch.dtype = torch.float64) -> DataLoader:
    """Batches of 5, 5, 5, 5 and 2 with inputs and classes."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 4, generator=g, dtype=dtype)
    return DataLoader(TensorDataset(x, torch.randint(3, (samples,), generator=g)), batch_size=5)


class Classifier(LightningModule):
    """Logs its loss by steps, an accuracy by epochs, both in validation; its test step calls the network twice."""

    def __init__(self, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.model = nn.Sequential(
                nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)
            ).to(dtype)
        self.losses: list[float] = []
        self.accuracy = MulticlassAccuracy(3, average="micro")
        self.counted = SumMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.model(x * 0.5)
        self.accuracy(logits, y)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        loss = nn.functional.cross_entropy(logits, y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"right": (logits.argmax(1) == y).double().mean()}, on_epoch=True, batch_size=len(y))
        self.log("most", logits.max(), reduce_fx="max", on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self.model(x * 0.5), y), sync_dist=True)
        self.counted(y)
        self.log("val_sum", self.counted)
        self.log("val_count", torch.tensor(float(len(y))), reduce_fx="sum", sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_change", (self.model(batch[0]) - self.model(-batch[0])).square().mean(), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(batch[0])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.parameters() if p.dim() == 2]
        vectors = [p for p in self.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=0.05, betas=(0.5, 0.9))
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def whole(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


OPTIONS: dict[str, Any] = {"max_epochs": 2, "accumulate_grad_batches": 2, "gradient_clip_val": 0.05}


def plain(module: Classifier, **options: Any) -> Trainer:
    fitter = trainer("auto", 1, use_distributed_sampler=False, **(OPTIONS | options))
    fitter.fit(module, data(), data(8, 5))
    return fitter


def staged(module: Any, strategy: PipelineStrategy, path: Any = None, **options: Any) -> Trainer:
    fitter = trainer(strategy, 2, use_distributed_sampler=False, **(OPTIONS | options))
    fitter.fit(module, data(), data(8, 5), ckpt_path=path)
    return fitter


class Placeholders(Callback):
    """How many values are in memory while training."""

    def __init__(self) -> None:
        self.elements = self.states = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.elements = sum(p.untyped_storage().size() // p.element_size() for p in pl_module.parameters())
        state = trainer.optimizers[0].state
        self.states = sum(
            t.numel() for entry in state.values() for t in entry.values() if isinstance(t, Tensor) and t.dim()
        )


KEYS = (
    *("loss_step", "loss_epoch", "right_epoch", "most_epoch", "accuracy_step", "accuracy_epoch"),
    *("val_loss", "val_count", "val_sum"),
)
SCHEDULES: dict[str, dict[str, Any]] = {
    "1f1b": {"num_microbatches": 4, "engine": "native"},
    "bitpipe": {"schedule": "bitpipe", "num_microbatches": 2},
    "last": {"schedule": "bitpipe", "num_microbatches": 2, "outputs": "last"},
    "torch": {"num_microbatches": 4, "outputs": "last"},
    "zbv": {"schedule": "zbv", "num_microbatches": 5},
}
if not available("zbv"):
    del SCHEDULES["zbv"]


@pytest.mark.filterwarnings("ignore")
def test_equals_one_process(tmp_path: Path) -> None:
    """Weights, losses and logged values in double precision, with accumulation, clipping, a scheduler and a short batch."""

    def job(rank: int) -> Any:
        results = {}
        for name, options in SCHEDULES.items():
            module, count = Classifier(), Placeholders()
            strategy = PipelineStrategy(**options)
            saver = ModelCheckpoint(tmp_path / name, "{epoch}-{val_loss:.6f}", monitor="val_loss", save_top_k=2)
            stop = EarlyStopping("val_loss", patience=5)
            fitter = staged(module, strategy, callbacks=[count, saver, stop])
            assert strategy.pipeline is not None
            results[name] = {
                "weights": whole(module),
                "losses": module.losses,
                "metrics": dict(fitter.callback_metrics),
                "memory": (count.elements, count.states),
                "best": saver.best_model_path,
                "test": fitter.test(module, data(8, 5), verbose=False)[0] if "outputs" not in options else None,
                "predictions": torch.cat(fitter.predict(module, data(8, 5))),
            }
        return results

    answers = on_ranks(job, 2)
    module = Classifier()
    fitter = plain(module)
    elements = sum(p.numel() for p in module.parameters())
    for name in SCHEDULES:
        zero, one = answers[0][name], answers[1][name]
        for result in (zero, one):
            for key, value in module.state_dict().items():
                torch.testing.assert_close(result["weights"][key], value, atol=1e-10, rtol=1e-10)
            assert result["losses"] == pytest.approx(module.losses, abs=1e-10)
            for key in KEYS:
                expected = float(fitter.callback_metrics[key])
                # torchmetrics counts in single precision
                far = 1e-6 if "accuracy" in key else 1e-10
                assert float(result["metrics"][key]) == pytest.approx(expected, abs=far), key
            x = torch.cat([b[0] for b in data(8, 5)])
            torch.testing.assert_close(result["predictions"], module.model(x), atol=1e-10, rtol=1e-10)
        assert zero["best"] == one["best"]
        assert zero["test"] == one["test"]
    sent = [float(answers[0][name]["metrics"]["comm/bytes/activations"]) for name in ("1f1b", "torch")]
    assert sent == [2 * 22 * 8 * 8] * 2, "rows of eight doubles, in both engines"
    assert "comm/bytes/outputs" in answers[1]["1f1b"]["metrics"]
    assert "comm/bytes/outputs" not in answers[1]["torch"]["metrics"], "the last stage evaluates"
    assert 0.0 <= answers[0]["1f1b"]["metrics"]["pipeline/idle"] < 1.0
    assert ("pipeline/idle" in answers[0]["torch"]["metrics"]) != available("1f1b"), "torch's engine does not tell"
    held = [answers[rank]["1f1b"]["memory"] for rank in range(2)]
    assert sum(states for _, states in held) == 2 * elements, "two states of Adam for each weight, on one rank"
    for held_elements, states in held:
        assert states // 2 <= held_elements < elements, "only one's own stage is in memory"
    best = torch.load(answers[0]["1f1b"]["best"], weights_only=False)
    again = Classifier()
    again.load_state_dict(best["state_dict"])
    assert len(best["optimizer_states"][0]["state"]) == len(list(again.parameters()))
    fitter = trainer("auto", 1, use_distributed_sampler=False, **(OPTIONS | {"max_epochs": 3}))
    fitter.fit(again, data(), data(8, 5), ckpt_path=answers[0]["1f1b"]["best"])
    longer = Classifier()
    plain(longer, max_epochs=3)
    for key, value in longer.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, atol=1e-10, rtol=1e-10)


@pytest.mark.filterwarnings("ignore")
def test_before_and_after_a_fit(tmp_path: Path) -> None:
    """Evaluation of a checkpoint, a second fit, one that goes on with a plain Trainer's checkpoint.

    Stages that stay apart, and what is refused of them.
    """

    def fresh(**options: Any) -> Trainer:
        return trainer(PipelineStrategy(num_microbatches=2, **options), 2, use_distributed_sampler=False, **OPTIONS)

    def job(rank: int) -> Any:
        first, module = fresh(whole_at_end=False), Classifier()
        first.fit(module, data(), data(8, 5))
        apart = {name: bool(p.isnan().any()) for name, p in module.named_parameters()}
        tested = first.test(module, data(8, 5), verbose=False)[0]
        path = tmp_path / "apart.ckpt"
        first.save_checkpoint(path)
        other = Classifier()
        validated = fresh().validate(other, data(8, 5), ckpt_path=path, verbose=False)[0]
        with pytest.raises(
            ValueError, match=r"^PipelineStrategy: 'model.\d.\w+' is on another rank since an earlier fit; load a"
        ):
            fresh(split=[1 if rank else 5]).fit(module, data())
        again = fresh()
        again.fit(module, data(), data(8, 5))
        resumed = Classifier()
        staged(resumed, PipelineStrategy(), tmp_path / "plain.ckpt", max_epochs=3)
        return apart, tested, validated, whole(module), whole(other), whole(resumed)

    module, longer = Classifier(), Classifier()
    plain(module).save_checkpoint(tmp_path / "plain.ckpt")
    plain(longer, max_epochs=3)
    answers = on_ranks(job, 2)
    for apart, tested, validated, _, restored, resumed in answers:
        assert set(apart.values()) == {True, False}
        assert apart["model.0.weight"] == (apart is answers[1][0])
        assert tested == answers[0][1]
        assert not any(t.isnan().any() for t in tested.values() if isinstance(t, Tensor))
        for key, value in module.state_dict().items():
            torch.testing.assert_close(restored[key], value, atol=1e-10, rtol=1e-10)
            torch.testing.assert_close(resumed[key], longer.state_dict()[key], atol=1e-10, rtol=1e-10)
        with torch.no_grad():
            losses = [nn.functional.cross_entropy(module.model(x * 0.5), y) * len(y) / 8 for x, y in data(8, 5)]
        assert validated["val_loss"] == pytest.approx(float(sum(losses)), abs=1e-10)
    twice = Classifier()
    plain(twice)
    plain(twice)
    for *_, weights, _, _ in answers:
        for key, value in twice.state_dict().items():
            torch.testing.assert_close(weights[key], value, atol=1e-10, rtol=1e-10)


# ---------------------------------------------------------------------- resume


class Losses(Callback):
    """Losses by batch, and the memories of the links at the end."""

    def __init__(self, strategy: PipelineStrategy) -> None:
        self.strategy = strategy
        self.rows: list[float] = []
        self.memories: Any = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        assert self.strategy.pipeline is not None
        self.rows.append(float(outputs["loss"]))
        states = self.strategy.pipeline.state_dict().values()
        self.memories = [{key: value for key, value in state.items() if key != "specs"} for state in states]


class Numbered(Classifier):
    """Its batches have the numbers of their samples first."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch[1:], batch_idx)


class SaveWithin(Callback):
    """Saves after the third batch, in the middle of a window of accumulation."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.fit_loop.batch_idx == 2 and trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def packed(kind: str) -> PipelineStrategy:
    codec = Int4(block=8)
    if kind == "aqsgd":
        return PipelineStrategy(activation_link=AQSGD(codec), gradient_link=Direct(codec), samples=0)
    link = Clapping("FU" if kind == "fu" else "FC", 0.5, codec)
    return PipelineStrategy(activation_link=link, gradient_link=link, schedule="1f1b", num_microbatches=3)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a.equal(b) if isinstance(a, Tensor) else bool(a == b)


@pytest.mark.filterwarnings("ignore")
def test_resume_is_exact(tmp_path: Path) -> None:
    """With memories of links, repeated batches, dropout and shuffling; in the middle of an epoch, and with other stages."""
    numbers = TensorDataset(torch.arange(22), *data(dtype=torch.float32).dataset.tensors)  # type: ignore[attr-defined]

    def run(rank: int, kind: str, folder: Path, path: Any = None, **options: Any) -> tuple[list[float], Any, Any]:
        torch.manual_seed(rank)
        strategy = packed(kind)
        module = (Numbered if kind == "aqsgd" else Classifier)(0.3, torch.float32)
        losses = Losses(strategy)
        saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        dataset = numbers if kind == "aqsgd" else data(dtype=torch.float32).dataset
        callbacks = [*options.pop("more", ()), losses, saver]
        fitter = trainer(strategy, options.pop("devices", 2), max_epochs=2, callbacks=callbacks, **options)
        fitter.fit(module, DataLoader(dataset, batch_size=5, shuffle=True), ckpt_path=path)
        return losses.rows, whole(module), losses.memories

    def job(rank: int) -> Any:
        told = []
        for kind in ("fu", "fc", "aqsgd"):
            folder = tmp_path / kind
            full, weights, memories = run(rank, kind, folder)
            for step in (3, 7) if kind == "fu" else (4,):
                rest, again, after = run(rank, kind, tmp_path / "again", folder / f"step={step}.ckpt")
                assert rest == full[step:], (kind, step)
                assert same(again, weights)
                assert same(after, memories)
            told.append((full, weights))
        path = tmp_path / "within.ckpt"
        window: dict[str, Any] = {"accumulate_grad_batches": 2, "more": [SaveWithin(path)]}
        full, weights, memories = run(rank, "fu", tmp_path / "window", **window)
        rest, again, after = run(rank, "fu", tmp_path / "window", path, **window)
        assert rest == full[3:]
        assert same(again, weights)
        assert same(after, memories)
        return told

    answers = on_ranks(job, 2)
    lengths = [len(losses) for losses, _ in answers[0]]
    assert lengths[0] == lengths[1] > 10, "batches are repeated"
    assert lengths[2] == 10
    assert same(answers[0], answers[1])

    def alone(rank: int) -> Any:
        with pytest.warns(
            UserWarning, match="was written by 2 ranks, this run has 1 rank: weights and optimizer states go on"
        ):
            return run(rank, "fu", tmp_path / "alone", tmp_path / "fu" / "step=3.ckpt", devices=1)

    rows, weights, _ = on_ranks(alone, 1)[0]
    assert len(rows) > 5
    assert not any(t.isnan().any() for t in weights.values())


class Batches(Callback):
    """What training was given, and whether it was new."""

    def __init__(self, strategy: PipelineStrategy) -> None:
        self.strategy = strategy
        self.rows: list[tuple[Any, bool]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        lazy = self.strategy._lazy
        assert lazy is not None
        self.rows.append(([t.clone() for t in batch], lazy.fresh(trainer.current_epoch, batch_idx)))


@pytest.mark.filterwarnings("ignore")
def test_links_are_those_of_the_runtime() -> None:
    """Losses equal those of a simulated pipeline in every bit, whose batches come again in a row when they are not new."""

    def train(rank: int) -> Any:
        strategy = packed("fu")
        module, losses, batches = Classifier(0.3, torch.float32), Losses(strategy), Batches(strategy)
        fitter = trainer(strategy, 2, max_epochs=2, callbacks=[losses, batches])
        fitter.fit(module, DataLoader(data(dtype=torch.float32).dataset, batch_size=5, shuffle=True))
        return losses.rows, batches.rows, whole(module)

    told, batches, weights = on_ranks(train, 2)[0]
    module, strategy = Classifier(0.3, torch.float32), packed("fu")
    replay = Replay(module)
    links = strategy.activation_link, strategy.gradient_link
    pipeline = SimulatedPipeline(cut(module.model, 2), one_f_one_b(2, 3), replay.loss, replay.inputs, *links)
    groups = [{"params": [p for p in module.parameters() if p.dim() == d]} for d in (2, 1)]
    groups[0]["weight_decay"], groups[1]["weight_decay"] = 0.1, 0.0  # type: ignore[assignment]
    optimizer = torch.optim.AdamW(groups, lr=0.05, betas=(0.5, 0.9))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    before: Any = None
    for loss, (batch, fresh) in zip(told, batches, strict=True):
        assert fresh != (before is not None and all(a.equal(b) for a, b in zip(batch, before, strict=True)))
        optimizer.zero_grad()
        assert float(pipeline.step(batch, fresh).float()) == loss
        optimizer.step()
        schedule.step()
        before = batch
    assert sum(fresh for _, fresh in batches) == 10
    assert all(weights[name].equal(p) for name, p in module.named_parameters())


def test_lazy_batches() -> None:
    """Every batch of an epoch once or more in a row; epochs of one length, in another order."""
    now = 0
    batches = [[k] for k in range(200)]
    lazy = LazyBatches(batches, 0.4, 0, lambda: now)
    counts = []
    for now in (0, 1, 2):
        given = list(lazy)
        assert len(given) == len(lazy)
        order = [batch for step, batch in enumerate(given) if lazy.fresh(now, step)]
        assert order == batches
        assert all(b is given[step - 1] for step, b in enumerate(given) if not lazy.fresh(now, step))
        counts.append([given.count(b) for b in batches])
    assert counts[0] != counts[1] != counts[2]
    assert sorted(counts[0]) == sorted(counts[1])
    assert 200 / 0.4 * 0.85 < len(lazy) < 200 / 0.4 * 1.15
    assert counts[0].count(1) / 200 == pytest.approx(0.4, abs=0.1), "geometric"
    endless = LazyBatches((b for b in batches), 0.4, 0, lambda: 0)
    given = list(endless)
    assert [b for step, b in enumerate(given) if endless.fresh(0, step)] == batches
    with pytest.raises(TypeError):
        len(endless)


# ---------------------------------------------------------------------- what is refused


class ByHand(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Outside(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


def made(**options: Any) -> Any:
    return lambda: trainer(PipelineStrategy(**options), 3)


def clapping(probability: float) -> Clapping:
    return Clapping("FU", probability, Int4())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (made(schedule="1f2b"), r"PipelineStrategy\(schedule='1f2b'\): must be one of 'gpipe'"),
        (made(schedule="bitpipe"), r"PipelineStrategy\(schedule='bitpipe'\) .* on 3 processes: must be even"),
        (
            made(schedule="interleaved", num_microbatches=4),
            r"PipelineStrategy\(num_microbatches=4\) with schedule 'interleaved' on 3 processes: must be a multiple",
        ),
        (made(num_microbatches=0), r"PipelineStrategy\(num_microbatches=0\): must be an integer of at least 1"),
        (made(chunks=2), r"PipelineStrategy\(chunks=2\) with schedule '1f1b' on 3 processes: only interleaved"),
        (made(engine="fast"), r"PipelineStrategy\(engine='fast'\): must be one of 'auto'"),
        (
            made(engine="torch", schedule="bitpipe"),
            r"PipelineStrategy\(engine='torch'\): this torch does not have 'bitpipe'",
        ),
        (
            made(engine="torch", activation_link=Direct(Int4())),
            r"PipelineStrategy\(engine='torch'\): torch sends tensors as",
        ),
        (made(split=[1]), r"PipelineStrategy\(split=\[1\]\): makes 2 stages, but '1f1b' on 3 processes has 3"),
        (made(pipeline_size=2), r"PipelineStrategy\(pipeline_size=2\): must divide the number of processes, 3"),
        (made(plan=plans.diloco()), r"PipelineStrategy\(plan=...\): there is one pipeline only"),
        (made(plan="diloco"), r"PipelineStrategy\(plan='diloco'\): must be a Plan"),
        (
            made(pipeline_size=1, plan=Plan([Sync(Drifted(0.1))])),
            r"PipelineStrategy\(plan=...\): stages would measure, and sync, each for itself",
        ),
        (made(balance="time", split=[1, 2]), r"PipelineStrategy\(balance='time', split=\[1, 2\]\): only split=None"),
        (made(split="head"), r"PipelineStrategy\(split='head'\): must be a list"),
        (made(activation_link=Int4()), r"PipelineStrategy\(activation_link=Int4\(.*\)\): must be a link"),
        (made(activation_link=AQSGD(Int4())), r"PipelineStrategy\(samples=None\): AQSGD needs the entry"),
        (made(samples="id"), r"PipelineStrategy\(samples='id'\): only AQSGD"),
        (
            made(activation_link=clapping(0.5), gradient_link=clapping(0.2)),
            r"PipelineStrategy\(activation_link, gradient_link\): both must have one probability, not \[0.2, 0.5\]",
        ),
        (lambda: trainer(PipelineStrategy(), 2, sync_batchnorm=True), r"Trainer\(sync_batchnorm=True\)"),
    ],
)
def test_refused_before_processes_start(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{message}[^\n]*$"):
        make()


def test_refused_when_training_starts() -> None:
    """In one process, which is enough for what is wrong with a module."""

    def refusal(module: LightningModule, strategy: PipelineStrategy | None = None, **options: Any) -> str:
        with pytest.raises(ValueError, match="PipelineStrategy") as error:
            trainer(strategy or PipelineStrategy(), 1, max_epochs=1, **options).fit(module, data())
        return str(error.value)

    def job(rank: int) -> list[str]:
        from lightning.pytorch.callbacks import StochasticWeightAveraging

        lbfgs = Classifier()
        lbfgs.configure_optimizers = lambda: torch.optim.LBFGS(lbfgs.parameters())  # type: ignore[method-assign]
        with pytest.raises(ValueError, match="Clapping") as error:
            trainer(packed("fu"), 1, max_epochs=1).fit(Numbered(), [data(), data()])
        several = str(error.value)
        with pytest.raises(ValueError, match="outputs") as error:
            trainer(PipelineStrategy(outputs="last"), 1).test(Classifier(), data())
        twice = str(error.value)
        stale = Classifier()
        stale.configure_optimizers = lambda: torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)  # type: ignore[method-assign]
        return [
            refusal(ByHand()),
            refusal(torch.compile(Classifier())),
            refusal(Outside()),
            refusal(Classifier(), PipelineStrategy(network="net")),
            refusal(Classifier(), PipelineStrategy(balance="time")),
            refusal(Classifier(), callbacks=[StochasticWeightAveraging(0.1)]),
            refusal(lbfgs),
            refusal(stale),
            refusal(Classifier(), PipelineStrategy(activation_link=AQSGD(Int4()), samples="id")),
            several,
            twice,
        ]

    expected = [
        "PipelineStrategy: ByHand optimizes by hand, but stages need automatic optimization",
        "PipelineStrategy: Classifier is compiled, but its step is run in two halves; compile its layers",
        "PipelineStrategy(network='model'): 'scale' is outside of it and would not be trained",
        "PipelineStrategy(network='net'): Classifier has no such module",
        "PipelineStrategy(balance='time'): needs Classifier.example_input_array, an input of the network",
        "PipelineStrategy: StochasticWeightAveraging averages a whole model, which no rank has",
        "PipelineStrategy: LBFGS needs all parameters in one place; use another optimizer",
        "PipelineStrategy: SGD holds parameters that are not part of the module; make it in configure_optimizers",
        "PipelineStrategy(samples='id'): the batch has no such entry with a tensor",
        "Clapping: repeats the batches of one training loader, not of several",
        "PipelineStrategy(outputs='last'): a step must call 'model' once; take outputs='all'",
    ]
    assert on_ranks(job, 1)[0] == expected


# ---------------------------------------------------------------------- precision, and a model that is its own network


@pytest.mark.filterwarnings("ignore")
def test_a_tied_language_model_and_half_precision() -> None:
    """ByteGPT is cut between blocks, its embedding is on both ranks; each precision equals one process of the same."""
    text = torch.randint(256, (12, 9), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    loader = DataLoader(text, batch_size=4)
    cases = {"64-true": 1e-12, "32-true": 1e-6, "bf16-mixed": 2e-3, "bf16-true": 2e-3}

    def run(precision: str, strategy: Any, devices: int) -> tuple[dict[str, Tensor], float]:
        with torch.random.fork_rng():
            torch.manual_seed(2)
            module = ByteGPT(n_layer=3, n_head=2, n_embd=16, context=8, warmup_steps=1, max_steps=20)
        options: dict[str, Any] = {"max_epochs": 2, "precision": precision, "gradient_clip_val": 0.5}
        fitter = trainer(strategy, devices, use_distributed_sampler=False, **options)
        fitter.fit(module, loader, loader)
        return whole(module), float(fitter.callback_metrics["val/bpb"])

    def job(rank: int) -> Any:
        return {p: run(p, PipelineStrategy(network="", num_microbatches=2), 2) for p in cases}

    answers = on_ranks(job, 2)
    for precision, atol in cases.items():
        expected, bits = run(precision, "auto", 1)
        for answer in answers:
            weights, told = answer[precision]
            assert told == pytest.approx(bits, abs=10 * atol)
            for name, value in expected.items():
                assert weights[name].dtype == value.dtype
                torch.testing.assert_close(weights[name], value, atol=atol, rtol=0.0, msg=f"{precision} {name}")


class Residual(nn.Module):
    """Its skip connection goes over the module ``second``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        return self.third(self.second(x.tanh()).tanh() + x)


class Traced(Classifier):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.model = Residual().double()
        self.example_input_array = torch.zeros(2, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(images=x)


@pytest.mark.filterwarnings("ignore")
def test_a_traced_model() -> None:
    """Cut inside of a residual connection, and by measured time; gradients are clipped by value; the summary runs the example."""

    def job(rank: int) -> Any:
        results = []
        for options in ({"split": ["second"]}, {"balance": "time"}):
            module = Traced()
            strategy = PipelineStrategy(num_microbatches=2, **options)  # type: ignore[arg-type]
            staged(module, strategy, enable_model_summary=True, gradient_clip_algorithm="value", gradient_clip_val=0.01)
            results.append(whole(module))
        return results

    answers = on_ranks(job, 2)
    module = Traced()
    plain(module, gradient_clip_algorithm="value", gradient_clip_val=0.01)
    for weights in (*answers[0], *answers[1]):
        for key, value in module.state_dict().items():
            torch.testing.assert_close(weights[key], value, atol=1e-10, rtol=1e-10)


# ---------------------------------------------------------------------- failures


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", [die, crash], ids=["killed", "raises"])
def test_a_stage_that_fails_is_named(what: Any, tmp_path: Path) -> None:
    """The others end long before the timeout, with its rank and stage, and write no checkpoint in their trouble."""

    def job(rank: int) -> None:
        collectives.Watch = partial(Watch, grace=4.0, poll=0.2, patience=2.0)  # type: ignore[misc, assignment]
        strategy = PipelineStrategy(network="net", num_microbatches=2, timeout=timedelta(seconds=60))
        saver = ModelCheckpoint(tmp_path, save_on_exception=True) if "save_on_exception" in SAVER else None
        fitter = trainer(strategy, 2, max_epochs=1, callbacks=[saver] if saver is not None else [])
        fitter.fit(Troubled(what, rank=1, step=3), regression(32))

    with Processes(job, 2) as processes:
        ended = processes.join(20.0)
    assert ended[0].code == 1, ended[0].text
    line = ended[0].errors[0]
    assert re.search(r"rank 0, step 3, pipeline, \w+: no answer after \d+\.\d s from rank", line), line
    if what is die:
        assert ended[1].code == -signal.SIGKILL
        assert "from rank(s) 1 (killed, hanging or out of step); rank 1 has stage 1 (" in line
    else:
        assert ended[1].errors[-1].startswith("ZeroDivisionError: the data is bad")
        assert (
            "from rank 1, which failed at step 3 with ZeroDivisionError: the data is bad; rank 1 has stage 1 (" in line
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(
    Version(lightning.__version__) < Version("2.5.2") or "save_on_exception" not in SAVER,
    reason="Lightning broadcasts SIGTERM since 2.5.2, and saves on exceptions since 2.6",
)
@pytest.mark.filterwarnings("ignore")
def test_sigterm_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """Rank 0 is told to stop; all stages stop at the same step and write what they have."""

    def job(rank: int) -> None:
        strategy = PipelineStrategy(network="net", num_microbatches=2, timeout=timedelta(seconds=60))
        saver = ModelCheckpoint(tmp_path, save_on_exception=True)
        trainer(strategy, 2, max_epochs=4, callbacks=[saver]).fit(Troubled(terminate, rank=0, step=3), regression(32))

    with Processes(job, 2) as processes:
        ended = processes.join(20.0)
    assert [e.code for e in ended.values()] == [0, 0], ended
    saved = torch.load(next(tmp_path.glob("*.ckpt")), weights_only=False)
    assert 4 <= saved["global_step"] <= 6
    assert not any(value.isnan().any() for value in saved["state_dict"].values())
    assert len(list(tmp_path.glob("*.replicas/*/*.ckpt"))) == 2


# ---------------------------------------------------------------------- replicas in stages


PLANS: dict[str, Plan | None] = {
    "mean gradient": None,
    "diloco": plans.diloco(3, outer_lr=0.7, outer_momentum=0.5),
    "dilocox": plans.dilocox(3, rank=2),
    "gossip": plans.gossip(Ring()),
}


@pytest.mark.filterwarnings("ignore")
def test_pipelines_are_replicas(tmp_path: Path) -> None:
    """Two pipelines of two stages train as two replicas that are whole do, and a run that is resumed as one that is not."""

    def run(strategy: Any, devices: int, folder: Path, path: Any = None) -> Any:
        module = Classifier(dtype=torch.float32)
        saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        options = {"max_epochs": 2, "callbacks": [saver], "accumulate_grad_batches": 1, "gradient_clip_val": 0.5}
        fitter = trainer(strategy, devices, **options)
        fitter.fit(module, data(40, dtype=torch.float32), data(8, 5, torch.float32), ckpt_path=path)
        told = [float(fitter.callback_metrics[key]) for key in ("val_loss", "val_count", "val_sum", "accuracy_epoch")]
        return whole(module), module.losses, told

    def staged_job(rank: int) -> Any:
        told = {}
        for name, plan in PLANS.items():
            made = partial(PipelineStrategy, num_microbatches=2, pipeline_size=2, plan=plan)
            folder = tmp_path / name
            told[name] = run(made(), 4, folder)
            again = run(made(), 4, tmp_path / "again", folder / "step=5.ckpt")
            assert same(again[0], told[name][0]), name
            assert again[1] == told[name][1][5:], name
        return told | {"links": linked(tmp_path / "links")}

    def linked(folder: Path) -> Any:
        """DiLoCoX whole: what goes on within the pipelines is packed, too."""
        link = Clapping("FU", 0.5, Int4(block=8))
        made = partial(
            PipelineStrategy, activation_link=link, gradient_link=link, pipeline_size=2, plan=PLANS["dilocox"]
        )
        full = run(made(), 4, folder)
        rest = run(made(), 4, tmp_path / "again", folder / "step=5.ckpt")
        assert same(rest[0], full[0])
        assert rest[1] == full[1][5:]
        assert len(full[1]) > 10
        return full

    def whole_job(rank: int) -> Any:
        made = {name: ReplicaStrategy(plan=plan or MEAN_GRADIENT) for name, plan in PLANS.items()}
        return {name: run(strategy, 2, tmp_path / f"whole {name}") for name, strategy in made.items()}

    staged_runs, whole_runs = on_ranks(staged_job, 4), on_ranks(whole_job, 2)
    for name in PLANS:
        for rank, runs in enumerate(staged_runs):
            weights, losses, told = runs[name]
            expected, losses_of_replica, told_of_replica = whole_runs[rank // 2][name]
            far = 5e-3 if name == "dilocox" else 2e-6  # factors begin at random, matrix by matrix of a rank
            assert losses == pytest.approx(losses_of_replica, abs=far), name
            assert told == pytest.approx(told_of_replica, abs=far), name
            for key, value in expected.items():
                torch.testing.assert_close(weights[key], value, atol=4 * far, rtol=0.0)
    assert all(same(runs["links"][0], staged_runs[0]["links"][0]) for runs in staged_runs)
    assert staged_runs[0]["links"][1] == staged_runs[1]["links"][1] != staged_runs[2]["links"][1]
    steps = range(1, len(staged_runs[0]["diloco"][1]) + 1)
    for step in steps:
        both = [
            torch.load(tmp_path / name / f"step={step}.ckpt", weights_only=False) for name in ("diloco", "whole diloco")
        ]
        for key, value in both[1]["state_dict"].items():
            torch.testing.assert_close(both[0]["state_dict"][key], value, atol=2e-6, rtol=0.0)
