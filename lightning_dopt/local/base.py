"""What a correction is: a change of the inner step that knows nothing of wires."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_dopt._part import Part
from lightning_dopt.slots import Lane

if TYPE_CHECKING:
    from lightning_dopt.plan import Plan


@dataclass(frozen=True)
class Context:
    """What a correction may know of the replica that it works in.

    Attributes:
        rank: This worker.
        size: Number of workers.
        lanes: The flat buffers that together hold all trainable parameters.
        parameters: The same tensors by name.
        lr: The inner optimizer's current learning rate of a parameter, by name.
        state: The inner optimizer's state tensor of a parameter, by name and key (``KeyError`` if there is none yet).
        means: For every rank the weight of its replica in the consensus model; they sum to one.
    """

    rank: int
    size: int
    lanes: Sequence[Lane]
    parameters: Mapping[str, Tensor]
    lr: Callable[[str], float]
    state: Callable[[str, str], Tensor]
    means: Sequence[float]


class Correction(Part, ABC):
    """Plain data; :meth:`bind` makes the running object with its state."""

    slots: frozenset[str] = frozenset()
    """The slots whose syncs it works on; with ``"tracker"`` it sends a message of its own."""

    remembers: bool = False
    """Whether it makes up for what the compressor of such a sync leaves out, as a memory does."""

    def check(self, plan: Plan) -> None:
        """Raise ``ValueError`` in one line if the plan's syncs do not suit the correction."""

    def check_size(self, plan: Plan, n: int) -> None:
        """Raise ``ValueError`` in one line if the plan's topologies do not suit the correction with ``n`` workers."""

    def suits(self, momentum: bool, adaptive: bool) -> str | None:
        """What to change if inner optimizers of that kind are none that it can work with, ``None`` if they are.

        Args:
            momentum: Whether the inner optimizer steps along earlier gradients, too.
            adaptive: Whether it scales each element of a gradient by what it has seen.
        """
        return None

    @abstractmethod
    def bind(self, context: Context) -> BoundCorrection:
        """Prepare for work in one replica."""


class BoundCorrection:
    """A correction at work. The hooks that a correction does not need do nothing."""

    slots: frozenset[str] = frozenset()
    """The slots whose syncs it wants to see."""

    needs_own: bool = False
    """Whether it wants to see what came of its messages; see :meth:`on_received`."""

    passes: int = 1
    """How many forward and backward passes a step takes, from :meth:`on_begin` on; before the second comes :meth:`perturb`."""

    positions: Sequence[Tensor] = ()
    """If only few elements are trained: which ones, of each lane. Syncs of parameters and gradients send those alone."""

    def rechosen(self) -> bool:
        """Whether :attr:`positions` hold others than when last asked."""
        return False

    def prepare(self, slot: str, lanes: list[Lane]) -> None:
        """Once, before training: the lanes of a sync it wants to see."""

    def on_begin(self, due: Collection[str]) -> None:
        """Before the first forward pass of a step: the parameters may be moved until :meth:`restore`.

        Args:
            due: Slots whose syncs run between the two passes of this step.
        """

    def on_backward(self, names: Collection[str]) -> None:
        """After every backward pass, before all other hooks: change ``p.grad`` in place and keep nothing."""

    def perturb(self, names: Collection[str]) -> None:
        """After the first backward, if :attr:`passes` is 2: move these parameters for the second pass."""

    def restore(self, names: Collection[str]) -> None:
        """After the last backward: move the parameters back to where they shall be updated, keep the gradients."""

    def on_gradient(self, names: Collection[str]) -> None:
        """After backward and before any gradient is sent: change ``p.grad`` in place, of these parameters only."""

    def on_stepped(self) -> None:
        """After the optimizer's update and before anything is sent: change the parameters in place."""

    def on_round(self, slot: str, lane: Lane, speaks: bool, share: float) -> None:
        """Before :meth:`publish`: whether this rank takes part in the round, and the weight of all ranks that do."""

    def publish(self, slot: str, lane: Lane, message: Tensor) -> None:
        """Before ``message`` (a private copy with the lane's layout) is sent: change it in place."""

    def on_received(self, slot: str, lane: Lane, own: Tensor | None, result: Tensor) -> None:
        """Before the lane or its anchor takes a result, if :attr:`needs_own`: change ``result`` in place.

        Args:
            slot: The slot of the sync.
            lane: The lane that it is for.
            own: What receivers made of this rank's message; ``None`` if it took no part in the round.
            result: The combined messages.
        """

    def on_applied(self, slot: str, lane: Lane, sent: Tensor, new: Tensor, steps: int) -> None:
        """After the lane has taken a result.

        Args:
            slot: The slot of the sync.
            lane: Where the result is now.
            sent: What the lane held when the message left.
            new: The result itself. With ``order="awc"`` the lane holds it plus the inner optimizer's displacement.
            steps: Optimizer steps since the last result.
        """

    def scratch(self) -> list[Tensor]:
        """Work space that no checkpoint needs, for forecasts of memory."""
        return []

    def state(self) -> dict[str, Tensor]:
        """The tensors that belong in a checkpoint, to be overwritten in place on resume."""
        return {}
