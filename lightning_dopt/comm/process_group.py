"""The world of real processes on ``torch.distributed`` (gloo, NCCL)."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dopt.comm.ledger import all_gather_bytes, all_reduce_bytes
from lightning_dopt.comm.link import LinkClock
from lightning_dopt.comm.links import REST, OnLostPeer, make_links
from lightning_dopt.comm.through_zero import ThroughZero
from lightning_dopt.comm.world import Pending, SyncError, Talk, World

T = TypeVar("T")
# One function, renamed in torch 2.14.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
TAGS = 65536
"""Operations until their tags start again; gloo matches by tag, NCCL by order, and both hold here."""


class _Work(Pending):
    """One or several asynchronous operations of ``torch.distributed`` and what they result in."""

    def __init__(
        self,
        world: ProcessGroupWorld,
        works: list[Any],
        result: Callable[[], Any],
        label: str,
        peers: str,
        done: float,
        keep: object = None,
    ) -> None:
        self.world, self.works, self.result, self.label, self.peers = world, works, result, label, peers
        self.step = world.step
        self.done = done
        self.keep = keep  # tensors that must stay alive until the transfer ends

    def wait(self) -> Any:
        """See :meth:`Pending.wait`."""
        start = time.perf_counter()
        try:
            for work in self.works:
                work.wait()
        except (RuntimeError, dist.DistError) as error:
            waited = time.perf_counter() - start
            raise self.world.gave_up(self.label, self.step, self.peers, waited, error) from error
        self.world.ledger.stalled(self.label, time.perf_counter() - start)
        if self.world.clock is not None:
            self.world.clock.wait(self.done)
        self.keep = None
        return self.result()


class _Neighbours(Pending):
    """An exchange over links that may fail or rest: every neighbour is waited for on its own.

    Never with a time limit of gloo's, which would close the links to all others, too.
    """

    def __init__(
        self, world: ProcessGroupWorld, send: Mapping[int, Tensor], boxes: dict[int, Tensor], label: str, done: float
    ) -> None:
        assert world.links is not None
        self.world, self.links, self.send, self.boxes, self.label, self.done = (
            world, world.links, dict(send), boxes, label, done,
        )  # fmt: skip
        self.step, tag = world.step, world.next_tag()
        start = time.perf_counter()
        self.flags = {j: self.links.flag(j, self.step) for j in boxes} if self.links.patience is not None else {}
        self.bytes = {j: torch.tensor([flag, 0], dtype=torch.uint8) for j, flag in self.flags.items()}
        self.works: dict[int, list[Any]] = {}
        for j, box in boxes.items():
            with world.may_lose(j, label, self.step, start):
                self.works[j] = [world.post(dist.irecv, box, j, tag), world.post(dist.isend, send[j], j, tag)]
                if j in self.bytes:
                    mine, theirs = self.bytes[j][:1], self.bytes[j][1:]
                    self.works[j] += [
                        world.post(dist.irecv, theirs, j, tag, 1),
                        world.post(dist.isend, mine, j, tag, 1),
                    ]

    def wait(self) -> dict[int, Tensor]:
        """See :meth:`Pending.wait`."""
        start = now = time.perf_counter()
        got = {}
        for j, works in self.works.items():
            with self.world.may_lose(j, self.label, self.step, start):
                for work in works:
                    work.wait()
                got[j] = self.boxes[j]
            before, now = now, time.perf_counter()  # time spent on others before is not this one's
            if j in got and j in self.flags:
                self.links.met(j, self.world.step, self.flags[j], int(self.bytes[j][1]), now - before)
        self.world.ledger.skip(self.label, len(self.boxes) - len(got))
        self.world.ledger.stalled(self.label, now - start)
        if self.world.clock is not None:
            self.world.clock.wait(self.done)
        self.send = {}
        return got


def no_answer(rank: int, step: int, where: str, who: str, waited: float, error: Exception) -> str:
    """The line of a :class:`SyncError`: where this rank waited, for whom, and what the backend said."""
    return f"rank {rank}, step {step}, {where}: no answer after {waited:.1f} s from {who} ({said(error)})"


def said(error: Exception) -> str:
    """What torch said, in one line and without the place in its sources."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[\S*\] ", "", first).partition(". This is typically caused by")[0]


class ProcessGroupWorld(World):
    """All processes of ``torch.distributed``, on a process group of its own.

    Creating it is collective: every rank must do so at the same point. Engine traffic never shares the default group,
    which loggers and barriers use.

    Args:
        timeout: How long a rank waits for its peers before it gives up with a :class:`SyncError`.
        backend: Backend of the group; ``None`` takes the default group's.
        clock: A virtual link clock that also runs.
        diagnose: Called with (label, step) after a failure, returns who is missing in words, or an empty string.
        on_lost_peer: ``"end"``: a peer that is gone ends the run with a :class:`SyncError`. ``"continue"``: the others go on
            without it, see :class:`~lightning_dopt.comm.links.Links`; sums over all ranks then go through rank 0, whose
            loss ends the run. A peer that hangs with its connections open still ends those that wait for it after
            ``timeout``.
        patience: Seconds to wait for a neighbour before its link is to rest; ``None``: links never rest.
        rest: Optimizer steps with a meeting of the pair that a link rests.
        group: A process group that this rank belongs to, whose members are the workers; it has a backend and a timeout of its
            own, and nothing else may use it. ``None`` makes one of all processes.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialized.
        ValueError: an argument out of range, or a backend other than gloo with ``on_lost_peer="continue"`` or ``patience``.
    """

    def __init__(
        self,
        timeout: timedelta = timedelta(minutes=30),
        backend: str | None = None,
        clock: LinkClock | None = None,
        diagnose: Callable[[str, int], str] | None = None,
        on_lost_peer: OnLostPeer = "end",
        patience: float | None = None,
        rest: int = REST,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if not dist.is_initialized():
            raise RuntimeError("ProcessGroupWorld: call torch.distributed.init_process_group first")
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        links = make_links(rank, size, on_lost_peer, patience, rest, type(self).__name__)
        used = backend or dist.get_backend(group)
        if links is not None and used != "gloo":
            raise ValueError(
                f"ProcessGroupWorld(backend={used!r}): links may fail or rest (on_lost_peer, patience) only with 'gloo'"
            )
        super().__init__(rank, size, clock, links)
        made = group if group is not None else dist.new_group(timeout=timeout, backend=backend)
        assert isinstance(made, dist.ProcessGroup)  # every rank belongs to it
        self.group = made
        self.diagnose: Callable[[str, int], str] = diagnose or (lambda label, step: "")
        self._tag = 0

    def _start(
        self,
        start: Callable[[], list[Any]],
        result: Callable[[], Any],
        label: str,
        peers: str,
        seconds: float,
        keep: object,
    ) -> Pending:
        done = self.clock.post(seconds) if self.clock is not None else 0.0
        pending = _Work(self, [], result, label, peers, done, keep)
        try:
            pending.works = start()
        except (RuntimeError, dist.DistError) as error:
            raise self.gave_up(label, pending.step, peers, 0.0, error) from error
        return pending

    def gave_up(self, label: str, step: int, peers: str, waited: float, error: Exception) -> SyncError:
        """The error to raise when ``peers`` did not answer."""
        who = self.diagnose(label, step) or peers
        return SyncError(no_answer(self.rank, step, f"sync '{label}'", who, waited, error))

    @contextmanager
    def may_lose(self, j: int, label: str, step: int, start: float) -> Iterator[None]:
        """Communication with rank ``j`` alone: if it fails the link is lost, or the run ends.

        Raises:
            SyncError: lost peers end the run, or the time is up, after which gloo closes all links of this rank.
        """
        try:
            yield
        except (RuntimeError, dist.DistError) as error:
            late = re.search("timed out|timeout", said(error), re.IGNORECASE)
            if self.links is None or not self.links.goes_on or late:
                raise self.gave_up(label, step, f"rank(s) {j}", time.perf_counter() - start, error) from error
            self.links.lose(j, step, said(error))

    def next_tag(self) -> int:
        """The tag of the next operation, the same on all ranks."""
        self._tag = (self._tag + 1) % TAGS
        return self._tag

    def post(self, operation: Callable[..., Any], tensor: Tensor, j: int, tag: int, kind: int = 0) -> Any:
        """Start ``dist.isend`` or ``dist.irecv`` with rank ``j``; different ``kind`` of one operation do not mix."""
        return operation(tensor, self._global(j), group=self.group, tag=tag + kind * TAGS)

    @property
    def _through_zero(self) -> bool:
        return self.size > 1 and self.links is not None and self.links.goes_on

    def meet(
        self,
        mine: Tensor,
        fold: Callable[[int, Tensor], None],
        answer: Callable[[], Tensor],
        result: Callable[[Tensor], Any],
        label: str,
        answer_bytes: int = 0,
        overhead: bool = True,
    ) -> Pending:
        """A collective over the ranks that are left, see :class:`ThroughZero`; needs ``on_lost_peer="continue"``.

        Args:
            mine: This rank's bytes.
            fold: See :class:`ThroughZero`.
            answer: See :class:`ThroughZero`.
            result: See :class:`ThroughZero`.
            label: Name in the ledger and in errors.
            answer_bytes: Length of the answer, for the ledger of rank 0.
            overhead: Whether the bytes carry no part of the signal.
        """
        nbytes = answer_bytes * (self.size - len(self.lost) - 1) if self.rank == 0 else len(mine)
        self.ledger.sent(label, 0 if overhead else nbytes, nbytes if overhead else 0)
        return ThroughZero(self, mine, fold, answer, result, label, self.next_tag())

    def _fold(self, tensor: Tensor, into: Callable[[Tensor, Tensor], Any], label: str, overhead: bool) -> Pending:
        """``tensor`` of all ranks that are left folded into one, in ascending order of the ranks."""
        total: list[Tensor] = []

        def fold(j: int, got: Tensor) -> None:
            value = got.view(tensor.dtype)
            if total:
                into(total[0], value)
            else:
                total.append(value.clone())

        def result(out: Tensor) -> Tensor:
            return tensor.copy_(out.view(tensor.dtype).view(tensor.shape))

        mine = _bytes(tensor)
        return self.meet(mine, fold, lambda: total[0].view(torch.uint8), result, label, len(mine), overhead)

    def _reduce(self, tensor: Tensor, op: Any, label: str) -> Pending:
        seconds = self.clock.link.all_reduce(tensor.nbytes, self.size) if self.clock is not None else 0.0
        return self._start(
            lambda: [dist.all_reduce(tensor, op=op, group=self.group, async_op=True)] if self.size > 1 else [],
            lambda: tensor,
            label,
            "some rank",
            seconds,
            tensor,
        )

    def all_reduce(self, tensor: Tensor, label: str, *, overhead: bool = False) -> Pending:
        """See :meth:`World.all_reduce`."""
        if self._through_zero:
            return self._fold(tensor, torch.Tensor.add_, label, overhead)
        nbytes = all_reduce_bytes(tensor.nbytes, self.size)
        self.ledger.sent(label, 0 if overhead else nbytes, nbytes if overhead else 0)
        return self._reduce(tensor, dist.ReduceOp.SUM, label)

    def all_reduce_max(self, tensor: Tensor, label: str) -> Pending:
        """See :meth:`World.all_reduce_max`."""
        if self._through_zero:
            return self._fold(tensor, lambda a, b: torch.maximum(a, b, out=a), label, True)
        self.ledger.sent(label, 0, all_reduce_bytes(tensor.nbytes, self.size))
        return self._reduce(tensor, dist.ReduceOp.MAX, label)

    def all_gather(self, payload: Tensor, label: str, *, overhead: bool = False) -> Pending:
        """See :meth:`World.all_gather`. Where peers may be lost the rows are those of the ranks that are left."""
        if self._through_zero:
            rows: list[Tensor] = []
            payload_bytes = _bytes(payload)
            return self.meet(
                payload_bytes,
                lambda j, row: rows.append(row),
                lambda: torch.cat(rows),
                lambda out: out.view(payload.dtype).view(-1, *payload.shape).to(payload.device),
                label,
                len(payload_bytes) * self.size,
                overhead,
            )
        nbytes = all_gather_bytes(payload.nbytes, self.size)
        self.ledger.sent(label, 0 if overhead else nbytes, nbytes if overhead else 0)
        out = torch.empty((self.size, *payload.shape), dtype=payload.dtype, device=payload.device)
        if self.size == 1:
            out.copy_(payload.unsqueeze(0))
        seconds = self.clock.link.all_gather(payload.nbytes, self.size) if self.clock is not None else 0.0
        return self._start(
            lambda: [_all_gather(out.view(-1), payload, group=self.group, async_op=True)] if self.size > 1 else [],
            lambda: out,
            label,
            "some rank",
            seconds,
            (payload, out),
        )

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
        device = next((t.device for t in send.values()), torch.device("cpu"))
        lent = boxes or {}
        boxes = {
            j: lent[j] if j in lent else torch.empty(length, dtype=torch.uint8, device=device)
            for j, length in sorted(receive.items())
        }
        seconds = self.clock.link.exchange(max(nbytes, sum(receive.values()))) if self.clock is not None else 0.0
        if self.links is not None and send.keys() == receive.keys():
            return _Neighbours(self, send, boxes, label, self.clock.post(seconds) if self.clock is not None else 0.0)
        tag = self.next_tag()
        ops = [dist.P2POp(dist.irecv, box, self._global(j), self.group, tag) for j, box in boxes.items()]
        ops += [dist.P2POp(dist.isend, t, self._global(j), self.group, tag) for j, t in sorted(send.items())]
        peers = f"rank(s) {', '.join(map(str, sorted({*send, *receive})))}"
        return self._start(
            lambda: dist.batch_isend_irecv(ops) if ops else [],
            lambda: boxes,
            label,
            peers,
            seconds,
            (dict(send), boxes),
        )

    def _global(self, rank: int) -> int:
        return dist.get_global_rank(self.group, rank)

    def run(self, talk: Talk[T]) -> T:
        """See :meth:`World.run`."""
        try:
            pending = next(talk)
            while True:
                pending = talk.send(pending.wait())
        except StopIteration as stop:
            return stop.value


def _bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor in main memory, 1-D, without a copy where possible."""
    return tensor.detach().cpu().reshape(-1).view(torch.uint8)
