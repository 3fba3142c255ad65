"""DProxSGT: gossip for losses with an l1 term, exact under heterogeneous data; CDProxSGT with compressed messages."""

from __future__ import annotations

from lightning_dopt.compress.base import Codec
from lightning_dopt.local import GradientTracking, Prox
from lightning_dopt.plan import Plan
from lightning_dopt.plans.gossip import gossip
from lightning_dopt.topology import Ring
from lightning_dopt.topology.base import Topology


def dprox_sgt(l1: float = 1e-4, topology: Topology | None = None, codec: Codec | None = None, match: str = "*") -> Plan:
    """Gradient tracking with a proximal step: all ranks find the same sparse model.

    Args:
        l1: Weight of the l1 norm.
        topology: ``None`` means the ring.
        codec: For both messages; a lossy compressor is wrapped in ``Difference`` (CDProxSGT).
        match: Pattern on the names of the parameters that the norm is of.

    Raises:
        ValueError: an option out of range.

    Source: Yan et al., "Compressed Decentralized Proximal Stochastic Gradient Method for Nonconvex Composite Problems with
    Heterogeneous Data", arXiv 2302.14252.
    """
    plan = gossip(topology or Ring(), codec, "gradient_tracking")
    return Plan(plan.syncs, [GradientTracking(), Prox(l1, match)])
