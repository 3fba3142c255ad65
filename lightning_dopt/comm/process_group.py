"""The world of real processes on ``torch.distributed`` (gloo, NCCL)."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dopt.comm.ledger import all_gather_bytes, all_reduce_bytes
from lightning_dopt.comm.link import LinkClock
from lightning_dopt.comm.world import Pending, SyncError, Talk, World

T = TypeVar("T")
# One function, renamed in torch 2.14.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


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
            raise SyncError(self._explain(error, time.perf_counter() - start)) from error
        self.world.ledger.stalled(self.label, time.perf_counter() - start)
        if self.world.clock is not None:
            self.world.clock.wait(self.done)
        self.keep = None
        return self.result()

    def _explain(self, error: Exception, waited: float) -> str:
        who = self.world.diagnose(self.label, self.step) or self.peers
        return no_answer(self.world.rank, self.step, f"sync '{self.label}'", who, waited, error)


def no_answer(rank: int, step: int, where: str, who: str, waited: float, error: Exception) -> str:
    """The line of a :class:`SyncError`: where this rank waited, for whom, and what the backend said."""
    said = (str(error).splitlines() or [type(error).__name__])[0]
    said = re.sub(r"^\[\S*\] ", "", said).partition(". This is typically caused by")[0]
    return f"rank {rank}, step {step}, {where}: no answer after {waited:.1f} s from {who} ({said})"


class ProcessGroupWorld(World):
    """All processes of ``torch.distributed``, on a process group of its own.

    Creating it is collective: every rank must do so at the same point. Engine traffic never shares the default group,
    which loggers and barriers use.

    Args:
        timeout: How long a rank waits for its peers before it gives up with a :class:`SyncError`.
        backend: Backend of the group; ``None`` takes the default group's.
        clock: A virtual link clock that also runs.
        diagnose: Called with (label, step) after a failure, returns who is missing in words, or an empty string.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialized.
    """

    def __init__(
        self,
        timeout: timedelta = timedelta(minutes=30),
        backend: str | None = None,
        clock: LinkClock | None = None,
        diagnose: Callable[[str, int], str] | None = None,
    ) -> None:
        if not dist.is_initialized():
            raise RuntimeError("ProcessGroupWorld: call torch.distributed.init_process_group first")
        super().__init__(dist.get_rank(), dist.get_world_size(), clock)
        group = dist.new_group(timeout=timeout, backend=backend)
        assert isinstance(group, dist.ProcessGroup)  # every rank belongs to it
        self.group = group
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
            raise SyncError(pending._explain(error, 0.0)) from error
        return pending

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
        nbytes = all_reduce_bytes(tensor.nbytes, self.size)
        self.ledger.sent(label, 0 if overhead else nbytes, nbytes if overhead else 0)
        return self._reduce(tensor, dist.ReduceOp.SUM, label)

    def all_reduce_max(self, tensor: Tensor, label: str) -> Pending:
        """See :meth:`World.all_reduce_max`."""
        self.ledger.sent(label, 0, all_reduce_bytes(tensor.nbytes, self.size))
        return self._reduce(tensor, dist.ReduceOp.MAX, label)

    def all_gather(self, payload: Tensor, label: str) -> Pending:
        """See :meth:`World.all_gather`."""
        self.ledger.sent(label, all_gather_bytes(payload.nbytes, self.size))
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
        self._tag = (self._tag + 1) % 65536  # gloo matches by tag, NCCL by order; both hold here
        ops = [dist.P2POp(dist.irecv, box, self._global(j), self.group, self._tag) for j, box in boxes.items()]
        ops += [dist.P2POp(dist.isend, t, self._global(j), self.group, self._tag) for j, t in sorted(send.items())]
        seconds = self.clock.link.exchange(max(nbytes, sum(receive.values()))) if self.clock is not None else 0.0
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
