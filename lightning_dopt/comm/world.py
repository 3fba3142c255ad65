"""The world a rank lives in: who is there, and the four ways to talk to them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from typing import Any, TypeVar

from torch import Tensor

from lightning_dopt.comm.ledger import Ledger
from lightning_dopt.comm.link import Link, LinkClock
from lightning_dopt.comm.links import Links

T = TypeVar("T")


class SyncError(RuntimeError):
    """Communication failed: says which rank, which step, which sync, and who is missing."""


class Pending(ABC):
    """A message under way. The engine yields it where it needs the result; the world's driver waits."""

    label: str
    """Name of the sync that started it."""

    @abstractmethod
    def wait(self) -> Any:
        """Block until the result is there and return it.

        Raises:
            SyncError: a peer is gone or did not answer in time.
        """


Talk = Generator[Pending, Any, T]
"""Code that communicates: yields what it must wait for and is sent the result. One text serves both worlds."""


class World(ABC):
    """A rank's view of all ranks. Every operation starts at once and returns a :class:`Pending`.

    All ranks must start the same operations in the same order. A buffer handed over must not change until the result
    has been taken. Operations count their bytes in :attr:`ledger` under ``label``.
    """

    rank: int
    size: int
    step: int = 0
    """The optimizer step being synchronised, for error messages."""

    def __init__(self, rank: int, size: int, clock: LinkClock | None = None, links: Links | None = None) -> None:
        self.rank = rank
        self.size = size
        self.clock = clock
        self.ledger = Ledger()
        self.links = links
        """What this rank knows of links that may fail or rest; ``None`` if none may."""
        self.present = list(range(size))
        """The ranks that took part in the last sum over all: all of them, less those that were lost."""
        self.weights: dict[int, float] | None = None
        """How much each rank's message counts in a mean over all where some have nothing to say; ``None``: the peers' row."""

    @property
    def link(self) -> Link | None:
        """Speed of the links, as far as it is known: that of the virtual clock."""
        return self.clock.link if self.clock is not None else None

    @property
    def lost(self) -> list[int]:
        """The ranks that this rank knows to be lost."""
        seen = self.links.lost if self.links is not None else set()
        return sorted(seen | (set(range(self.size)) - set(self.present)))

    @abstractmethod
    def all_reduce(self, tensor: Tensor, label: str, *, overhead: bool = False) -> Pending:
        """Sum ``tensor`` over all ranks, in place. Result: the tensor, bit-equal on all ranks."""

    @abstractmethod
    def all_reduce_max(self, tensor: Tensor, label: str) -> Pending:
        """Maximum of ``tensor`` over all ranks, in place, for flags (counted as overhead). Result: the tensor."""

    @abstractmethod
    def all_gather(self, payload: Tensor, label: str) -> Pending:
        """Give every rank every rank's ``payload`` (1-D, equal sizes). Result: shape (size, len(payload))."""

    @abstractmethod
    def exchange(
        self,
        send: Mapping[int, Tensor],
        receive: Mapping[int, int],
        label: str,
        boxes: Mapping[int, Tensor] | None = None,
    ) -> Pending:
        """Send 1-D ``uint8`` tensors to the ranks in ``send`` and get one of known length from each in ``receive``.

        Result: ``{source: payload}``. Payloads may be written into ``boxes``, tensors of those lengths by source, which
        then hold them until the caller lends them again. Where peers may be lost (:attr:`links`), the ranks sent to and
        heard from must be the same, and the result leaves out those whose link failed.
        """

    @abstractmethod
    def run(self, talk: Talk[T]) -> T:
        """Drive communicating code to its end, waiting where it yields, and return its result."""
