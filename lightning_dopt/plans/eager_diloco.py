"""DiLoCo whose messages may travel for a whole round: eager and plainly delayed outer updates."""

from __future__ import annotations

from lightning_dopt.apply import OneRound
from lightning_dopt.compress import Identity
from lightning_dopt.compress.base import Codec
from lightning_dopt.fragments import Pattern
from lightning_dopt.plan import Plan
from lightning_dopt.plans.streaming_diloco import fragmented, outer_of
from lightning_dopt.topology import Complete


def eager_diloco(
    sync_every: int = 30,
    outer_lr: float = 0.4,
    outer_momentum: float = 0.9,
    fragments: int = 1,
    pattern: Pattern = "strided",
    codec: Codec | None = None,
) -> Plan:
    """Eager updates: a rank's own change acts at once, that of the others a round later.

    The outer optimizer gets ``m / n + D - m_previous / n``: this rank's own message now, and the mean of the previous
    round without the share that was used already. Replicas differ by design, in proportion to the outer learning rate,
    and the difference does not add up. With one worker it is DiLoCo. At the end of training the last round arrives
    and own shares go back.

    Args:
        sync_every: Optimizer steps per round (H), each of which a message may take.
        outer_lr: Outer learning rate.
        outer_momentum: Outer momentum in [0, 1), Nesterov unless 0. The more workers, the less of it is stable: with 0.9 the
            rate must stay below 0.77, 0.42, 0.32 for 2, 4, 8 workers where a round converges; a warning says so.
        fragments: Parts of the model that are sent in turn, each a period later.
        pattern: How blocks are dealt, see :class:`~lightning_dopt.Fragment`.
        codec: What is on the wire; ``None`` sends floats as they are. The paper also takes ``E3M0()``.

    Raises:
        ValueError: an option out of range.

    Source: Kale, Douillard, Donchev, "Eager Updates for Overlapped Communication and Computation in DiLoCo",
    arXiv 2502.12996.
    """
    outer = outer_of("eager_diloco", outer_lr, outer_momentum)
    return fragmented(
        "eager_diloco", sync_every, fragments, pattern, outer, OneRound("own_share"), codec or Identity(), Complete()
    )


def delayed_diloco(
    sync_every: int = 30,
    outer_lr: float = 0.4,
    outer_momentum: float = 0.5,
    fragments: int = 1,
    pattern: Pattern = "strided",
    codec: Codec | None = None,
) -> Plan:
    """The plain delayed update: the outer optimizer gets the mean change of the previous round; replicas are equal.

    The simplest overlap, which the eager update improves: all ranks, each itself included, learn of a round's
    progress a round late.

    Args:
        sync_every: Optimizer steps per round (H), each of which a message may take.
        outer_lr: Outer learning rate.
        outer_momentum: Outer momentum in [0, 1), Nesterov unless 0. Delay leaves little room: where a round converges the
            rate must stay below 1, 0.72, 0.56, 0.25 at momentum 0, 0.3, 0.5, 0.9; a warning says so. The default is ours.
        fragments: As for :func:`eager_diloco`.
        pattern: As for :func:`eager_diloco`.
        codec: As for :func:`eager_diloco`.

    Raises:
        ValueError: an option out of range.

    Source: the baseline of Kale, Douillard, Donchev, arXiv 2502.12996.
    """
    outer = outer_of("delayed_diloco", outer_lr, outer_momentum)
    return fragmented(
        "delayed_diloco", sync_every, fragments, pattern, outer, OneRound(), codec or Identity(), Complete()
    )
