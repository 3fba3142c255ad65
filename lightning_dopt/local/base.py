"""What a correction is: a change of the inner step that knows nothing of wires."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_dopt._part import Part
from lightning_dopt.slots import Lane

if TYPE_CHECKING:
    from lightning_dopt.plan import Plan


class Correction(Part, ABC):
    """Plain data; :meth:`bind` makes the running object with its state."""

    def check(self, plan: Plan) -> None:
        """Raise ``ValueError`` in one line if the plan's syncs do not suit the correction."""

    def check_size(self, plan: Plan, n: int) -> None:
        """Raise ``ValueError`` in one line if the plan's topologies do not suit the correction with ``n`` workers."""

    @abstractmethod
    def bind(self, lanes: list[Lane], parameters: Mapping[str, Tensor], lr: Callable[[str], float]) -> BoundCorrection:
        """Prepare for the parameters in ``lanes``; ``lr`` gives the current learning rate of a parameter by name."""


class BoundCorrection:
    """A correction at work. The hooks that a correction does not need do nothing."""

    slots: frozenset[str] = frozenset()
    """The slots whose syncs it wants to see."""

    def prepare(self, slot: str, lanes: list[Lane]) -> None:
        """Once, before training: the lanes of a sync it wants to see."""

    def on_gradient(self, names: Collection[str]) -> None:
        """After backward and before any gradient is sent: change ``p.grad`` in place, of these parameters only."""

    def publish(self, slot: str, lane: Lane, message: Tensor) -> None:
        """Before ``message`` (a private copy with the lane's layout) is sent: change it in place."""

    def on_applied(self, slot: str, lane: Lane, sent: Tensor, steps: int) -> None:
        """After the lane has taken a result; ``sent`` is what it was before, ``steps`` the steps since the last time."""

    def state(self) -> dict[str, Tensor]:
        """The tensors that belong in a checkpoint, to be overwritten in place on resume."""
        return {}
