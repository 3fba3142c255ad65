"""Several exchanges per round: multi-gossip, and its accelerated forms."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_dopt._checks import check_float, check_int
from lightning_dopt.combine.base import WeightedSum, Wire
from lightning_dopt.comm.world import Talk
from lightning_dopt.compress import Identity
from lightning_dopt.topology.base import Topology
from lightning_dopt.topology.spectrum import consensus_rate

if TYPE_CHECKING:
    from lightning_dopt.plan import Sync


class _Several(WeightedSum):
    """``rounds`` exchanges in a row; where one is exact, one."""

    rounds: int

    def exchanges(self, peers: Topology, n: int) -> int:
        """See :meth:`Combine.exchanges`."""
        return 1 if peers.is_mean(n) else self.rounds

    def check(self, sync: Sync) -> None:
        """See :meth:`Combine.check`."""
        if sync.signal != "value":
            raise ValueError(
                f"Sync(signal={sync.signal!r}, combine={self!r}): repeated exchanges mix values, use signal='value'"
            )


class Repeated(_Several):
    """Multi-gossip: ``rounds`` exchanges in a row, ``x <- W x`` each, so that the consensus rate is ``rho**rounds``.

    A lossy codec's memory works in every exchange. Over the complete graph one exchange is exact and is all that is
    done; a changing topology advances with every exchange.

    Args:
        rounds: Exchanges per round of the sync (called Q in DFedSAM-MGS).

    Raises:
        ValueError: ``rounds < 1``.

    Source: Shi et al., "Improving the Model Consistency of Decentralized Federated Learning", arXiv 2302.04083.
    """

    def __init__(self, rounds: int) -> None:
        self.rounds = check_int("Repeated", "rounds", rounds, 1)

    def talk(self, wire: Wire, value: Tensor, state: dict[str, Tensor]) -> Talk[Tensor]:
        """See :meth:`Combine.talk`."""
        for k in range(self.exchanges(wire.peers, wire.size)):
            value = yield from wire.mix(value, k)
        return value


class Chebyshev(_Several):
    """Accelerated gossip on a fixed graph: the Chebyshev polynomial of ``W`` that contracts most in ``rounds`` exchanges.

    ``y_0 = x``, ``y_1 = W x``, ``y_{k+1} = 2 c_k / (rho c_{k+1}) W y_k - c_{k-1} / c_{k+1} y_{k-1}`` with
    ``c_k = T_k(1 / rho)``. Differences shrink by ``1 / T_K(1 / rho)``, and about ``sqrt`` as many exchanges are needed as
    with :class:`Repeated`; the mean is preserved. Negative weights occur on the way, so the result need not lie between
    the values.

    Args:
        rounds: Exchanges per round of the sync.

    Raises:
        ValueError: ``rounds < 1``; from the plan, a lossy codec or a topology that changes or has no real spectrum.

    Source: Scaman et al., "Optimal Algorithms for Smooth and Strongly Convex Distributed Optimization in Networks"
    (MSDA), arXiv 1702.08704.
    """

    in_place = False

    def __init__(self, rounds: int) -> None:
        self.rounds = check_int("Chebyshev", "rounds", rounds, 1)

    def check(self, sync: Sync) -> None:
        """See :meth:`Combine.check`."""
        super().check(sync)
        _only_exact(self, sync)

    def check_size(self, sync: Sync, n: int) -> None:
        """See :meth:`Combine.check_size`."""
        if sync.peers.is_mean(n):
            return
        if sync.peers.period(n) != 1 or not sync.peers.reversible(n):
            raise ValueError(
                f"Sync(peers={sync.peers!r}, combine={self!r}): needs one fixed undirected graph; use Ring() or another "
                "static one, or combine=Repeated(...)"
            )
        if _rate(sync.peers, n) >= 1 - 1e-12:
            raise ValueError(
                f"Sync(peers={sync.peers!r}, combine={self!r}): repeated mixing does not converge with {n} workers "
                "(an eigenvalue is -1); use Lazy(...)"
            )

    def talk(self, wire: Wire, value: Tensor, state: dict[str, Tensor]) -> Talk[Tensor]:
        """See :meth:`Combine.talk`."""
        if wire.peers.is_mean(wire.size):
            return (yield from wire.mix(value))
        rho = _rate(wire.peers, wire.size)
        c_old, c = 1.0, 1.0 / rho
        old, y = value, (yield from wire.mix(value.clone()))
        for k in range(1, self.rounds):
            c_new = 2.0 / rho * c - c_old
            mixed = yield from wire.mix(y.clone(), k)
            old, y = y, mixed.mul_(2.0 * c / (rho * c_new)).sub_(old, alpha=c_old / c_new)
            c_old, c = c, c_new
        return y


class MomentumGossip(_Several):
    """Accelerated gossip that tolerates a slowly changing graph: Nesterov's method on the disagreement.

    ``y = x + q (x - x_previous)``, ``x <- y - (y - W y) / s`` in every exchange, ``s = 1 - lambda_min(W)``,
    ``q = (sqrt(chi) - 1) / (sqrt(chi) + 1)``, ``chi = s / (1 - lambda_2(W))``. About ``sqrt(chi)`` exchanges do what plain
    gossip needs ``chi`` for. If the graph changes arbitrarily no method can do that; it holds for a fixed graph, for
    occasional changes, and for changes around a fixed connected skeleton.

    Args:
        rounds: Exchanges per round of the sync.
        chi: Condition number to assume; ``None`` computes it, over all rounds of a period.

    Raises:
        ValueError: ``rounds < 1`` or ``chi < 1``; from the plan, a lossy codec, a directed topology, or ``chi=None`` with
            a topology that has no period or rounds that do not connect all ranks.

    Source: Metelev, Rogozin, Kovalev, Gasnikov, "Is Consensus Acceleration Possible in Decentralized Optimization over
    Slowly Time-Varying Networks?", arXiv 2301.11817.
    """

    in_place = False

    def __init__(self, rounds: int, chi: float | None = None) -> None:
        self.rounds = check_int("MomentumGossip", "rounds", rounds, 1)
        self.chi = None if chi is None else check_float("MomentumGossip", "chi", chi, 1.0)

    def check(self, sync: Sync) -> None:
        """See :meth:`Combine.check`."""
        super().check(sync)
        _only_exact(self, sync)

    def check_size(self, sync: Sync, n: int) -> None:
        """See :meth:`Combine.check_size`."""
        if sync.peers.is_mean(n):
            return
        if not sync.peers.symmetric(n):
            raise ValueError(
                f"Sync(peers={sync.peers!r}, combine={self!r}): needs symmetric weights, use Ring() or similar"
            )
        period = sync.peers.period(n)
        if self.chi is None and (
            period is None or any(consensus_rate(sync.peers.matrix(n, t)) >= 1 - 1e-12 for t in range(period))
        ):
            raise ValueError(
                f"Sync(peers={sync.peers!r}, combine=MomentumGossip(chi=None)): no round by itself connects all {n} ranks, or "
                "rounds never repeat; give the condition number chi of the skeleton, or use combine=Repeated(...)"
            )

    def talk(self, wire: Wire, value: Tensor, state: dict[str, Tensor]) -> Talk[Tensor]:
        """See :meth:`Combine.talk`."""
        if wire.peers.is_mean(wire.size):
            return (yield from wire.mix(value))
        spread, chi = _condition(wire.peers, wire.size, self.chi)
        q = (math.sqrt(chi) - 1.0) / (math.sqrt(chi) + 1.0)
        old, x = value, value
        for k in range(self.rounds):
            y = x + q * (x - old)
            mixed = yield from wire.mix(y.clone(), k)
            old, x = x, mixed.sub_(y).div_(spread).add_(y)
        return x


def _rate(peers: Topology, n: int) -> float:
    return consensus_rate(peers.matrix(n), None if peers.doubly_stochastic(n) else peers.stationary(n))


def _condition(peers: Topology, n: int, chi: float | None) -> tuple[float, float]:
    """``1 - lambda_min`` and ``chi``, the worst of a period; without a period at most 2, and ``chi`` as given."""
    period = peers.period(n)
    if period is None:
        assert chi is not None  # check_size saw to it
        return 2.0, chi
    spectra = [torch.linalg.eigvalsh(peers.matrix(n, t)) for t in range(period)]
    spread = 1.0 - min(float(s[0]) for s in spectra)
    return spread, chi if chi is not None else spread / (1.0 - max(float(s[-2]) for s in spectra))


def _only_exact(rule: WeightedSum, sync: Sync) -> None:
    if not isinstance(sync.codec, Identity):
        raise ValueError(
            f"Sync(codec={sync.codec!r}, combine={rule!r}): acceleration needs exact messages, use Identity()"
        )
