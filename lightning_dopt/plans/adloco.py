"""AdLoCo: several models that are trained by a few ranks each and merge one after the other."""

from __future__ import annotations

from lightning_dopt._checks import check_float, check_int
from lightning_dopt.outer import GossipMomentum
from lightning_dopt.plan import Plan, Sync
from lightning_dopt.schedules import Every
from lightning_dopt.topology import Complete, Groups, Switch
from lightning_dopt.topology.base import Topology


def adloco(
    trainers: list[list[int]] | None = None,
    sync_every: int = 200,
    outer_lr: float = 0.5,
    merge_every: int = 2,
) -> Plan:
    """DiLoCo in groups ("trainers") of ranks, each with a model of its own; every few rounds the two smallest groups become one.

    Within a group, every ``sync_every`` steps, ``anchor <- anchor - outer_lr (anchor - mean)``. In the first round of a larger
    group its anchors are averaged, too, weighted by the ranks that trained them, and training goes on from there: the mean over
    all ranks is what it would have been without the merge. With one group, which is where it ends, this is DiLoCo with SGD as
    the outer optimizer. No rank leaves, and each keeps its data; those of a merged group serve the common model.

    Its adaptive batches are the callback :class:`~lightning_dopt.callbacks.AdaptiveBatch`; as all ranks take batches of one size
    there, the demand by which the paper picks and weighs groups is their number of ranks.

    Args:
        trainers: The ranks of each group at the start; ``None`` is one group of everybody.
        sync_every: Optimizer steps per round.
        outer_lr: Outer learning rate, without momentum.
        merge_every: Rounds between merges.

    Raises:
        ValueError: an option out of range, groups that do not name every rank once.

    Source: "AdLoCo", arXiv 2508.18182; rates and merges of the authors' code.
    """
    check_int("adloco", "sync_every", sync_every, 1)
    check_float("adloco", "outer_lr", outer_lr, 0.0, open_low=True)
    check_int("adloco", "merge_every", merge_every, 1)
    try:
        groups = Groups(trainers).members if trainers is not None else []
    except ValueError as error:
        raise ValueError(f"adloco(trainers={trainers!r}): must name every rank from 0 on exactly once") from error
    phases: list[tuple[int | None, Topology]] = []
    while len(groups) > 1:
        phases.append(((len(phases) + 1) * merge_every, Groups(groups)))
        first, second, *rest = sorted(groups, key=lambda group: (len(group), group))
        groups = sorted([*rest, sorted(first + second)])
    peers = Switch([*phases, (None, Complete())]) if phases else Complete()
    outer = GossipMomentum(0.0, outer_lr, 1.0)  # anchors of a group that has just met become equal at once
    return Plan([Sync(Every(sync_every), signal="value", peers=peers, outer=outer)])
