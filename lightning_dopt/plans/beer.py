"""BEER: gradient tracking with both messages compressed, exact under heterogeneous data."""

from __future__ import annotations

from lightning_dopt.apply import Blocking
from lightning_dopt.compress import TopK
from lightning_dopt.compress.base import Compressor
from lightning_dopt.compress.memory import Difference
from lightning_dopt.local import GradientTracking
from lightning_dopt.plan import Plan, Sync
from lightning_dopt.topology import Ring
from lightning_dopt.topology.base import Topology


def beer(topology: Topology | None = None, codec: Compressor | None = None, gamma: float = 0.2) -> Plan:
    """Gradient tracking in which parameters and trackers both travel as compressed differences to public copies.

    ``V <- V + gamma (W - I) G + g - g_previous``, ``X <- X + gamma (W - I) H - lr V`` with the public copies ``G`` of ``V`` and
    ``H`` of ``X``. The trackers' sum is the gradients' sum whatever the compressor, and with full gradients all ranks
    reach the optimum at a constant learning rate, where CHOCO-SGD stays away from it. Any inner optimizer; two
    compressed messages a step, and memory for six more vectors like the parameters.

    Args:
        topology: ``None`` means the ring.
        codec: For both messages; ``None`` means ``TopK(0.1)``.
        gamma: Step towards the neighbours' copies, in (0, 1]; smaller for stronger compression.

    Raises:
        ValueError: ``codec`` is no compressor or ``gamma`` outside (0, 1].

    Source: Zhao et al., "BEER: Fast O(1/T) Rate for Decentralized Nonconvex Optimization with Communication Compression",
    arXiv 2201.13320.
    """
    peers, wire = topology or Ring(), Difference(codec or TopK(0.1), gamma)
    trackers = Sync(what="gradients", codec=wire, peers=peers)
    mix = Sync(signal="value", codec=wire, peers=peers, apply=Blocking(order="awc"))
    return Plan([trackers, mix], [GradientTracking(form="semi")])
