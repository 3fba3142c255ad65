"""Processes that may fail: how they meet, and what Lightning asks of all of them at once."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch import Tensor

from lightning_dopt._checks import check_choice
from lightning_dopt.comm import ProcessGroupWorld
from lightning_dopt.comm.links import OnLostPeer
from lightning_dopt.engine import Engine
from lightning_dopt.strategies import _private, failure, start
from lightning_dopt.strategies.survivors import Survivors
from lightning_dopt.strategies.watch import Watch

T = TypeVar("T")

StartMethod = Literal["popen", "spawn", "fork", "forkserver"]


class Collectives(DDPStrategy):
    """The start and the collectives of ``DDPStrategy`` for processes that may fail; nothing is wrapped in DDP.

    A failure raises :class:`SyncError` in one line, which names who is missing. With ``on_lost_peer="continue"`` they run over
    the ranks that are left, see :class:`~lightning_dopt.strategies.survivors.Survivors`.

    Args:
        timeout: How long a rank waits for others before it gives up.
        start_method: How Lightning starts the processes.
        process_group_backend: ``"gloo"``, ``"nccl"``, or others that torch has, also one per device (``"cpu:gloo,cuda:nccl"``);
            ``None`` picks by device.
        **options: Those of ``DDPStrategy``.

    Raises:
        ValueError: an argument that cannot work.
    """

    on_lost_peer: OnLostPeer = "end"
    engine: Engine | None = None
    world: ProcessGroupWorld | None = None
    _watch: Watch | None = None

    def __init__(
        self, *, timeout: timedelta, start_method: StartMethod, process_group_backend: str | None, **options: Any
    ) -> None:
        name = type(self).__name__
        check_choice(name, "start_method", start_method, ("popen", "spawn", "fork", "forkserver"))
        if timeout <= timedelta(0):
            raise ValueError(f"{name}(timeout={timeout!r}): must be longer than zero")
        for backend in process_group_backend.split(",") if process_group_backend is not None else ():
            if not dist.is_backend_available(backend.rpartition(":")[2]):
                known = [b for b in dist.Backend.backend_list if b not in ("undefined", "fake")]
                here = ", ".join(b for b in known if dist.is_backend_available(b))
                raise ValueError(
                    f"{name}(process_group_backend={process_group_backend!r}): must be None or of what this torch has: {here}"
                )
        super().__init__(
            timeout=timeout, start_method=start_method, process_group_backend=process_group_backend, **options
        )
        self.timeout = timeout

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

    # ------------------------------------------------------------------ start

    def set_world_ranks(self) -> None:
        """Called while the Trainer is made, before any process starts."""
        super().set_world_ranks()
        if self._start_method == "popen" and hasattr(sys, "ps1"):  # as Lightning asks, which would advise another one
            raise ValueError(
                f"{type(self).__name__}(start_method='popen'): a notebook cannot be started again as a script; use "
                "start_method='fork', or a name with '_notebook' behind it, such as strategy='diloco_notebook'"
            )

    def setup_environment(self) -> None:
        """Make the process groups (again for each ``fit`` or ``validate``, but only once in a process).

        Raises:
            SyncError: not all processes came within ``timeout``.
        """
        start.warn_of_stale_addresses()
        with failure.meeting(self, self.timeout):
            super().setup_environment()
            self._make_groups()
        if self._trainer.state.fn == TrainerFn.FITTING:
            self._watch = Watch(_private.default_store(), self.global_rank, self.world_size, goes_on=self.goes_on)
            self._watch.start()

    def _make_groups(self) -> None:
        """Make groups of processes beyond the default one, unless they are there."""

    def configure_ddp(self) -> None:
        """Nothing is wrapped."""

    @property
    def _trainer(self) -> Any:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    # ------------------------------------------------------------------ asking all

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
