"""A world whose ranks come and go between rounds, on torchft's process group and manager."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dopt.comm.ledger import all_gather_bytes
from lightning_dopt.comm.link import LinkClock
from lightning_dopt.comm.process_group import ProcessGroupWorld
from lightning_dopt.comm.world import Pending, SyncError, World

LABEL = "members"
"""Name of what members tell each other about a round, in the ledger and in errors."""


class Members(Protocol):
    """Who takes part in the coming round, and how to talk to them."""

    rank: int
    size: int

    def meet(self) -> bool:
        """Agree on the members of the coming round; those behind get the state of one that is not.

        Returns whether there is a group to talk over.

        Raises:
            SyncError: no quorum came about in time.
        """

    def all_reduce(self, tensor: Tensor, op: Any) -> Any:
        """Start a sum (or another operation) over the members, in place."""

    def all_gather(self, out: list[Tensor], tensor: Tensor) -> Any:
        """Start to give every member every member's tensor."""

    def commit(self, ok: bool) -> bool:
        """End the round that :meth:`meet` began; whether it counts."""

    def close(self) -> None:
        """Leave."""


class TorchftMembers:
    """Members by torchft: a lighthouse that all know, a manager per worker, a gloo group made anew when members change.

    Making it tells the lighthouse that this worker is alive, and others may wait for it from then on.

    Args:
        worker: Number of this worker, for logs.
        lighthouse: Address of the lighthouse, such as ``http://host:29510``.
        minimum: Members that a round needs to count.
        timeout: How long to wait for others, in every wait.
        state: Gives what a member that is behind needs.
        load: Takes it.
        host: Name under which others reach this machine; ``None`` asks the system.

    Raises:
        ImportError: torchft is not installed.
        SyncError: the lighthouse does not answer.
    """

    def __init__(
        self,
        worker: int,
        lighthouse: str,
        minimum: int,
        timeout: timedelta,
        state: Callable[[], Any],
        load: Callable[[Any], None],
        host: str | None = None,
    ) -> None:
        os.environ.setdefault("RUST_LOG", "error")  # read when torchft is imported; it tells much otherwise
        from torchft import Manager, ProcessGroupGloo

        self.lighthouse, self.timeout = lighthouse, timeout
        name = host or socket.gethostname()
        self._store = dist.TCPStore(name, 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
        self._group = ProcessGroupGloo(timeout=timeout)
        try:
            self._manager = Manager(
                pg=self._group,
                load_state_dict=load,
                state_dict=state,
                min_replica_size=minimum,
                use_async_quorum=False,
                timeout=timeout,
                quorum_timeout=timeout,
                connect_timeout=min(timeout, timedelta(seconds=30)),
                rank=0,
                world_size=1,
                store_addr=name,
                store_port=self._store.port,
                lighthouse_addr=lighthouse,
                replica_id=f"worker{worker}",
                hostname=name,
            )
        except RuntimeError as error:
            raise self._gone(error) from error
        self.rank, self.size = 0, 1

    def _gone(self, error: Exception) -> SyncError:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        return SyncError(
            f"no quorum from the lighthouse at {self.lighthouse}: is it running, and are enough workers? ({first})"
        )

    def meet(self) -> bool:
        """See :class:`Members`."""
        try:
            self._manager.start_quorum()
        except (RuntimeError, TimeoutError) as error:
            raise self._gone(error) from error
        rank = self._manager.participating_rank()
        self.rank, self.size = rank if rank is not None else 0, self._manager.num_participants()
        return self._manager.errored() is None

    def all_reduce(self, tensor: Tensor, op: Any) -> Any:
        """See :class:`Members`."""
        options = torch._C._distributed_c10d.AllreduceOptions()
        options.reduceOp = op
        return self._group.allreduce([tensor], options)

    def all_gather(self, out: list[Tensor], tensor: Tensor) -> Any:
        """See :class:`Members`."""
        return self._group.allgather([out], [tensor], torch._C._distributed_c10d.AllgatherOptions())

    def commit(self, ok: bool) -> bool:
        """See :class:`Members`."""
        if not ok:
            self._manager.report_error(RuntimeError("the round failed"))
            self._group.abort()  # closes its connections: others that wait for this one must not do so until their time is up
        return bool(self._manager.should_commit())

    def close(self) -> None:
        """See :class:`Members`."""
        self._manager.shutdown(wait=False)


class ElasticWorld(ProcessGroupWorld):
    """The members of the coming round; rank and size change with :meth:`convene`, and nothing is sent in between.

    Sums and gathers only: plans over the complete graph. A rank that has nothing to say takes part with weight zero.

    Args:
        members: Who they are.
        clock: A virtual link clock that also runs.
    """

    def __init__(self, members: Members, clock: LinkClock | None = None) -> None:
        World.__init__(self, 0, 1, clock)
        self.members = members
        self.diagnose = lambda label, step: ""

    def convene(self) -> bool:
        """Agree on who takes part in the coming round; whether there is a group to talk over."""
        ok = self.members.meet()
        self.rank, self.size = self.members.rank, self.members.size
        self.present, self.weights = list(range(self.size)), None
        return ok

    def tell(self, stamp: Sequence[int]) -> list[list[int]]:
        """Every member's numbers, in the order of their ranks, as many as these.

        Raises:
            SyncError: a member is gone.
        """
        mine = torch.tensor(stamp, dtype=torch.int64)
        rows: list[list[int]] = self.all_gather(mine, LABEL, overhead=True).wait().tolist()
        return rows

    def heed(self, ranks: Sequence[int]) -> None:
        """In this round only these ranks have something to say, all the same much; the others send zeros."""
        self.present = list(ranks)
        self.weights = None if len(self.present) == self.size else {j: 1.0 / len(self.present) for j in self.present}

    def agreed(self, ok: bool) -> bool:
        """Whether the round went well for all members, and counts."""
        if ok:
            bad = torch.zeros(1)
            try:
                self.all_reduce_max(bad, LABEL).wait()
            except SyncError:
                ok = False
        return self.members.commit(ok) and ok

    def _reduce(self, tensor: Tensor, op: Any, label: str) -> Pending:
        seconds = self.clock.link.all_reduce(tensor.nbytes, self.size) if self.clock is not None else 0.0
        works: Callable[[], list[Any]] = lambda: [self.members.all_reduce(tensor, op)] if self.size > 1 else []  # noqa: E731
        return self._start(works, lambda: tensor, label, "some worker", seconds, tensor)

    def all_gather(self, payload: Tensor, label: str, *, overhead: bool = False) -> Pending:
        """See :meth:`World.all_gather`."""
        nbytes = all_gather_bytes(payload.nbytes, self.size)
        self.ledger.sent(label, 0 if overhead else nbytes, nbytes if overhead else 0)
        out = torch.empty((self.size, *payload.shape), dtype=payload.dtype, device=payload.device)
        if self.size == 1:
            out.copy_(payload.unsqueeze(0))
        seconds = self.clock.link.all_gather(payload.nbytes, self.size) if self.clock is not None else 0.0
        works: Callable[[], list[Any]] = lambda: (  # noqa: E731
            [self.members.all_gather(list(out.unbind()), payload)] if self.size > 1 else []
        )
        return self._start(works, lambda: out, label, "some worker", seconds, (payload, out))
