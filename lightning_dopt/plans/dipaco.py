"""DiPaCo: every rank trains one path through a model of shared modules."""

from __future__ import annotations

from lightning_dopt._checks import check_flag, check_int
from lightning_dopt.combine import Mixing, Rescaled
from lightning_dopt.compress import Identity
from lightning_dopt.compress.base import Codec
from lightning_dopt.plan import Plan, Sync
from lightning_dopt.plans.streaming_diloco import outer_of
from lightning_dopt.schedules import Every
from lightning_dopt.topology import Complete, Groups
from lightning_dopt.what import Parameters


def dipaco(
    paths: list[list[int]],
    modules: list[str],
    sync_every: int = 150,
    outer_lr: float = 0.7,
    outer_momentum: float = 0.9,
    counts: list[int] | None = None,
    rescale: bool = False,
    codec: Codec | None = None,
) -> Plan:
    """One sync per level of modules: ranks whose paths share a module are a DiLoCo of that module alone.

    A model has levels, and alternatives at each level. A rank holds one path, one alternative per level, under the same names as
    all ranks do; ``paths`` says which alternative its weights stand for. Every ``sync_every`` steps the ranks that hold the
    same alternative average their changes, and Nesterov momentum moves its anchor. What no pattern matches stays with the rank.
    All paths start from rank 0's weights.

    Train with ``ReplicaStrategy(evaluate="local", buffers="local")``: the mean over different paths means nothing. Which
    samples a path sees is up to the data, for example ``PartitionedDataModule(partition="routed")``.

    Args:
        paths: For every rank the number of its alternative at each level, such as ``[[0, 0], [0, 1], [1, 0], [1, 1]]``.
        modules: For every level the pattern of its parameters' names, such as ``["net.0.*", "net.1.*"]``.
        sync_every: Optimizer steps per round.
        outer_lr: Outer learning rate.
        outer_momentum: Outer momentum in [0, 1), Nesterov unless 0.
        counts: Samples of each rank, its weight in the means; ``None`` weighs all alike.
        rescale: Whether means of ``m`` ranks are multiplied by ``sqrt(m)``, see :class:`~lightning_dopt.combine.Rescaled`.
        codec: What is on the wire; ``None`` sends floats as they are.

    Raises:
        ValueError: an option out of range, or paths that do not name one alternative per level.

    Source: Douillard et al., "DiPaCo: Distributed Path Composition", arXiv 2403.10616; rates as remembered.
    """
    check_int("dipaco", "sync_every", sync_every, 1)
    check_flag("dipaco", "rescale", rescale)
    if not paths or not modules or any(len(path) != len(modules) for path in paths):
        raise ValueError(
            f"dipaco(paths={paths!r}, modules={modules!r}): every path needs one alternative for each level"
        )
    for alternative in (a for path in paths for a in path):
        check_int("dipaco", "paths", alternative, 0)
    if counts is not None and len(counts) != len(paths):
        raise ValueError(f"dipaco(counts={counts!r}): must have one number for each of {len(paths)} paths")
    outer = outer_of("dipaco", outer_lr, outer_momentum)
    syncs = []
    for level, match in enumerate(modules):
        chosen = [path[level] for path in paths]
        groups = [[rank for rank, a in enumerate(chosen) if a == module] for module in sorted(set(chosen))]
        peers = Complete() if len(groups) == 1 and counts is None else Groups(groups, counts)
        combine = Rescaled() if rescale else Mixing()
        syncs.append(Sync(Every(sync_every), Parameters(match), "delta", codec or Identity(), peers, combine, outer))
    return Plan(syncs)
