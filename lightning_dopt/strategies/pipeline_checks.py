"""What a pipeline under a Trainer refuses, in one line, and whom it asks for lazy sampling."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import LBFGS, Optimizer

from lightning_dopt.pipeline import Clapping, Link, Program, Schedule, make_program
from lightning_dopt.pipeline.engines import Engine
from lightning_dopt.pipeline.torch_schedules import TORCH_SCHEDULES, available
from lightning_dopt.strategies import _private

NAME = "PipelineStrategy"


def program_for(schedule: Schedule, ranks: int, num_microbatches: int, chunks: int | None) -> Program:
    """The program on so many processes.

    Raises:
        ValueError: There is none.
    """
    try:
        return make_program(schedule, ranks, num_microbatches, chunks)
    except ValueError as error:
        reason = str(error).partition(": ")[2]
        options = {"microbatches=": ("num_microbatches", num_microbatches), "chunks=": ("chunks", chunks)}
        option, value = next((ours for theirs, ours in options.items() if theirs in str(error)), ("schedule", schedule))
        raise ValueError(
            f"{NAME}({option}={value!r}) with schedule {schedule!r} on {ranks} processes: {reason}"
        ) from None


def check_links(links: Sequence[Link], samples: int | str | None) -> float | None:
    """The probability of a new batch that the links ask for, if any does.

    Raises:
        ValueError: They ask for different ones, or need the numbers of samples, or numbers are given that none needs.
    """
    lazy = {link.probability for link in links if isinstance(link, Clapping)}
    if len(lazy) > 1:
        raise ValueError(f"{NAME}(activation_link, gradient_link): both must have one probability, not {sorted(lazy)}")
    by_sample = any(link.by_sample for link in links)
    if by_sample and samples is None:
        raise ValueError(f"{NAME}(samples=None): AQSGD needs the entry of a batch with the number of each sample")
    if samples is not None and not by_sample:
        raise ValueError(f"{NAME}(samples={samples!r}): only AQSGD needs the numbers of samples")
    return lazy.pop() if lazy else None


def check_engine(engine: Engine, schedule: Schedule, links: Sequence[Link]) -> None:
    """Refuse torch's engine where it cannot run.

    Raises:
        ValueError: With links, or with a schedule that it does not have.
    """
    if engine == "torch" and links:
        raise ValueError(f"{NAME}(engine='torch'): torch sends tensors as they are; with links take 'auto' or 'native'")
    if engine == "torch" and not (schedule in TORCH_SCHEDULES and available(schedule)):
        raise ValueError(f"{NAME}(engine='torch'): this torch does not have {schedule!r}; take 'auto' or 'native'")


def check_devices(devices: Sequence[torch.device] | None, precision: Any) -> None:
    """Refuse devices whose tensors cannot be sent, and losses that are scaled.

    Raises:
        ValueError: There are such.
    """
    kinds = {device.type for device in devices or ()}
    for kind in kinds - {"cpu", "cuda"}:
        raise ValueError(f"{NAME}: needs accelerator='cpu' or 'gpu' (CUDA), not {kind!r}")
    if getattr(precision, "scaler", None) is not None or getattr(precision, "precision", "") in ("16-mixed", "16-true"):
        raise ValueError("Trainer(precision='16-mixed'): gradients of activations have no loss scale; use 'bf16-mixed'")


def check_module(module: LightningModule, callbacks: Sequence[Any]) -> None:
    """Refuse a module or a callback that cannot work with stages.

    Raises:
        ValueError: There is one.
    """
    if not module.automatic_optimization:
        raise ValueError(f"{NAME}: {type(module).__name__} optimizes by hand, but stages need automatic optimization")
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise ValueError(f"{NAME}: {type(module).__name__}.training_step takes an iterator; it must take a batch")
    if _private.is_compiled(module):
        raise ValueError(
            f"{NAME}: {type(module).__name__} is compiled, but its step is run in two halves; compile its layers"
        )
    for callback in callbacks:
        names = {cls.__name__ for cls in type(callback).__mro__}
        if _private.averages_weights(callback) or "StochasticWeightAveraging" in names:
            raise ValueError(f"{NAME}: {type(callback).__name__} averages a whole model, which no rank has")


def check_optimizers(optimizers: Sequence[Optimizer], parameters: Sequence[torch.Tensor]) -> None:
    """Refuse optimizers that need all parameters in one place, or hold some that are not the module's.

    Raises:
        ValueError: There is one.
    """
    known = {id(p) for p in parameters}
    for optimizer in optimizers:
        if isinstance(optimizer, LBFGS):
            raise ValueError(f"{NAME}: LBFGS needs all parameters in one place; use another optimizer")
        if any(id(p) not in known for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(
                f"{NAME}: {type(optimizer).__name__} holds parameters that are not part of the module; make it in "
                "configure_optimizers"
            )


def warn_of_repeats(module: LightningModule, accumulate: int, probability: float) -> None:
    """Warn where repeated batches are of no use, or are not what they were."""
    if probability == 1.0:
        return
    if accumulate > 1:
        rank_zero_warn(
            f"Trainer(accumulate_grad_batches={accumulate}) with Clapping: a batch that comes again within a window adds the "
            "same gradient; use larger batches and num_microbatches instead"
        )
    for hook in ("on_before_batch_transfer", "on_after_batch_transfer"):
        if getattr(type(module), hook) is not getattr(LightningModule, hook):
            rank_zero_warn(
                f"{type(module).__name__}.{hook} with Clapping: must not draw random numbers, or a batch that comes again is "
                "another one and the changes of its activations are large"
            )


@contextmanager
def own_names() -> Iterator[None]:
    """Let errors of the parts name the strategy's options.

    Raises:
        ValueError: The part's, with our name for its option.
    """
    try:
        yield
    except ValueError as error:
        text = str(error)
        for theirs, ours in (("cut(at=", "split="), ("cut(stages=", "split=None, stages="), ("Replay(", "")):
            if text.startswith(theirs):
                raise ValueError(f"{NAME}({ours}{text[len(theirs) :]}") from None
        raise ValueError(f"{NAME}: {text}") from None


def number_of(batch: Any, entry: int | str | None) -> torch.Tensor | None:
    """The numbers of the samples of a batch, if they are asked for.

    Raises:
        ValueError: It has no such entry.
    """
    if entry is None:
        return None
    try:
        numbers = batch[entry]
    except (LookupError, TypeError):
        numbers = None
    if not isinstance(numbers, torch.Tensor):
        raise ValueError(f"{NAME}(samples={entry!r}): the batch has no such entry with a tensor")
    return numbers
