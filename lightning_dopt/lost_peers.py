"""Which plans can do without a peer, for good (``on_lost_peer="continue"``) or for a while (``patience``)."""

from __future__ import annotations

from lightning_dopt.combine import Combine, PushSum, RelaySum
from lightning_dopt.comm.links import Links
from lightning_dopt.compress import Budget
from lightning_dopt.compress.base import Compressor
from lightning_dopt.compress.memory import DeepSqueeze, Difference, MoniQua, as_compressor
from lightning_dopt.local import SAM, GradientTracking, LossWeights, Prox, QuasiGlobalMomentum
from lightning_dopt.plan import Plan, Sync, is_exact
from lightning_dopt.topology import Complete
from lightning_dopt.topology.base import Topology

LOCAL = (LossWeights, Prox, QuasiGlobalMomentum, SAM)
"""Corrections whose state says nothing about other ranks."""
MEMORIES = (DeepSqueeze, Difference, MoniQua)
"""Memories that keep the mean when a message does not come (``Difference`` with a copy per neighbour)."""


def check_links(plan: Plan, n: int, links: Links) -> None:
    """Check that every mean and sum that the plan relies on outlives a link between two of ``n`` ranks.

    Raises:
        ValueError: it does not, in one line with the reason and what to use instead.
    """
    if n == 1:
        return
    option = "on_lost_peer='continue'" if links.goes_on else f"patience={links.patience!r}"
    for correction in plan.corrections:
        if not isinstance(correction, LOCAL) and (links.goes_on or not isinstance(correction, GradientTracking)):
            raise ValueError(
                f"{option}: {correction!r} remembers what lost or resting peers sent; use no such correction, "
                "QuasiGlobalMomentum(), or on_lost_peer='end' without patience"
            )
    for sync in plan:
        _check_sync(sync, n, option, links)


def _check_sync(sync: Sync, n: int, option: str, links: Links) -> None:
    peers, codec = sync.peers, sync.codec
    if sync.when.measured and links.goes_on:
        raise ValueError(f"Sync(when={sync.when!r}): needs all ranks to decide, with {option} use Every(...)")
    if sync.when.at_end and peers.is_mean(n) and is_exact(codec) and sync.signal == "value" and sync.combine.linear:
        return  # one sum over the ranks that are left
    if isinstance(peers, Complete) or sync.signal == "delta":
        raise ValueError(
            f"Sync(peers={peers!r}, signal={sync.signal!r}): needs every rank, with {option} use a neighbour topology such "
            "as OnePeerHypercube(), Ring() or RandomPairs()"
        )
    check_symmetric(peers, n, option)
    if isinstance(as_compressor(codec)[0], Budget):
        raise ValueError(
            f"Sync(codec={codec!r}): all ranks add up errors for its choices, with {option} use a fixed codec"
        )
    if _needs_everybody(sync.combine):
        raise ValueError(f"Sync(combine={sync.combine!r}): loses mass with a message, with {option} use Mixing()")
    if not isinstance(codec, (Compressor, *MEMORIES)):
        raise ValueError(
            f"Sync(codec={codec!r}): remembers a sum over the neighbours, with {option} use Difference(...), "
            "DeepSqueeze(...) or MoniQua(...)"
        )


def check_symmetric(peers: Topology, n: int, option: str) -> None:
    """Check that both ends of a link can give up its weight together without moving the mean.

    Raises:
        ValueError: the topology is directed or its weights are not reversible.
    """
    if peers.directed or not peers.reversible(n):
        raise ValueError(
            f"Sync(peers={peers!r}): a lost or resting link needs reversible weights, with {option} use a symmetric topology "
            "such as OnePeerHypercube(), Ring() or RandomPairs()"
        )


def _needs_everybody(combine: Combine) -> bool:
    return not combine.linear or isinstance(combine, (PushSum, RelaySum))
