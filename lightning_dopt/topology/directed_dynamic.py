"""Directed graphs that change every round: random pulls, links taken one by one, machines with changing speakers."""

from __future__ import annotations

import math
from functools import lru_cache

from lightning_dopt._checks import check_float, check_int
from lightning_dopt.topology._graph import log2_ceil, random_bits, uniform
from lightning_dopt.topology.base import Topology

_EXACT = 1e-12
_Rows = tuple[dict[int, float], ...]


class RandomPull(Topology):
    """Every round each rank, with probability ``p``, averages itself with one uniformly random other rank, 1/2 each.

    Nobody waits for a partner that is busy, and a rank may be heard by many at once. Rows sum to one but columns do not:
    agreement is kept exactly, the plain mean in expectation only, so :meth:`stationary` (``1/n`` each) is the expected
    mean and a single run ends somewhere near. Prefer :class:`RandomPairs` where the mean matters. Drawn from ``(seed,
    step, rank)`` alone.

    Args:
        p: probability that a rank pulls in a round, in (0, 1].
        seed: selects the sequence, at least 0.

    Raises:
        ValueError: an argument outside its range.
    """

    directed = True

    def __init__(self, p: float = 0.2, seed: int = 0) -> None:
        self.p = check_float("RandomPull", "p", p, 0.0, 1.0, open_low=True)
        self.seed = check_int("RandomPull", "seed", seed, 0)

    def period(self, n: int) -> int | None:
        """``None``, or 1 where every round is the same."""
        return 1 if self.is_mean(n) else None

    def source(self, n: int, rank: int, step: int) -> int:
        """The rank that ``rank`` pulls from in round ``step``; ``rank`` itself if it does not pull."""
        if n == 1 or random_bits(self.seed, step, rank, 0) >= self.p * 2.0**64:
            return rank
        return (rank + 1 + uniform(n - 1, self.seed, step, rank, 1)) % n

    def row(self, n: int, rank: int, step: int = 0) -> dict[int, float]:
        """One half each for ``rank`` and its source, one for ``rank`` if it does not pull."""
        source = self.source(n, rank, step)
        return {rank: 1.0} if source == rank else {rank: 0.5, source: 0.5}

    def receivers(self, n: int, rank: int, step: int = 0) -> list[int]:
        """The ranks that pull from ``rank``; found by asking all, in time proportional to ``n``."""
        return [i for i in range(n) if i != rank and self.source(n, i, step) == rank]

    def max_degree(self, n: int) -> int:
        """One source."""
        return min(1, n - 1)

    def is_mean(self, n: int) -> bool:
        """Whether there are at most two workers and both always pull."""
        return n == 1 or (n == 2 and self.p == 1)

    def symmetric(self, n: int) -> bool:
        """Only where every round is the mean."""
        return self.is_mean(n)

    def doubly_stochastic(self, n: int) -> bool:
        """Only where every round is the mean."""
        return self.is_mean(n)


class _Sends(Topology):
    """Each rank sends to one other rank at most and splits its value in halves: columns sum to one, rows may not."""

    directed = True

    def target(self, n: int, rank: int, step: int) -> int:
        """The rank that ``rank`` sends to in round ``step``; ``rank`` itself if to nobody."""
        raise NotImplementedError

    def row(self, n: int, rank: int, step: int = 0) -> dict[int, float]:
        """One half of every value that is sent to ``rank``, and of its own if it sends it."""
        return dict(_rows(self, n, step % (self.period(n) or 1))[rank])

    def receivers(self, n: int, rank: int, step: int = 0) -> list[int]:
        """The rank sent to."""
        target = self.target(n, rank, step)
        return [] if target == rank else [target]

    def is_mean(self, n: int) -> bool:
        """For up to two workers."""
        return n <= 2

    def symmetric(self, n: int) -> bool:
        """Whether ranks always exchange in pairs."""
        steps = range(self.period(n) or 1)
        return all(self.target(n, self.target(n, i, step), step) == i for step in steps for i in range(n))

    def row_stochastic(self, n: int) -> bool:
        """Whether in every round every rank hears as many halves as it gives away."""
        steps = range(self.period(n) or 1)
        return all(abs(sum(row.values()) - 1) < _EXACT for step in steps for row in _rows(self, n, step))

    def column_stochastic(self, n: int) -> bool:
        """Always, since nobody gives away more than it has."""
        return True

    def doubly_stochastic(self, n: int) -> bool:
        """Whether rows sum to one as well."""
        return self.row_stochastic(n)


class CycleThrough(_Sends):
    """One link at a time of a static graph: in round ``t`` every rank sends to its ``t``-th neighbour clockwise.

    A rank's receivers are ordered by ``(j - i) mod n`` and taken in turn, half of the value each time. On graphs in
    which everybody does the same relative to its number (ring, exponential graphs) every rank hears one other and the
    matrices are doubly stochastic; on others (torus, hypercube) some rank may hear two and another none, so that only
    columns sum to one and push-sum is needed: :meth:`row_stochastic` tells.

    Args:
        graph: a static graph in which all ranks send to equally many; its weights do not matter.

    Raises:
        ValueError: ``graph`` is not a topology; from ``check``, it changes over time or its degrees differ.
    """

    def __init__(self, graph: Topology) -> None:
        if not isinstance(graph, Topology):
            raise ValueError(f"CycleThrough(graph={graph!r}): must be a static topology such as Exponential()")
        self.graph = graph

    def check(self, n: int) -> None:
        """Raise ``ValueError`` if the graph refuses ``n`` workers, changes over time or has unequal degrees."""
        self.graph.check(n)
        if self.graph.period(n) != 1:
            raise ValueError(f"CycleThrough(graph={self.graph!r}): the graph must stay the same in every round")
        degrees = sorted({len(self.graph.receivers(n, rank)) for rank in range(n)})
        if len(degrees) > 1:
            raise ValueError(
                f"CycleThrough(graph={self.graph!r}): ranks send to between {degrees[0]} and {degrees[-1]} others with "
                f"{n} workers; must be equally many, as on a ring or torus; MatchingsOf takes any undirected graph"
            )

    def period(self, n: int) -> int:
        """The links of a rank, at least 1."""
        return max(1, len(self.graph.receivers(n, 0)))

    def target(self, n: int, rank: int, step: int) -> int:
        """The receiver of ``rank`` in turn."""
        clockwise = sorted(self.graph.receivers(n, rank), key=lambda j: (j - rank) % n)
        return clockwise[step % len(clockwise)] if clockwise else rank


class InnerOuter(_Sends):
    """Machines of ``local`` ranks: in turn one rank of each machine speaks to another machine, the rest among themselves.

    In round ``t`` place ``t mod local`` of every machine sends to the same place of a machine at distance
    ``2**(t // local mod tau)``; the others form a circle and send to the one at distance ``2**(t mod tau')``. One
    receiver each, weights 1/2, doubly stochastic; one message per machine and round crosses machines, where
    :class:`OnePeerExponential` sends up to ``local``.

    Source: the inner-outer dynamic graphs of Ying et al., "BlueFog: Make Decentralized Algorithms Practical For
    Optimization and Deep Learning" (2021).

    Args:
        local: ranks per machine, 1 or at least 3 (of two, the one that stays has nobody to speak to); consecutive ranks
            share a machine.

    Raises:
        ValueError: an argument outside its range; from ``check``, a number of workers that ``local`` does not divide.
    """

    def __init__(self, local: int) -> None:
        self.local = check_int("InnerOuter", "local", local, 1)
        if local == 2:
            raise ValueError("InnerOuter(local=2): must be 1 or at least 3; for two per machine use Hierarchical")

    def check(self, n: int) -> None:
        """Raise ``ValueError`` if ``n`` workers do not fill whole machines."""
        super().check(n)
        if n % self.local:
            raise ValueError(f"InnerOuter(local={self.local}): {n} workers do not fill machines of {self.local}")

    def period(self, n: int) -> int:
        """Until speakers and distances repeat together."""
        if n == self.local:
            return max(1, log2_ceil(n))
        return math.lcm(self.local * _distances(n // self.local), _distances(self.local - 1))

    def target(self, n: int, rank: int, step: int) -> int:
        """The receiver in the next machine for the speaker, in the own machine for the others."""
        size, machines = self.local, n // self.local
        machine, place = divmod(rank, size)
        if machines == 1:
            return (rank + (1 << step % _distances(n))) % n
        speaker, turn = step % size, step // size
        if place == speaker:
            return (machine + (1 << turn % _distances(machines))) % machines * size + place
        seat = ((place - speaker - 1) % size + (1 << step % _distances(size - 1))) % (size - 1)
        return machine * size + (speaker + 1 + seat) % size


def _distances(n: int) -> int:
    """Powers of two below ``n``, at least one."""
    return max(1, log2_ceil(n))


@lru_cache(maxsize=256)
def _rows(topology: _Sends, n: int, step: int) -> _Rows:
    """The rows of all ranks in one round."""
    rows: list[dict[int, float]] = [{i: 1.0} for i in range(n)]
    for i in range(n):
        target = topology.target(n, i, step)
        if target != i:
            rows[i][i] -= 0.5
            rows[target][i] = 0.5
    return tuple(rows)
