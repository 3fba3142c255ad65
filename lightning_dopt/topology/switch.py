"""One topology after the other."""

from __future__ import annotations

from lightning_dopt._checks import check_int
from lightning_dopt.topology.base import Topology


class Switch(Topology):
    """Several topologies in turn, by the number of the round: sparse first, complete in the end, or the other way.

    A phase ``(until, topology)`` covers the rounds below ``until`` that no earlier phase covers, and its topology counts
    its own rounds from 0. The last phase has ``until`` ``None`` and never ends. Rounds are sends of the sync, not
    optimizer steps.

    Args:
        phases: pairs of the first round after the phase and its topology, for example
            ``[(900, RandomPairs()), (None, Complete())]``.

    Raises:
        ValueError: no phases, ends that do not increase, a last phase that ends or another that does not; from
            ``check``, a number of workers for which one of the topologies does not exist.
    """

    def __init__(self, phases: list[tuple[int | None, Topology]]) -> None:
        self.phases = [(until, topology) for until, topology in phases]
        self._check_phases()
        self.directed = any(topology.directed for _, topology in self.phases)

    def _check_phases(self) -> None:
        if not self.phases:
            raise ValueError("Switch(phases=[]): must have at least one phase, such as (None, Ring())")
        start = 0
        for place, (until, topology) in enumerate(self.phases):
            if not isinstance(topology, Topology):
                raise ValueError(f"Switch: phase {place} has {topology!r}; must be a topology such as Ring()")
            last = place == len(self.phases) - 1
            if last != (until is None):
                raise ValueError(
                    f"Switch: phase {place} ends at {until}; the last phase, and no other, must end at None"
                )
            if until is not None:
                start = check_int("Switch", f"phases[{place}][0]", until, start + 1)

    def check(self, n: int) -> None:
        """Raise ``ValueError`` if one of the topologies does not exist for ``n`` workers."""
        for _, topology in self.phases:
            topology.check(n)

    def at(self, step: int) -> tuple[Topology, int]:
        """The topology of round ``step``, and the number of the round within its phase."""
        start = 0
        for until, topology in self.phases:
            if until is None or step < until:
                return topology, step - start
            start = until
        raise AssertionError("the last phase never ends")

    def period(self, n: int) -> int | None:
        """``None``, unless there is one phase only (or one worker)."""
        if n == 1:
            return 1
        return self.phases[0][1].period(n) if len(self.phases) == 1 else None

    def row(self, n: int, rank: int, step: int = 0) -> dict[int, float]:
        """The row of the topology whose turn it is."""
        topology, own = self.at(step)
        return topology.row(n, rank, own)

    def neighbors(self, n: int, rank: int, step: int = 0) -> list[int]:
        """The neighbours in the topology whose turn it is."""
        topology, own = self.at(step)
        return topology.neighbors(n, rank, own)

    def receivers(self, n: int, rank: int, step: int = 0) -> list[int]:
        """The receivers in the topology whose turn it is."""
        topology, own = self.at(step)
        return topology.receivers(n, rank, own)

    def max_degree(self, n: int) -> int:
        """The largest of all phases."""
        return max(topology.max_degree(n) for _, topology in self.phases)

    def is_mean(self, n: int) -> bool:
        """Whether every phase is the mean in every round."""
        return all(topology.is_mean(n) for _, topology in self.phases)

    def symmetric(self, n: int) -> bool:
        """Whether all phases are."""
        return all(topology.symmetric(n) for _, topology in self.phases)

    def reversible(self, n: int) -> bool:
        """Whether all phases are, with the same stationary weights."""
        first = self.phases[0][1].stationary(n)
        return all(topology.reversible(n) and topology.stationary(n) == first for _, topology in self.phases)

    def stationary(self, n: int) -> list[float]:
        """The stationary weights of the last phase; earlier phases keep them only if theirs are the same."""
        return self.phases[-1][1].stationary(n)

    def doubly_stochastic(self, n: int) -> bool:
        """Whether all phases are."""
        return all(topology.doubly_stochastic(n) for _, topology in self.phases)

    def row_stochastic(self, n: int) -> bool:
        """Whether the rows of all phases sum to one."""
        return all(topology.row_stochastic(n) for _, topology in self.phases)

    def column_stochastic(self, n: int) -> bool:
        """Whether the columns of all phases sum to one."""
        return all(topology.column_stochastic(n) for _, topology in self.phases)
