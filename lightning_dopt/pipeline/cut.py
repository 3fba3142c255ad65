"""Cutting a model into stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from lightning_dopt._checks import check_choice, check_int
from lightning_dopt.pipeline.balance import balanced, measured_times, parameter_counts
from lightning_dopt.pipeline.families import BlockStage, Family, family_of, family_units
from lightning_dopt.pipeline.stage import SequentialStage, Stage, Unit
from lightning_dopt.pipeline.tied import check_buffers
from lightning_dopt.pipeline.trace import trace, units_of
from lightning_dopt.pipeline.traced import split

How = Literal["auto", "sequential", "blocks", "trace"]
Balance = Literal["parameters", "time"]
Build = Callable[[Sequence[int]], Sequence[Stage]]


def cut(
    model: nn.Module,
    stages: int | None = None,
    at: Sequence[int | str] | None = None,
    balance: Balance = "parameters",
    example: Tensor | None = None,
    how: How = "auto",
) -> list[Stage]:
    """Cut a model into stages. Nothing is copied: the stages share the model's modules.

    Either into ``stages`` of them, such that the largest is as small as possible, or right before the modules that ``at``
    names. Three kinds of models can be cut:

    * ``"sequential"``: an ``nn.Sequential`` without hooks, and those inside it.
    * ``"blocks"``: a model of a known :class:`~lightning_dopt.pipeline.Family`, a list of blocks between what comes before
      and what comes after: LLaMA of Hugging Face, and what ``register_family`` was told.
    * ``"trace"``: all others. The model's forward is traced with ``torch.fx``; everything is a whole that no cut goes
      through. Skip connections that cross a cut are packed into one tensor with the activation beside them.

    Args:
        model: The model. It takes one tensor, the batch first.
        stages: How many stages.
        at: Where each stage but the first begins, in order: names of modules, such as ``"layers.4"``, or, of an
            ``nn.Sequential``, indices of children.
        balance: What ``stages`` makes even: ``"parameters"``, or ``"time"`` of forward and backward, measured with
            ``example``. Where ``torch.distributed`` is initialized, rank 0's times count on all ranks, and all must call.
        example: An input of the model, for ``balance="time"`` and for traced models with cuts that several tensors cross.
        how: One of the three kinds; ``"auto"`` takes the first that fits.

    Raises:
        ValueError: Not exactly one of ``stages`` and ``at``; more stages than modules; an unknown or misplaced cut; the model
            is not of the kind ``how`` or cannot be traced; what crosses a cut cannot be sent; statistics of batch
            normalization would be in two stages.
    """
    check_choice("cut", "balance", balance, ("parameters", "time"))
    if (stages is None) == (at is None):
        raise ValueError(f"cut(stages={stages!r}, at={at!r}): give one of them")
    if balance == "time" and (stages is None or example is None):
        raise ValueError("cut(balance='time'): needs stages=... and example=..., an input to measure with")
    units, build = _plan(model, at, example, _kind(model, how))
    if at is not None:
        starts = _starts(model, units, at)
    else:
        count = check_int("cut", "stages", stages, 1)
        if count > len(units):
            raise ValueError(f"cut(stages={count!r}): the model has {len(units)} modules only")
        timed = balance == "time" and example is not None
        starts = balanced(measured_times(model, units, example) if timed else parameter_counts(units), count)  # type: ignore[arg-type]
    made = list(build(starts))
    check_buffers(made)
    return made


def _kind(model: nn.Module, how: How) -> str:
    check_choice("cut", "how", how, ("auto", "sequential", "blocks", "trace"))
    fits = {"sequential": _open(model), "blocks": family_of(model) is not None, "trace": True}
    kind = next(name for name, fit in fits.items() if fit) if how == "auto" else how
    if not fits[kind]:
        needs = (
            "an nn.Sequential without hooks of its own"
            if kind == "sequential"
            else "of a class that register_family knows"
        )
        raise ValueError(f"cut(model={type(model).__name__}, how={how!r}): must be {needs}")
    return kind


def _plan(
    model: nn.Module, at: Sequence[int | str] | None, example: Tensor | None, kind: str
) -> tuple[list[Unit], Build]:
    """The modules that may begin a stage, and how stages are made of their numbers."""
    if kind == "sequential":
        units = list(_units(model))
        return units, lambda starts: [SequentialStage(units[a:b]) for a, b in pairwise([0, *starts, len(units)])]
    family = family_of(model) if kind == "blocks" else None
    if family is not None:
        units = family_units(model, family)
        return units, lambda starts: _block_stages(model, family, units, starts)
    graph = trace(model, [name for name in at or () if isinstance(name, str)])
    return units_of(model, graph), lambda starts: split(model, graph, starts, example)


def _block_stages(model: nn.Module, family: Family, units: list[Unit], starts: Sequence[int]) -> list[BlockStage]:
    bounds = pairwise([0, *starts, len(units)])
    return [BlockStage(model, family, units, [name for name, _ in units[a:b]]) for a, b in bounds]


def _open(module: nn.Module) -> bool:
    """Whether its children may be run one by one instead of the module."""
    return type(module) is nn.Sequential and not module._forward_hooks and not module._forward_pre_hooks


def _units(model: nn.Module, prefix: str = "") -> Iterator[Unit]:
    for name, child in model._modules.items():
        assert child is not None
        if _open(child) and child._modules:
            yield from _units(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def _starts(model: nn.Module, units: Sequence[Unit], at: Sequence[int | str]) -> list[int]:
    """The number of the unit that each cut is before."""
    names = list(model._modules)
    starts = [0]
    for where in at:
        if isinstance(where, int) and not isinstance(model, nn.Sequential):
            raise ValueError(
                f"cut(at={list(at)!r}): {type(model).__name__} is no nn.Sequential, give names, not {where}"
            )
        if isinstance(where, int) and not 0 < where < len(names):
            raise ValueError(f"cut(at={list(at)!r}): {where} is no index from 1 to {len(names) - 1}")
        name = names[where] if isinstance(where, int) else where
        found = [k for k, (unit, _) in enumerate(units) if unit == name or unit.startswith(f"{name}.")]
        if not found:
            known = ", ".join(unit for unit, _ in units)
            raise ValueError(f"cut(at={list(at)!r}): no module {name!r} can begin a stage; there are {known}")
        if found[0] <= starts[-1]:
            raise ValueError(f"cut(at={list(at)!r}): the stage that begins with {name!r} would leave none before it")
        starts.append(found[0])
    return starts[1:]
