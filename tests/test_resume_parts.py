"""Exact resume: random states, repeatable loaders, and runs that are stopped anywhere against runs that are not."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from torch.utils.data.distributed import DistributedSampler

from lightning_dopt.strategies.resumable_loader import ResumableLoader, SeededLoader
from lightning_dopt.strategies.resume import ExactResume
from lightning_dopt.strategies.rng import RandomStream, rng_state, set_rng_state

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled"),
    pytest.mark.filterwarnings("ignore:.*litlogger"),
    pytest.mark.filterwarnings("ignore:.*IterableDataset"),
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]

SAMPLES, BATCH = 8, 2
PER_EPOCH = SAMPLES // BATCH


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "lightning.pytorch")


def draws() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        *torch.rand(3).tolist(),
    ]


# ---------------------------------------------------------------- random state


def test_rng_state_survives_a_weights_only_file(tmp_path: Path) -> None:
    random.gauss(0, 1), np.random.randn(), torch.rand(1)  # leaves a second normal number waiting in two generators
    torch.save(rng_state(), tmp_path / "rng.pt")
    expected = draws()
    draws()
    set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert draws() == expected


def test_stream_has_its_own_numbers_and_leaves_the_global_ones() -> None:
    stream, other = RandomStream(), RandomStream()
    stream.seed(2**62 + 1)
    other.seed(2**62 + 1)
    before = rng_state()
    expected = draws()
    set_rng_state(before)
    with stream.active():
        first = draws()
    with stream.active():
        second = draws()
    assert draws() == expected
    with other.active():
        assert draws() == first
        assert draws() == second
    assert len({tuple(first), tuple(second), tuple(expected)}) == 3


# ---------------------------------------------------------------- loaders


class Noisy(Dataset):
    """Items with noise from all three global generators."""

    def __init__(self, samples: int = SAMPLES) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Tensor:
        noise = torch.randn(4) + random.random() + float(np.random.rand())
        return torch.arange(4.0) * (index + 1) / 10 + noise / 10


class Shuffled(IterableDataset):
    """A stream with a shuffle buffer: the order depends on numbers drawn item by item. No length."""

    def __iter__(self) -> Iterator[Tensor]:
        waiting = []
        for index in range(SAMPLES):
            waiting.append(index)
            if len(waiting) > 4:
                yield torch.full((4,), waiting.pop(random.randrange(5)) / 10) + torch.randn(4) / 10
        for index in waiting:
            yield torch.full((4,), index / 10)


class Drawing(Sampler):
    """Draws from the global generator whenever an index is wanted."""

    def __init__(self) -> None: ...

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self) -> Iterator[int]:
        for _ in range(SAMPLES):
            yield random.randrange(SAMPLES)


def seeded_start(seed: int) -> Any:
    state = torch.Generator().manual_seed(seed).get_state()
    return lambda loader: (0, state)


def batches_of(loader: Any) -> list[list[float]]:
    out = []
    for batch in loader:
        out.append(batch.flatten().tolist())
        draws()  # the model's
    return out


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_is_a_function_of_its_start(workers: int) -> None:
    def loader(seed: int) -> SeededLoader:
        return SeededLoader(DataLoader(Noisy(), BATCH, shuffle=True, num_workers=workers), seeded_start(seed))

    first = batches_of(loader(1))
    torch.manual_seed(99)
    before = rng_state()["torch"]
    again, other = list(loader(1)), list(loader(2))
    assert [batch.flatten().tolist() for batch in again] == first
    assert [batch.flatten().tolist() for batch in other] != first
    assert torch.equal(rng_state()["torch"], before)


def test_workers_and_global_numbers_are_those_of_an_ordinary_loader() -> None:
    loader = DataLoader(Noisy(), BATCH, shuffle=True, num_workers=1)
    torch.manual_seed(4)
    stock = [batch.tolist() for batch in loader]
    torch.manual_seed(4)
    state = torch.get_rng_state()
    assert [batch.tolist() for batch in SeededLoader(loader, lambda _: (0, state))] == stock


def test_wrapper_passes_for_the_loader_it_wraps() -> None:
    inner = DataLoader(Noisy(), BATCH, shuffle=True)
    loader = ResumableLoader(inner, seeded_start(1))
    assert isinstance(loader, DataLoader)
    assert isinstance(loader, ResumableLoader)
    assert len(loader) == PER_EPOCH
    assert loader.sampler is inner.sampler
    assert loader.batch_sampler is inner.batch_sampler
    assert loader.dataset is inner.dataset
    loader.worker_init_fn = print
    assert inner.worker_init_fn is print
    with pytest.raises(TypeError):
        len(ResumableLoader(DataLoader(Shuffled(), BATCH), seeded_start(1)))
    with pytest.raises(AttributeError):
        _ = loader.no_such_attribute


def test_a_second_pass_goes_on_after_an_end_and_repeats_without_one() -> None:
    loader = SeededLoader(DataLoader(Noisy(), BATCH), seeded_start(1))
    first = next(iter(loader))
    assert torch.equal(next(iter(loader)), first)
    whole = batches_of(loader)
    assert whole[0] == first.flatten().tolist()
    assert batches_of(loader) != whole


def test_generators_of_the_user_are_saved() -> None:
    generator = torch.Generator().manual_seed(3)
    loader = ResumableLoader(DataLoader(range(100), 10, shuffle=True, generator=generator), seeded_start(1))
    passes = iter(loader)
    first = next(passes)
    state = loader.state_dict()
    rest = list(passes)
    loader.load_state_dict(state, repeat_epoch=True)
    again = list(loader)
    assert torch.equal(again[0], first)
    assert all(torch.equal(a, b) for a, b in zip(again[1:], rest, strict=True))


def test_inexact_loaders_are_named() -> None:
    with pytest.warns(UserWarning, match="persistent_workers"):
        ResumableLoader(DataLoader(Noisy(), BATCH, num_workers=1, persistent_workers=True), seeded_start(1))


# ---------------------------------------------------------------- whole runs


class Exact(SingleDeviceStrategy):
    """One process, using the parts as a strategy does."""

    parts = True

    def __init__(self) -> None:
        super().__init__(device="cpu")
        self.resume = ExactResume()

    def process_dataloader(self, dataloader: object) -> object:
        loader = super().process_dataloader(dataloader)
        return self.resume.wrap(loader, self.lightning_module.trainer) if self.parts else loader

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        mine = dict(checkpoint)
        if self.parts:
            mine["exact"] = self.resume.save_state(self.lightning_module.trainer)
        super().save_checkpoint(mine, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, **kwargs: Any) -> dict[str, Any]:
        super().load_checkpoint(checkpoint_path, **kwargs)
        mine = torch.load(checkpoint_path, weights_only=True)
        if self.parts:
            self.resume.load_state(mine.pop("exact"), mine)
        return mine

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.parts:
            self.resume.on_train_start(self.lightning_module.trainer)

    def on_train_end(self) -> None:
        super().on_train_end()
        if self.parts:
            self.resume.on_train_end(self.lightning_module.trainer)

    def on_validation_start(self) -> None:
        super().on_validation_start()
        if self.parts:
            self.resume.on_validation_start(self.lightning_module.trainer)

    def on_validation_end(self) -> None:
        if self.parts:
            self.resume.on_validation_end()
        super().on_validation_end()

    def teardown(self) -> None:
        self.resume.teardown()
        super().teardown()


class Stock(Exact):
    """The same without the parts."""

    parts = False


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3), nn.Linear(4, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if isinstance(batch, dict):
            batch = batch["long"] * batch["short"].mean()
        return self.net(batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("drawn", torch.rand(3).sum() + self.net(batch).sum())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), 1e-2)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


class Counting(Module):
    """Asks for the number of batches: Lightning then makes the loaders before it restores their states."""

    def configure_optimizers(self) -> Any:
        assert self.trainer.estimated_stepping_batches > 0
        return super().configure_optimizers()


class Skipping(Module):
    """Leaves out the rest of an epoch from its third batch on."""

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> int | None:
        return -1 if batch_idx == 2 else None


class ByHand(Module):
    """Accumulates over three batches by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.net(batch).square().mean())
        if batch_idx % 3 == 1:
            optimizer.step()
            optimizer.zero_grad()


class SaveAll(pl.Callback):
    """Saves at each of the given places, whenever training comes by."""

    def __init__(self, folder: Path, places: tuple[str, ...]) -> None:
        self.folder, self.places, self.saved = folder, places, []

    def _save(self, trainer: pl.Trainer, place: str) -> None:
        if place in self.places and not trainer.sanity_checking:
            self.saved.append(self.folder / f"{len(self.saved)}-{place}-{trainer.global_step}.ckpt")
            trainer.save_checkpoint(self.saved[-1])

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._save(trainer, "batch")

    def on_validation_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._save(trainer, "validation")

    def on_train_epoch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._save(trainer, "epoch")


def train_loader(kind: str, workers: int) -> Any:
    data = Noisy()
    options: dict[str, Any] = {"batch_size": BATCH, "num_workers": workers}
    if kind == "random":
        return DataLoader(data, shuffle=True, **options)
    if kind == "generator":
        return DataLoader(data, shuffle=True, generator=torch.Generator().manual_seed(3), **options)
    if kind == "distributed":
        return DataLoader(data, sampler=DistributedSampler(data, 2, 1, seed=5), batch_size=1, num_workers=workers)
    if kind == "drawing":
        return DataLoader(data, sampler=Drawing(), **options)
    if kind == "stream":
        return DataLoader(Shuffled(), **options)
    short = DataLoader(Noisy(2 * BATCH), shuffle=True, **options)
    return {"long": DataLoader(data if kind == "two" else Shuffled(), **options), "short": short}


def fit(
    kind: Any = "distributed",
    *,
    ckpt: Path | None = None,
    callback: pl.Callback | None = None,
    strategy: type[Exact] = Exact,
    module: type[Module] = Module,
    validate: bool = False,
    workers: int = 0,
    **options: Any,
) -> tuple[list[Tensor], pl.Trainer]:
    """One run in what might be a process of its own: other numbers are drawn before each resume."""
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    model = module()
    if ckpt is not None:
        draws()
    trainer = pl.Trainer(
        strategy=strategy(),
        callbacks=[] if callback is None else [callback],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, **options},
    )
    loader = train_loader(kind, workers) if isinstance(kind, str) else kind
    trainer.fit(model, loader, DataLoader(Noisy(4), BATCH) if validate else None, ckpt_path=ckpt)
    return [p.detach().clone() for p in model.parameters()], trainer


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def unequal_resumes(folder: Path, places: tuple[str, ...], every: int = 1, **options: Any) -> tuple[int, list[str]]:
    """How many checkpoints were resumed from, and the names of those that ended with other weights."""
    save = SaveAll(folder, places)
    full, trainer = fit(callback=save, **options)
    wrong = []
    for path in save.saved[::every]:
        weights, resumed = fit(ckpt=path, **options)
        if not equal(weights, full) or resumed.global_step != trainer.global_step:
            wrong.append(path.name)
    return len(save.saved[::every]), wrong


KINDS = ["random", "distributed", "generator", "drawing", "stream", "two", "two-stream"]


@pytest.mark.parametrize("kind", KINDS)
def test_resume_after_any_batch(kind: str, tmp_path: Path) -> None:
    assert unequal_resumes(tmp_path, ("batch", "epoch"), kind=kind, max_epochs=2) == (2 * PER_EPOCH + 2, [])


@pytest.mark.parametrize("kind", ["random", "distributed"])
def test_resume_with_worker_processes(kind: str, tmp_path: Path) -> None:
    count, wrong = unequal_resumes(tmp_path, ("batch", "epoch"), 3, kind=kind, workers=2, max_epochs=2)
    assert (count, wrong) == (4, [])


@pytest.mark.parametrize(
    "options",
    [
        {"validate": True},
        {"validate": True, "val_check_interval": 2},
        {"validate": True, "check_val_every_n_epoch": None, "val_check_interval": 3, "num_sanity_val_steps": 0},
        {"validate": True, "kind": "stream", "val_check_interval": 2},
        {"accumulate_grad_batches": 3},
        {"validate": True, "accumulate_grad_batches": 2, "val_check_interval": 3},
        {"limit_train_batches": 3},
        {"reload_dataloaders_every_n_epochs": 1},
        {"module": Counting},
        {"module": Skipping, "max_epochs": 3},
        {"module": ByHand, "validate": True, "val_check_interval": 2},
        {"max_epochs": -1, "max_steps": 2 * PER_EPOCH + 3},
        {"max_epochs": -1, "max_steps": 2 * PER_EPOCH + 3, "validate": True},
    ],
    ids=str,
)
def test_resume_anywhere_under_options_of_the_trainer(options: dict[str, Any], tmp_path: Path) -> None:
    options = {"max_epochs": 2, **options}
    count, wrong = unequal_resumes(tmp_path, ("batch", "validation", "epoch"), **options)
    assert count >= 2 * 3 + 2
    assert wrong == []


@pytest.mark.parametrize(
    "options", [{"max_epochs": 3}, {"max_steps": 2 * PER_EPOCH + 3}, {"max_epochs": 4, "module": Skipping}], ids=str
)
def test_resume_of_a_resumed_run(options: dict[str, Any], tmp_path: Path) -> None:
    first = SaveAll(tmp_path, ("batch", "validation", "epoch"))
    full, trainer = fit(validate=True, callback=first, **options)
    for index, path in enumerate(first.saved[2:7]):
        folder = tmp_path / str(index)
        folder.mkdir()
        second = SaveAll(folder, first.places)
        fit(validate=True, ckpt=path, callback=second, **options)
        for again in second.saved[index:-3:4]:
            weights, resumed = fit(validate=True, ckpt=again, **options)
            assert equal(weights, full), (path.name, again.name)
            assert resumed.global_step == trainer.global_step
            assert resumed.current_epoch == trainer.current_epoch


@pytest.mark.parametrize("kind", ["distributed", "stream"])
@pytest.mark.parametrize("validate", [False, True])
def test_resume_of_a_run_that_max_steps_ended(kind: str, validate: bool, tmp_path: Path) -> None:
    full, _ = fit(kind, validate=validate, max_epochs=3)
    for steps in (PER_EPOCH - 2, 2 * PER_EPOCH + 1):
        folder = tmp_path / str(steps)
        folder.mkdir()
        save = SaveAll(folder, ("epoch",))
        _, trainer = fit(kind, validate=validate, max_steps=steps, callback=save)
        draws()
        trainer.save_checkpoint(folder / "after.ckpt")
        for path in (save.saved[-1], folder / "after.ckpt"):
            weights, resumed = fit(kind, validate=validate, max_epochs=3, ckpt=path)
            assert equal(weights, full), path
            assert resumed.global_step == 3 * PER_EPOCH
            assert resumed.current_epoch == 3


def test_resume_from_model_checkpoints(tmp_path: Path) -> None:
    save = pl.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    options: dict[str, Any] = {"validate": True, "val_check_interval": 2, "max_epochs": 2}
    full, _ = fit(callback=save, enable_checkpointing=True, **options)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert [path.stem for path in paths] == ["step=3", "step=6"]
    assert all(equal(fit(ckpt=path, **options)[0], full) for path in paths)


def test_validation_does_not_touch_training() -> None:
    without, _ = fit(max_epochs=2)
    assert equal(fit(max_epochs=2, validate=True)[0], without)
    assert equal(fit(max_epochs=2, validate=True, val_check_interval=2)[0], without)


def test_a_run_with_the_parts_is_that_without_them() -> None:
    """Seeded shuffling, data from workers, dropout: what Lightning does by itself is not changed."""
    assert equal(fit(max_epochs=2, workers=1)[0], fit(max_epochs=2, workers=1, strategy=Stock)[0])


class Counter:
    """A loader that keeps its position itself."""

    def __init__(self) -> None:
        self.position, self.restored, self.fetched = 0, 0, 0

    def __len__(self) -> int:
        return PER_EPOCH

    def __iter__(self) -> Iterator[Tensor]:
        begin, self.restored = self.restored, 0
        for self.position in range(begin + 1, PER_EPOCH + 1):
            self.fetched += 1
            yield torch.full((BATCH, 4), self.position / 10)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.restored = state["position"]


@pytest.mark.parametrize("module", [Module, Counting])
@pytest.mark.parametrize("alone", [False, True])
def test_stateful_loaders_are_left_alone(alone: bool, module: type[Module], tmp_path: Path) -> None:
    save = SaveAll(tmp_path, ("batch", "epoch"))
    options: dict[str, Any] = {"max_epochs": -1, "max_steps": 2 * PER_EPOCH, "module": module}

    def loaders(counter: Counter) -> Any:
        return counter if alone else {"long": DataLoader(Noisy(), BATCH, shuffle=True), "short": counter}

    full, _ = fit(loaders(Counter()), callback=save, **options)
    for path in save.saved:
        counter = Counter()
        assert equal(fit(loaders(counter), ckpt=path, **options)[0], full), path.name
        assert counter.fetched == 2 * PER_EPOCH - int(path.stem.split("-")[-1])


def test_resume_after_an_exception_repeats_the_batch(tmp_path: Path) -> None:
    class Failing(Module):
        fail_at: int | None = None

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if self.trainer.global_step == self.fail_at:
                raise OSError("unplugged")
            return self.net[0](batch).square().mean()

    class SaveOnException(pl.Callback):
        def on_exception(self, trainer: pl.Trainer, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / "failed.ckpt")

    full, _ = fit(module=Failing, max_epochs=2)
    for Failing.fail_at in (0, 1, PER_EPOCH - 1, PER_EPOCH, PER_EPOCH + 2):
        with pytest.raises(OSError, match="unplugged"):
            fit(module=Failing, max_epochs=2, callback=SaveOnException())
        Failing.fail_at = None
        assert equal(fit(module=Failing, max_epochs=2, ckpt=tmp_path / "failed.ckpt")[0], full)


def test_fit_after_a_search_for_the_learning_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search saves before there are loaders, trains, and restores within the same trainer."""

    class Searched(Module):
        lr = 1e-3

    def weights(search: bool) -> list[Tensor]:
        monkeypatch.chdir(tmp_path)
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        model, options = Searched(), {"enable_progress_bar": False, "enable_model_summary": False}
        trainer = pl.Trainer(strategy=Exact(), logger=False, enable_checkpointing=False, max_epochs=2, **options)
        if search:
            state = rng_state()
            Tuner(trainer).lr_find(model, train_loader("stream", 0), num_training=6, update_attr=False)
            set_rng_state(state)
        trainer.fit(model, train_loader("stream", 0))
        assert trainer.global_step == 2 * PER_EPOCH
        return [p.detach().clone() for p in model.parameters()]

    assert equal(weights(True), weights(False))


def test_other_data_is_refused(tmp_path: Path) -> None:
    save = SaveAll(tmp_path, ("batch",))
    fit("random", callback=save, max_epochs=1)
    with pytest.raises(RuntimeError, match="ended after 2 batches, but the checkpoint was saved after 3"):
        fit(DataLoader(Noisy(4), BATCH), ckpt=save.saved[2], max_epochs=2)
    with pytest.raises(RuntimeError, match="stateful loaders"):
        fit("two", ckpt=save.saved[2], max_epochs=2)


def test_without_the_parts_resume_is_not_exact(tmp_path: Path) -> None:
    """The comparison used above can fail, for each thing the parts restore."""
    places = ("batch", "validation", "epoch")
    with pytest.warns(UserWarning, match="not resumable"):
        count, wrong = unequal_resumes(tmp_path, places, strategy=Stock, kind="random", max_epochs=2, validate=True)
    assert count == 12
    assert len([name for name in wrong if not name.endswith(f"-{2 * PER_EPOCH}.ckpt")]) == 9


@pytest.mark.parametrize(
    ("broken", "options"),
    [
        ("set_rng_state", {}),
        ("_repeat", {}),
        ("_settle_loops", {"max_steps": 2 * PER_EPOCH + 3, "max_epochs": -1}),
        ("_open_gradients", {"accumulate_grad_batches": 3}),
        ("loops.set_sampler_epoch", {}),
    ],
)
def test_every_piece_is_needed(broken: str, options: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"lightning_dopt.strategies.resume.{broken}", lambda *args: {})
    _, wrong = unequal_resumes(tmp_path, ("batch", "epoch"), **{"max_epochs": 2, **options})
    assert len(wrong) >= 2


def test_hooks_of_lightning_that_are_relied_upon() -> None:
    """Private names: fail here, not in the middle of a resume, when a release renames them."""
    loop = pl.Trainer(logger=False, enable_checkpointing=False, max_steps=1).fit_loop
    for name in ("_combined_loader", "_data_fetcher", "epoch_progress", "_restarting"):
        assert hasattr(loop, name)
    assert hasattr(loop, "_restart_stage") == (tuple(map(int, lightning.__version__.split(".")[:2])) >= (2, 5))
    assert {"epoch_loop.batch_progress", "epoch_progress"} <= set(loop.state_dict())
