"""A job on several processes of this machine that stand as if a launcher such as torchrun had started them.

Importing torch and Lightning takes longer than many a small training. Here it happens once: the processes are forks where
that is safe (Linux), and several ``Trainer`` objects can fit one after the other in the same processes.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def on_ranks(job: Callable[[int], T], n: int) -> list[T]:
    """``job(rank)`` on ``n`` processes of one thread each, which share a gloo group; their results in rank order.

    Args:
        job: module-level function, or a ``functools.partial`` of one; its result must be picklable.
        n: number of processes.

    Raises:
        SystemExit: a process failed and has printed why; the others were ended.
    """
    torch.set_num_threads(1)  # before a fork, which threads do not survive
    context = get_context("fork") if sys.platform == "linux" else get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="ranks") as folder:
        processes = [context.Process(target=_serve, args=(job, rank, n, folder)) for rank in range(n)]
        try:
            for process in processes:
                process.start()
            while any(p.is_alive() for p in processes) and not any(p.exitcode for p in processes):
                time.sleep(0.1)
        finally:
            for process in processes:
                process.kill()
                process.join()
        files = [Path(folder, f"{rank}.result") for rank in range(n)]
        if not all(file.exists() for file in files):
            raise SystemExit(1)
        return [pickle.loads(file.read_bytes()) for file in files]


def _end_with_parent() -> None:
    """Nobody waits for the result of a process whose parent was killed."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _serve(job: Callable[[int], T], rank: int, n: int, folder: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*|torch\..*")
    store = dist.FileStore(f"{folder}/store", n)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=n, timeout=timedelta(minutes=10))
    result = job(rank)
    dist.barrier()
    dist.destroy_process_group()
    Path(folder, f"{rank}.result").write_bytes(pickle.dumps(result))
