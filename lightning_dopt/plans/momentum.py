"""Gossip with momentum: local, mixed, quasi-global, and momentum on the mixed step."""

from __future__ import annotations

from lightning_dopt._checks import check_flag, check_float
from lightning_dopt.local import GradientTracking, MixedMomentum, QuasiGlobalMomentum
from lightning_dopt.outer import HeavyBall
from lightning_dopt.plan import Plan, Sync
from lightning_dopt.plans.gossip import gossip
from lightning_dopt.topology import Ring
from lightning_dopt.topology.base import Topology


def dmsgd(topology: Topology | None = None, mix_momentum: bool = False, momentum: float = 0.9) -> Plan:
    """DmSGD: gossip of the weights with local momentum, which multiplies the bias by ``1 / (1 - momentum)``.

    Args:
        topology: ``None`` means the one-peer exponential graph.
        mix_momentum: Whether momentum is mixed as well: twice the bytes, less bias. Momentum is then here and the inner
            optimizer should be plain SGD; without it the inner optimizer should be ``SGD(momentum=...)``.
        momentum: With ``mix_momentum``, in [0, 1).

    Raises:
        ValueError: ``momentum`` outside [0, 1).

    Source: Yu, Jin, Yang, "On the Linear Speedup Analysis of Communication Efficient Momentum SGD", arXiv 1905.03817.
    """
    check_float("dmsgd", "momentum", momentum, 0.0, 1.0, open_high=True)
    if not check_flag("dmsgd", "mix_momentum", mix_momentum):
        return gossip(topology)
    plan = gossip(topology, correction=GradientTracking())
    return Plan(plan.syncs, [MixedMomentum(momentum)])


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
