"""Virtual time: an event queue whose every run is the same."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable

from lightning_dopt._checks import check_float, check_int
from lightning_dopt._random import uniform


class EventClock:
    """Events in the order of their virtual time; events at equal times run in the order in which they were planned.

    Nothing depends on the wall clock, and random gaps are drawn from counters: equal seeds and equal calls give the
    same events at the same times on any machine.

    Args:
        seed: Seed of the Poisson streams.

    Raises:
        ValueError: a negative seed.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = check_int("EventClock", "seed", seed, 0)
        self.now = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._planned = 0
        self._streams = 0

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Run ``action`` once, ``seconds`` from now (zero: after what is already planned for this moment)."""
        self._at(self.now + check_float("EventClock.after", "seconds", seconds, 0.0), action)

    def every(self, seconds: float, action: Callable[[], None], phase: float = 0.0) -> None:
        """Run ``action`` at ``phase``, ``phase + seconds``, ``phase + 2 seconds``, ... from now on."""
        check_float("EventClock.every", "seconds", seconds, 0.0, open_low=True)
        start = self.now + check_float("EventClock.every", "phase", phase, 0.0)
        self._repeat(lambda k: start + k * seconds, action, 0)

    def poisson(self, rate: float, action: Callable[[], None]) -> None:
        """Run ``action`` at random times, ``rate`` per second on average, independent of all other streams."""
        check_float("EventClock.poisson", "rate", rate, 0.0, open_low=True)
        stream, self._streams = self._streams, self._streams + 1

        def next_time(k: int) -> float:
            return self.now - math.log1p(-uniform(self.seed, stream, k)) / rate

        self._repeat(next_time, action, 0)

    def _repeat(self, time_of: Callable[[int], float], action: Callable[[], None], k: int) -> None:
        def ring() -> None:
            action()
            self._repeat(time_of, action, k + 1)

        self._at(time_of(k), ring)

    def _at(self, time: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (time, self._planned, action))
        self._planned += 1

    def run(self, seconds: float) -> None:
        """Let ``seconds`` pass: run all events up to and including ``now + seconds``, those they plan as well."""
        end = self.now + check_float("EventClock.run", "seconds", seconds, 0.0)
        while self._queue and self._queue[0][0] <= end:
            self.now, _, action = heapq.heappop(self._queue)
            action()
        self.now = end
