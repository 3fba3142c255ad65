"""FISH mask: local SGD on few elements."""

from __future__ import annotations

from lightning_dopt._checks import check_int
from lightning_dopt.compress.base import Codec
from lightning_dopt.local import FisherMask
from lightning_dopt.plan import Plan, Sync
from lightning_dopt.schedules import After, Either, Every, Until


def fish_mask(
    ratio: float = 0.005,
    batches: int = 256,
    sync_every: int = 100,
    refresh: int = 10,
    codec: Codec | None = None,
    always: str | None = None,
) -> Plan:
    """Local SGD that trains and averages the few elements with the most Fisher information.

    Args:
        ratio: Share of the elements, in (0, 1].
        batches: Steps before the first choice, which only score.
        sync_every: Optimizer steps between averages.
        refresh: Averages between choices; 0 chooses once.
        codec: Of the packed elements; ``None`` sends them as they are.
        always: Pattern on the names of parameters that are always trained, such as a new classifier.

    Raises:
        ValueError: an option out of range.

    Source: Sung, Nair, Raffel, "Training Neural Networks with Fixed Sparse Masks", arXiv 2111.09839.
    """
    check_int("fish_mask", "batches", batches, 1)
    check_int("fish_mask", "sync_every", sync_every, 1)
    check_int("fish_mask", "refresh", refresh, 0)
    first = Until(batches, Every(batches))
    when = Either(first, After(batches, Every(refresh * sync_every))) if refresh else first
    syncs = [Sync(After(batches, Every(sync_every)), codec=codec), Sync(when, "tracker")]
    return Plan(syncs, [FisherMask(ratio, always)])
