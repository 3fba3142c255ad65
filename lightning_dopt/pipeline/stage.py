"""A stage: the part of a model that one rank of a pipeline runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

Unit = tuple[str, nn.Module]
"""A module that is not cut, and its name in the model."""


class Stage(nn.Module):
    """A run of consecutive modules of a model, which it shares with the model.

    Its input and its output are one tensor each; what crosses a cut beside the main activation is packed with it.

    Attributes:
        names: The names of its modules in the model.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)

    def model_name(self, name: str) -> str:
        """The name in the model of a parameter or buffer of this stage."""
        raise NotImplementedError

    def finish(self, output: Tensor) -> Any:
        """What the model returns, made of the output of its last stage."""
        return output


class SequentialStage(Stage):
    """Modules of an ``nn.Sequential``, run one after the other."""

    def __init__(self, units: Sequence[Unit]) -> None:
        super().__init__([name for name, _ in units])
        for number, (_, module) in enumerate(units):
            self.add_module(str(number), module)

    def forward(self, x: Tensor) -> Tensor:
        """From the activation before its first module to that behind its last one."""
        for module in self.children():
            x = module(x)
        return x

    def model_name(self, name: str) -> str:
        """``"3.weight"`` of ``"0.weight"``, if its first module is the model's fourth."""
        number, _, rest = name.partition(".")
        return f"{self.names[int(number)]}.{rest}"
