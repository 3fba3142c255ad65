"""Gossip for matrices that stay orthonormal: conjugate gradients and gradient tracking on the Stiefel manifold."""

from __future__ import annotations

from lightning_dopt._checks import check_int
from lightning_dopt.apply import Blocking
from lightning_dopt.combine import Mixing, Repeated
from lightning_dopt.local import ConjugateGradient, GradientTracking, Stiefel
from lightning_dopt.plan import Plan, Sync
from lightning_dopt.topology import Ring
from lightning_dopt.topology.base import Topology
from lightning_dopt.what import Tracker


def drcgd(match: str = "*.weight", topology: Topology | None = None, rounds: int = 1) -> Plan:
    """DRCGD: decentralized Riemannian conjugate gradients on the Stiefel manifold.

    The inner optimizer should be SGD without momentum; with a constant learning rate it reaches a neighbourhood, with
    rates falling as ``1 / sqrt(k)`` the optimum.

    Args:
        match: Pattern on the names of the matrices that are orthonormal; all others are trained by plain gossip.
        topology: Symmetric peers; ``None`` means the ring.
        rounds: Exchanges of weights and of directions per step (called K).

    Raises:
        ValueError: an option out of range.

    Source: Chen, Ye, Liu, Dai, "Decentralized Riemannian Conjugate Gradient Method on the Stiefel Manifold",
    arXiv 2308.10547.
    """
    check_int("drcgd", "rounds", rounds, 1)
    peers, combine = topology or Ring(), Mixing() if rounds == 1 else Repeated(rounds)
    directions = Sync(what=Tracker(match), peers=peers, combine=combine)
    mix = Sync(signal="value", peers=peers, combine=combine, apply=Blocking("awc"))
    return Plan([directions, mix], [Stiefel(match), ConjugateGradient(match)])


def riemannian_tracking(match: str = "*.weight", topology: Topology | None = None) -> Plan:
    """Riemannian gradient tracking on the Stiefel manifold: exact under heterogeneous data at a constant learning rate.

    Args:
        match: As for :func:`drcgd`.
        topology: Doubly stochastic peers; ``None`` means the ring.

    Source: Chen, Garcia, Hong, Shahrampour, "Decentralized Riemannian Gradient Descent on the Stiefel Manifold",
    arXiv 2102.07091.
    """
    peers = topology or Ring()
    syncs = [Sync(what="gradients", peers=peers), Sync(signal="value", peers=peers, apply=Blocking("awc"))]
    return Plan(syncs, [GradientTracking("semi"), Stiefel(match)])
