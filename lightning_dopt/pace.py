"""How many local steps workers of unequal speed take between two meetings."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor

from lightning_dopt._checks import check_flag, check_int
from lightning_dopt._part import Part

_ROUNDING = 1e-6  # speeds are measured: an H that misses an integer by rounding is that integer


class LocalSteps(Part):
    """How many steps a worker takes before it pushes: dynamic local updates (DyLU), or the same for all.

    ``H_i = max(1, floor(v_i / max_j v_j * H))`` with the speeds ``v`` in steps per second, so that all take about as long.

    Args:
        steps: ``H``, of the fastest worker.
        dynamic: Whether ``H_i`` follows the speed measured in the worker's last phase; otherwise it is ``H``.
        speeds: Steps per second until they are measured, one per worker; ``None``: first phases have ``H`` steps.

    Raises:
        ValueError: ``steps < 1``, speeds that are not positive, or speeds without ``dynamic``.

    Source: Liu et al., "Asynchronous Local-SGD Training for Language Modeling", arXiv 2401.09135.
    """

    def __init__(self, steps: int, dynamic: bool = False, speeds: Sequence[float] | None = None) -> None:
        self.steps = check_int("LocalSteps", "steps", steps, 1)
        self.dynamic = check_flag("LocalSteps", "dynamic", dynamic)
        self.speeds = speeds if speeds is None else [float(v) for v in speeds]
        if speeds is not None and not dynamic:
            raise ValueError(f"LocalSteps(speeds={speeds!r}): has no effect without dynamic=True")
        if self.speeds is not None and not (self.speeds and min(self.speeds) > 0.0):
            raise ValueError(f"LocalSteps(speeds={speeds!r}): must be positive numbers, one per worker")

    def of(self, speed: float, fastest: float) -> int:
        """``H_i`` of a worker with ``speed``, the fastest having ``fastest``."""
        if not self.dynamic:
            return self.steps
        return max(1, floor(speed / fastest * self.steps + _ROUNDING))


class Turns:
    """Which steps one rank takes: all at which ranks talk, and of the others as many as its share allows, spread evenly.

    Rounds have ``steps`` steps. How many of these are for talking is known from the round before; in the first one it is
    taken to be one, the last.

    Args:
        steps: Length of a round.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._talks, self._heard, self._free = 1, 0, 0
        self._asked, self._answer = -1, True

    def takes(self, step: int, share: int, talks: bool) -> bool:
        """Whether the rank takes optimizer step ``step`` (1 is the first); to be asked for one step after the other.

        Args:
            step: Its number.
            share: How many steps of a round the rank takes.
            talks: Whether ranks talk at this step.
        """
        if step == self._asked:
            return self._answer
        if (step - 1) % self.steps == 0:
            self._talks, self._heard, self._free = self._heard if step > self.steps else 1, 0, 0
        self._asked, self._answer = step, talks or self._may(share)
        if talks:
            self._heard += 1
        else:
            self._free += 1
        return self._answer

    def _may(self, share: int) -> bool:
        others, wanted = self.steps - self._talks, max(0, share - self._talks)
        if self._free >= others:  # less talk than in the round before
            return share == self.steps
        return (self._free + 1) * wanted // others > self._free * wanted // others

    def state_dict(self) -> dict[str, int]:
        """Where in the round it is."""
        return {"talks": self._talks, "heard": self._heard, "free": self._free}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there, with the step that comes next."""
        self._talks, self._heard, self._free = state["talks"], state["heard"], state["free"]
        self._asked = -1
