"""RelaySGD: exact gossip on a tree, without any correction of the gradients."""

from lightning_dopt.combine import RelaySum
from lightning_dopt.plan import Plan, Sync
from lightning_dopt.topology import Tree
from lightning_dopt.topology.base import Topology


def relay_sgd(topology: Topology | None = None) -> Plan:
    """Models are relayed along a tree, each arriving everywhere with weight ``1/n``, late by its distance.

    Exact with SGD; an adaptive inner optimizer divides each rank's own gradient and keeps its bias.

    Args:
        topology: A tree: ``Tree()`` (``None``), ``Chain()``, ``Star()``.

    Source: Vogels et al., "RelaySum for Decentralized Deep Learning on Heterogeneous Data", arXiv 2110.04175.
    """
    return Plan([Sync(peers=topology or Tree(), signal="value", combine=RelaySum())])
