"""Which parts of a module become units of fully sharded training, where the module does not say so itself."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal
from weakref import WeakSet

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

STEPS = ("training_step", "validation_step", "test_step", "predict_step")
AfterForward = Literal["free", "node", "keep"]

SHARDED_HERE: WeakSet[LightningModule] = WeakSet()
"""Modules that were given to :func:`shard`, so that a second fit or validation knows them."""


def units(module: nn.Module, wrap: Sequence[str] | None) -> list[nn.Module]:
    """The parts that are gathered on their own, inner ones first.

    Args:
        module: The whole.
        wrap: Class names, or names of parts in which ``*`` stands for anything; ``None`` takes the elements of all lists of
            modules (transformer blocks usually are), but not of lists inside them.

    Raises:
        ValueError: an entry of ``wrap`` that nothing matches; units that share parameters, or have no forward.
    """
    chosen = _chosen(module, wrap)
    _refuse_ties(module, {n for n, m in module.named_modules() if any(m is c for c in chosen)}, wrap)
    return chosen


def _chosen(module: nn.Module, wrap: Sequence[str] | None) -> list[nn.Module]:
    named = [(n, m) for n, m in module.named_modules() if n and any(True for _ in m.parameters())]
    if wrap is None:
        lists = [n for n, m in named if isinstance(m, nn.ModuleList)]
        outer = [n for n in lists if not any(n.startswith(f"{other}.") for other in lists)]
        return [m for n, m in named if n.rpartition(".")[0] in outer]
    chosen = []
    for entry in wrap:
        found = [m for n, m in named if entry in (c.__name__ for c in type(m).__mro__[:1]) or fnmatchcase(n, entry)]
        if not found:
            raise ValueError(f"ShardedStrategy(wrap={list(wrap)!r}): {entry!r} is neither a class nor a name of a part")
        for part in found:
            if isinstance(part, (nn.ModuleList, nn.ModuleDict)):
                raise ValueError(
                    f"ShardedStrategy(wrap={list(wrap)!r}): {entry!r} is a {type(part).__name__}, which has no forward"
                )
        chosen += found
    inner_first = sorted(named, key=lambda pair: -pair[0].count("."))
    return [m for _, m in inner_first if any(m is other for other in chosen)]


def _refuse_ties(module: nn.Module, names: set[str], wrap: Sequence[str] | None) -> None:
    seen: dict[nn.Parameter, tuple[str, str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owner = name
        while owner and owner not in names:
            owner = owner.rpartition(".")[0]
        first, unit = seen.setdefault(parameter, (name, owner))
        if unit != owner:
            raise ValueError(f"ShardedStrategy(wrap={wrap!r}): {first} is tied to {name}, which is in another unit")


def shard(
    module: LightningModule, wrap: Sequence[str] | None, mesh: Any, after_forward: AfterForward, node_size: int
) -> None:
    """Call ``fully_shard`` on the units of a module, then on the whole, whose steps become forward methods."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    choices: dict[AfterForward, bool | int] = {"free": True, "node": node_size, "keep": False}
    for unit in units(module, wrap):
        fully_shard(unit, mesh=mesh, reshard_after_forward=choices[after_forward])
    fully_shard(module, mesh=mesh)
    for step in STEPS:
        if is_overridden(step, module):
            register_fsdp_forward_method(module, step)
    SHARDED_HERE.add(module)
