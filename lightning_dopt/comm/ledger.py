"""The ledger: every byte handed to the wire, counted where it is sent, and every second spent waiting for it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Entry:
    """What one sync has cost so far on this rank."""

    bytes: int = 0
    """Payload bytes sent: values, indices and scales."""
    overhead: int = 0
    """Bytes sent that carry no part of the signal: agreement flags, checks."""
    messages: int = 0
    """Collectives or neighbour exchanges started."""
    stall_s: float = 0.0
    """Seconds this rank stood still, waiting."""
    skipped: int = 0
    """Exchanges with a neighbour that did not take place because it is lost or the link rests."""


@dataclass
class Ledger:
    """Per-sync counters of one rank; part of every checkpoint."""

    entries: dict[str, Entry] = field(default_factory=dict)

    def entry(self, label: str) -> Entry:
        """The counters of one sync, made on first use."""
        return self.entries.setdefault(label, Entry())

    def sent(self, label: str, payload: int, overhead: int = 0) -> None:
        """Count one collective or exchange of this rank."""
        entry = self.entry(label)
        entry.bytes += payload
        entry.overhead += overhead
        entry.messages += 1

    def stalled(self, label: str, seconds: float) -> None:
        """Count time spent waiting."""
        self.entry(label).stall_s += seconds

    def skip(self, label: str, count: int) -> None:
        """Count exchanges with neighbours that did not take place."""
        if count:
            self.entry(label).skipped += count

    @property
    def skipped(self) -> int:
        """All exchanges with a neighbour that did not take place."""
        return sum(e.skipped for e in self.entries.values())

    @property
    def bytes(self) -> int:
        """All payload bytes this rank has sent."""
        return sum(e.bytes for e in self.entries.values())

    @property
    def overhead(self) -> int:
        """All bytes this rank has sent that carry no signal."""
        return sum(e.overhead for e in self.entries.values())

    @property
    def stall_s(self) -> float:
        """All seconds this rank has waited."""
        return sum(e.stall_s for e in self.entries.values())

    def state_dict(self) -> dict[str, dict[str, int | float]]:
        """Plain numbers, ready for a checkpoint."""
        return {label: dict(vars(e)) for label, e in self.entries.items()}

    def load_state_dict(self, state: dict[str, dict[str, int | float]]) -> None:
        """Continue from saved counters."""
        self.entries = {label: Entry(**values) for label, values in state.items()}  # type: ignore[arg-type]


def all_reduce_bytes(nbytes: int, size: int) -> int:
    """Bytes a rank sends in a ring all-reduce of ``nbytes``: ``2 (n-1)/n nbytes`` (reduce-scatter, then all-gather)."""
    return -(-2 * (size - 1) * nbytes // size)


def all_gather_bytes(nbytes: int, size: int) -> int:
    """Bytes a rank sends in a ring all-gather of ``nbytes`` per rank: ``(n-1) nbytes``."""
    return (size - 1) * nbytes
