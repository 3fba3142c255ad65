"""Who failed first: ranks leave notes for each other, and nobody outlives a failed run."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from typing import Any


class Watch:
    """Notes in the store of the process group, and a thread that ends this process if the run has failed elsewhere.

    A rank that raises writes why; a rank that waits in vain writes where. So a rank that sees its communication fail
    can name the culprit, and a rank that hangs outside communication is ended ``grace`` seconds after another gave up.

    Args:
        store: Key-value store shared by all ranks (``None``: nothing is noted).
        rank: This rank.
        size: Number of ranks.
        grace: Seconds between another rank's failure and the end of this process.
        poll: Seconds between looks at the store.
    """

    def __init__(self, store: Any, rank: int, size: int, grace: float = 15.0, poll: float = 3.0) -> None:
        self.store, self.rank, self.size, self.grace, self.poll = store, rank, size, grace, poll
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
        text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        self._write(f"dopt/failed/{self.rank}", f"{step}|{text}")

    def diagnose(self, label: str, step: int) -> str:
        """After failed communication: who is missing, as far as the notes tell, in words."""
        self._write(f"dopt/waiting/{self.rank}", f"{step}|{label}")
        if self.store is None:
            return ""
        deadline = time.monotonic() + 2.0
        notes: dict[int, str] = {}
        while time.monotonic() < deadline:
            try:
                notes = self._read("failed")
                waiting = self._read("waiting")
            except Exception:
                return "rank 0, which is gone (it kept the store)"
            culprits = {
                r: n for r, n in notes.items() if r != self.rank and not n.partition("|")[2].startswith("SyncError")
            }
            if culprits:
                rank, note = next(iter(sorted(culprits.items())))
                at, _, text = note.partition("|")
                return f"rank {rank}, which failed at step {at} with {text}"
            time.sleep(0.1)
        silent = [r for r in range(self.size) if r != self.rank and r not in waiting and r not in notes]
        return f"rank(s) {', '.join(map(str, silent))} (killed, hanging or out of step)" if silent else ""

    def _write(self, key: str, value: str) -> None:
        if self.store is not None:
            with contextlib.suppress(Exception):  # the store lives on rank 0, which may be what failed
                self.store.set(key, value)

    def _read(self, kind: str) -> dict[int, str]:
        keys = {r: f"dopt/{kind}/{r}" for r in range(self.size)}
        return {r: self.store.get(k).decode() for r, k in keys.items() if self.store.check([k])}

    def _loop(self) -> None:
        while not self._stop.wait(self.poll):
            try:
                others = {r: n for r, n in self._read("failed").items() if r != self.rank}
            except Exception:
                others = {0: "|the store on rank 0 is gone"}
            if others and not self._stop.wait(self.grace):
                rank, note = next(iter(sorted(others.items())))
                print(
                    f"[rank {self.rank}] ended: rank {rank} failed {self.grace:.0f} s ago ({note.partition('|')[2]}) and "
                    "this rank has not noticed; it was here:",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback()
                os._exit(1)
