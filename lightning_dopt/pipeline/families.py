"""Models that are a list of blocks between what comes before and what comes after: decoders of language models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from lightning_dopt.pipeline.stage import Stage, Unit


@dataclass(frozen=True)
class Family:
    """Where a kind of model has its blocks.

    Every stage runs the *model's own* forward, in which the blocks of other stages are missing, and modules before and behind
    the blocks hand on what they are given where they belong to other stages. So each stage computes masks, positions and
    rotary tables itself, the way the model does, and one tensor crosses a cut. That needs a model whose modules ``before``
    and ``after`` take the hidden state, or what it is made of, and return it.

    Attributes:
        blocks: Name of the ``nn.ModuleList`` of blocks.
        before: Names of the modules that run before the blocks, in order.
        after: Names of the modules that run after them, in order.
        arguments: Arguments that the forward is always given, such as ``{"use_cache": False}``.
        output: Makes what the model returns of the tensor that its last module gives; ``None``: the tensor itself.
    """

    blocks: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    output: Callable[[Tensor], Any] | None = None


def _with_logits(logits: Tensor) -> Any:
    return import_module("transformers.modeling_outputs").CausalLMOutputWithPast(logits=logits)


def _with_hidden_state(hidden: Tensor) -> Any:
    return import_module("transformers.modeling_outputs").BaseModelOutputWithPast(last_hidden_state=hidden)


_FAMILIES: dict[str, Family] = {
    "transformers.LlamaForCausalLM": Family(
        "model.layers", ("model.embed_tokens",), ("model.norm", "lm_head"), {"use_cache": False}, _with_logits
    ),
    "transformers.LlamaModel": Family("layers", ("embed_tokens",), ("norm",), {"use_cache": False}, _with_hidden_state),
}


def register_family(kind: type[nn.Module], family: Family) -> None:
    """Tell :func:`~lightning_dopt.pipeline.cut` where models of this class, and of derived ones, have their blocks."""
    _FAMILIES[_key(kind)] = family


def family_of(model: nn.Module) -> Family | None:
    """The family of a model, if it is known."""
    return next((_FAMILIES[_key(kind)] for kind in type(model).__mro__ if _key(kind) in _FAMILIES), None)


def family_units(model: nn.Module, family: Family) -> list[Unit]:
    """The modules that may begin a stage, in order."""
    blocks = [f"{family.blocks}.{name}" for name, _ in model.get_submodule(family.blocks).named_children()]
    return [(name, model.get_submodule(name)) for name in (*family.before, *blocks, *family.after)]


class BlockStage(Stage):
    """Some of the blocks of a model, in the model's own forward."""

    def __init__(self, model: nn.Module, family: Family, units: Sequence[Unit], names: Sequence[str]) -> None:
        super().__init__(names)
        self.model = _with_only(model, family, {name for name, _ in units} - set(names))
        self.arguments, self.output = dict(family.arguments), family.output
        self.shells = ["", family.blocks, *_parents({family.blocks, *family.before, *family.after})]
        """Modules of the model that are here without all that is in them."""

    def forward(self, x: Tensor) -> Tensor:
        """From the hidden state, or tokens, to the hidden state, or what the model's last module gives."""
        mode = self.model.get_submodule(self.names[0]).training  # shared with the model, whose mode it follows
        for name in self.shells:
            self.model.get_submodule(name).training = mode
        output = self.model(x, **self.arguments)
        found: Tensor = output if isinstance(output, Tensor) else output[0]
        return found

    def finish(self, output: Tensor) -> Any:
        """What the model returns."""
        return output if self.output is None else self.output(output)

    def model_name(self, name: str) -> str:
        """Without ``"model."``, the name under which the stage has the model."""
        return name.partition(".")[2]


def _with_only(model: nn.Module, family: Family, gone: set[str]) -> nn.Module:
    """A shallow copy without some of its units; what it keeps is shared."""
    hollow = _shallow(model)
    for path in _parents({family.blocks, *family.before, *family.after}):
        _put(hollow, path, _shallow(hollow.get_submodule(path)))
    for name in gone - {f"{family.blocks}.{k}" for k, _ in model.get_submodule(family.blocks).named_children()}:
        _put(hollow, name, nn.Identity())
    blocks = _shallow(model.get_submodule(family.blocks))
    blocks._modules = {k: block for k, block in blocks._modules.items() if f"{family.blocks}.{k}" not in gone}
    _put(hollow, family.blocks, blocks)
    return hollow


def _parents(names: set[str]) -> list[str]:
    """The modules that these are in, outer ones first."""
    return sorted({".".join(name.split(".")[:k]) for name in names for k in range(1, name.count(".") + 1)})


def _shallow(module: nn.Module) -> nn.Module:
    made = object.__new__(type(module))
    made.__dict__.update(module.__dict__)
    made._modules = dict(module._modules)
    return made


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    where, _, leaf = name.rpartition(".")
    model.get_submodule(where)._modules[leaf] = module


def _key(kind: type) -> str:
    """A class by package and name, so that none must be imported to be known."""
    return f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}"
