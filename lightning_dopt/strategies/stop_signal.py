"""SIGTERM: all ranks stop together where they meet anyway, or each on its own if that takes too long."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_dopt.strategies import _private

PATIENCE = 10.0
"""Seconds from the signal until a rank stops on its own; schedulers kill after 30 s, and a checkpoint takes time."""


class StopSignal:
    """Handles SIGTERM during ``fit``, without communication inside the signal handler.

    The signal is noted. Before the next step at which all ranks meet, rank 0 tells all whether it got one; then all raise
    ``SIGTERMException`` at the same step, so that replicas saved by a callback belong together. A rank that has not
    come to such a step within :data:`PATIENCE` seconds stops after its batch.

    Where messages travel while training goes on nobody shall wait for this one either: what rank 0 says before one such
    step is heard before the next.

    Args:
        trainer: The Trainer, before it registers its signal handlers.
        meets: Whether all ranks wait for all at the coming optimizer step; the same answer on all ranks.
        ask_zero: Begins to give all ranks rank 0's flag, and returns what waits for it. Collective.
        late: Whether the answer is heard one meeting later.
    """

    def __init__(
        self, trainer: Any, meets: Callable[[], bool], ask_zero: Callable[[bool], Callable[[], bool]], late: bool
    ) -> None:
        self.trainer, self.meets, self.ask_zero, self.late = trainer, meets, ask_zero, late
        self._answer: Callable[[], bool] | None = None
        self._timer: threading.Timer | None = None
        self._undo = _private.replace_sigterm(trainer, self._on_signal, self._before_batch)

    def undo(self) -> None:
        """The fit is over."""
        self._undo()
        if self._timer is not None:
            self._timer.cancel()

    def _on_signal(self, signum: int, frame: object) -> None:
        if self._timer is not None:
            return
        self._timer = threading.Timer(PATIENCE, _private.received_sigterm, (self.trainer,))
        self._timer.daemon = True
        self._timer.start()
        if self.trainer.world_size == 1:
            _private.received_sigterm(self.trainer)
        launcher = self.trainer.strategy.launcher
        if launcher is not None:
            launcher.kill(signum)

    def _before_batch(self) -> None:
        if not self.meets():
            return
        stop = False
        if self._answer is not None:
            stop, self._answer = self._answer(), None
        if not stop:
            answer = self.ask_zero(self._timer is not None)
            if self.late:
                self._answer = answer
            else:
                stop = answer()
        if stop:
            _private.received_sigterm(self.trainer)
            raise SIGTERMException
