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
