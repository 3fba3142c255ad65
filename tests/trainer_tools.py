"""Trainers for tests: tiny modules and data, and two ways to run them on several processes."""

from __future__ import annotations

import logging
import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

torch.set_num_threads(1)
T = TypeVar("T")


def quiet() -> None:
    """No banners; warnings that are not about this package are dropped."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*|torch\..*")


# ---------------------------------------------------------------------- data and modules


def regression(samples: int = 32, width: int = 4, seed: int = 0, batch: int = 4, shuffle: bool = False) -> DataLoader:
    """``y = sin(x w)`` with noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, width, generator=generator)
    y = torch.sin(x @ torch.randn(width, 1, generator=generator)) + 0.1 * torch.randn(samples, 1, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch, shuffle=shuffle)


def shares(loader: DataLoader, rank: int, epoch: int = 0, n: int = 2) -> list[tuple[Tensor, ...]]:
    """The batches of one rank with the DistributedSampler that Lightning puts into a training loader."""
    sampler = DistributedSampler(loader.dataset, n, rank, shuffle=True)
    sampler.set_epoch(epoch)
    order = torch.tensor(list(sampler))
    return [tuple(t[chunk] for t in loader.dataset.tensors) for chunk in order.split(loader.batch_size)]


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.02)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def mlp(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 1))


class Regressor(LightningModule):
    """Mean squared error of ``net``; logs ``val_loss``.

    Args:
        net: Made with the given seed.
        optimizer: Makes the optimizer.
        decay: Factor of an exponential schedule per step, if any.
    """

    def __init__(
        self,
        net: Callable[[], nn.Module] = mlp,
        optimizer: Callable[[Any], torch.optim.Optimizer] = sgd,
        decay: float | None = None,
        seed: int = 1,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = net()
        self.make, self.decay = optimizer, decay

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return (self.net(x) - y).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = self.make([p for p in self.parameters() if p.requires_grad])
        if self.decay is None:
            return optimizer
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, self.decay)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def flat(module: nn.Module, buffers: bool = True) -> Tensor:
    """All parameters and floating point buffers in one vector, copied."""
    tensors = [*module.parameters(), *(b for b in module.buffers() if buffers and b.is_floating_point())]
    return torch.cat([t.detach().double().reshape(-1) for t in tensors])


class Trace(Callback):
    """The module's weights after every optimizer step, by step, in :attr:`rows`."""

    def __init__(self) -> None:
        self.rows: dict[int, Tensor] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step:
            self.rows[trainer.global_step] = flat(pl_module)

    def stacked(self) -> Tensor:
        return torch.stack(list(self.rows.values()))


# ---------------------------------------------------------------------- processes


def trainer(strategy: Any, devices: int = 2, **options: Any) -> Trainer:
    """A Trainer without logger, bar, summary and, unless asked for, checkpoints."""
    options = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any("Checkpoint" in type(c).__name__ for c in options.get("callbacks", ())),
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "default_root_dir": tempfile.gettempdir(),
    } | options
    return Trainer(strategy=strategy, devices=devices, **options)


def on_ranks(job: Callable[[int], T], n: int = 2, timeout: float = 60.0) -> list[T]:
    """``job(rank)`` on ``n`` forked processes that stand as if a launcher such as torchrun had started them.

    Several Trainers can fit one after the other inside a job. Results come back through files.

    Raises:
        AssertionError: with the traceback of the rank that failed, or the ranks that gave no answer.
    """
    folder = Path(tempfile.mkdtemp(prefix="ranks"))
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_serve, args=(job, r, n, folder), daemon=True) for r in range(n)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.1, deadline - time.monotonic()))
        if process.exitcode != 0:  # the others wait for it in vain
            deadline = min(deadline, time.monotonic() + 5.0)
    for process in processes:
        process.kill()
    failures = sorted(folder.glob("*.failed"), key=lambda p: p.stat().st_mtime)
    done = [(folder / f"{r}.pt").exists() for r in range(n)]
    if not all(done):
        texts = [f"rank {p.stem}:\n{p.read_text()}" for p in failures]
        raise AssertionError("\n".join(texts) or f"no answer within {timeout} s from ranks with False: {done}")
    return [torch.load(folder / f"{r}.pt", weights_only=False) for r in range(n)]


def _serve(job: Callable[[int], Any], rank: int, n: int, folder: Path) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)  # threads that find the parent's pool broken must not all mend it at once
    quiet()
    try:
        dist.init_process_group(
            "gloo", store=dist.FileStore(f"{folder}/store", n), rank=rank, world_size=n, timeout=timedelta(seconds=60)
        )
        torch.save(job(rank), folder / f"{rank}.tmp")
        os.replace(folder / f"{rank}.tmp", folder / f"{rank}.pt")
    except BaseException:
        (folder / f"{rank}.failed").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)


class _Report(Callback):
    """Writes what a rank has at the end of a fit."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.trace = Trace()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.trace.on_train_batch_end(trainer, pl_module, *args)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        result = {
            "rows": self.trace.rows,
            "weights": flat(pl_module),
            "state_dict": pl_module.state_dict(),
            "metrics": dict(trainer.callback_metrics),
            "logged": dict(trainer.logged_metrics),
            "bar": dict(trainer.progress_bar_metrics),
            "step": trainer.global_step,
        }
        torch.save(result, f"{self.folder}/{trainer.global_rank}.pt")


def fit(
    strategy: Any, module: LightningModule, data: Any, val: Any = None, devices: int = 2, **options: Any
) -> list[dict[str, Any]]:
    """One fit with processes forked by Lightning (``strategy`` must be made with ``start_method="fork"``).

    Returns, by rank: ``rows`` (weights after each step), ``weights`` and ``state_dict`` at the end, ``metrics``,
    ``logged``, ``bar`` (progress bar metrics) and ``step``.
    """
    quiet()
    folder = tempfile.mkdtemp(prefix="fit")
    options["callbacks"] = [*options.get("callbacks", ()), _Report(folder)]
    trainer(strategy, devices, **options).fit(module, data, val)
    return [torch.load(f"{folder}/{r}.pt", weights_only=False) for r in range(devices)]


# ---------------------------------------------------------------------- watching the wire


@contextmanager
def counted_calls() -> Iterator[list[str]]:
    """The names of all communicating functions of ``torch.distributed`` called within the block, in this process.

    All but ``isend`` and ``irecv``, which torch recognises by identity when ``batch_isend_irecv`` is given them.
    """
    names = [
        "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast", "broadcast_object_list",
        "reduce", "reduce_scatter", "reduce_scatter_tensor", "gather", "scatter", "send", "recv",
        "batch_isend_irecv", "barrier", "monitored_barrier", "all_to_all", "all_to_all_single",
    ]  # fmt: skip
    calls: list[str] = []
    modules = [dist, dist.distributed_c10d]
    originals = {(m, name): getattr(m, name) for m in modules for name in names if hasattr(m, name)}

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return function(*args, **kwargs)

        return call

    try:
        for (module, name), function in originals.items():
            setattr(module, name, watched(name, function))
        yield calls
    finally:
        for (module, name), function in originals.items():
            setattr(module, name, function)
