"""Runs that go wrong on purpose: processes as an external launcher starts them, with exit codes, times and stderr."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from trainer_tools import Regressor, quiet

from lightning_dopt.strategies import collectives
from lightning_dopt.strategies.watch import Watch


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@dataclass
class Ended:
    """How one rank ended: exit code (negative: signal), seconds after the start, standard error."""

    code: int | None
    seconds: float
    text: str

    @property
    def errors(self) -> list[str]:
        """The last lines of tracebacks on standard error that nothing else followed from."""
        names = ("lightning_dopt.comm.world.SyncError: ", "ZeroDivisionError: ", "ValueError: ", "OSError: ")
        return [line for line in self.text.splitlines() if line.startswith(names)]


def torchrun_environment(rank: int, n: int, port: int) -> dict[str, str]:
    """What torchrun sets on one node."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(n),
        "TORCHELASTIC_RUN_ID": "test",
    }


def no_environment(rank: int, n: int, port: int) -> dict[str, str]:
    """As in an ordinary shell."""
    return {}


class Processes:
    """``job(rank)`` on the given ranks out of ``n``, forked, each with its own stderr and ``environment(rank, n, port)``.

    Ranks that hang are given one second after the first failure.
    """

    def __init__(
        self,
        job: Callable[[int], Any],
        n: int = 2,
        ranks: list[int] | None = None,
        environment: Callable[[int, int, int], dict[str, str]] = torchrun_environment,
    ) -> None:
        self.folder, self.start, self.n = Path(tempfile.mkdtemp(prefix="broken")), time.monotonic(), n
        port, context = free_port(), multiprocessing.get_context("fork")
        self.processes = {
            r: context.Process(target=_serve, args=(job, r, environment(r, n, port), self.folder))
            for r in (range(n) if ranks is None else ranks)
        }
        for process in self.processes.values():
            process.start()

    def pid(self, rank: int) -> int:
        pid = self.processes[rank].pid
        assert pid is not None
        return pid

    def text(self, rank: int) -> str:
        return (self.folder / f"{rank}.err").read_text(errors="replace")

    def wait_for(self, rank: int, word: str, timeout: float = 20.0) -> None:
        """Until ``word`` is in the stderr of ``rank``."""
        deadline = time.monotonic() + timeout
        path = self.folder / f"{rank}.err"
        while not path.exists() or word not in path.read_text(errors="replace"):
            assert time.monotonic() < deadline, f"rank {rank} did not say {word!r} within {timeout} s"
            time.sleep(0.05)

    def join(self, within: float, ranks: list[int] | None = None) -> dict[int, Ended]:
        """How the ranks ended.

        Raises:
            AssertionError: a rank still runs ``within`` seconds after the start of all.
        """
        ended: dict[int, Ended] = {}
        waiting = list(self.processes) if ranks is None else list(ranks)
        while waiting and time.monotonic() - self.start < within:
            for rank in list(waiting):
                process = self.processes[rank]
                if not process.is_alive():
                    ended[rank] = Ended(process.exitcode, time.monotonic() - self.start, self.text(rank))
                    waiting.remove(rank)
            time.sleep(0.05)
        if waiting:
            texts = "\n".join(f"--- rank {r}:\n{self.text(r)}" for r in self.processes)
            raise AssertionError(f"rank(s) {waiting} still running after {within} s\n{texts}")
        return ended

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.kill()
            process.join()
        shutil.rmtree(self.folder)


def _serve(job: Callable[[int], Any], rank: int, environment: dict[str, str], folder: Path) -> None:
    error = open(folder / f"{rank}.err", "w", buffering=1)  # noqa: SIM115
    os.dup2(error.fileno(), 2)
    os.dup2(error.fileno(), 1)
    sys.stdout = sys.stderr = error
    os.environ.update(environment)
    collectives.Watch = partial(Watch, grace=4.0, poll=0.2, patience=2.0)  # type: ignore[misc, assignment]
    quiet()
    job(rank)


def say(word: str) -> None:
    print(word, file=sys.stderr, flush=True)


def crash() -> None:
    raise ZeroDivisionError("the data is bad\nin two lines")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    say("hanging")
    while True:
        time.sleep(60)


def slow() -> None:
    say("slow")
    time.sleep(2)


def stop() -> None:
    say("stopping")
    os.kill(os.getpid(), signal.SIGSTOP)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class Troubled(Regressor):
    """Does ``what`` on ``rank`` in the hook ``where`` once ``step`` optimizer steps are done."""

    def __init__(self, what: Callable[[], None], rank: int, step: int, where: str = "training_step") -> None:
        super().__init__()
        self.what, self.bad, self.step, self.where = what, rank, step, where

    def _maybe(self, where: str) -> None:
        if (where, self.trainer.global_step, self.trainer.global_rank) == (self.where, self.step, self.bad):
            self.what()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self._maybe("training_step")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._maybe("validation_step")
        super().validation_step(batch, batch_idx)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._maybe("on_save_checkpoint")

    def setup(self, stage: str) -> None:
        self._maybe("setup")
