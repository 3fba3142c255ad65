"""Gossip with momentum: local, mixed, quasi-global, and momentum on the mixed step."""

from __future__ import annotations

from lightning_dopt._checks import check_float
from lightning_dopt.local import QuasiGlobalMomentum
from lightning_dopt.outer import HeavyBall
from lightning_dopt.plan import Plan, Sync
from lightning_dopt.plans.gossip import gossip
from lightning_dopt.topology import OnePeerExponential, Ring
from lightning_dopt.topology.base import Topology


def dmsgd(topology: Topology | None = None, mix_momentum: bool = False) -> Plan:
    """DmSGD: gossip of the weights with local momentum, which multiplies the bias by ``1 / (1 - momentum)``.

    Args:
        topology: ``None`` means the one-peer exponential graph.
        mix_momentum: Whether ``momentum_buffer`` is mixed as well: twice the bytes, less bias. The inner optimizer must be
            ``SGD(momentum=...)``.

    Source: Yu, Jin, Yang, "On the Linear Speedup Analysis of Communication Efficient Momentum SGD", arXiv 1905.03817.
    """
    peers = topology or OnePeerExponential()
    plan = gossip(peers)
    extra = [Sync(what="optimizer.momentum_buffer", peers=peers)] if mix_momentum else []
    return Plan([*extra, *plan.syncs])


def decentlam(topology: Topology | None = None, momentum: float = 0.9) -> Plan:
    """DecentLaM: momentum on the mixed step, which leaves the bias of plain gossip as it is.

    ``x <- W (x - lr g) + momentum (x - x_previous)``. The inner optimizer should be plain SGD: momentum is here.

    Args:
        topology: ``None`` means the ring: every rank has its own momentum, which needs a fixed graph to agree.
        momentum: In [0, 1).

    Raises:
        ValueError: ``momentum`` outside [0, 1).

    Source: Yuan et al., "DecentLaM: Decentralized Momentum SGD for Large-Batch Deep Training", arXiv 2104.11981.
    """
    check_float("decentlam", "momentum", momentum, 0.0, 1.0, open_high=True)
    return Plan([Sync(signal="value", peers=topology or Ring(), outer=HeavyBall(1.0, momentum))])


def qg_dsgdm(topology: Topology | None = None, mu: float = 0.9, nu: float = 0.999) -> Plan:
    """QG-DSGDm: the inner optimizer's momentum is rebuilt from the step that mixing has corrected.

    Args:
        topology: ``None`` means the one-peer exponential graph.
        mu: Share of the old momentum that stays; usually the inner optimizer's momentum.
        nu: The same for the second moment of Adam.

    Raises:
        ValueError: an option out of range.

    Source: Lin et al., "Quasi-Global Momentum: Accelerating Decentralized Deep Learning on Heterogeneous Data",
    arXiv 2102.04761.
    """
    return gossip(topology, correction=QuasiGlobalMomentum(mu, nu))
