"""Meetings between real processes: two ranks swap their vectors while both go on computing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dopt._checks import check_int
from lightning_dopt.asynchronous.edges import Matchings
from lightning_dopt.comm.ledger import Ledger
from lightning_dopt.comm.process_group import said
from lightning_dopt.comm.world import SyncError

_HEADER_TAG, _PAYLOAD_TAG = 1, 2
_ASK, _STOP, _BYE, _LOST = range(4)
_NEVER = timedelta(days=365)  # a wait that expires closes all of a gloo group's connections, the healthy ones as well
_Decision = Literal["wait", "skip", "ask", "meet", "stop", "end", "fail"]


class PairExchange:
    """Holds the meetings of this rank in the order of a matching list that all ranks share.

    One thread holds meetings, one listens to each neighbour; both use a gloo group of their own. The computing thread
    only says how far this rank may go (:meth:`allow`). A rank asks its partner as soon as it may; the partner answers
    even if it is not that far itself, and first goes through the earlier indexes on its list. So whoever computes fastest
    sets the pace, and nobody waits for anyone's gradient. A meeting happens at both ends or at neither.

    The list has no cycles to wait in: of all unfinished meetings that somebody asked for, the one with the lowest index
    always finds both ends ready.

    Creating the object is collective.

    Args:
        matchings: Who meets whom at which index.
        take: ``take(index)`` gives what to send, CPU tensors that must stay as they are until ``give`` is called.
        give: ``give(received)`` takes tensors of the same shapes from the partner.
        timeout: How long the computing thread waits for progress before it gives up.
        max_ahead: How many indexes the computing thread may be ahead of the last meeting before it must wait.
        ledger: Where to count; ``None`` makes a new one.

    Raises:
        ValueError: an argument outside its range, or a list for another number of ranks.
    """

    def __init__(
        self,
        matchings: Matchings,
        take: Callable[[int], list[Tensor]],
        give: Callable[[list[Tensor]], None],
        timeout: timedelta = timedelta(minutes=30),
        max_ahead: int = 8,
        ledger: Ledger | None = None,
    ) -> None:
        if timeout <= timedelta(0):
            raise ValueError(f"PairExchange(timeout={timeout!r}): must be longer than zero")
        self.max_ahead = check_int("PairExchange", "max_ahead", max_ahead, 1)
        if matchings.n != dist.get_world_size():
            raise ValueError(f"PairExchange(matchings=<{matchings.n} ranks>): there are {dist.get_world_size()} ranks")
        self.matchings, self.take, self.give, self.timeout = matchings, take, give, timeout
        group = dist.new_group(backend="gloo", timeout=_NEVER)
        assert isinstance(group, dist.ProcessGroup)  # every rank belongs to it
        self.group = group
        self.rank = dist.get_rank()
        self.neighbours = matchings.neighbours(self.rank)
        self.ledger = ledger if ledger is not None else Ledger()
        self.meetings = 0
        """Meetings held so far."""
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._boxes: list[Tensor] = []
        self._failure: str | None = None
        self._culprit = -1
        self._reset(0)

    def _reset(self, first: int) -> None:
        self._next = self._limit = first
        self._asked = -1
        self._arrived: dict[int, int] = {}
        self._final: int | None = None
        self._finals: dict[int, int] = {}
        self._gone: set[int] = set()
        self._stopping = self._ended = False

    @property
    def running(self) -> bool:
        """Whether meetings are being held."""
        return bool(self._threads)

    # ------------------------------------------------------------------ for the computing thread

    def start(self, first: int = 0) -> None:
        """Begin at index ``first``, the same on all ranks.

        Raises:
            SyncError: the exchange has failed before.
            RuntimeError: it runs already.
        """
        self.check()
        if self.running:
            raise RuntimeError("PairExchange.start: it runs already")
        self._reset(first)
        targets: list[Callable[[], None]] = [self._hold_meetings]
        targets += [lambda j=j: self._listen(j) for j in self.neighbours]  # type: ignore[misc]
        self._threads = [threading.Thread(target=t, name="pair exchange", daemon=True) for t in targets]
        for thread in self._threads:
            thread.start()

    def check(self) -> None:
        """Raise what has gone wrong in the background, if anything has.

        Raises:
            SyncError: a rank is lost; names it.
        """
        if self._failure is not None:
            raise SyncError(self._failure)

    def allow(self, index: int) -> None:
        """This rank may hold all meetings below ``index``; waits while it is more than ``max_ahead`` indexes behind.

        Raises:
            SyncError: a rank is lost or did not answer in time; names it.
        """
        with self._changed:
            self._limit = max(self._limit, index)
            self._changed.notify_all()
            self._wait_until(lambda: index - self._next <= self.max_ahead)

    def stop(self) -> int:
        """Hold all meetings that this rank or its partners may still hold, then end; all ranks must come here.

        Returns:
            The index after the last one. Ranks end at different indexes: continue at the largest.

        Raises:
            SyncError: a rank is lost or did not stop in time; names it.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            self._wait_until(lambda: self._ended and self._gone == set(self.neighbours))
        for thread in self._threads:
            thread.join()
        self._threads = []
        return self._next

    def abort(self) -> None:
        """Give up: tell the neighbours, from the background, and refuse all further calls. Does not wait."""
        if self.running:
            self._fail("this rank gave up", self.rank)

    def close(self) -> None:
        """Give the connections back, unless threads still use them. Local; the object is of no use afterwards."""
        if not self.running and self._failure is None:
            self._failure = f"rank {self.rank}: this exchange is closed"
            dist.destroy_process_group(self.group)

    def _wait_until(self, done: Callable[[], bool]) -> None:
        start = time.perf_counter()
        seconds = self.timeout.total_seconds()
        good = self._changed.wait_for(lambda: self._failure is not None or done(), seconds)
        self.ledger.stalled("pairs", time.perf_counter() - start)
        self.check()
        if not good:
            who = ", ".join(map(str, self._awaited())) or "unknown"
            self._fail(f"no answer after {seconds:g} s from rank(s) {who}", -1)
            self.check()

    def _awaited(self) -> list[int]:
        partner = self.matchings.partner(self.rank, self._next)
        if partner is not None and self._asked == self._next:
            return [partner]
        return sorted(set(self.neighbours) - self._gone)

    def _fail(self, reason: str, culprit: int) -> None:
        with self._changed:
            if self._failure is None:
                self._failure = f"rank {self.rank}, meeting {self._next}: {reason}"
                self._culprit = culprit
            self._changed.notify_all()

    # ------------------------------------------------------------------ the listening threads

    def _listen(self, source: int) -> None:
        header = torch.zeros(2, dtype=torch.int64)
        while source not in self._gone:
            try:
                dist.recv(header, src=source, group=self.group, tag=_HEADER_TAG)
            except (RuntimeError, dist.DistError) as error:
                self._fail(f"lost rank {source} ({said(error)})", source)
                return
            self._heard(source, int(header[0]), int(header[1]))

    def _heard(self, source: int, kind: int, value: int) -> None:
        with self._changed:
            if kind == _ASK:
                self._arrived[source] = value
                self._limit = max(self._limit, value + 1)
            elif kind == _STOP:
                self._finals[source] = value
            elif kind == _BYE:
                self._gone.add(source)
            self._changed.notify_all()
        if kind == _LOST:
            others = value not in (source, -1)
            self._fail(f"rank {source} " + (f"says that rank {value} is lost" if others else "gave up"), value)

    # ------------------------------------------------------------------ the meeting thread

    def _hold_meetings(self) -> None:
        try:
            while (decision := self._decision()) not in ("end", "fail"):
                if decision == "stop":
                    self._final = max(self._limit, self._next)
                    self._tell_all(_STOP, self._final)
                elif decision == "ask":
                    self._asked = self._next
                    self._tell(self._partner(), _ASK, self._next)
                else:
                    if decision == "meet":
                        self._meet(self._partner())
                    with self._changed:
                        self._next += 1
                        self._changed.notify_all()
            self._tell_all(*((_BYE, 0) if decision == "end" else (_LOST, self._culprit)))
        except Exception as error:  # must reach the computing thread
            self._fail(f"{type(error).__name__}: {said(error)}", -1)
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _partner(self) -> int:
        partner = self.matchings.partner(self.rank, self._next)
        assert partner is not None  # decided by _decide
        return partner

    def _decision(self) -> _Decision:
        peer = self.matchings.partner(self.rank, self._next)
        with self._changed:
            self._changed.wait_for(lambda: self._decide(peer) != "wait")
            return self._decide(peer)

    def _decide(self, peer: int | None) -> _Decision:
        """What to do at the present index.

        Two ranks that have both stopped meet at the indexes below the larger of their final ones, and each knows the
        other's before any later request of it, since messages of a pair keep their order.
        """
        index, final = self._next, self._final
        if self._failure is not None:
            return "fail"
        if self._stopping and final is None:
            return "stop"
        all_stopped = final is not None and len(self._finals) == len(self.neighbours)
        if all_stopped and index >= max([final or 0, *self._finals.values()]):
            return "end"
        if peer is None:
            return "skip" if index < self._limit or final is not None else "wait"
        if final is not None and peer in self._finals and index >= max(final, self._finals[peer]):
            return "skip"
        if index >= self._limit:
            return "wait"
        if self._asked != index:
            return "ask"
        return "meet" if self._arrived.get(peer) == index else "wait"

    def _tell(self, peer: int, kind: int, value: int) -> None:
        try:
            dist.send(torch.tensor([kind, value]), dst=peer, group=self.group, tag=_HEADER_TAG)
        except (RuntimeError, dist.DistError) as error:
            self._fail(f"lost rank {peer} ({said(error)})", peer)

    def _tell_all(self, kind: int, value: int) -> None:
        for j in self.neighbours:
            if j != self._culprit:
                self._tell(j, kind, value)

    def _meet(self, peer: int) -> None:
        sent = self.take(self._next)
        if len(self._boxes) != len(sent):
            self._boxes = [torch.empty_like(t) for t in sent]
        try:
            works = [dist.irecv(t, src=peer, group=self.group, tag=_PAYLOAD_TAG) for t in self._boxes]
            works += [dist.isend(t, dst=peer, group=self.group, tag=_PAYLOAD_TAG) for t in sent]
            for work in works:
                assert work is not None
                work.wait()
        except (RuntimeError, dist.DistError) as error:
            self._fail(f"lost rank {peer} ({said(error)})", peer)
            return
        self.give(self._boxes)
        self.meetings += 1
        self.ledger.sent("pairs", sum(t.nbytes for t in sent))
