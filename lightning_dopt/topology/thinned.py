"""Links that are used now and then: every link of another topology with a probability in every round."""

from __future__ import annotations

from lightning_dopt._checks import check_float, check_int
from lightning_dopt.topology._graph import random_bits
from lightning_dopt.topology.base import Topology


class Thinned(Topology):
    """Every link of an undirected topology is used with probability ``p`` in each round, independently.

    The weight of a link that rests stays with both of its ends, so every round keeps the mean exactly. The draw depends on
    ``(seed, step, link)`` alone and both ends agree without a word. ``Thinned(RandomPairs(), 0.2)`` is the sparse gossip
    of training with a single merging: in each round about a fifth of the workers meet one random other.

    Args:
        topology: The links, with symmetric weights.
        p: Probability that a link is used, in (0, 1].
        seed: Selects the draws, at least 0.

    Raises:
        ValueError: an argument out of range; from ``check``, a topology whose weights are not symmetric.

    Source: Boyd, Ghosh, Prabhakar, Shah, "Randomized Gossip Algorithms" (2006), for the model.
    """

    def __init__(self, topology: Topology, p: float, seed: int = 0) -> None:
        if not isinstance(topology, Topology):
            raise ValueError(f"Thinned(topology={topology!r}): must be a topology such as Ring()")
        self.topology = topology
        self.p = check_float("Thinned", "p", p, 0.0, 1.0, open_low=True)
        self.seed = check_int("Thinned", "seed", seed, 0)

    def check(self, n: int) -> None:
        """Raise ``ValueError`` in one line unless the inner topology exists and has symmetric weights."""
        self.topology.check(n)
        if not self.topology.symmetric(n):
            raise ValueError(f"{self!r}: needs symmetric weights, {self.topology!r} has none with {n} workers")

    def period(self, n: int) -> int | None:
        """``None``; that of the inner topology if every link is always used, or there is none."""
        return self.topology.period(n) if self.p == 1.0 or n == 1 else None

    def row(self, n: int, rank: int, step: int = 0) -> dict[int, float]:
        """The inner row; the weights of links that rest are added to the own one."""
        row = self.topology.row(n, rank, step)
        resting = [j for j in row if j != rank and not self._used(rank, j, step)]
        for j in resting:
            row[rank] = row.get(rank, 0.0) + row.pop(j)
        return row

    def _used(self, i: int, j: int, step: int) -> bool:
        return random_bits(self.seed, step, min(i, j), max(i, j)) < self.p * 2.0**64

    def max_degree(self, n: int) -> int:
        """That of the inner topology."""
        return self.topology.max_degree(n)

    def is_mean(self, n: int) -> bool:
        """Only with one worker, or if every link is always used and the inner rounds are means."""
        return n == 1 or (self.p == 1.0 and self.topology.is_mean(n))
