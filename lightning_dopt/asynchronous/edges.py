"""The pairs of a graph: how often each meets, and who meets whom at which index."""

from __future__ import annotations

from lightning_dopt._checks import check_float, check_int
from lightning_dopt._random import key
from lightning_dopt.topology.base import Topology


def edges(topology: Topology, n: int) -> list[tuple[int, int]]:
    """The linked pairs ``(i, j)`` with ``i < j``, in ascending order.

    Raises:
        ValueError: not an undirected graph, one that changes, is not connected or does not exist for ``n`` workers.
    """
    topology.check(n)
    name = repr(topology)
    if topology.directed or topology.period(n) != 1:
        raise ValueError(f"edges(topology={name}): must be a graph whose links go both ways and stay, such as Ring()")
    pairs = [(i, j) for i in range(n) for j in topology.neighbors(n, i) if i < j]
    seen = {0}
    while grown := {k for pair in pairs if seen & set(pair) for k in pair} - seen:
        seen |= grown
    if len(seen) < n:
        raise ValueError(
            f"edges(topology={name}): rank {min(set(range(n)) - seen)} of {n} cannot be reached from rank 0"
        )
    return pairs


def edge_rate(pairs: int, n: int, rate: float) -> float:
    """How often each of ``pairs`` edges meets if all meet equally often and a node meets ``rate`` times on average."""
    return rate * n / (2 * pairs)


class Matchings:
    """A list of matchings that all ranks know: at index ``k`` every rank has at most one partner.

    The edges are split into ``colours`` matchings once (first fit, in ascending order). Every stretch of ``colours``
    indexes uses each of them once, in an order drawn from ``(seed, stretch)``: all edges meet equally often, and ranks
    agree without talking.

    Args:
        topology: An undirected graph that stays the same.
        n: Number of ranks.
        seed: Seed of the order.

    Raises:
        ValueError: see :func:`edges`; a negative seed.
    """

    def __init__(self, topology: Topology, n: int, seed: int = 0) -> None:
        self.n, self.seed = n, check_int("Matchings", "seed", seed, 0)
        self.pairs = edges(topology, n)
        self._partners: list[dict[int, int]] = []
        for i, j in self.pairs:
            free = next((c for c in self._partners if i not in c and j not in c), None)
            if free is None:
                free = {}
                self._partners.append(free)
            free |= {i: j, j: i}

    @property
    def colours(self) -> int:
        """Number of matchings that together hold every edge once."""
        return len(self._partners)

    def partner(self, rank: int, index: int) -> int | None:
        """Whom ``rank`` meets at ``index``; nobody, if its partner is ``None``."""
        if not self._partners:
            return None
        stretch, place = divmod(index, self.colours)
        order = sorted(range(self.colours), key=lambda c: key(self.seed, stretch, c))
        return self._partners[order[place]].get(rank)

    def neighbours(self, rank: int) -> list[int]:
        """Everybody that ``rank`` ever meets, ascending."""
        return sorted(c[rank] for c in self._partners if rank in c)

    def indexes_per_gradient(self, rate: float) -> float:
        """Indexes per gradient for which a rank has ``rate`` meetings per gradient, averaged over the ranks.

        More than ``rate`` where some ranks have no partner at some indexes.
        """
        check_float("Matchings.indexes_per_gradient", "rate", rate, 0.0, open_low=True)
        return edge_rate(len(self.pairs), self.n, rate) * self.colours if self.pairs else rate
