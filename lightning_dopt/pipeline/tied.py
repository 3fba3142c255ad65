"""Parameters that several stages share, such as one matrix for embedding and output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_dopt.pipeline.program import Program
from lightning_dopt.pipeline.stage import Stage


@dataclass(frozen=True)
class Tie:
    """One parameter on several ranks: each trains a copy of its own with the sum of all gradients.

    Attributes:
        ranks: The ranks that hold it, in order.
        places: For each of them a stage and the parameter's name in it.
    """

    ranks: tuple[int, ...]
    places: tuple[tuple[int, str], ...]


def ties(stages: Sequence[nn.Module], program: Program) -> list[Tie]:
    """The parameters that stages on different ranks share.

    Raises:
        ValueError: There are some, and the schedule has two pipes.
    """
    found = []
    for places in _shared(stages, "parameters"):
        ranks: dict[int, tuple[int, str]] = {}
        for stage, name in places:
            ranks.setdefault(program.rank_of(0, stage), (stage, name))
        if len(program.placement) > 1:
            (a, one), (b, other) = places[0], places[-1]
            raise ValueError(
                f"'{_name(stages[a], one)}' of stage {a} and '{_name(stages[b], other)}' of stage {b} are one tensor, which "
                f"'{program.name}' cannot train: cut such that both are in one stage, or take a schedule with one direction"
            )
        if len(ranks) > 1:
            found.append(Tie(tuple(sorted(ranks)), tuple(ranks[r] for r in sorted(ranks))))
    return found


def separate(stages: Sequence[nn.Module], program: Program) -> list[nn.Module]:
    """The stages with a copy of each shared parameter on every rank but the first, as on real ranks.

    Modules on the way to a copy are copied without their contents; the model itself stays as it is.
    """
    made = list(stages)
    for tie in ties(stages, program):
        stage, name = tie.places[0]
        shared = stages[stage].get_parameter(name)
        for rank in tie.ranks[1:]:
            copied = nn.Parameter(shared.detach().clone(), shared.requires_grad)
            for k in range(program.stages):
                if program.rank_of(0, k) == rank:
                    made[k] = _replaced(made[k], shared, copied)
    return made


def check_buffers(stages: Sequence[nn.Module]) -> None:
    """Refuse running statistics that two stages would update, each for itself.

    Raises:
        ValueError: There are such.
    """
    for places in _shared(stages, "buffers"):
        if places[0][1].rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked"):
            (a, one), (b, other) = places[0], places[-1]
            raise ValueError(
                f"cut(model): '{_name(stages[a], one)}' of stage {a} and '{_name(stages[b], other)}' of stage {b} are one "
                "tensor; on two ranks they would drift apart, so cut such that both are in one stage"
            )


def _shared(stages: Sequence[nn.Module], what: str) -> list[list[tuple[int, str]]]:
    """Tensors that are in several stages: their places, as stage and name, by tensor."""
    places: dict[Tensor, list[tuple[int, str]]] = {}
    for k, stage in enumerate(stages):
        named = stage.named_parameters if what == "parameters" else stage.named_buffers
        for name, tensor in named(remove_duplicate=False):
            places.setdefault(tensor, []).append((k, name))
    return [found for found in places.values() if len({k for k, _ in found}) > 1]


def _replaced(module: nn.Module, old: nn.Parameter, new: nn.Parameter) -> nn.Module:
    """The module, or a shallow copy of it if it holds the parameter, with another one in its place."""
    if all(p is not old for p in module.parameters()):
        return module
    made = object.__new__(type(module))
    made.__dict__.update(module.__dict__)
    made._parameters = {k: new if p is old else p for k, p in module._parameters.items()}
    made._modules = {k: None if m is None else _replaced(m, old, new) for k, m in module._modules.items()}
    return made


def _name(stage: nn.Module, name: str) -> str:
    return stage.model_name(name) if isinstance(stage, Stage) else name
