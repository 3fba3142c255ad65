"""One line for communication that failed: where this rank waited, for whom, and what to do about it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy

from lightning_dopt.comm import SyncError
from lightning_dopt.comm.process_group import no_answer
from lightning_dopt.strategies import _private
from lightning_dopt.strategies.watch import Watch


@contextmanager
def answers(where: str, rank: int, step: int, watch: Watch | None) -> Iterator[None]:
    """Say who is missing if communication outside the plan fails.

    Args:
        where: What is communicated, in words.
        rank: This rank.
        step: The optimizer step in work, counted from 1; 0 before there is an engine.
        watch: Knows who failed first; ``None`` before it runs.

    Raises:
        SyncError: instead of an error about peers; all others pass.
    """
    start = time.perf_counter()
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        if not _private.is_lost_connection(error):
            raise
        waited = time.perf_counter() - start
        who = watch.diagnose(where, step) if watch is not None else ""
        raise SyncError(no_answer(rank, step, where, who or "some rank", waited, error)) from error


@contextmanager
def meeting(strategy: DDPStrategy, timeout: timedelta) -> Iterator[None]:
    """Say where the processes were to meet if they do not.

    Args:
        strategy: Knows the place, and in the end which rank this is.
        timeout: How long they wait for each other.

    Raises:
        SyncError: instead of an error about peers; all others pass.
    """
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        if not _private.is_lost_connection(error):
            raise
        place = strategy.cluster_environment
        assert place is not None
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise SyncError(
            f"rank {strategy.global_rank} of {strategy.world_size} could not meet the others at {place.main_address}:"
            f"{place.main_port} within {timeout.total_seconds():g} s: start all processes with the same "
            f"address, port and numbers of nodes and devices ({first})"
        ) from error
