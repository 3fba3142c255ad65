"""FedCE: federated averaging with weights by what each client contributes."""

from __future__ import annotations

from lightning_dopt._checks import check_choice, check_flag, check_float, check_int
from lightning_dopt.combine import Contribution
from lightning_dopt.combine.contribution import Errors
from lightning_dopt.local import Restart
from lightning_dopt.outer import Outer
from lightning_dopt.plan import Plan, Sync
from lightning_dopt.schedules import Every


def fedce(
    sync_every: int = 20,
    floor: float = 1e-3,
    outer: Outer | None = None,
    restart: bool = True,
    errors: Errors = "none",
) -> Plan:
    """FedAvg whose weights follow how unlike the others each client's changes have been, see :class:`Contribution`.

    With ``errors`` they also follow how badly the model made without a client serves its data; add the callback ``ClientErrors``.

    All ranks take part in every round; every rank gets the changes of all, ``n - 1`` messages each.

    Args:
        sync_every: Optimizer steps per round.
        floor: Smallest weight, in [0, 1).
        outer: Optimizer on the common weights; ``None`` takes the weighted mean.
        restart: Whether the inner optimizer forgets its moments between rounds.
        errors: How errors count: ``"plus"``, ``"times"`` (both from the authors' code), or not at all.

    Raises:
        ValueError: an option out of range.

    Source: Jiang et al., "Fair Federated Medical Image Segmentation via Client Contribution Estimation", arXiv 2303.16520.
    """
    check_int("fedce", "sync_every", sync_every, 1)
    check_float("fedce", "floor", floor, 0.0, 1.0, open_high=True)
    check_flag("fedce", "restart", restart)
    check_choice("fedce", "errors", errors, ("none", "plus", "times"))
    sync = Sync(Every(sync_every), signal="delta", combine=Contribution(floor, errors), outer=outer)
    return Plan([sync], [Restart()] if restart else [])
