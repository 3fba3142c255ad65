"""DiLoCoX: DiLoCo a round late, its changes as thin factors of four bits whose rank follows the changes."""

from __future__ import annotations

from lightning_dopt._checks import check_float, check_int
from lightning_dopt.apply import OneRound
from lightning_dopt.compress import Factors, Int4, KeepEnergy, LowRank
from lightning_dopt.compress.base import Compressor
from lightning_dopt.compress.memory import ErrorFeedback
from lightning_dopt.plan import Plan, Sync
from lightning_dopt.plans.streaming_diloco import outer_of
from lightning_dopt.schedules import ByBytes, Every


def dilocox(
    sync_every: int = 100,
    rank: int = 64,
    keep: float | None = 0.9,
    window: int = 10,
    least: int | None = None,
    outer_lr: float = 0.4,
    outer_momentum: float = 0.5,
    codec: Compressor | None = None,
) -> Plan:
    """Every round matrices are sent as two thin factors, and the outer step of the round before is made.

    At the end of round ``k`` the result of round ``k - 1`` is waited for, ``c = C(anchor - x + e)`` leaves with the residual ``e``,
    Nesterov momentum moves the anchor by the mean ``c`` of round ``k - 1``, and training goes on from the anchor. ``C`` packs
    the factors of every matrix worth it in four bits; vectors travel whole. Every ``window`` rounds each matrix gets the
    smallest rank that keeps ``keep`` of its energy, never a larger one than before.

    The pipeline inside a worker is not part of it: ``PipelineStrategy(pipeline_size=2, plan=plans.dilocox())`` has both. The
    defaults are ours.

    Args:
        sync_every: Optimizer steps of the first round (H), each of which a message may take.
        rank: Rank at the start, the largest.
        keep: Share of the energy of a matrix that its factors must carry, in (0, 1); ``None`` keeps the rank.
        window: Rounds between choices of ranks.
        least: With it rounds get shorter as messages do, down to so many steps, at the same traffic per step.
        outer_lr: Outer learning rate.
        outer_momentum: Outer momentum in [0, 1), Nesterov unless 0. Delay leaves little room: where a round converges the rate
            must stay below 1, 0.72, 0.56, 0.25 at momentum 0, 0.3, 0.5, 0.9; a warning says so.
        codec: How the factors are packed; ``None`` means ``Int4()``.

    Raises:
        ValueError: an option out of range.

    Source: Qi et al., "DiLoCoX: A Low-Communication Large-Scale Training Framework for Decentralized Cluster", arXiv
    2506.21263. The rule for ranks and lengths of rounds could not be checked, see
    :class:`~lightning_dopt.compress.KeepEnergy` and :class:`~lightning_dopt.ByBytes`.
    """
    check_int("dilocox", "sync_every", sync_every, 1)
    check_int("dilocox", "rank", rank, 1)
    check_int("dilocox", "window", window, 1)
    if keep is not None:
        check_float("dilocox", "keep", keep, 0.0, 1.0, open_low=True, open_high=True)
    if least is not None and check_int("dilocox", "least", least, 1) > sync_every:
        raise ValueError(f"dilocox(least={least}, sync_every={sync_every}): the first round is the longest")
    wire: Compressor = Factors(LowRank(rank, min_ratio=1.0), codec if codec is not None else Int4())
    if keep is not None and rank > 1:
        wire = KeepEnergy(wire, keep, every=window)
    when = Every(sync_every) if least is None else ByBytes(sync_every, least)
    outer = outer_of("dilocox", outer_lr, outer_momentum)
    return Plan([Sync(when, signal="delta", codec=ErrorFeedback(wire), outer=outer, apply=OneRound())])
