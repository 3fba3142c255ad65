"""NoLoCo: DiLoCo without an all-reduce; random pairs, and momentum that draws their anchors together."""

from __future__ import annotations

from lightning_dopt._checks import check_float, check_int
from lightning_dopt.apply import Blocking, Delay
from lightning_dopt.compress import Identity
from lightning_dopt.compress.base import Codec
from lightning_dopt.fragments import Fragment, Pattern
from lightning_dopt.outer import GossipMomentum
from lightning_dopt.plan import Plan, Sync
from lightning_dopt.plans.gossip import value_codec
from lightning_dopt.schedules import Every
from lightning_dopt.topology import RandomGroups, RandomPairs


def noloco(
    sync_every: int = 50,
    alpha: float = 0.5,
    beta: float = 0.7,
    gamma: float = 0.7,
    overlap: int = 0,
    fragments: int = 1,
    pattern: Pattern = "strided",
    codec: Codec | None = None,
    seed: int = 0,
    group: int = 2,
) -> Plan:
    """Every ``sync_every`` steps a rank meets one other, drawn anew from the shared seed; bytes do not grow with the workers.

    ``d <- alpha d - beta D - gamma (a - A)``, ``a <- a + d``, ``x <- a`` with the pair's mean change ``D`` and mean anchor ``A``.
    The paper sends both ``D`` and the anchor. One tensor is enough for any ``gamma`` (see
    :class:`~lightning_dopt.outer.GossipMomentum`), so here a round costs one message of the size of the model. Replicas
    are never quite equal.

    Args:
        sync_every: Optimizer steps per round (H).
        alpha: Outer momentum in [0, 1).
        beta: Outer learning rate.
        gamma: Pull of the anchors; replicas stay together below ``2 (1 - alpha^2)`` for many workers, a warning says so.
        overlap: Optimizer steps that a message may travel, below ``sync_every``; progress made meanwhile is kept on top.
        fragments: Parts of the model that are sent in turn, each to a pair of its own.
        pattern: How blocks are dealt, see :class:`~lightning_dopt.Fragment`.
        codec: What is on the wire; a lossy compressor is wrapped in ``Difference``, which keeps two copies for every
            other worker, as pairs change.
        seed: Of the pairs.
        group: Ranks that meet; more than two each hear all others of their group, at as many messages.

    Raises:
        ValueError: an option out of range.

    Source: Kolehmainen et al., "NoLoCo: No-all-reduce Low Communication Training Method for Large Models", arXiv 2506.10911.
    """
    check_int("noloco", "sync_every", sync_every, 1)
    check_float("noloco", "alpha", alpha, 0.0, 1.0, open_high=True)
    check_float("noloco", "beta", beta, 0.0, open_low=True)
    check_float("noloco", "gamma", gamma, 0.0, open_low=True)
    check_int("noloco", "fragments", fragments, 1)
    check_int("noloco", "overlap", overlap, 0)
    check_int("noloco", "seed", seed, 0)
    check_int("noloco", "group", group, 2)
    if max(fragments, overlap + 1) > sync_every:
        raise ValueError(
            f"noloco(sync_every={sync_every}, fragments={fragments}, overlap={overlap}): needs a step for every fragment and a "
            "message that lands before the next one leaves"
        )
    return Plan(
        [
            Sync(
                Every(sync_every, p * sync_every // fragments),
                Fragment(p, fragments, pattern) if fragments > 1 else "parameters",
                "value",
                value_codec(codec if codec is not None else Identity()),
                RandomPairs(seed + p) if group == 2 else RandomGroups(group, seed + p),
                outer=GossipMomentum(alpha, beta, gamma),
                apply=Delay(overlap) if overlap else Blocking(),
            )
            for p in range(fragments)
        ]
    )
