"""Steps that take their gradient at a second point: the forward and backward pass once more, on the same batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_dopt.engine import Engine


def check_two_passes(engine: Engine, module: LightningModule, trainer: Trainer) -> None:
    """Refuse what cannot be done twice.

    Raises:
        ValueError: manual optimization or accumulated gradients, with corrections that need a second pass; loss scaling, if
            they send gradients of the first.
    """
    pairs = zip(engine.plan.corrections, engine.corrections, strict=True)
    name = next((type(c).__name__ for c, bound in pairs if bound.passes == 2), None)
    if name is None:
        return
    if not module.automatic_optimization:
        raise ValueError(f"{name}: the second pass repeats training_step, which needs automatic optimization")
    if trainer.accumulate_grad_batches != 1:
        raise ValueError(
            f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}): {name} takes both passes on one batch, use 1"
        )
    if engine.between and getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ValueError(f"Trainer(precision='16-mixed'): {name} sends unscaled gradients, use 'bf16-mixed'")


def second_pass(engine: Engine, closure: Callable[[], Any], module: LightningModule, group: int) -> None:
    """Replace the gradients by those at the perturbed point; buffers and logged values stay those of the first pass."""
    engine.run(engine.perturb(group))
    with _unnoticed(module):
        closure()


@contextmanager
def _unnoticed(module: LightningModule) -> Iterator[None]:
    kept = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    try:
        with muted(module):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)


@contextmanager
def muted(module: LightningModule) -> Iterator[None]:
    """Within the block the module logs nothing."""
    module.log = module.log_dict = _nothing  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.log, module.log_dict


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In place of ``LightningModule.log``."""
