"""Real ranks for tests: processes that stay alive for the whole session, so that a test costs milliseconds."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import pickle
import random
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy
import pytest
import torch
import torch.distributed as dist

from lightning_dopt import ProcessGroupWorld

torch.set_num_threads(1)
# Autograd counts devices at its first backward. Compilers register some, after which processes that are forked could not train.
torch.zeros(1, requires_grad=True).sum().backward()


def _seed() -> None:
    """The same random numbers whichever tests ran before in this process."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


def _serve(rank: int, n: int, pipe: connection.Connection, folder: str) -> None:
    """One rank: run what comes through the pipe, each time on a world of its own."""
    faulthandler.register(signal.SIGUSR1, file=open(f"{folder}/stack{rank}", "w"))  # noqa: SIM115
    store = dist.FileStore(f"{folder}/store", n)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=n, timeout=timedelta(seconds=60))
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            os._exit(0)
        try:
            _seed()
            world = ProcessGroupWorld(timeout=timedelta(seconds=50))
            answer = (True, function(world, *args))
            dist.destroy_process_group(world.group)
        except BaseException:
            answer = (False, traceback.format_exc())
        buffer = io.BytesIO()
        pickle.dump(answer, buffer)
        pipe.send_bytes(buffer.getvalue())


class _Pool:
    """``n`` forked ranks on gloo."""

    def __init__(self, n: int) -> None:
        self.folder = tempfile.mkdtemp(prefix="ranks")
        context = get_context("fork")
        ends = [context.Pipe() for _ in range(n)]
        self.pipes = [end[0] for end in ends]
        self.processes = [
            context.Process(target=_serve, args=(rank, n, end[1], self.folder), daemon=True)
            for rank, end in enumerate(ends)
        ]
        for process in self.processes:
            process.start()
        for _, end in ends:
            end.close()

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        job = pickle.dumps((function, args))
        for pipe in self.pipes:
            pipe.send_bytes(job)
        answers = self._collect(time.monotonic() + timeout)
        failed = {rank: text for rank, (good, text) in answers.items() if not good}
        missing = [rank for rank in range(len(self.pipes)) if rank not in answers]
        if failed or missing:
            failed.update({rank: f"gave no answer within {timeout} s\n{self._stack(rank)}" for rank in missing})
            self.close()
            raise AssertionError("\n".join(f"rank {rank}: {text}" for rank, text in sorted(failed.items())))
        return [answers[rank][1] for rank in range(len(self.pipes))]

    def _collect(self, deadline: float) -> dict[int, tuple[bool, Any]]:
        """The answers until all are there, the time is up, or two seconds after the first failure."""
        answers: dict[int, tuple[bool, Any]] = {}
        while len(answers) < len(self.pipes):
            waiting = [p for rank, p in enumerate(self.pipes) if rank not in answers]
            ready = connection.wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                assert isinstance(pipe, connection.Connection)
                rank = self.pipes.index(pipe)
                try:
                    answers[rank] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    answers[rank] = (False, "the process died")
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + 2.0)
        return answers

    def _stack(self, rank: int) -> str:
        process = self.processes[rank]
        if process.pid is None or not process.is_alive():
            return "the process has ended"
        os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.2)
        return Path(self.folder, f"stack{rank}").read_text()

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.kill()
            process.join()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[..., list[Any]]]:
    """``ranks(function, n, *args)``: the results of ``function(world, *args)`` on ``n`` gloo ranks, in rank order.

    The function must be importable by name (module level), arguments and results picklable. Every call gets a fresh
    :class:`ProcessGroupWorld`. If a rank raises, or does not answer in time, the ranks are killed and the test fails
    with that rank's traceback; the next call starts new ones.
    """
    pools: dict[int, _Pool] = {}

    def call(function: Callable[..., Any], n: int = 4, *args: Any, timeout: float = 60.0) -> list[Any]:
        if n not in pools:
            pools[n] = _Pool(n)
        try:
            return pools[n].run(function, args, timeout)
        except AssertionError:
            del pools[n]
            raise

    yield call
    for pool in pools.values():
        with contextlib.suppress(OSError):
            pool.close()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Tests that draw without a seed of their own draw the same every time."""
    _seed()


@pytest.fixture(autouse=True)
def _no_group_stays() -> Iterator[None]:
    """A Trainer of one process leaves its group behind, which processes forked later would inherit."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
