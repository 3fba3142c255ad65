"""Local SGD with a diagonal scaling that all ranks share and that changes at synchronisations only."""

from __future__ import annotations

from typing import Literal

from lightning_dopt._checks import check_choice, check_int
from lightning_dopt.plan import Plan, Sync
from lightning_dopt.schedules import Every


def savic(sync_every: int = 8, scope: Literal["global", "local"] = "global") -> Plan:
    """Averages of the parameters, and of the statistic from which the next round's scaling is made.

    The inner optimizer must be :class:`~lightning_dopt.optim.FrozenScaling` with ``every=sync_every``. In contrast to
    :func:`desloc` nothing adaptive moves between syncs, so local steps of all ranks are scaled alike.

    Args:
        sync_every: Optimizer steps per round.
        scope: ``"global"`` averages the statistic, which doubles the bytes; ``"local"`` leaves each rank its own scaling.

    Raises:
        ValueError: an option out of range.

    Source: Chezhegov et al., "Local Methods with Adaptivity via Scaling", arXiv 2406.00846.
    """
    check_int("savic", "sync_every", sync_every, 1)
    check_choice("savic", "scope", scope, ("global", "local"))
    shared = [Sync(Every(sync_every), "optimizer.statistic")] if scope == "global" else []
    return Plan([Sync(Every(sync_every)), *shared])
