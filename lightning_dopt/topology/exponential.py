"""Directed graphs in which every rank does the same relative to its own number: ring and exponential graphs."""

from __future__ import annotations

from abc import abstractmethod

from lightning_dopt._checks import check_int
from lightning_dopt.topology._graph import log2_ceil
from lightning_dopt.topology.base import Topology


class _Circulant(Topology):
    """Rank ``i`` sends to ``i + o`` and hears ``i - o`` modulo ``n`` for each offset ``o`` of the round, evenly.

    Every matrix is a circulant and therefore doubly stochastic; with ``m`` offsets every weight is ``1 / (m + 1)``.
    """

    directed = True

    @abstractmethod
    def offsets(self, n: int, step: int) -> list[int]:
        """The offsets of round ``step``: distinct, each in ``1..n-1``."""

    def row(self, n: int, rank: int, step: int = 0) -> dict[int, float]:
        """Even weights for ``rank`` itself and the ranks that send to it."""
        offsets = self.offsets(n, step)
        return dict.fromkeys([rank, *((rank - o) % n for o in offsets)], 1.0 / (len(offsets) + 1))

    def receivers(self, n: int, rank: int, step: int = 0) -> list[int]:
        """``rank`` plus each offset, modulo ``n``, ascending."""
        return sorted((rank + o) % n for o in self.offsets(n, step))

    def max_degree(self, n: int) -> int:
        """The most offsets in one round."""
        return max(len(self.offsets(n, step)) for step in range(self.period(n) or 1))

    def is_mean(self, n: int) -> bool:
        """Whether every round has all ``n - 1`` offsets."""
        return all(len(self.offsets(n, step)) == n - 1 for step in range(self.period(n) or 1))

    def symmetric(self, n: int) -> bool:
        """Whether the offsets of every round come in pairs ``o`` and ``n - o``."""
        rounds = (set(self.offsets(n, step)) for step in range(self.period(n) or 1))
        return all(offsets == {n - o for o in offsets} for offsets in rounds)


class DirectedRing(_Circulant):
    """Ranks in a circle, each sending to the next one only; weights 1/2 for itself and the rank before.

    Half the traffic of :class:`Ring`. Doubly stochastic but not symmetric for ``n >= 3``: corrections that need a
    symmetric matrix (exact diffusion, EXTRA) may diverge on it.
    """

    def offsets(self, n: int, step: int) -> list[int]:
        """1, or nothing for a single worker."""
        return [1] if n > 1 else []


class Exponential(_Circulant):
    """The static exponential graph: rank ``i`` sends to ``i + 1, i + 2, i + 4, ...`` modulo ``n``.

    With ``tau = ceil(log2 n)`` receivers per rank and weights ``1 / (tau + 1)`` the consensus rate is
    ``(tau - 1) / (tau + 1)`` for even ``n``: nearly independent of ``n`` at ``log2 n`` messages per round.

    Source: Ying et al., "Exponential Graph is Provably Efficient for Decentralized Deep Training" (2021).
    """

    def offsets(self, n: int, step: int) -> list[int]:
        """All powers of two below ``n``."""
        return [1 << k for k in range(log2_ceil(n))]


class OnePeerExponential(_Circulant):
    """Few receivers per round: in round ``t`` rank ``i`` sends to ``i + j (p + 1)**(t mod tau)`` for ``j = 1..p``.

    With one peer (``p = 1``) that is ``i + 2**(t mod tau)``, ``tau = ceil(log2 n)``, and weights 1/2 for itself and the
    one rank heard; in general ``tau = ceil(log_{p+1} n)`` and weights ``1 / (p + 1)``. If ``n`` is a power of ``p + 1``,
    ``tau`` rounds in a row give the exact mean; otherwise they only come close (offsets of ``n`` or more are left out).
    A single round may not contract at all, so judge the product over a period.

    Source: Assran et al., "Stochastic Gradient Push for Distributed Deep Learning" (2019); exactness: Ying et al.,
    "Exponential Graph is Provably Efficient for Decentralized Deep Training" (2021).

    Args:
        peers: ``p``, the ranks that a rank sends to in a round, at least 1.

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(self, peers: int = 1) -> None:
        self.peers = check_int("OnePeerExponential", "peers", peers, 1)

    def period(self, n: int) -> int:
        """``ceil(log_{p+1} n)``, at least 1."""
        rounds, reach = 1, self.peers + 1
        while reach < n:
            rounds, reach = rounds + 1, reach * (self.peers + 1)
        return rounds

    def offsets(self, n: int, step: int) -> list[int]:
        """Multiples of one power of ``p + 1``, of the next power every round."""
        unit: int = (self.peers + 1) ** (step % self.period(n))
        return [j * unit for j in range(1, self.peers + 1) if j * unit < n]
