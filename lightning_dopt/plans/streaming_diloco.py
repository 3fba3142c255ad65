"""Streaming DiLoCo: the model in fragments that are sent in turn, four bits each, while training goes on."""

from __future__ import annotations

from lightning_dopt._checks import check_float, check_int
from lightning_dopt.apply import Apply, Blocking, Delay, Lerp, Replace
from lightning_dopt.compress import E3M0
from lightning_dopt.compress.base import Codec, Compressor
from lightning_dopt.compress.memory import Difference
from lightning_dopt.fragments import Fragment, Pattern
from lightning_dopt.outer import SGD, Outer
from lightning_dopt.plan import Plan, Sync, is_exact
from lightning_dopt.schedules import Every
from lightning_dopt.topology import Complete
from lightning_dopt.topology.base import Topology
from lightning_dopt.transport import Transport


def streaming_diloco(
    sync_every: int = 100,
    fragments: int = 3,
    overlap: int = 5,
    alpha: float = 0.5,
    outer_lr: float = 0.4,
    outer_momentum: float = 0.9,
    pattern: Pattern = "strided",
    codec: Codec | None = None,
    topology: Topology | None = None,
    transport: Transport = "auto",
) -> Plan:
    """DiLoCo whose peak traffic is that of a fragment, and whose messages travel while training goes on.

    Every fragment has an anchor, an outer optimizer and a period of ``sync_every`` steps of its own, fragment ``p`` shifted by
    ``p sync_every / fragments`` steps. ``overlap`` steps after a send the mean change moves the anchor by Nesterov momentum,
    and ``x <- alpha x + (1 - alpha) anchor``. Anchors are equal on all ranks at all times, live weights are not.

    Over a sparse ``topology`` fragments of the weights themselves are mixed, as :func:`diloco` does; a lossy codec is then
    wrapped in ``Difference``, and momentum must be lower.

    Args:
        sync_every: Optimizer steps between two sends of one fragment (H); 30 and 100 in the paper.
        fragments: Number of fragments. The paper takes three transformer blocks to one.
        overlap: Optimizer steps that a message may travel (tau), below ``sync_every``; 0 waits for it. Up to 5 in the paper.
        alpha: Share of the live weights that stays; 0 takes the anchor.
        outer_lr: Outer learning rate.
        outer_momentum: Outer momentum in [0, 1), Nesterov unless 0.
        pattern: How blocks are dealt, see :class:`~lightning_dopt.Fragment`.
        codec: What is on the wire; ``None`` means ``E3M0()``, a sign and a power of two in four bits.
        topology: With whom; ``None`` means everybody.
        transport: How messages travel, see :class:`~lightning_dopt.Sync`. ``"two_phase"`` sends ``2 (n - 1) / n`` messages per rank
            in place of ``n - 1``, at the price of packing the mean once more; its second leg leaves half-way through ``overlap``.

    Raises:
        ValueError: an option out of range.

    Source: Douillard et al., "Streaming DiLoCo with overlapping communication: Towards a Distributed Free Lunch",
    arXiv 2501.18512; half a live weight is the middle between its ablations.
    """
    check_int("streaming_diloco", "sync_every", sync_every, 1)
    check_int("streaming_diloco", "overlap", overlap, 0)
    check_float("streaming_diloco", "alpha", alpha, 0.0, 1.0)
    if overlap >= sync_every:
        raise ValueError(
            f"streaming_diloco(overlap={overlap}, sync_every={sync_every}): a message must land before the next one leaves"
        )
    merge = Lerp(alpha) if alpha else Replace()
    return fragmented(
        "streaming_diloco",
        sync_every,
        fragments,
        pattern,
        outer_of("streaming_diloco", outer_lr, outer_momentum),
        Delay(overlap, merge) if overlap else Blocking(merge=merge),
        codec if codec is not None else E3M0(),
        topology or Complete(),
        transport,
    )


def outer_of(owner: str, lr: float, momentum: float) -> Outer:
    """Nesterov momentum, plain SGD where it is 0; errors name the options of the plan."""
    check_float(owner, "outer_lr", lr, 0.0, open_low=True)
    check_float(owner, "outer_momentum", momentum, 0.0, 1.0, open_high=True)
    return SGD(lr, momentum, nesterov=momentum > 0)


def fragmented(
    owner: str,
    sync_every: int,
    count: int,
    pattern: Pattern,
    outer: Outer,
    apply: Apply,
    codec: Codec,
    peers: Topology,
    transport: Transport = "auto",
) -> Plan:
    """One sync per fragment, evenly shifted; one sync of everything if there is one fragment.

    Raises:
        ValueError: more fragments than steps in a period, or no fragment.
    """
    check_int(owner, "sync_every", sync_every, 1)
    check_int(owner, "fragments", count, 1)
    if count > sync_every:
        raise ValueError(f"{owner}(fragments={count}, sync_every={sync_every}): needs a step for every fragment")
    everybody = isinstance(peers, Complete)
    if not everybody and isinstance(codec, Compressor) and not is_exact(codec):
        codec = Difference(codec)
    return Plan(
        [
            Sync(
                Every(sync_every, p * sync_every // count),
                Fragment(p, count, pattern) if count > 1 else "parameters",
                "delta" if everybody else "value",
                codec,
                peers,
                outer=outer,
                apply=apply,
                transport=transport,
            )
            for p in range(count)
        ]
    )
