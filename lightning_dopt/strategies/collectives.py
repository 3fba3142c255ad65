"""What Lightning asks of all ranks at once: errors that name who is missing, or answers from those that are left."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor

from lightning_dopt.comm import ProcessGroupWorld
from lightning_dopt.comm.links import OnLostPeer
from lightning_dopt.engine import Engine
from lightning_dopt.strategies import failure
from lightning_dopt.strategies.survivors import Survivors
from lightning_dopt.strategies.watch import Watch

T = TypeVar("T")


class Collectives(DDPStrategy):
    """The collectives of ``DDPStrategy`` for processes that may fail.

    A failure raises :class:`SyncError` in one line. With ``on_lost_peer="continue"`` they run over the ranks that are
    left, see :class:`~lightning_dopt.strategies.survivors.Survivors`.
    """

    on_lost_peer: OnLostPeer = "end"
    engine: Engine | None = None
    world: ProcessGroupWorld | None = None
    _watch: Watch | None = None

    @property
    def goes_on(self) -> bool:
        """Whether the run goes on without lost peers, so that Lightning's own communication must, too."""
        return self.on_lost_peer == "continue"

    @property
    def _survivors(self) -> Survivors | None:
        return Survivors(self.world) if self.goes_on and self.world is not None else None

    @property
    def interrupted(self) -> bool:
        """Whether the run has failed, so that other ranks may be gone."""
        trainer = getattr(self.lightning_module, "_trainer", None)
        return trainer is not None and trainer.state.status == TrainerStatus.INTERRUPTED

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all ranks, except in a failed run, where peers may be gone."""
        if self.interrupted:
            return
        if self._survivors is not None:
            self._survivors.barrier()
            return
        with self._answers(f"barrier {args[0]!r}" if args else "barrier"):
            super().barrier(*args, **kwargs)

    def broadcast(self, obj: T, src: int = 0) -> T:
        """One rank's object for all."""
        if self._survivors is not None:
            return cast(T, self._survivors.broadcast(obj, src))
        with self._answers("broadcast"):
            return super().broadcast(obj, src)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """The mean (or what is asked for) over all ranks, as for ``self.log(..., sync_dist=True)``."""
        if self._survivors is not None:
            return self._survivors.reduce(tensor, reduce_op) if isinstance(tensor, Tensor) else tensor
        with self._answers("reduction of a metric"):
            return super().reduce(tensor, group, reduce_op)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all ranks, or any, decided so."""
        if self._survivors is not None:
            return self._survivors.any_or_all(decision, all)
        return super().reduce_boolean_decision(decision, all)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Every rank's tensor, stacked.

        Raises:
            ValueError: ``sync_grads`` with ``on_lost_peer="continue"``.
        """
        if self._survivors is not None:
            if sync_grads:
                raise ValueError("all_gather(sync_grads=True): no gradients with on_lost_peer='continue'; use False")
            return self._survivors.all_gather(tensor)
        with self._answers("all_gather"):
            return super().all_gather(tensor, group, sync_grads)

    def _ask_zero(self, flag: bool) -> Callable[[], bool]:
        """Begin to tell all ranks rank 0's flag; what is returned waits for it, which the ledger counts under ``"stop"``."""
        if self._survivors is not None:
            told = bool(self._survivors.broadcast(flag, 0))
            return lambda: told
        value = torch.tensor([int(flag)], device=self.root_device)
        with self._answers("broadcast before the step"):
            work = dist.broadcast(value, 0, async_op=True)
        assert work is not None  # every rank belongs to the default group

        def wait() -> bool:
            began = time.perf_counter()
            with self._answers("broadcast before the step"):
                work.wait()
            if self.world is not None:
                self.world.ledger.stalled("stop", time.perf_counter() - began)
            return bool(value.item())

        return wait

    def _answers(self, where: str) -> AbstractContextManager[None]:
        """Say who is missing if communication outside the plan fails."""
        return failure.answers(where, self.global_rank, self._step, self._watch)

    @property
    def _step(self) -> int:
        return self.engine.step + 1 if self.engine is not None else 0
