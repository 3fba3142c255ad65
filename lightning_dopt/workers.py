"""``dopt workers``: starts the workers of an elastic run, and starts those that die again, without a person."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

POLL = 0.1
"""Seconds between two looks at the workers."""


class Workers:
    """Processes that run one command each, told apart by their environment.

    A worker that ends with status 0 has finished. One that ends in any other way is started again, until it was
    ``max_restarts`` times, or until all others have finished.

    Args:
        command: What each worker runs.
        numbers: Numbers of the workers.
        total: How many there are when all are, on all machines.
        lighthouse: Address of the lighthouse.
        host: Name under which others reach this machine; ``None`` asks the system.
        max_restarts: How often each worker is started again.
        say: Called with what happens, one line at a time.
    """

    def __init__(
        self,
        command: Sequence[str],
        numbers: Sequence[int],
        total: int,
        lighthouse: str,
        host: str | None = None,
        max_restarts: int = 100,
        say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    ) -> None:
        self.command, self.total, self.lighthouse, self.host = list(command), total, lighthouse, host
        self.max_restarts, self.say = max_restarts, say
        self.restarts = dict.fromkeys(numbers, 0)
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.finished: set[int] = set()
        self.given_up: set[int] = set()

    def environment(self, number: int) -> dict[str, str]:
        """What a worker finds in its environment."""
        told = {"DOPT_WORKER": str(number), "DOPT_WORKERS": str(self.total), "TORCHFT_LIGHTHOUSE": self.lighthouse}
        return {**os.environ, **told} | ({"DOPT_HOST": self.host} if self.host is not None else {})

    def start(self, number: int) -> None:
        """Start a worker, in a process group of its own."""
        self.processes[number] = subprocess.Popen(
            self.command, env=self.environment(number), start_new_session=os.name == "posix"
        )

    def run(self) -> int:
        """Until all have finished or were given up; 0 if at least one finished and none was given up while it was needed."""
        try:
            for number in self.restarts:
                self.start(number)
            while self.processes:
                self.look()
                time.sleep(POLL)
        finally:
            self.stop()
        return 0 if self.finished and not self.given_up else 1

    def look(self) -> None:
        """See who has ended, and start again who is needed."""
        for number, process in list(self.processes.items()):
            status = process.poll()
            if status is None:
                continue
            del self.processes[number]
            if status == 0:
                self.finished.add(number)
            elif self.finished and not self.processes:
                self.say(f"worker {number} ended {_how(status)}, when all others had finished")
            elif self.restarts[number] >= self.max_restarts:
                self.given_up.add(number)
                self.say(
                    f"worker {number} ended {_how(status)}, and is not started again after {self.max_restarts} times"
                )
            else:
                self.restarts[number] += 1
                self.say(
                    f"worker {number} ended {_how(status)}, is started again ({self.restarts[number]} of {self.max_restarts})"
                )
                self.start(number)

    def stop(self, patience: float = 30.0) -> None:
        """Ask those that are left to stop, and after ``patience`` seconds end them."""
        for process in self.processes.values():
            process.terminate()
        deadline = time.monotonic() + patience
        for process in self.processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        self.processes = {}


def _how(status: int) -> str:
    if status >= 0:
        return f"with status {status}"
    try:
        return f"by {signal.Signals(-status).name}"
    except ValueError:
        return f"by signal {-status}"


class Lighthouse(AbstractContextManager["Lighthouse"]):
    """torchft's lighthouse in this process, which knows who is alive and forms quorums.

    Args:
        bind: Address and port to listen at; port 0 takes a free one.
        min_workers: Members that a quorum needs.
        wait: Seconds that a round waits for a worker that is alive but has not come.
        dead_after: Seconds without a sign of life after which a worker counts as dead.
        host: Name under which others reach this machine; ``None`` asks the system.

    Raises:
        ImportError: torchft is not installed.
    """

    def __init__(self, bind: str, min_workers: int, wait: float, dead_after: float, host: str | None = None) -> None:
        os.environ.setdefault("RUST_LOG", "error")  # read when torchft is imported; it tells much otherwise
        from torchft.coordination import LighthouseServer

        self._server: Any = LighthouseServer(
            bind=bind,
            min_replicas=min_workers,
            join_timeout_ms=int(wait * 1000),
            quorum_tick_ms=50,
            heartbeat_timeout_ms=int(dead_after * 1000),
        )
        self.host = host

    @property
    def address(self) -> str:
        """Where workers reach it."""
        address = str(self._server.address())
        return address if self.host is None else f"http://{self.host}:{address.rpartition(':')[2]}"

    def __exit__(self, *_: object) -> None:
        """End it."""
        self._server.shutdown()


def supervise(
    command: Sequence[str],
    n: int,
    first: int = 0,
    total: int | None = None,
    lighthouse: str | None = None,
    bind: str = "0.0.0.0:0",
    host: str | None = None,
    min_workers: int = 1,
    wait: float = 60.0,
    dead_after: float = 5.0,
    max_restarts: int = 100,
) -> int:
    """Start workers ``first`` to ``first + n - 1`` of ``total``, and a lighthouse unless there is one, and see them through.

    Args:
        command: What each worker runs.
        n: Workers to start here.
        first: Number of the first of them.
        total: Workers on all machines; ``None`` means ``first + n``.
        lighthouse: Address of a lighthouse that runs elsewhere; ``None`` starts one here.
        bind: Address and port that the one started here listens at.
        host: Name under which others reach this machine; ``None`` asks the system.
        min_workers: Members that a round needs.
        wait: Seconds that a round waits for a worker that is alive but late.
        dead_after: Seconds without a sign of life after which a worker counts as dead.
        max_restarts: How often each worker is started again.

    Returns:
        0 if the run came to its end, 130 if it was interrupted.
    """

    def ended(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, ended)
    try:
        own = Lighthouse(bind, min_workers, wait, dead_after, host) if lighthouse is None else None
        with own if own is not None else nullcontext():
            address = own.address if own is not None else str(lighthouse)
            workers = Workers(command, range(first, first + n), total or first + n, address, host, max_restarts)
            workers.say(f"lighthouse: {address}")
            return workers.run()
    except KeyboardInterrupt:
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


__all__ = ["Lighthouse", "Workers", "supervise"]
