"""Who failed first: ranks leave notes for each other, and nobody outlives a failed run."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
SECONDARY = ("SyncError", "DistBackendError", "DistNetworkError", "DistStoreError")
"""Errors that another rank's failure causes."""


class Watch:
    """Notes in the store of the process group, and a thread that ends this process if the run has failed elsewhere.

    A rank that raises writes why; a rank that waits in vain writes where. So a rank that sees its communication fail
    can name the culprit, and a rank that hangs outside communication is ended ``grace`` seconds after another gave up.
    Rank 0, whose process keeps the store, stays for a while until the others have read who that is.

    Args:
        store: Key-value store shared by all ranks (``None``: nothing is noted).
        rank: This rank.
        size: Number of ranks.
        grace: Seconds between another rank's failure and the end of this process.
        poll: Seconds between looks at the store.
        patience: Seconds that a look may take: a process that is stopped keeps its connections and never answers.
        goes_on: Whether the run goes on without the ranks that fail, except rank 0.
        linger: Seconds that rank 0, when another rank's failure ends it, stays at most for those that have not noticed yet; less
            than ``grace``.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        grace: float = 15.0,
        poll: float = 3.0,
        patience: float = 5.0,
        goes_on: bool = False,
        linger: float = 3.0,
    ) -> None:
        self.store, self.rank, self.size, self.goes_on = store, rank, size, goes_on
        self.grace, self.poll, self.patience, self.linger = grace, poll, patience, linger
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to watch (forgets earlier notes of this rank)."""
        if self.store is None or self.size == 1:
            return
        with contextlib.suppress(Exception):
            self.store.delete_key(f"dopt/failed/{self.rank}")
            self.store.delete_key(f"dopt/waiting/{self.rank}")
        self._stop.clear()
        self._thread = threading.Thread(target=self._loop, name="dopt-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """The run has ended in order."""
        self._stop.set()

    def failed(self, error: BaseException, step: int) -> None:
        """Note that this rank raised ``error`` at ``step``; the first line is kept."""
        first = (str(error).splitlines() or [""])[0]
        self._write(f"dopt/failed/{self.rank}", f"{step}|{type(error).__name__}{': ' if first else ''}{first}")
        if self.rank == 0 and self.store is not None and type(error).__name__ in SECONDARY:
            self._stay()

    def _stay(self) -> None:
        """Wait until all others have noted their failures, which they do once they know whose fault it is."""
        deadline = time.monotonic() + self.linger
        with contextlib.suppress(Exception):
            while time.monotonic() < deadline:
                notes = self._ask(lambda: self._read("failed"))
                if len(notes) == self.size or all(map(_secondary, notes.values())):
                    return  # all know, or there is nothing to know
                time.sleep(0.05)

    def diagnose(self, label: str, step: int) -> str:
        """After failed communication: who is missing, as far as the notes tell, in words."""
        self._write(f"dopt/waiting/{self.rank}", f"{step}|{label}")
        if self.store is None:
            return ""
        deadline = time.monotonic() + 2.0
        notes: dict[int, str] = {}
        waiting: dict[int, str] = {}
        while time.monotonic() < deadline:
            try:
                notes, waiting = self._ask(lambda: (self._read("failed"), self._read("waiting")))
            except TimeoutError:
                return "rank 0 (stopped, or cut off from this rank)"
            except Exception:
                return "rank 0, which is gone (its own output may say why)"
            culprits = {r: n for r, n in notes.items() if r != self.rank and not _secondary(n)}
            if culprits:
                rank, note = next(iter(sorted(culprits.items())))
                at, _, text = note.partition("|")
                when = f"at step {at}" if int(at) else "before the first step"
                return f"rank {rank}, which failed {when} with {text}"
            time.sleep(0.1)
        silent = [r for r in range(self.size) if r != self.rank and r not in waiting and r not in notes]
        return f"rank(s) {', '.join(map(str, silent))} (killed, hanging or out of step)" if silent else ""

    def _ask(self, question: Callable[[], T]) -> T:
        """The answer to a question to the store, which itself would wait for ever for a stopped process."""
        answers: list[T] = []
        errors: list[Exception] = []

        def ask() -> None:
            try:
                answers.append(question())
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=ask, name="dopt-ask", daemon=True)
        thread.start()
        thread.join(self.patience)
        if errors:
            raise errors[0]
        if not answers:
            raise TimeoutError(f"the store did not answer within {self.patience} s")
        return answers[0]

    def _write(self, key: str, value: str) -> None:
        if self.store is not None:
            with contextlib.suppress(Exception):  # the store lives on rank 0, which may be what failed
                self._ask(lambda: self.store.set(key, value))

    def _read(self, kind: str) -> dict[int, str]:
        keys = {r: f"dopt/{kind}/{r}" for r in range(self.size)}
        return {r: self.store.get(k).decode() for r, k in keys.items() if self.store.check([k])}

    def _loop(self) -> None:
        while not self._stop.wait(self.poll):
            try:
                others = {r: n for r, n in self._read("failed").items() if r != self.rank}
            except Exception:
                others = {0: "|its process has ended"}
            if self.goes_on:
                others = {r: n for r, n in others.items() if r == 0}
            if others and not self._stop.wait(self.grace):
                self._end(others)

    def _end(self, others: dict[int, str]) -> None:
        rank, note = min(others.items(), key=lambda item: (_secondary(item[1]), item[0]))
        try:
            with contextlib.suppress(Exception):  # in a notebook, standard error may not be a file
                print(
                    f"[rank {self.rank}] ended: rank {rank} failed {self.grace:.0f} s ago ({note.partition('|')[2]}) "
                    "and this rank has not noticed; it was here:",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(sys.__stderr__ or sys.stderr)
        finally:
            os._exit(1)


def _secondary(note: str) -> bool:
    """Whether a note tells of a failure that followed from another rank's."""
    text = note.partition("|")[2]
    return text.startswith(SECONDARY) or "gloo" in text or "NCCL" in text
