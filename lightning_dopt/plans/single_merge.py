"""A single merging: sparse gossip keeps models mergeable, one average at the end makes them good."""

from __future__ import annotations

from lightning_dopt._checks import check_float, check_int
from lightning_dopt.plan import Plan, Sync
from lightning_dopt.schedules import After, AtEnd, Every, Until
from lightning_dopt.topology import RandomPairs
from lightning_dopt.topology.base import Topology
from lightning_dopt.topology.thinned import Thinned


def single_merge(
    sync_every: int = 100,
    p: float = 0.2,
    topology: Topology | None = None,
    dense_from: int | None = None,
    dense_steps: int = 0,
    seed: int = 0,
) -> Plan:
    """Rare random gossip during training and one global average after the last step.

    Local models stay poor, but their average is good at any time (see the callback ``Mergeability``). Communication that
    the budget allows is best spent late: ``dense_from`` and ``dense_steps`` add a window of global averages.

    Args:
        sync_every: Optimizer steps between gossip rounds.
        p: Probability in (0, 1] that a pair of the round meets.
        topology: Who may meet; ``None`` means random pairs. Weights must be symmetric.
        dense_from: Optimizer step after which a window of global averages in every step begins; ``None`` for no window.
        dense_steps: Length of the window in optimizer steps.
        seed: Of the draws.

    Raises:
        ValueError: an option out of range, or a window without a length or a beginning.

    Source: "A single merging suffices", arXiv 2507.06542. Pairs are drawn from a shared seed, so the mean is kept in
    every round.
    """
    check_int("single_merge", "sync_every", sync_every, 1)
    check_float("single_merge", "p", p, 0.0, 1.0, open_low=True)
    check_int("single_merge", "dense_steps", dense_steps, 0)
    check_int("single_merge", "seed", seed, 0)
    if (dense_from is None) != (dense_steps == 0):
        raise ValueError(
            f"single_merge(dense_from={dense_from!r}, dense_steps={dense_steps!r}): give both for a window, or neither"
        )
    peers = topology or RandomPairs(seed)
    sparse = Sync(Every(sync_every), signal="value", peers=Thinned(peers, p, seed + 1) if p < 1 else peers)
    window = []
    if dense_from is not None:
        window = [Sync(After(check_int("single_merge", "dense_from", dense_from, 0), Until(dense_steps, Every(1))))]
    return Plan([sparse, *window, Sync(AtEnd())])
