"""CELLM: low-rank adapters whose largest entries alone go up and come down."""

from __future__ import annotations

from lightning_dopt._checks import check_flag, check_float
from lightning_dopt.adaptive import FedAdam
from lightning_dopt.compress import Codec, ErrorFeedback, Identity, TopK
from lightning_dopt.local import Correction, Download
from lightning_dopt.outer import Outer
from lightning_dopt.plan import Plan
from lightning_dopt.plans.federated import averaging, clients


def cellm(
    match: str = "*lora_*",
    sync_every: int = 20,
    up: float = 0.25,
    down: float = 0.25,
    outer: Outer | None = None,
    feedback: bool = True,
    fraction: float = 1.0,
    counts: list[int] | None = None,
    seed: int = 0,
) -> Plan:
    """Adapters are trained densely; a round starts from the largest of their entries, and the largest changes are sent.

    Everything but the adapters should be frozen (``requires_grad_(False)``); what is trained beside them and not matched stays
    with its rank. ``A`` and ``B`` are averaged each on its own, which is not the average of their products. The defaults are ours.

    Args:
        match: Pattern on the names of the adapters' parameters.
        sync_every: Optimizer steps per round.
        up: Share of the changes that is sent, in (0, 1].
        down: Share of the common adapters that a round starts from, in (0, 1], see :class:`~lightning_dopt.local.Download`.
        outer: Optimizer on the common adapters; ``None`` means ``FedAdam()``.
        feedback: Whether what was not sent is added to the next change; the paper loses it, and a warning says so.
        fraction: Share of the ranks drawn for a round.
        counts: Samples of each rank, its weight in the mean.
        seed: Of the draws.

    Raises:
        ValueError: an option out of range.

    Source: Vavekanand, Sam, "CELLM", arXiv 2407.20557; Kuo, Raje, Rajesh, Smith, "Federated LoRA with Sparse Communication"
    (FLASC), arXiv 2406.05233.
    """
    check_float("cellm", "up", up, 0.0, 1.0, open_low=True)
    check_float("cellm", "down", down, 0.0, 1.0, open_low=True)
    check_flag("cellm", "feedback", feedback)
    wire: Codec = Identity() if up == 1.0 else TopK(up)
    if up < 1.0 and feedback:
        wire = ErrorFeedback(TopK(up))
    start: list[Correction] = [Download(TopK(down))] if down < 1.0 else []
    peers = clients("cellm", fraction, counts, seed)
    return averaging("cellm", sync_every, peers, outer or FedAdam(), wire, match=match, corrections=start)
