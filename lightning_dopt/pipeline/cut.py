"""Cutting a model into stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import Tensor, nn

from lightning_dopt._checks import check_int

Unit = tuple[str, nn.Module]


class Stage(nn.Sequential):
    """A run of consecutive modules of a model, which it shares with the model.

    Attributes:
        names: The names of its modules in the model.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        super().__init__(*(module for _, module in units))
        self.names = tuple(name for name, _ in units)

    def model_name(self, name: str) -> str:
        """The name in the model of a parameter or buffer of this stage, e.g. ``"3.weight"`` of ``"0.weight"``."""
        number, _, rest = name.partition(".")
        return f"{self.names[int(number)]}.{rest}"


def cut(model: nn.Module, stages: int | None = None, at: Sequence[int | str] | None = None) -> list[Stage]:
    """Cut a sequential model into stages. Nothing is copied: the stages share the model's modules.

    Either into ``stages`` of them, such that the largest has as few parameters as possible, or right before the children
    that ``at`` gives. ``nn.Sequential`` inside ``nn.Sequential`` may be cut, too.

    Args:
        model: An ``nn.Sequential``.
        stages: How many stages.
        at: Where each stage but the first begins, in order: indices of children, or names such as ``"4"``, ``"head"``
            or, for a child of a child, ``"2.1"``.

    Raises:
        ValueError: The model is no ``nn.Sequential``; not exactly one of ``stages`` and ``at``; more stages than
            modules; an unknown or misplaced cut; a parameter or buffer would be in two stages, so that its copies
            would drift apart.
    """
    if not _open(model):
        raise ValueError(f"cut(model={type(model).__name__}): must be an nn.Sequential without hooks of its own")
    units = list(_units(model))
    if (stages is None) == (at is None):
        raise ValueError(f"cut(stages={stages!r}, at={at!r}): give one of them")
    starts = _starts(model, units, at) if at is not None else _balanced(units, check_int("cut", "stages", stages, 1))
    made = [Stage(units[first:last]) for first, last in pairwise([0, *starts, len(units)])]
    _check_not_tied(made)
    return made


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


def _balanced(units: Sequence[Unit], stages: int) -> list[int]:
    """Where the stages begin if the largest is to be as small as possible.

    Of equal ones an even one (sum of squares), and modules without parameters stay with what is before them.
    """
    if stages > len(units):
        raise ValueError(f"cut(stages={stages!r}): the model has {len(units)} modules only")
    total = [0]
    for _, module in units:
        total.append(total[-1] + sum(p.numel() for p in module.parameters()))
    # best[k]: the cheapest way to cut the first k units, as (largest, sum of squares, starts below 0).
    best: dict[int, tuple[int, int, list[int]]] = {k: (total[k], total[k] ** 2, []) for k in range(1, len(units) + 1)}
    for done in range(1, stages):
        best = {
            k: min(
                (max(best[j][0], total[k] - total[j]), best[j][1] + (total[k] - total[j]) ** 2, [*best[j][2], -j])
                for j in range(done, k)
            )
            for k in range(done + 1, len(units) + 1)
        }
    return [-start for start in best[len(units)][2]]


def _check_not_tied(stages: Sequence[Stage]) -> None:
    owner: dict[Tensor, tuple[int, str]] = {}
    for k, stage in enumerate(stages):
        tensors = [*stage.named_parameters(remove_duplicate=False), *stage.named_buffers(remove_duplicate=False)]
        for name, tensor in tensors:
            first, other = owner.setdefault(tensor, (k, stage.model_name(name)))
            if first != k:
                raise ValueError(
                    f"cut(model): '{other}' of stage {first} and '{stage.model_name(name)}' of stage {k} are one tensor; "
                    "on two ranks they would be trained apart, so cut such that both are in one stage"
                )
