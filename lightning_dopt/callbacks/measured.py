"""A metric of ``validation_step`` measured at any time, without a trace."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics import Metric


def measured(trainer: Trainer, module: LightningModule, metric: str, batches: int, owner: str) -> Tensor:
    """What ``validation_step`` logs as ``metric``, in the mean over this rank's validation data, with the weights as they are.

    Training modes, buffers, random numbers and metric objects come back as they were, and nothing is logged.

    Args:
        trainer: The trainer, whose validation data must be set up.
        module: The module.
        metric: A name that ``validation_step`` logs with ``self.log``.
        batches: Validation batches of each loader to use; 0 uses all.
        owner: Whose option ``metric`` is, for errors.

    Raises:
        ValueError: there are no validation data, or ``validation_step`` logs nothing under that name.
    """
    if not trainer.val_dataloaders:
        raise ValueError(f"{owner}(metric={metric!r}): needs validation data, and there are none")
    total, count = torch.zeros((), dtype=torch.float64), 0.0
    with _captured(module) as logged:
        for index, loader in enumerate(_loaders(trainer)):
            for k, batch in enumerate(loader):
                if batches and k >= batches:
                    break
                logged.clear()
                _step(trainer, batch, k, index)
                if metric not in logged:
                    raise ValueError(
                        f"{owner}(metric={metric!r}): validation_step logs no such name, it logs {sorted(logged)}"
                    )
                value, size = logged[metric]
                size = size if size is not None else _size(batch)
                total += size * torch.as_tensor(value).detach().double().cpu()
                count += size
    return (total / max(count, 1.0)).float().to(module.device)


def _step(trainer: Trainer, batch: Any, k: int, index: int) -> None:
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
    training = [child for child in module.modules() if child.training]
    module.eval()
    module.log = log  # type: ignore[method-assign]
    for parent, name, child in metrics:
        setattr(parent, name, copy.deepcopy(child))
    try:
        yield logged
    finally:
        for part in training:
            part.training = True
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
