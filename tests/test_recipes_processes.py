"""Processes of a recipe end with the one that started them, however that ends."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import pytest

from recipes.processes import on_ranks


class Job:
    """A job that leaves its process number and stays."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, rank: int) -> None:
        (self.folder / f"{rank}").write_text(str(os.getpid()))
        time.sleep(600)


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_ranks_do_not_outlive_the_process_that_started_them(tmp_path: Path) -> None:
    parent = get_context("fork").Process(target=on_ranks, args=(Job(tmp_path), 2))
    parent.start()
    wait(lambda: all((tmp_path / str(rank)).exists() and (tmp_path / str(rank)).read_text() for rank in range(2)))
    ranks = [int((tmp_path / str(rank)).read_text()) for rank in range(2)]
    assert all(map(alive, ranks))
    assert parent.pid is not None
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    wait(lambda: not any(map(alive, ranks)))


def wait(condition: Callable[[], bool]) -> None:
    """Until ``condition()`` holds, half a minute at most."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
