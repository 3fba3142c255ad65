"""A deterministic virtual clock for links: the time a run would have taken on a network of given speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_dopt._checks import check_float
from lightning_dopt._part import Part


class Link(Part):
    """A full-duplex link of every worker to the others.

    Costs follow the usual latency-bandwidth model: a ring all-reduce of ``B`` bytes over ``n`` ranks takes
    ``2 (n-1) latency + 2 (n-1)/n B / bandwidth``, a ring all-gather of ``p`` bytes per rank
    ``(n-1) (latency + p / bandwidth)``, an exchange with neighbours ``latency + bytes sent / bandwidth``.

    Args:
        mbit: Bandwidth of each worker in each direction, in 10^6 bit per second; 0 means unlimited.
        ms: One-way latency in milliseconds.

    Raises:
        ValueError: a negative bandwidth or latency.
    """

    def __init__(self, mbit: float = 0.0, ms: float = 0.0) -> None:
        self.mbit = check_float("Link", "mbit", mbit, 0.0)
        self.ms = check_float("Link", "ms", ms, 0.0)

    def transfer(self, nbytes: float) -> float:
        """Seconds that ``nbytes`` occupy the link, without latency."""
        return nbytes * 8e-6 / self.mbit if self.mbit else 0.0

    def all_reduce(self, nbytes: int, size: int) -> float:
        """Seconds of a ring all-reduce."""
        return 2 * (size - 1) * (self.ms * 1e-3 + self.transfer(nbytes / size)) if size > 1 else 0.0

    def all_gather(self, nbytes: int, size: int) -> float:
        """Seconds of a ring all-gather of ``nbytes`` per rank."""
        return (size - 1) * (self.ms * 1e-3 + self.transfer(nbytes))

    def exchange(self, nbytes: int) -> float:
        """Seconds until the last of ``nbytes`` to neighbours has arrived; 0 if nothing is sent."""
        return self.ms * 1e-3 + self.transfer(nbytes) if nbytes else 0.0


def one_per_rank(owner: str, link: Link | Sequence[Link] | None, n: int) -> list[Link] | None:
    """Every rank's link, from one for all or a list of them.

    Raises:
        ValueError: a list of another length.
    """
    if link is None or isinstance(link, Link):
        return None if link is None else [link] * n
    links = list(link)
    if len(links) != n or not all(isinstance(each, Link) for each in links):
        raise ValueError(f"{owner}(link=<{len(links)} of them>): must be one Link(...), or {n} of them, one per rank")
    return links


def slowest(links: Sequence[Link]) -> Link:
    """What holds for all: the least bandwidth and the longest latency."""
    return Link(min((each.mbit for each in links if each.mbit), default=0.0), max(each.ms for each in links))


@dataclass
class LinkClock:
    """Virtual time of one worker: it computes, its messages occupy its link one after another, it waits for them."""

    link: Link
    now: float = 0.0
    """Virtual seconds since the start."""
    free: float = 0.0
    """When the link has finished everything handed to it so far."""
    stall_s: float = 0.0
    """Virtual seconds spent waiting."""

    def compute(self, seconds: float) -> None:
        """The worker computes for that long."""
        self.now += seconds

    def post(self, seconds: float, ready: float | None = None) -> float:
        """Hand the link a transfer of that length, not before ``ready``; returns when it will be complete."""
        start = max(self.now if ready is None else ready, self.free)
        self.free = start + seconds
        return self.free

    def wait(self, done: float) -> None:
        """Stand still until ``done``."""
        self.stall_s += max(0.0, done - self.now)
        self.now = max(self.now, done)

    def state_dict(self) -> dict[str, float]:
        """Plain numbers, ready for a checkpoint."""
        return {"now": self.now, "free": self.free, "stall_s": self.stall_s}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from saved times."""
        self.now, self.free, self.stall_s = state["now"], state["free"], state["stall_s"]
