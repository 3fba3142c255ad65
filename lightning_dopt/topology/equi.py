"""EquiTopo: graphs of random offsets whose consensus rate does not depend on the number of workers."""

from __future__ import annotations

import math
from collections import Counter
from functools import lru_cache

from lightning_dopt._checks import check_float, check_int
from lightning_dopt.topology._graph import log2_ceil, uniform
from lightning_dopt.topology.base import Topology

_DRAWS = 200


class _EquiStatic(Topology):
    """``peers`` random offsets, drawn once."""

    def __init__(self, peers: int | None = None, seed: int = 0) -> None:
        owner = type(self).__name__
        self.peers = None if peers is None else check_int(owner, "peers", peers, 1)
        self.seed = check_int(owner, "seed", seed, 0)

    @staticmethod
    def peers_for(n: int, rate: float, failure: float = 0.1) -> int:
        """Offsets that make the consensus rate smaller than ``rate`` with probability ``1 - failure`` at least.

        ``ceil(8 ln(2 n / failure) / (3 rate**2))``, a bound that is far from tight for small ``n``.

        Raises:
            ValueError: an argument outside its range.
        """
        check_int("peers_for", "n", n, 1)
        check_float("peers_for", "rate", rate, 0.0, 1.0, open_low=True, open_high=True)
        check_float("peers_for", "failure", failure, 0.0, 1.0, open_low=True, open_high=True)
        return math.ceil(8 * math.log(2 * n / failure) / (3 * rate**2))

    def check(self, n: int) -> None:
        """Raise ``ValueError`` if 200 draws find no connected graph for ``n`` workers."""
        super().check(n)
        self.offsets(n)

    def offsets(self, n: int) -> Counter[int]:
        """The offsets drawn, and how often each was."""
        return Counter(_offsets(type(self).__name__, self.peers or max(1, log2_ceil(n)), self.seed, n))

    def is_mean(self, n: int) -> bool:
        """Whether all weights are ``1/n``: for up to two workers, or if all offsets were drawn equally often."""
        return all(abs(weight - 1.0 / n) < 1e-12 for weight in self.row(n, 0).values()) and len(self.row(n, 0)) == n


class DEquiStatic(_EquiStatic):
    """A static directed graph of random offsets: each rank hears ``i - u`` for each of ``peers`` drawn offsets ``u``.

    Drawn with replacement from ``1..n-1``; ``W`` is the mean over the offsets of the matrices with ``1/n`` on the
    diagonal and ``(n - 1)/n`` at the offset, so that ``W`` is the exact mean in expectation and the consensus rate
    depends on ``peers`` but hardly on ``n``. Doubly stochastic, not symmetric. Draws whose offsets all share a divisor
    with ``n`` (their graph is in pieces) are repeated.

    Source: Song et al., "Communication-Efficient Topologies for Decentralized Learning with O(1) Consensus Rate" (2022).

    Args:
        peers: offsets to draw, at least 1; by default ``ceil(log2 n)``, as many as in :class:`Exponential`.
            :meth:`peers_for` gives the number that guarantees a rate.
        seed: selects the graph, at least 0.

    Raises:
        ValueError: an argument outside its range; from ``check``, no connected graph in 200 draws.
    """

    directed = True

    def row(self, n: int, rank: int, step: int = 0) -> dict[int, float]:
        """``1/n`` for ``rank`` itself, the rest shared by the ranks at the drawn offsets as often as they were drawn."""
        offsets = self.offsets(n)
        unit = (n - 1) / (n * max(1, sum(offsets.values())))
        return {rank: 1.0 / n} | {(rank - u) % n: count * unit for u, count in offsets.items()}

    def receivers(self, n: int, rank: int, step: int = 0) -> list[int]:
        """``rank`` plus each offset, modulo ``n``, ascending."""
        return sorted((rank + u) % n for u in self.offsets(n))

    def max_degree(self, n: int) -> int:
        """The number of different offsets."""
        return len(self.offsets(n))

    def symmetric(self, n: int) -> bool:
        """Whether every offset was drawn as often as its opposite."""
        offsets = self.offsets(n)
        return all(offsets.get(n - u, 0) == count for u, count in offsets.items())


class UEquiStatic(_EquiStatic):
    """The undirected relative of :class:`DEquiStatic`: ``(W + W') / 2`` of its matrix, with up to twice the neighbours.

    Source: Song et al., "Communication-Efficient Topologies for Decentralized Learning with O(1) Consensus Rate" (2022).

    Args:
        peers: offsets to draw, at least 1; by default ``ceil(log2 n)``. Each is used in both directions.
        seed: selects the graph, at least 0.

    Raises:
        ValueError: an argument outside its range; from ``check``, no connected graph in 200 draws.
    """

    def row(self, n: int, rank: int, step: int = 0) -> dict[int, float]:
        """``1/n`` for ``rank`` itself, the rest shared by the ranks at the drawn offsets on both sides."""
        offsets = self.offsets(n)
        unit = (n - 1) / (2 * n * max(1, sum(offsets.values())))
        row = {rank: 1.0 / n}
        for j in [(rank + sign * u) % n for u in offsets.elements() for sign in (1, -1)]:
            row[j] = row.get(j, 0.0) + unit
        return row

    def max_degree(self, n: int) -> int:
        """The number of different offsets and their opposites."""
        return len({o for u in self.offsets(n) for o in (u, n - u)})


class _EquiDyn(Topology):
    """One random offset per round."""

    def __init__(self, eta: float = 0.5, seed: int = 0, peers: int | None = None) -> None:
        owner = type(self).__name__
        self.eta = check_float(owner, "eta", eta, 0.0, 1.0, open_low=True)
        self.seed = check_int(owner, "seed", seed, 0)
        self.peers = None if peers is None else check_int(owner, "peers", peers, 1)

    def check(self, n: int) -> None:
        """Raise ``ValueError`` if 200 draws of the list of offsets find no connected graph for ``n`` workers."""
        super().check(n)
        if self.peers is not None:
            _offsets(type(self).__name__, self.peers, self.seed, n)

    def period(self, n: int) -> int | None:
        """``None``, or 1 where there is only one offset to draw."""
        return 1 if len(self._choices(n)) <= 1 else None

    def offset(self, n: int, step: int) -> int:
        """The offset of round ``step``, in ``1..n-1`` (0 for a single worker)."""
        choices = self._choices(n)
        return choices[uniform(len(choices), self.seed, step)] if choices else 0

    def _choices(self, n: int) -> list[int]:
        if self.peers is None:
            return list(range(1, n))
        return sorted(_offsets(type(self).__name__, self.peers, self.seed, n))

    def max_degree(self, n: int) -> int:
        """One partner."""
        return min(1, n - 1)

    def is_mean(self, n: int) -> bool:
        """Whether there are at most two workers and ``eta`` is one."""
        return n == 1 or (n == 2 and self.eta == 1)


class ODEquiDyn(_EquiDyn):
    """One directed peer per round at a random offset ``u``: ``W(t) = (1 - eta) I + eta A_u``.

    ``A_u`` has ``1/n`` on the diagonal and ``(n - 1)/n`` at the rank ``u`` places back. Doubly stochastic. Drawn from
    ``(seed, step)`` alone. With offsets from all of ``1..n-1`` the expected squared contraction of a round is
    ``1/2 - 1/(2n)`` at ``eta = 1/2`` but ``1 - 2/n`` at ``eta = 1``, so do not raise ``eta`` far above one half.

    Source: Song et al., "Communication-Efficient Topologies for Decentralized Learning with O(1) Consensus Rate" (2022).

    Args:
        eta: share of the peer's matrix, in (0, 1].
        seed: selects the offsets, at least 0.
        peers: draw from the list of so many offsets that :class:`DEquiStatic` would hold; by default from all.

    Raises:
        ValueError: an argument outside its range; from ``check``, no connected list of offsets in 200 draws.
    """

    directed = True

    def row(self, n: int, rank: int, step: int = 0) -> dict[int, float]:
        """Own weight and the weight of the rank at the offset of the round."""
        if n == 1:
            return {rank: 1.0}
        peer = self.eta * (n - 1) / n
        return {rank: 1.0 - peer, (rank - self.offset(n, step)) % n: peer}

    def receivers(self, n: int, rank: int, step: int = 0) -> list[int]:
        """The rank at the offset of the round, in the other direction."""
        return [(rank + self.offset(n, step)) % n] if n > 1 else []

    def symmetric(self, n: int) -> bool:
        """Only where every offset is its own opposite."""
        return all(2 * u == n for u in self._choices(n))


class OUEquiDyn(_EquiDyn):
    """One undirected peer per round: pairs at a random offset, matched one after the other from a random start.

    With the offset ``u`` and a start drawn from ``(seed, step)``, the ranks ``i`` are visited in circular order, and ``i``
    and ``i + u`` become partners if both are still free; they exchange with weight ``eta (n - 1)/n``, the others keep
    their values. Symmetric and doubly stochastic.

    Source: Song et al., "Communication-Efficient Topologies for Decentralized Learning with O(1) Consensus Rate" (2022).

    Args:
        eta: share of the pairs' matrix, in (0, 1]; close to one half is best, see :class:`ODEquiDyn`.
        seed: selects the offsets, at least 0.
        peers: draw from a list of so many offsets; by default from all.

    Raises:
        ValueError: an argument outside its range; from ``check``, no connected list of offsets in 200 draws.
    """

    def period(self, n: int) -> int | None:
        """``None``, or 1 where there is only one pair."""
        return 1 if n <= 2 else None

    def row(self, n: int, rank: int, step: int = 0) -> dict[int, float]:
        """Own weight and that of the partner, if there is one."""
        start = uniform(n, self.seed, step, 1)
        partner = _matched(n, self.offset(n, step), start)[rank]
        peer = self.eta * (n - 1) / n
        return {rank: 1.0} if partner == rank else {rank: 1.0 - peer, partner: peer}


@lru_cache(maxsize=256)
def _matched(n: int, offset: int, start: int) -> tuple[int, ...]:
    """The partner of every rank; a rank without one is its own."""
    partners = list(range(n))
    for k in range(n):
        i = (start + k) % n
        j = (i + offset) % n
        if i != j and partners[i] == i and partners[j] == j:
            partners[i], partners[j] = j, i
    return tuple(partners)


@lru_cache(maxsize=64)
def _offsets(owner: str, peers: int, seed: int, n: int) -> Counter[int]:
    """``peers`` offsets drawn with replacement until they connect everybody, which no common divisor with ``n`` does."""
    if n == 1:
        return Counter()
    for attempt in range(_DRAWS):
        drawn = Counter(1 + uniform(n - 1, seed, attempt, k) for k in range(peers))
        if math.gcd(n, *drawn) == 1:
            return drawn
    raise ValueError(f"{owner}(peers={peers}): no connected graph of {n} workers in {_DRAWS} draws; use more peers")
