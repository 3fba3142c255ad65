"""Gossip over directed graphs whose ranks know only whom they send to."""

from __future__ import annotations

from lightning_dopt.combine import PushSum
from lightning_dopt.local import GradientTracking
from lightning_dopt.plan import Plan, Sync
from lightning_dopt.topology import OnePeerExponential
from lightning_dopt.topology.base import Topology


def sgp(topology: Topology | None = None) -> Plan:
    """SGP: stochastic gradient push, gossip that ends in the plain mean over directed graphs.

    Args:
        topology: Peers whose columns sum to one, such as ``Directed(links)``; ``None`` means the one-peer exponential graph,
            where rows do as well and push-sum has nothing to correct.

    Source: Assran, Loizou, Ballas, Rabbat, "Stochastic Gradient Push for Distributed Deep Learning", arXiv 1811.10792.
    """
    return Plan([Sync(peers=topology or OnePeerExponential(), signal="value", combine=PushSum())])


def push_diging(topology: Topology | None = None) -> Plan:
    """Push-DIGing: gradient tracking over directed graphs, exact under heterogeneous data.

    Args:
        topology: As for :func:`sgp`.

    Source: Nedic, Olshevsky, Shi, "Achieving Geometric Convergence for Distributed Optimization over Time-Varying
    Graphs", arXiv 1607.03218.
    """
    peers = topology or OnePeerExponential()
    syncs = [Sync(what="gradients", peers=peers), Sync(peers=peers, signal="value", combine=PushSum())]
    return Plan(syncs, [GradientTracking("semi")])
