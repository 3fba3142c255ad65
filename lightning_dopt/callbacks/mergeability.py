"""Mergeability: how good the average of all replicas would be, beside how good the replicas are."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_dopt._checks import check_int
from lightning_dopt.strategies.replica import ReplicaStrategy


class Mergeability(Callback):
    """Measures, at every validation, a metric on each replica's own weights and on the average of all replicas.

    Logs ``merge/local/<metric>``, the mean over ranks of what ``validation_step`` logs under that name with the rank's own
    weights, ``merge/merged/<metric>``, the same with the counterfactual average, and ``merge/gain/<metric>``, local minus
    merged. Training is left as it is: weights, buffers, random numbers, and metric objects of the module come back as they
    were. Costs two more passes over the validation data (or ``batches`` of it).

    Args:
        metric: A name that ``validation_step`` logs with ``self.log``.
        batches: Validation batches of each loader to use; 0 uses all.

    Raises:
        ValueError: an empty name or ``batches < 0``; in validation, a strategy that is no :class:`ReplicaStrategy`, or a
            ``validation_step`` that logs nothing under that name.

    Source: "A single merging suffices", arXiv 2507.06542.
    """

    def __init__(self, metric: str = "val_loss", batches: int = 0) -> None:
        if not isinstance(metric, str) or not metric:
            raise ValueError(f"Mergeability(metric={metric!r}): must be a name that validation_step logs")
        self.metric = metric
        self.batches = check_int("Mergeability", "batches", batches, 0)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse other strategies before training starts."""
        if stage == "fit" and not isinstance(trainer.strategy, ReplicaStrategy):
            raise ValueError(
                f"Mergeability: needs a strategy with replicas, such as ReplicaStrategy, got {type(trainer.strategy).__name__}"
            )

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log, within ``fit``."""
        strategy = trainer.strategy
        if trainer.sanity_checking or not isinstance(strategy, ReplicaStrategy):
            return
        if not strategy.fitting or strategy.consensus is None:
            return
        with strategy.consensus.own():
            local = self._measured(trainer, pl_module)
            with strategy.consensus.model():
                merged = self._measured(trainer, pl_module)
        for name, value in (("local", local), ("merged", merged), ("gain", local - merged)):
            pl_module.log(f"merge/{name}/{self.metric}", value, sync_dist=True)

    def _measured(self, trainer: Trainer, module: LightningModule) -> Tensor:
        total, count = torch.zeros((), dtype=torch.float64), 0.0
        with _captured(module) as logged:
            for index, loader in enumerate(_loaders(trainer)):
                for k, batch in enumerate(loader):
                    if self.batches and k >= self.batches:
                        break
                    logged.clear()
                    self._step(trainer, batch, k, index)
                    if self.metric not in logged:
                        raise ValueError(
                            f"Mergeability(metric={self.metric!r}): validation_step logs no such name, it logs {sorted(logged)}"
                        )
                    value, size = logged[self.metric]
                    size = size if size is not None else _size(batch)
                    total += size * torch.as_tensor(value).detach().double().cpu()
                    count += size
        return (total / max(count, 1.0)).float().to(module.device)

    def _step(self, trainer: Trainer, batch: Any, k: int, index: int) -> None:
        strategy = trainer.strategy
        batch = strategy.batch_to_device(batch, dataloader_idx=index)
        arguments = (batch, k) if len(_loaders(trainer)) == 1 else (batch, k, index)
        with torch.no_grad(), strategy.precision_plugin.val_step_context():
            strategy.validation_step(*arguments)


@contextmanager
def _captured(module: LightningModule) -> Iterator[dict[str, tuple[Any, int | None]]]:
    """Within the block ``module.log`` only notes values; metric objects, buffers and the random state are put back."""
    logged: dict[str, tuple[Any, int | None]] = {}

    def log(name: str, value: Any, *args: Any, batch_size: int | None = None, **kwargs: Any) -> None:
        if isinstance(value, Metric):
            return  # its value belongs to an epoch, not to a batch
        logged[name] = (value, batch_size)

    metrics = [(parent, name, child) for parent in module.modules() for name, child in _metrics(parent)]
    buffers = [(b, b.detach().clone()) for b in module.buffers()]
    random = torch.get_rng_state()
    module.log = log  # type: ignore[method-assign]
    for parent, name, child in metrics:
        setattr(parent, name, copy.deepcopy(child))
    try:
        yield logged
    finally:
        del module.log
        for parent, name, child in metrics:
            setattr(parent, name, child)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        torch.set_rng_state(random)


def _metrics(parent: nn.Module) -> list[tuple[str, Metric]]:
    if isinstance(parent, Metric):  # a metric inside a metric is copied with it
        return []
    return [(name, child) for name, child in parent.named_children() if isinstance(child, Metric)]


def _loaders(trainer: Trainer) -> list[Any]:
    loaders = trainer.val_dataloaders
    return list(loaders) if isinstance(loaders, (list, tuple)) else [loaders]


def _size(batch: Any) -> int:
    """The length of the first tensor in a batch."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else 1
    if isinstance(batch, dict):
        batch = list(batch.values())
    return _size(batch[0]) if isinstance(batch, (list, tuple)) and batch else 1
