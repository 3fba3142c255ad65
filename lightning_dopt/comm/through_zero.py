"""Collectives that survive lost ranks: all send to rank 0, which answers everyone that is left."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dopt.comm.world import Pending

if TYPE_CHECKING:
    from lightning_dopt.comm.process_group import ProcessGroupWorld


class ThroughZero(Pending):
    """One collective over the ranks that are left: bytes of any length to rank 0, the same answer back to all.

    Rank 0 alone decides who took part: those whose message arrived whole. So all ranks get the same answer even if one
    dies in the middle, which the collectives of gloo cannot do. Costs the link of rank 0 one message from and one to
    everybody. Sets :attr:`World.present`.

    Args:
        world: With whom; its process group must be gloo's.
        mine: This rank's bytes, 1-D ``uint8`` in main memory.
        fold: Called on rank 0 with the bytes of each rank that took part, in ascending order.
        answer: Called on rank 0 after that: the bytes that all ranks get.
        result: Makes the result of the answer.
        label: Name in the ledger and in errors.
        tag: Of this collective.

    Raises:
        SyncError: from :meth:`wait`, rank 0 is lost, or somebody did not answer in time.
    """

    def __init__(
        self,
        world: ProcessGroupWorld,
        mine: Tensor,
        fold: Callable[[int, Tensor], None],
        answer: Callable[[], Tensor],
        result: Callable[[Tensor], Any],
        label: str,
        tag: int,
    ) -> None:
        self.world, self.mine, self.fold, self.answer, self.result = world, mine, fold, answer, result
        self.label, self.tag, self.step = label, tag, world.step

    def wait(self) -> Any:
        """See :meth:`Pending.wait`."""
        start = time.perf_counter()
        answer = self._serve(start) if self.world.rank == 0 else self._ask(start)
        self.world.ledger.stalled(self.label, time.perf_counter() - start)
        return self.result(answer)

    def _ask(self, start: float) -> Tensor:
        world, head = self.world, torch.empty(1 + self.world.size, dtype=torch.int64)
        try:
            works = [world.post(dist.isend, torch.tensor([self.mine.numel()]), 0, self.tag, 2)]
            if self.mine.numel():
                works.append(world.post(dist.isend, self.mine, 0, self.tag))
            works.append(world.post(dist.irecv, head, 0, self.tag, 2))
            for work in works:
                work.wait()
            answer = torch.empty(int(head[0]), dtype=torch.uint8)
            if answer.numel():
                world.post(dist.irecv, answer, 0, self.tag).wait()
        except (RuntimeError, dist.DistError) as error:
            raise world.gave_up(self.label, self.step, "rank 0", time.perf_counter() - start, error) from error
        world.present = [j for j in range(world.size) if head[1 + j]]
        return answer

    def _serve(self, start: float) -> Tensor:
        world, links = self.world, self.world.links
        assert links is not None
        heads: dict[int, tuple[Tensor, Any]] = {}
        for j in range(1, world.size):
            if j not in links.lost:
                length = torch.empty(1, dtype=torch.int64)
                with world.may_lose(j, self.label, self.step, start):
                    heads[j] = length, world.post(dist.irecv, length, j, self.tag, 2)
        self.fold(0, self.mine)
        present = [0]
        for j, (length, work) in heads.items():
            with world.may_lose(j, self.label, self.step, start):
                work.wait()
                payload = torch.empty(int(length), dtype=torch.uint8)
                if payload.numel():
                    world.post(dist.irecv, payload, j, self.tag).wait()
                self.fold(j, payload)
                present.append(j)
        answer = self.answer()
        self._tell(present, answer, start)
        world.present = present
        return answer

    def _tell(self, present: list[int], answer: Tensor, start: float) -> None:
        world = self.world
        head = torch.tensor([answer.numel(), *(int(j in present) for j in range(world.size))])
        works: dict[int, list[Any]] = {}
        for j in present[1:]:
            with world.may_lose(j, self.label, self.step, start):
                works[j] = [world.post(dist.isend, head, j, self.tag, 2)]
                if answer.numel():
                    works[j].append(world.post(dist.isend, answer, j, self.tag))
        for j, posted in works.items():
            with world.may_lose(j, self.label, self.step, start):
                for work in posted:
                    work.wait()
