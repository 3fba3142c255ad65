"""Compressed gossip, by the names under which it was published."""

from __future__ import annotations

from lightning_dopt.compress import TopK
from lightning_dopt.compress.base import Compressor
from lightning_dopt.compress.memory import DeepSqueeze, Difference, MoniQua
from lightning_dopt.plan import Plan
from lightning_dopt.plans.gossip import gossip
from lightning_dopt.topology import Ring
from lightning_dopt.topology.base import Topology


def choco_sgd(topology: Topology | None = None, codec: Compressor | None = None, gamma: float = 0.2) -> Plan:
    """CHOCO-SGD: compressed differences to public copies; the mean is kept whatever the compressor.

    Args:
        topology: ``None`` means the ring.
        codec: ``None`` means ``TopK(0.1)``.
        gamma: Step towards the neighbours' copies; smaller for stronger compression.

    Raises:
        ValueError: ``gamma`` outside (0, 1].

    Source: Koloskova, Stich, Jaggi, arXiv 1902.00340; Koloskova et al., arXiv 1907.09356.
    """
    return gossip(topology or Ring(), Difference(codec or TopK(0.1), gamma))


def deep_squeeze(topology: Topology | None = None, codec: Compressor | None = None, eta: float = 0.1) -> Plan:
    """DeepSqueeze: compressed values with error feedback; one extra vector, no copies of neighbours.

    Args:
        topology: ``None`` means the ring.
        codec: ``None`` means ``TopK(0.1)``.
        eta: Step towards the neighbours' messages; smaller comes closer to consensus, more slowly.

    Raises:
        ValueError: ``eta`` outside (0, 1].

    Source: Tang et al., "DeepSqueeze: Decentralization Meets Error-Compensated Compression", arXiv 1907.07346.
    """
    return gossip(topology or Ring(), DeepSqueeze(codec or TopK(0.1), eta))


def moniqua(topology: Topology | None = None, bits: int = 8, theta: float = 1.0) -> Plan:
    """MoniQua: values modulo a bound on how far neighbours are apart; few bits and no extra memory.

    Args:
        topology: ``None`` means the ring.
        bits: Per coordinate.
        theta: Bound on ``|x_i - x_j|`` in every coordinate. If it is too small ranks do not agree.

    Raises:
        ValueError: an option out of range.

    Source: Lu, De Sa, "Moniqua: Modulo Quantized Communication in Decentralized SGD", arXiv 2002.11787.
    """
    return gossip(topology or Ring(), MoniQua(bits, theta))
