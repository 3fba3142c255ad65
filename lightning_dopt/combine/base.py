"""What a combine is: the rule by which the messages of several ranks become one, and how many rounds that takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lightning_dopt._part import Part
from lightning_dopt.comm.world import Talk
from lightning_dopt.compress import Identity
from lightning_dopt.topology.base import Topology

if TYPE_CHECKING:
    from lightning_dopt.plan import Sync


class Decode(Protocol):
    """Adds ``weight`` times one rank's decoded message to ``out``."""

    def __call__(self, out: Tensor, weight: float) -> None:
        """Accumulate into ``out`` in place."""


class Wire(Protocol):
    """What a combine may do with the network during one round of a sync."""

    size: int
    rank: int
    peers: Topology
    round: int
    """The topology's round of the first exchange; the following exchanges of the same sync count on from it."""

    def mix(self, value: Tensor, exchange: int = 0) -> Talk[Tensor]:
        """Encode, exchange and decode once: ``sum_j W[i, j] C(value_j)``, or what the codec's memory makes of it.

        May overwrite ``value``. ``exchange`` counts the exchanges of this round of the sync.
        """

    def swap(self, send: Mapping[int, Tensor], receive: Mapping[int, int]) -> Talk[dict[int, Tensor]]:
        """Send each rank in ``send`` its own bytes and get as many as ``receive`` says; result by source."""


class Combine(Part, ABC):
    """A rule that turns weighted messages into one tensor.

    Messages come in ascending order of their rank, the same on all ranks that get the same messages, so that results
    are reproducible to the last bit.
    """

    linear: bool = True
    """Whether one exchange is a weighted sum: sums may then be formed on the way (all-reduce, shift memories)."""

    extra_bytes: int = 0
    """Bytes that travel beside each message."""

    in_place: bool = True
    """Whether the live buffer itself may be handed over: the rule needs no copy of what it was given."""

    def check(self, sync: Sync) -> None:
        """Raise ``ValueError`` in one line if the rest of the sync does not suit the rule."""

    def check_size(self, sync: Sync, n: int) -> None:
        """Raise ``ValueError`` in one line if the sync's topology with ``n`` workers does not suit the rule."""

    def exchanges(self, peers: Topology, n: int) -> int:
        """How many times messages travel in one round of the sync."""
        return 1

    def state(self, start: Tensor, peers: Topology, n: int, rank: int) -> dict[str, Tensor]:
        """Fresh state for a lane that holds ``start`` when training begins."""
        return {}

    def talk(self, wire: Wire, value: Tensor, state: dict[str, Tensor]) -> Talk[Tensor]:
        """One round of the sync: from this rank's ``value`` to the combined result."""
        return (yield from wire.mix(value))

    @abstractmethod
    def __call__(self, messages: Sequence[tuple[float, Decode]], out: Tensor) -> None:
        """Combine the ``(weight, decode)`` pairs of one exchange into ``out``, which holds zeros."""


class WeightedSum(Combine):
    """The rules whose exchanges are weighted sums with the weights of the topology: ``sum_j W[i, j] m_j``."""

    def __call__(self, messages: Sequence[tuple[float, Decode]], out: Tensor) -> None:
        """See :class:`Combine`."""
        for weight, decode in messages:
            decode(out, weight)


def check_plain(rule: Combine, sync: Sync) -> None:
    """Refuse what rules that send more than the message cannot do.

    Raises:
        ValueError: a lossy codec, another slot than parameters, changes, an outer optimizer, or an order other than
            ``"atc"``.
    """
    if not isinstance(sync.codec, Identity):
        raise ValueError(f"Sync(codec={sync.codec!r}, combine={rule!r}): needs exact messages, use Identity()")
    if sync.what.slot != "parameters" or sync.signal != "value" or sync.outer is not None:
        raise ValueError(f"Sync(combine={rule!r}): is for parameters by value without outer")
    if sync.apply.delay or getattr(sync.apply, "order", "atc") != "atc":
        raise ValueError(f"Sync(apply={sync.apply!r}, combine={rule!r}): use apply=Blocking(order='atc')")


def number(value: float, like: Tensor) -> Tensor:
    """``value`` as a float64 tensor of one element on the device of ``like``."""
    return torch.full((1,), value, dtype=torch.float64, device=like.device)
