"""The start of a fit: equal weights, an engine, and what to refuse or to warn of before the first step."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_dopt import client_errors
from lightning_dopt.combine import Contribution
from lightning_dopt.comm.world import World
from lightning_dopt.compress import DGC
from lightning_dopt.engine import Engine
from lightning_dopt.local.loss_weights import LossWeights, warn_if_scale_free
from lightning_dopt.plan import Plan
from lightning_dopt.strategies import _private
from lightning_dopt.strategies.optimizers import OptimizerIndex


def warn_of_stale_addresses() -> None:
    """Warn if workers that torchrun starts again may find the addresses of those before them, whom nobody answers for.

    The store that torchrun's agent serves outlives the workers, with all they have written into it (torch 2.5 and later).
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        rank_zero_warn(
            f"torchrun --max-restarts={restarts}: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where torchrun is started, or workers "
            "that are started again may look for the ones before them"
        )


def share_start(module: nn.Module) -> None:
    """Give all replicas rank 0's weights and buffers. Collective, on the default group."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.data, 0)


def make_engine(
    plan: Plan,
    module: LightningModule,
    index: OptimizerIndex,
    world: World,
    average_buffers: bool,
    offload: bool,
    made: type[Engine] = Engine,
) -> Engine:
    """The engine of a module and its optimizers."""
    saved = module.state_dict(keep_vars=True)  # buffers that no checkpoint holds are constants, such as rotary tables
    return made(
        plan,
        index.trainable,
        world,
        buffers={n: b for n, b in module.named_buffers() if n in saved},
        lr=index.lr,
        optimizer_state=index.state,
        gradient_groups=index.groups if index.several else None,
        sync_buffers=average_buffers,
        offload=offload,
    )


def refuse_unequal_loaders(batches: float, size: int) -> None:
    """Compare the number of training batches of all ranks. Collective, on the default group.

    Raises:
        ValueError: they differ.
    """
    all_batches: list[Any] = [None] * size
    dist.all_gather_object(all_batches, batches)
    if len(set(all_batches)) > 1:
        raise ValueError(
            f"ranks have unequal numbers of training batches, {all_batches}: ranks with more would wait for ever"
        )


def refuse_metric_schedulers(plan: Plan, schedulers: list[Any]) -> None:
    """Refuse schedulers that follow a metric, which may differ between ranks, where rounds depend on the learning rate.

    Raises:
        ValueError: there is one.
    """
    reading = [sync.when for sync in plan if sync.when.reads_lr]
    for config in schedulers:
        if reading and getattr(config, "reduce_on_plateau", False):
            raise ValueError(
                f"Sync(when={reading[0]!r}): {type(config.scheduler).__name__} follows a metric, so that ranks may disagree on the "
                "learning rate and wait for each other for ever; use a schedule of the step"
            )


def warn_of_averages(plan: Plan, size: int, callbacks: list[Any]) -> None:
    """Warn where ``WeightAveraging`` averages replicas that differ."""
    shared = any(s.what.slot == "gradients" and s.peers.is_mean(size) for s in plan)
    if size > 1 and not shared and any(_private.averages_weights(c) for c in callbacks):
        rank_zero_warn(
            "WeightAveraging averages each rank's own replica over time: validation measures other weights on every rank "
            "and the main checkpoint holds rank 0's average; after fit all ranks hold the mean of their averages"
        )


def refuse_unmeasured_errors(plan: Plan, callbacks: list[Any]) -> None:
    """Refuse plans that weigh clients by errors which nothing measures.

    Raises:
        ValueError: no callback says that it does (``measures_client_errors``).
    """
    if client_errors.counted(plan) and not any(getattr(c, "measures_client_errors", False) for c in callbacks):
        combine = next(s.combine for s in plan if isinstance(s.combine, Contribution) and s.combine.errors != "none")
        raise ValueError(f"{combine!r}: nothing measures errors, add callbacks.ClientErrors() to the Trainer")


def check_momentum(plan: Plan, inner: list[Optimizer]) -> None:
    """Momentum before the compressor and again in the optimizer is no published method, and most likely a mistake.

    Raises:
        ValueError: an optimizer has momentum, and so does the memory of the gradients.
    """
    memory = next((s.codec for s in plan if isinstance(s.codec, DGC) and s.what.slot == "gradients"), None)
    if memory is None or not memory.momentum:
        return
    for optimizer in inner:
        if any(group.get("momentum", 0) for group in optimizer.param_groups):
            raise ValueError(
                f"{memory!r} with {type(optimizer).__name__}(momentum=...): momentum would be applied twice; use an optimizer "
                "without momentum"
            )
        if any("betas" in group for group in optimizer.param_groups):
            rank_zero_warn(
                f"{memory!r} with {type(optimizer).__name__}: has its momentum before the compressor; use plain SGD, or "
                "ErrorFeedback with this optimizer"
            )


def refuse_optimizers(plan: Plan, inner: list[Optimizer]) -> None:
    """Refuse inner optimizers whose steps a correction of the plan would misread.

    Raises:
        ValueError: there is one, with what to change.
    """
    for optimizer in inner:
        momentum = any(group.get("momentum", 0) for group in optimizer.param_groups)
        adaptive = any(key in group for group in optimizer.param_groups for key in ("betas", "eps"))
        for correction in plan.corrections:
            advice = correction.suits(momentum, adaptive)
            if advice is not None:
                raise ValueError(f"{advice}; the inner optimizer is {type(optimizer).__name__}")


def warn_of_lost_weights(plan: Plan, inner: list[Optimizer], clip: float | None) -> None:
    """Warn where the optimizer or clipping undoes the weights of the losses."""
    if any(isinstance(c, LossWeights) for c in plan.corrections):
        for message in {warn_if_scale_free(optimizer, clip) for optimizer in inner} - {None}:
            rank_zero_warn(str(message))
