"""The common base of everything a plan is made of: plain data that prints, compares and pickles by its arguments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


@functools.cache
def _parameters_of(init: Callable[..., None]) -> tuple[inspect.Parameter, ...]:
    return () if init is object.__init__ else tuple(inspect.signature(init).parameters.values())[1:]


class Part:
    """A plan's building block: an object fully described by its constructor arguments.

    A subclass stores each constructor argument under the argument's own name and keeps no other state, so two parts
    with equal arguments are equal and the printed form is the code that makes the part. Run-time state (anchors,
    memories, counters) lives in the engine, never in a part: one part may serve in several plans at once.
    """

    def arguments(self) -> dict[str, Any]:
        """The constructor arguments by name, in the order of the signature (``*args`` under their own name)."""
        return {p.name: getattr(self, p.name) for p in self._parameters()}

    @classmethod
    def _parameters(cls) -> tuple[inspect.Parameter, ...]:
        return _parameters_of(cls.__init__)

    def __repr__(self) -> str:
        defaults = {p.name: p.default for p in self._parameters()}
        shown = [f"{name}={value!r}" for name, value in self.arguments().items() if value != defaults[name]]
        return f"{type(self).__name__}({', '.join(shown)})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and isinstance(other, Part) and other.arguments() == self.arguments()

    def __hash__(self) -> int:
        return hash((type(self).__name__, repr(self)))
