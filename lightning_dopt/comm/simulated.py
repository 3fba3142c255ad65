"""A world of many workers in one process, with a virtual clock: exact tests without processes, plans at any size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_dopt.comm.ledger import all_gather_bytes, all_reduce_bytes
from lightning_dopt.comm.link import Link, LinkClock, one_per_rank, slowest
from lightning_dopt.comm.links import REST, Links, OnLostPeer, check_links, make_links
from lightning_dopt.comm.world import Pending, SyncError, Talk, World

T = TypeVar("T")


@dataclass
class _Meeting:
    """The k-th operation of every worker: what each brought, and the shared outcome."""

    kind: str
    label: str
    brought: dict[int, Any] = field(default_factory=dict)
    posted: dict[int, float] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    taken: int = 0
    outcome: Any = None


class _Visit(Pending):
    def __init__(
        self,
        world: SimulatedWorld,
        index: int,
        finish: Callable[[_Meeting], Any],
        seconds: float,
        sources: Iterable[int] | None,
    ) -> None:
        self.world, self.index, self.finish, self.seconds = world, index, finish, seconds
        self.sources = None if sources is None else [world.rank, *sources]
        self.meeting = world.hub.meetings[index]
        self.label = self.meeting.label

    def wait(self) -> Any:
        """See :meth:`Pending.wait`."""
        world, meeting = self.world, self.meeting
        missing = sorted(set(range(world.size)) - set(meeting.brought))
        gone = world.hub.dead if world.links is not None and world.links.goes_on else set()
        if set(missing) - gone:
            raise SyncError(
                f"rank {world.rank}, step {world.step}, sync '{self.label}': "
                f"rank(s) {', '.join(map(str, missing))} never took part in this {meeting.kind}"
            )
        result = self.finish(meeting)
        if world.clock is not None:
            posted = meeting.posted  # an exchange waits for those it hears only
            heard = [j for j in self.sources or posted if j in posted]
            seconds = self.seconds if world.hub.alike else max(meeting.seconds[j] for j in heard)
            world.clock.wait(max(posted[j] for j in heard) + seconds)
        meeting.taken += 1
        if meeting.taken == len(meeting.brought):
            del world.hub.meetings[self.index]
        return result


class SimulatedWorld(World):
    """One simulated worker; make all of them with :meth:`SimulatedWorld.create` and drive them with :func:`lockstep`.

    Sums are formed in ascending rank order, so results are the same in every run.
    """

    def __init__(self, hub: _Hub, rank: int, size: int, clock: LinkClock | None, links: Links | None = None) -> None:
        super().__init__(rank, size, clock, links)
        self.hub = hub
        self._count = 0

    @classmethod
    def create(
        cls,
        size: int,
        link: Link | Sequence[Link] | None = None,
        on_lost_peer: OnLostPeer = "end",
        patience: float | None = None,
        rest: int = REST,
    ) -> list[SimulatedWorld]:
        """``size`` workers that can talk to each other, over links of the given speed if one is given.

        With links of unequal speed, one per worker, a transfer takes as long as the slowest of its ends needs.

        The other arguments are those of :class:`ProcessGroupWorld`, with ``patience`` in virtual seconds.

        Raises:
            ValueError: an argument out of range, or ``patience`` without ``link``.
        """
        check_links(cls.__name__, on_lost_peer, patience, rest)
        if patience is not None and link is None:
            raise ValueError(f"{cls.__name__}(patience={patience!r}): virtual time passes only with link=Link(...)")
        links = one_per_rank(cls.__name__, link, size)
        hub = _Hub(
            common=slowest(links) if links is not None else None, alike=links is None or len(set(map(repr, links))) == 1
        )
        return [
            cls(
                hub,
                rank,
                size,
                LinkClock(links[rank]) if links is not None else None,
                make_links(rank, size, on_lost_peer, patience, rest, cls.__name__),
            )
            for rank in range(size)
        ]

    @property
    def link(self) -> Link | None:
        """See :attr:`World.link`; the slowest, so that all choose alike."""
        return self.hub.common

    def die(self) -> None:
        """This worker takes part in nothing from now on, and nobody waits for it if the world goes on without lost peers."""
        self.hub.dead.add(self.rank)

    def _meet(
        self,
        kind: str,
        label: str,
        item: Any,
        finish: Callable[[_Meeting], Any],
        seconds: float,
        sources: Iterable[int] | None = None,
    ) -> Pending:
        index, self._count = self._count, self._count + 1
        meeting = self.hub.meetings.setdefault(index, _Meeting(kind, label))
        if (meeting.kind, meeting.label) != (kind, label):
            raise SyncError(
                f"rank {self.rank}, step {self.step}: starts {kind} for sync '{label}' where others started "
                f"{meeting.kind} for sync '{meeting.label}'"
            )
        meeting.brought[self.rank] = item
        if self.clock is not None:
            meeting.posted[self.rank] = self.clock.post(seconds) - seconds
            meeting.seconds[self.rank] = seconds
        return _Visit(self, index, finish, seconds, sources)

    def _reduce(self, tensor: Tensor, label: str, kind: str, combine: Callable[[list[Tensor]], Tensor]) -> Pending:
        def finish(meeting: _Meeting) -> Tensor:
            self.present = sorted(meeting.brought)
            if meeting.outcome is None:
                meeting.outcome = combine([meeting.brought[j].clone() for j in self.present])
            return tensor.copy_(meeting.outcome)

        seconds = self.clock.link.all_reduce(tensor.nbytes, self.size) if self.clock is not None else 0.0
        return self._meet(kind, label, tensor, finish, seconds)

    def all_reduce(self, tensor: Tensor, label: str, *, overhead: bool = False) -> Pending:
        """See :meth:`World.all_reduce`."""
        nbytes = all_reduce_bytes(tensor.nbytes, self.size)
        self.ledger.sent(label, 0 if overhead else nbytes, nbytes if overhead else 0)
        return self._reduce(tensor, label, "all_reduce", lambda ts: torch.stack(ts).sum(0))

    def all_reduce_max(self, tensor: Tensor, label: str) -> Pending:
        """See :meth:`World.all_reduce_max`."""
        self.ledger.sent(label, 0, all_reduce_bytes(tensor.nbytes, self.size))
        return self._reduce(tensor, label, "all_reduce_max", lambda ts: torch.stack(ts).amax(0))

    def all_gather(self, payload: Tensor, label: str) -> Pending:
        """See :meth:`World.all_gather`."""
        self.ledger.sent(label, all_gather_bytes(payload.nbytes, self.size))
        seconds = self.clock.link.all_gather(payload.nbytes, self.size) if self.clock is not None else 0.0

        def finish(meeting: _Meeting) -> Tensor:
            self.present = sorted(meeting.brought)
            if meeting.outcome is None:
                meeting.outcome = torch.stack([meeting.brought[j] for j in self.present])
            return meeting.outcome

        return self._meet("all_gather", label, payload, finish, seconds)

    def exchange(
        self,
        send: Mapping[int, Tensor],
        receive: Mapping[int, int],
        label: str,
        boxes: Mapping[int, Tensor] | None = None,
    ) -> Pending:
        """See :meth:`World.exchange`."""
        nbytes = sum(t.nbytes for t in send.values())
        self.ledger.sent(label, nbytes)
        seconds = self.clock.link.exchange(max(nbytes, sum(receive.values()))) if self.clock is not None else 0.0
        links, step = self.links, self.step
        flags = {j: links.flag(j, step) for j in send} if links is not None else {}

        def finish(meeting: _Meeting) -> dict[int, Tensor]:
            if meeting.outcome is None:  # copies: a worker may reuse its buffers once it has its own result
                meeting.outcome = {
                    j: {k: t.clone() for k, t in sent.items()} for j, (sent, _) in meeting.brought.items()
                }
            got = {}
            for j, length in sorted(receive.items()):
                if j not in meeting.brought:
                    assert links is not None
                    links.lose(j, step, "it never came")
                    self.ledger.skip(label, 1)
                    continue
                box = meeting.outcome[j].get(self.rank)
                if box is None or box.numel() != length:
                    what = "nothing" if box is None else f"{box.numel()} bytes"
                    raise SyncError(
                        f"rank {self.rank}, sync '{label}': expected {length} bytes of rank {j}, got {what}"
                    )
                got[j] = box
                if links is not None and self.clock is not None and j in flags:
                    waited = meeting.posted[j] + seconds - self.clock.now
                    links.met(j, self.step, flags[j], meeting.brought[j][1].get(self.rank, 0), waited)
            return got

        return self._meet("exchange", label, (dict(send), flags), finish, seconds, receive)

    def run(self, talk: Talk[T]) -> T:
        """A lone worker can only run code that never has to wait for another.

        Raises:
            SyncError: it had to; drive all workers together with :func:`lockstep`.
        """
        return lockstep([talk])[0]


class _Hub:
    def __init__(self, common: Link | None, alike: bool) -> None:
        self.common, self.alike = common, alike
        self.meetings: dict[int, _Meeting] = {}
        self.dead: set[int] = set()


def lockstep(talks: Sequence[Talk[T]]) -> list[T]:
    """Drive one talk per worker: each runs until it must wait, then all results are delivered, until all have ended.

    Raises:
        SyncError: workers disagree on what they do next.
    """
    results: dict[int, T] = {}
    waiting: dict[int, Pending] = {}
    for i, talk in enumerate(talks):
        try:
            waiting[i] = next(talk)
        except StopIteration as stop:
            results[i] = stop.value
    while waiting:
        # All workers have posted what they wait for before the first result is taken.
        for i, pending in list(waiting.items()):
            try:
                waiting[i] = talks[i].send(pending.wait())
            except StopIteration as stop:
                results[i] = stop.value
                del waiting[i]
    return [results[i] for i in range(len(talks))]
