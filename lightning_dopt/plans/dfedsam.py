"""DFedSAM: sharpness-aware local steps, then one or several gossip rounds."""

from __future__ import annotations

from lightning_dopt.local import SAM
from lightning_dopt.plan import Plan
from lightning_dopt.plans.gossip import gossip
from lightning_dopt.topology import Ring
from lightning_dopt.topology.base import Topology


def dfedsam(topology: Topology | None = None, sync_every: int = 5, rho: float = 0.05, rounds: int = 1) -> Plan:
    """Local steps with gradients taken uphill keep models of unlike data alike; DFedSAM-MGS mixes several times.

    Args:
        topology: ``None`` means the ring.
        sync_every: Optimizer steps between mixings.
        rho: Distance uphill; 0 is decentralized federated averaging (DFedAvg).
        rounds: Exchanges per mixing; above 1 it is DFedSAM-MGS.

    Raises:
        ValueError: an option out of range.

    Source: Shi et al., "Improving the Model Consistency of Decentralized Federated Learning", arXiv 2302.04083.
    """
    plan = gossip(topology or Ring(), sync_every=sync_every, rounds=rounds)
    return Plan(plan.syncs, [SAM(rho)])
