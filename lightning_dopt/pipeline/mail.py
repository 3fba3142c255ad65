"""How messages get from rank to rank: between processes, or between the ranks of one process."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dopt.comm import Ledger, SyncError
from lightning_dopt.comm.process_group import no_answer

T = TypeVar("T")

BOTH = "cpu:gloo,cuda:nccl"
"""Backends of a group whose messages go over gloo, and over NCCL where torch's engine sends tensors that lie on GPUs."""


def backends(default: str) -> str:
    """Those of a pipeline's group, from that of the default group."""
    return BOTH if "nccl" in default else "gloo"


def on_host(tensor: Tensor) -> bool:
    """Whether gloo can send a tensor from where it lies."""
    return tensor.device.type == "cpu"


def _host_box(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


class Letter(ABC):
    """A message that is expected."""

    @abstractmethod
    def ready(self) -> bool:
        """Whether it can be taken without waiting."""

    @abstractmethod
    def wait(self) -> Tensor:
        """The message.

        Raises:
            SyncError: It did not come.
        """


Talk = Generator[Letter, Tensor, T]
"""Code that yields each letter it needs and is sent the message."""


class Mail(ABC):
    """A rank's way to send tensors to, and get them from, the other ranks of its pipeline."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.ledger = Ledger()
        self.step = 0
        """The optimizer step, for messages of errors."""

    @abstractmethod
    def post(self, peer: int, tag: int, tensor: Tensor, label: str) -> None:
        """Send without waiting; the tensor must not change any more."""

    @abstractmethod
    def expect(self, peer: int, tag: int, box: Tensor, label: str) -> Letter:
        """A message of known size, to be put into ``box``."""

    @abstractmethod
    def finish(self) -> None:
        """Wait until all that was posted has left.

        Raises:
            SyncError: A receiver is gone.
        """


class _Box(Letter):
    def __init__(self, queue: deque[Tensor], box: Tensor) -> None:
        self.queue, self.box = queue, box

    def ready(self) -> bool:
        return bool(self.queue)

    def wait(self) -> Tensor:
        return self.box.copy_(self.queue.popleft())


class LocalMail(Mail):
    """All ranks in one process; make them with :meth:`create` and run them with :func:`take_turns`."""

    def __init__(self, rank: int, size: int, queues: defaultdict[tuple[int, int, int], deque[Tensor]]) -> None:
        super().__init__(rank, size)
        self.queues = queues

    @classmethod
    def create(cls, size: int) -> list[LocalMail]:
        """Mail of ``size`` ranks that can write to each other."""
        queues: defaultdict[tuple[int, int, int], deque[Tensor]] = defaultdict(deque)
        return [cls(rank, size, queues) for rank in range(size)]

    def post(self, peer: int, tag: int, tensor: Tensor, label: str) -> None:
        """See :meth:`Mail.post`."""
        self.ledger.sent(label, tensor.nbytes)
        self.queues[self.rank, peer, tag].append(tensor.clone())

    def expect(self, peer: int, tag: int, box: Tensor, label: str) -> Letter:
        """See :meth:`Mail.expect`."""
        return _Box(self.queues[peer, self.rank, tag], box)

    def finish(self) -> None:
        """Nothing is under way."""


class _Work(Letter):
    def __init__(self, mail: ProcessMail, work: Any, box: Tensor, lands: Tensor, peer: int, label: str) -> None:
        self.mail, self.work, self.box, self.lands, self.peer, self.label = mail, work, box, lands, peer, label

    def ready(self) -> bool:
        return False  # never asked: a process waits

    def wait(self) -> Tensor:
        self.mail.wait(self.work, self.peer, self.label)
        return self.box if self.lands is self.box else self.box.copy_(self.lands)


class ProcessMail(Mail):
    """One rank per process, over ``torch.distributed``. Creating it is collective.

    Messages go over gloo, which tells them apart by their tags; NCCL takes them in one order, and blocks where two ranks write to
    each other in different ones. Those of tensors on a GPU are copied to the memory of the host first, and from there at their end.

    Args:
        timeout: How long a rank waits for another one before it gives up; that of ``group`` if there is one.
        group: The processes that take part, in the order of their ranks in it; ``None``: all of them.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialized.
        ValueError: gloo is not among the backends of the group, or this process is not in ``group``.
    """

    def __init__(self, timeout: timedelta = timedelta(minutes=30), group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_initialized():
            raise RuntimeError("Pipeline: call torch.distributed.init_process_group first")
        if group is not None and dist.get_rank(group) < 0:
            raise ValueError(f"Pipeline(group=...): rank {dist.get_rank()} does not belong to it")
        if "gloo" not in str(dist.get_backend(group)):
            raise ValueError(
                f"Pipeline(backend={dist.get_backend(group)!r}): needs 'gloo', or '{BOTH}' for torch's engine on GPUs"
            )
        super().__init__(dist.get_rank(group), dist.get_world_size(group))
        made = group if group is not None else dist.new_group(timeout=timeout, backend=backends(dist.get_backend()))
        assert isinstance(made, dist.ProcessGroup)  # every rank belongs to it
        self.group = made
        self.ranks = dist.get_process_group_ranks(made)
        """The ranks of its members among all processes."""
        self.diagnose: Callable[[str, int], str] = lambda label, step: ""
        """Called with (label, step) after a failure, returns who is missing in words, or an empty string."""
        self._sends: list[tuple[Any, Tensor, int, str]] = []

    def post(self, peer: int, tag: int, tensor: Tensor, label: str) -> None:
        """See :meth:`Mail.post`."""
        self.ledger.sent(label, tensor.nbytes)
        if not on_host(tensor):
            tensor = _host_box(tensor).copy_(tensor)
        try:
            work = dist.isend(tensor, self.ranks[peer], group=self.group, tag=tag)
        except (RuntimeError, dist.DistError) as error:
            raise self._gave_up(peer, label, 0.0, error) from error
        self._sends.append((work, tensor, peer, label))  # the tensor must live until it has left

    def expect(self, peer: int, tag: int, box: Tensor, label: str) -> Letter:
        """See :meth:`Mail.expect`."""
        lands = box if on_host(box) else _host_box(box)
        try:
            work = dist.irecv(lands, self.ranks[peer], group=self.group, tag=tag)
            return _Work(self, work, box, lands, peer, label)
        except (RuntimeError, dist.DistError) as error:
            raise self._gave_up(peer, label, 0.0, error) from error

    def wait(self, work: Any, peer: int, label: str) -> None:
        """Wait for one transfer.

        Raises:
            SyncError: It failed, or took longer than the timeout.
        """
        start = time.perf_counter()
        try:
            work.wait()
        except (RuntimeError, dist.DistError) as error:
            raise self._gave_up(peer, label, time.perf_counter() - start, error) from error
        self.ledger.stalled(label, time.perf_counter() - start)

    def finish(self) -> None:
        """See :meth:`Mail.finish`."""
        sends, self._sends = self._sends, []
        for work, _, peer, label in sends:
            self.wait(work, peer, label)

    def _gave_up(self, peer: int, label: str, waited: float, error: Exception) -> SyncError:
        where = f"pipeline, {label}"
        who = self.diagnose(where, self.step) or f"rank {self.ranks[peer]}"
        return SyncError(no_answer(self.ranks[self.rank], self.step, where, who, waited, error))


def run(talk: Talk[T]) -> T:
    """Run the code of one process, which waits for each of its letters."""
    try:
        letter = next(talk)
        while True:
            letter = talk.send(letter.wait())
    except StopIteration as stop:
        return stop.value


def take_turns(talks: Sequence[Talk[T]]) -> list[T]:
    """Run the code of all ranks in one process, each until it must wait for a letter that is not there yet.

    Raises:
        SyncError: All wait.
    """
    results: dict[int, T] = {}
    waiting: dict[int, Letter | None] = dict.fromkeys(range(len(talks)))
    while waiting:
        moved = False
        for k, letter in list(waiting.items()):
            try:
                while letter is None or letter.ready():
                    moved = True
                    letter = waiting[k] = next(talks[k]) if letter is None else talks[k].send(letter.wait())
            except StopIteration as stop:
                results[k] = stop.value
                del waiting[k]
        if not moved:
            raise SyncError(f"ranks {', '.join(map(str, waiting))} wait for each other")
    return [results[k] for k in range(len(talks))]
