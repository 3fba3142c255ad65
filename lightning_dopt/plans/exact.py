"""Gossip that is exact under heterogeneous data, by the names under which it was published."""

from __future__ import annotations

from lightning_dopt.compress.base import Codec
from lightning_dopt.local import ExactDiffusion, Extra, GradientTracking
from lightning_dopt.plan import Plan
from lightning_dopt.plans.gossip import gossip
from lightning_dopt.topology.base import Topology


def exact_diffusion(topology: Topology | None = None, kappa: float = 1.0, sync_every: int = 1) -> Plan:
    """Exact Diffusion (NIDS): gossip without the bias of heterogeneous data, for one message per round.

    Args:
        topology: Symmetric (or reversible) peers; made lazy if they are not. ``None`` means the ring.
        kappa: 1 for plain SGD, ``1 - momentum`` for heavy-ball, at most 0.1 for Adam.
        sync_every: Optimizer steps between mixings.

    Raises:
        ValueError: an option out of range.

    Source: Yuan, Ying, Zhao, Sayed, "Exact Diffusion for Distributed Optimization and Learning", arXiv 1702.05122.
    """
    return gossip(topology, correction=ExactDiffusion(kappa), sync_every=sync_every)


def d2(topology: Topology | None = None) -> Plan:
    """D2: exact diffusion with the mixing matrix itself, whose eigenvalues must lie above -1/3.

    Args:
        topology: Fixed symmetric peers; ``None`` means the lazy ring.

    Source: Tang, Lian, Yan, Zhang, Liu, "D2: Decentralized Training over Decentralized Data", arXiv 1803.07068.
    """
    return gossip(topology, correction="d2" if topology is not None else "exact_diffusion")


def extra(topology: Topology | None = None, kappa: float = 1.0) -> Plan:
    """EXTRA: exact gossip whose message travels during forward and backward.

    Args:
        topology: Fixed symmetric (or reversible) peers; ``None`` means the ring.
        kappa: 1 for plain SGD, ``1 - momentum`` for heavy-ball, at most 0.1 for Adam.

    Raises:
        ValueError: an option out of range.

    Source: Shi, Ling, Wu, Yin, "EXTRA", arXiv 1404.6264.
    """
    return gossip(topology, correction=Extra(kappa))


def gradient_tracking(topology: Topology | None = None, codec: Codec | None = None) -> Plan:
    """Gradient tracking (DSGT): exact gossip over any doubly stochastic peers with any optimizer, for two messages.

    Args:
        topology: ``None`` means the one-peer exponential graph.
        codec: For both messages; a lossy compressor is wrapped in ``Difference``.

    Source: Di Lorenzo, Scutari, "NEXT", arXiv 1602.00591; Pu, Nedic, "Distributed Stochastic Gradient Tracking Methods",
    arXiv 1805.11454.
    """
    return gossip(topology, codec, "gradient_tracking")


def diging(topology: Topology | None = None) -> Plan:
    """DIGing: gradient tracking that adapts while combining; it needs smaller steps than DSGT.

    Args:
        topology: ``None`` means the one-peer exponential graph.

    Source: Nedic, Olshevsky, Shi, "Achieving Geometric Convergence for Distributed Optimization over Time-Varying
    Graphs", arXiv 1607.03218.
    """
    return gossip(topology, correction=GradientTracking("semi"), order="awc")


def k_gt(topology: Topology | None = None, sync_every: int = 8, codec: Codec | None = None) -> Plan:
    """K-GT: gradient tracking with local steps, exact however many there are.

    Args:
        topology: ``None`` means the one-peer exponential graph.
        sync_every: Optimizer steps between mixings.
        codec: For both messages; a lossy compressor is wrapped in ``Difference``.

    Raises:
        ValueError: an option out of range.

    Source: Liu, Lin, Koloskova, Stich, "Decentralized Gradient Tracking with Local Steps", arXiv 2301.01313.
    """
    return gossip(topology, codec, "local_tracking", sync_every=sync_every)
