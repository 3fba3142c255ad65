"""A hub in real time: workers hand in what they have done, from threads, and are told when to go on."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from torch import Tensor

from lightning_dopt._checks import check_int
from lightning_dopt.asynchronous.hub import Hub, Push
from lightning_dopt.comm.world import SyncError


@dataclass(frozen=True)
class Answer:
    """What a worker goes on with.

    Args:
        reference: One vector per lane; nobody changes it.
        version: Its version.
        steps: Optimizer steps of the coming phase.
        done: Whether training has had the steps that it was to have.
    """

    reference: list[Tensor]
    version: int
    steps: int
    done: bool


class HubDesk:
    """Owns a :class:`Hub` and does what its rule says when it says so, by the clock on the wall.

    Args:
        hub: The hub.
        total_steps: Optimizer steps of all workers together after which answers say ``done``; 0: never.

    Raises:
        ValueError: ``total_steps < 0``.
    """

    def __init__(self, hub: Hub, total_steps: int = 0) -> None:
        self.hub, self.total_steps = hub, check_int("HubDesk", "total_steps", total_steps, 0)
        self._changed = threading.Condition()
        self._waiting: set[int] = set()
        self._leaving: set[int] = set()
        self._failure: str | None = None
        self._stepped = 0
        self._open = False
        self._openings = 0
        self._reference: list[Tensor] | None = None
        self.culprit = -1
        """The rank that is to blame for a failure; -1: none, or unknown."""

    def open(self) -> None:
        """All workers are there and get going."""
        with self._changed:
            self.hub.alive = set(range(self.hub.n))
            self._waiting.clear()
            self._leaving.clear()
            self._open = True
            self._openings += 1
        if self.hub.rule.when.period is not None:
            threading.Thread(target=self._tick, args=(self._openings,), name="hub clock", daemon=True).start()

    def first(self, worker: int) -> Answer:
        """What a worker begins with."""
        with self._changed:
            return self._answer(worker)

    def hand_in(self, worker: int, push: Push | None, last: bool = False) -> Answer:
        """Take in a push, if there is one; returns when its worker is to go on.

        Args:
            worker: Who.
            push: What it has done.
            last: Whether it leaves. Then the answer comes when all have left and all that can be is taken in. While its push
                waits for others it counts as one of those that a step waits for: who comes first makes no difference.

        Raises:
            SyncError: a worker is lost.
        """
        waits = self.hub.rule.when.waits
        with self._changed:
            self.check()
            if push is not None:
                if waits:
                    self._waiting.add(worker)
                self._plan(self.hub.receive(push))
            if last:
                self._leaving.add(worker)
                self._let_go()
                self._close()
                self._changed.wait_for(lambda: not self._open or self._failure is not None)
            elif push is not None and waits:
                self._changed.wait_for(lambda: worker not in self._waiting or self._failure is not None)
            self.check()
            return self._answer(worker)

    def fail(self, reason: str, culprit: int = -1) -> None:
        """Nobody goes on: everyone who waits, or comes later, gets a :class:`SyncError`."""
        with self._changed:
            if self._failure is None:
                self._failure, self.culprit = reason, culprit
            self._changed.notify_all()

    def check(self) -> None:
        """Raise what has gone wrong.

        Raises:
            SyncError: a worker is lost.
        """
        if self._failure is not None:
            raise SyncError(self._failure)

    # ------------------------------------------------------------------ with the lock held

    def _answer(self, worker: int) -> Answer:
        if self._reference is None:  # the same copy for all that are answered before the next step
            self._reference = [t.clone() for t in self.hub.reference]
        done = 0 < self.total_steps <= sum(self.hub.steps)
        return Answer(self._reference, self.hub.version, self.hub.steps_of(worker), done)

    def _plan(self, delay: float | None) -> None:
        if delay == 0.0:
            self._step()
        elif delay is not None:
            timer = threading.Timer(delay, self._step_unless_done, (self._stepped,))
            timer.daemon = True
            timer.start()

    def _step(self) -> None:
        self._stepped += 1
        self._reference = None
        self._waiting.difference_update(self.hub.step())
        self._changed.notify_all()

    def _let_go(self) -> None:
        """Who leaves is gone once its push has been taken."""
        while gone := self._leaving & self.hub.alive - self._waiting:
            self._plan(self.hub.leave(min(gone)))

    def _close(self) -> None:
        if self.hub.alive - self._leaving:
            return
        if self._waiting:  # what they wait for would come with time; what a buffer waits for would not
            self._step()
            self._let_go()
        self._open = False
        self._changed.notify_all()

    # ------------------------------------------------------------------ other threads

    def _step_unless_done(self, stepped: int) -> None:
        with self._changed:
            if self._stepped == stepped and self._open:
                self._step()

    def _tick(self, opening: int) -> None:
        period = self.hub.rule.when.period
        assert period is not None

        def over() -> bool:
            return not self._open or self._openings != opening or self._failure is not None

        with self._changed:
            while not self._changed.wait_for(over, period):
                self._step()
