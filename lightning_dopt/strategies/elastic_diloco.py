"""DiLoCo whose workers may die, miss rounds, leave and join, by a name."""

from __future__ import annotations

from datetime import timedelta
from typing import Literal

from lightning_dopt import plans
from lightning_dopt.compress.base import Codec
from lightning_dopt.elastic import Missed
from lightning_dopt.strategies.elastic import ElasticStrategy


class ElasticDiLoCoStrategy(ElasticStrategy):
    """DiLoCo whose workers may die, miss rounds, leave and join. See :func:`lightning_dopt.plans.diloco`.

    Args:
        sync_every: Optimizer steps per round (H).
        outer_lr: Outer learning rate.
        outer_momentum: Outer momentum in [0, 1).
        nesterov: Nesterov momentum instead of heavy-ball; must be false when ``outer_momentum`` is 0.
        codec: What is on the wire; ``None`` sends floats as they are.
        workers: See :class:`ElasticStrategy`, as for all that follow.
        worker: See :class:`ElasticStrategy`.
        lighthouse: See :class:`ElasticStrategy`.
        min_workers: See :class:`ElasticStrategy`.
        on_missed_round: See :class:`ElasticStrategy`.
        joiner_optimizer: See :class:`ElasticStrategy`.
        start_timeout: See :class:`ElasticStrategy`.
        evaluate: See :class:`ElasticStrategy`.
        buffers: See :class:`ElasticStrategy`.
        timeout: See :class:`ElasticStrategy`.
    """

    def __init__(
        self,
        sync_every: int = 500,
        outer_lr: float = 0.7,
        outer_momentum: float = 0.9,
        nesterov: bool = True,
        codec: Codec | None = None,
        workers: int | None = None,
        worker: int | None = None,
        lighthouse: str | None = None,
        min_workers: int = 1,
        on_missed_round: Missed = "keep",
        joiner_optimizer: Literal["peer", "fresh"] = "peer",
        start_timeout: timedelta = timedelta(minutes=5),
        evaluate: Literal["consensus", "local"] = "consensus",
        buffers: Literal["average", "local"] = "average",
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        super().__init__(
            plan=plans.diloco(sync_every, outer_lr, outer_momentum, nesterov, codec),
            workers=workers,
            worker=worker,
            lighthouse=lighthouse,
            min_workers=min_workers,
            on_missed_round=on_missed_round,
            joiner_optimizer=joiner_optimizer,
            start_timeout=start_timeout,
            evaluate=evaluate,
            buffers=buffers,
            timeout=timeout,
        )
