"""CO2: local steps, an average that is a round late, and an outer step made for late averages."""

from __future__ import annotations

from lightning_dopt._checks import check_float, check_int
from lightning_dopt.apply import OneRound
from lightning_dopt.outer import LateMomentum
from lightning_dopt.plan import Plan, Sync
from lightning_dopt.schedules import Every


def co2(
    sync_every: int = 48,
    outer_lr: float = 1.0,
    outer_momentum: float = 0.0,
    clip: float | None = 1.0,
    penalty: float = 1.0,
    gap_aware: bool = False,
) -> Plan:
    """Communication is hidden if it takes no longer than a round; all ranks start every round from the same weights.

    At the end of round ``k``, with the common starts ``X`` and the mean end of the round before,
    ``m <- clamp(mu m + (X_{k-1} - mean end_{k-1}) / L, -clip, clip)`` and ``X_{k+1} = X_k - outer_lr m``. The first round moves
    nothing. Where a round converges, delayed heavy ball is stable for ``outer_lr < 1 - momentum`` only: penalty and clip are
    there for that.

    Args:
        sync_every: Optimizer steps per round (tau); the authors take 20 and 48.
        outer_lr: Outer learning rate.
        outer_momentum: Outer momentum in [0, 1). The authors take 0 up to 16 workers, 0.2 up to 32, 0.5 up to 64, then 0.6.
        clip: Bound on every element of the momentum; ``None`` for none, 0 freezes the starts.
        penalty: Constant staleness gap penalty, at least 1.
        gap_aware: Whether elements whose start has just moved far are damped more; the form is ours, as the paper's could not
            be checked.

    Raises:
        ValueError: an option out of range.

    Source: Sun et al., "CO2: Efficient Distributed Training with Full Communication-Computation Overlap", arXiv 2401.16265.
    Unlike in the released code the clip clips, and the average is of a copy.
    """
    check_int("co2", "sync_every", sync_every, 1)
    check_float("co2", "outer_lr", outer_lr, 0.0, open_low=True)
    check_float("co2", "outer_momentum", outer_momentum, 0.0, 1.0, open_high=True)
    check_float("co2", "penalty", penalty, 1.0)
    if clip is not None:
        check_float("co2", "clip", clip, 0.0)
    outer = LateMomentum(outer_lr, outer_momentum, clip, penalty, gap_aware)
    return Plan([Sync(Every(sync_every), outer=outer, apply=OneRound())])
