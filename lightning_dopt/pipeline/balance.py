"""Where to cut such that no stage is much larger than the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_dopt.pipeline.batches import tensors
from lightning_dopt.pipeline.stage import Unit

REPEATS = 5
"""How often each module is timed; the fastest counts."""


def balanced(weights: Sequence[float], stages: int) -> list[int]:
    """Where the stages but the first begin if the largest is to be as small as possible.

    Of equal ones an even one (sum of squares), and units of no weight stay with what is before them.

    Args:
        weights: Weight of each unit, in order.
        stages: How many stages, at most as many as units.
    """
    total = [0.0]
    for weight in weights:
        total.append(total[-1] + weight)
    # best[k]: the cheapest way to cut the first k units, as (largest, sum of squares, starts below 0).
    best: dict[int, tuple[float, float, list[int]]]
    best = {k: (total[k], total[k] ** 2, []) for k in range(1, len(weights) + 1)}
    for done in range(1, stages):
        best = {
            k: min(
                (max(best[j][0], total[k] - total[j]), best[j][1] + (total[k] - total[j]) ** 2, [*best[j][2], -j])
                for j in range(done, k)
            )
            for k in range(done + 1, len(weights) + 1)
        }
    return [-start for start in best[len(weights)][2]]


def parameter_counts(units: Sequence[Unit]) -> list[float]:
    """How many parameters each unit has."""
    return [float(sum(p.numel() for p in module.parameters())) for _, module in units]


def measured_times(model: nn.Module, units: Sequence[Unit], example: Tensor, repeats: int = REPEATS) -> list[float]:
    """Seconds that the forward and backward of each unit take, the fastest of several runs, on the inputs it gets in the model.

    Buffers and random number generators are afterwards what they were, and no gradients are added to. Where
    ``torch.distributed`` is initialized the times of rank 0 count for all ranks, so all of them must call this.
    """
    calls: dict[str, list[tuple[Any, Any]]] = {name: [] for name, _ in units}
    with _unchanged(model, example):
        handles = [module.register_forward_pre_hook(_keeper(calls[name]), with_kwargs=True) for name, module in units]
        try:
            with torch.no_grad():
                model(example)
        finally:
            for handle in handles:
                handle.remove()
        times = [
            min(sum(_seconds(module, *call) for call in calls[name]) for _ in range(repeats)) for name, module in units
        ]
    if dist.is_available() and dist.is_initialized():
        box = [times]
        dist.broadcast_object_list(box, src=0)
        times = box[0]
    return times


def _keeper(calls: list[tuple[Any, Any]]) -> Callable[[nn.Module, Any, Any], None]:
    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append((args, kwargs))

    return keep


def _seconds(module: nn.Module, args: Any, kwargs: Any) -> float:
    """One forward and backward."""
    leaves = [a.detach().requires_grad_() for a in args if isinstance(a, Tensor) and a.is_floating_point()]
    rest = iter([leaf.clone() for leaf in leaves])  # a module may change its input in place, but no leaf
    args = tuple(next(rest) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    _wait(args)
    start = time.perf_counter()
    output = next((t for t in tensors(module(*args, **kwargs)) if t.requires_grad), None)
    if output is not None:
        wanted = [t for t in (*leaves, *module.parameters()) if t.requires_grad]
        torch.autograd.grad(output, wanted, torch.ones_like(output), allow_unused=True)
    _wait(args)
    return time.perf_counter() - start


def _wait(args: Any) -> None:
    device = next((t.device for t in tensors(args)), None)
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _unchanged(model: nn.Module, example: Tensor) -> Iterator[None]:
    """Undo what forwards change: running statistics, and draws of random numbers."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng(devices=[example.device] if example.is_cuda else []):
            yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)
