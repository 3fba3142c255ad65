"""Average for a while, then move on from the average with momentum; and averaging that begins rare or dense."""

from __future__ import annotations

from lightning_dopt._checks import check_float, check_int
from lightning_dopt.outer import HeavyBall
from lightning_dopt.plan import Plan, Sync
from lightning_dopt.schedules import After, Every, Until


def slowmo(sync_every: int = 12, outer_lr: float = 1.0, outer_momentum: float = 0.5) -> Plan:
    """SlowMo: local steps, then the mean change drives heavy-ball momentum on the common starting point.

    ``u <- mu u + (a - mean x)``, ``a <- a - outer_lr u``, ``x <- a``. The paper divides the change by the inner learning
    rate and multiplies by it again when it moves, which is the same while the rate does not change. The inner
    optimizer keeps its state ("maintain" in the paper).

    Args:
        sync_every: Optimizer steps per round (tau); the paper takes 12 and 48.
        outer_lr: Slow learning rate (alpha), 1 in the paper.
        outer_momentum: Slow momentum (beta) in [0, 1), 0.4 to 0.8 in the paper. 0 with rate 1 is local SGD.

    Raises:
        ValueError: an option out of range.

    Source: Wang et al., "SlowMo: Improving Communication-Efficient Distributed SGD with Slow Momentum", arXiv 1910.00643.
    """
    check_int("slowmo", "sync_every", sync_every, 1)
    check_float("slowmo", "outer_lr", outer_lr, 0.0, open_low=True)
    check_float("slowmo", "outer_momentum", outer_momentum, 0.0, 1.0, open_high=True)
    return Plan([Sync(Every(sync_every), outer=HeavyBall(outer_lr, outer_momentum))])


def post_local_sgd(start: int = 1000, sync_every: int = 8) -> Plan:
    """Post-local SGD: an average in every step at first, every ``sync_every`` steps later.

    Over the first ``start`` steps replicas stay equal: with plain SGD inside this is data parallel training, with an
    adaptive or momentum optimizer its states stay local all the same.

    Args:
        start: Optimizer steps with an average each; the papers switch at the first decay of the learning rate.
        sync_every: Optimizer steps between averages from then on.

    Raises:
        ValueError: an option out of range.

    Source: Lin, Stich, Patel, Jaggi, "Don't Use Large Mini-Batches, Use Local SGD", arXiv 1808.07217.
    """
    check_int("post_local_sgd", "start", start, 1)
    check_int("post_local_sgd", "sync_every", sync_every, 1)
    return Plan([Sync(Until(start, Every(1))), Sync(After(start, Every(sync_every)))])
