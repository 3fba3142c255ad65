"""Strategies with a name: thin, typed faces of the plans that people ask for most."""

from __future__ import annotations

from datetime import timedelta
from typing import Literal

from lightning_dopt import plans
from lightning_dopt.comm.link import Link
from lightning_dopt.comm.links import REST, OnLostPeer
from lightning_dopt.compress.base import Codec
from lightning_dopt.local import Correction
from lightning_dopt.plans.gossip import CorrectionName, Order
from lightning_dopt.strategies.collectives import StartMethod
from lightning_dopt.strategies.replica import ReplicaStrategy
from lightning_dopt.topology.base import Topology

Evaluate = Literal["consensus", "local"]
BufferPolicy = Literal["average", "local"]
HALF_HOUR = timedelta(minutes=30)


class LocalSGDStrategy(ReplicaStrategy):
    """Local SGD: train alone for ``sync_every`` steps, then average. See :func:`lightning_dopt.plans.local_sgd`.

    Args:
        sync_every: Optimizer steps between averages.
        evaluate: See :class:`ReplicaStrategy`, as for all that follow.
        buffers: See :class:`ReplicaStrategy`.
        measure_every: See :class:`ReplicaStrategy`.
        link: See :class:`ReplicaStrategy`.
        link_step_seconds: See :class:`ReplicaStrategy`.
        timeout: See :class:`ReplicaStrategy`.
        process_group_backend: See :class:`ReplicaStrategy`.
        start_method: See :class:`ReplicaStrategy`.
    """

    def __init__(
        self,
        sync_every: int = 8,
        evaluate: Evaluate = "consensus",
        buffers: BufferPolicy = "average",
        measure_every: int = 0,
        link: Link | None = None,
        link_step_seconds: float | None = None,
        timeout: timedelta = HALF_HOUR,
        process_group_backend: str | None = None,
        start_method: StartMethod = "popen",
    ) -> None:
        super().__init__(
            plan=plans.local_sgd(sync_every),
            evaluate=evaluate,
            buffers=buffers,
            measure_every=measure_every,
            link=link,
            link_step_seconds=link_step_seconds,
            timeout=timeout,
            process_group_backend=process_group_backend,
            start_method=start_method,
        )


class DiLoCoStrategy(ReplicaStrategy):
    """DiLoCo: many local steps, then one outer step on the mean change. See :func:`lightning_dopt.plans.diloco`.

    Args:
        sync_every: Optimizer steps per round.
        outer_lr: Outer learning rate.
        outer_momentum: Outer momentum in [0, 1).
        nesterov: Nesterov momentum instead of heavy-ball.
        codec: What is on the wire; ``None`` sends floats.
        topology: With whom; ``None`` means everybody.
        evaluate: See :class:`ReplicaStrategy`, as for all that follow.
        buffers: See :class:`ReplicaStrategy`.
        measure_every: See :class:`ReplicaStrategy`.
        link: See :class:`ReplicaStrategy`.
        link_step_seconds: See :class:`ReplicaStrategy`.
        timeout: See :class:`ReplicaStrategy`.
        process_group_backend: See :class:`ReplicaStrategy`.
        start_method: See :class:`ReplicaStrategy`.
    """

    def __init__(
        self,
        sync_every: int = 500,
        outer_lr: float = 0.7,
        outer_momentum: float = 0.9,
        nesterov: bool = True,
        codec: Codec | None = None,
        topology: Topology | None = None,
        evaluate: Evaluate = "consensus",
        buffers: BufferPolicy = "average",
        measure_every: int = 0,
        link: Link | None = None,
        link_step_seconds: float | None = None,
        timeout: timedelta = HALF_HOUR,
        process_group_backend: str | None = None,
        start_method: StartMethod = "popen",
    ) -> None:
        super().__init__(
            plan=plans.diloco(sync_every, outer_lr, outer_momentum, nesterov, codec, topology),
            evaluate=evaluate,
            buffers=buffers,
            measure_every=measure_every,
            link=link,
            link_step_seconds=link_step_seconds,
            timeout=timeout,
            process_group_backend=process_group_backend,
            start_method=start_method,
        )


class GossipStrategy(ReplicaStrategy):
    """Decentralized SGD: average with neighbours around every step. See :func:`lightning_dopt.plans.gossip`.

    Args:
        topology: With whom; ``None`` means the one-peer exponential graph.
        codec: What is on the wire; a lossy compressor is wrapped in ``Difference``.
        correction: Removes the bias of heterogeneous data.
        order: Adapt then combine, combine then adapt, or adapt while combining; ``None`` is what suits the correction.
        sync_every: Optimizer steps between mixings.
        rounds: Exchanges per mixing.
        evaluate: See :class:`ReplicaStrategy`, as for all that follow.
        buffers: See :class:`ReplicaStrategy`.
        measure_every: See :class:`ReplicaStrategy`.
        link: See :class:`ReplicaStrategy`.
        link_step_seconds: See :class:`ReplicaStrategy`.
        timeout: See :class:`ReplicaStrategy`.
        on_lost_peer: See :class:`ReplicaStrategy`.
        patience: See :class:`ReplicaStrategy`.
        rest: See :class:`ReplicaStrategy`.
        process_group_backend: See :class:`ReplicaStrategy`.
        start_method: See :class:`ReplicaStrategy`.
    """

    def __init__(
        self,
        topology: Topology | None = None,
        codec: Codec | None = None,
        correction: CorrectionName | Correction = "none",
        order: Order | None = None,
        sync_every: int = 1,
        rounds: int = 1,
        evaluate: Evaluate = "consensus",
        buffers: BufferPolicy = "average",
        measure_every: int = 0,
        link: Link | None = None,
        link_step_seconds: float | None = None,
        timeout: timedelta = HALF_HOUR,
        on_lost_peer: OnLostPeer = "end",
        patience: float | None = None,
        rest: int = REST,
        process_group_backend: str | None = None,
        start_method: StartMethod = "popen",
    ) -> None:
        super().__init__(
            plan=plans.gossip(topology, codec, correction, order, sync_every, rounds),
            evaluate=evaluate,
            buffers=buffers,
            measure_every=measure_every,
            link=link,
            link_step_seconds=link_step_seconds,
            timeout=timeout,
            on_lost_peer=on_lost_peer,
            patience=patience,
            rest=rest,
            process_group_backend=process_group_backend,
            start_method=start_method,
        )


class CompressedDDPStrategy(ReplicaStrategy):
    """Data parallel training with compressed gradients. See :func:`lightning_dopt.plans.compressed_ddp`.

    Args:
        codec: What is on the wire; a lossy compressor is wrapped in ``ErrorFeedback``. ``None`` means ``Int8()``.
        evaluate: See :class:`ReplicaStrategy`, as for all that follow.
        buffers: See :class:`ReplicaStrategy`.
        measure_every: See :class:`ReplicaStrategy`.
        link: See :class:`ReplicaStrategy`.
        link_step_seconds: See :class:`ReplicaStrategy`.
        timeout: See :class:`ReplicaStrategy`.
        process_group_backend: See :class:`ReplicaStrategy`.
        start_method: See :class:`ReplicaStrategy`.
    """

    def __init__(
        self,
        codec: Codec | None = None,
        evaluate: Evaluate = "consensus",
        buffers: BufferPolicy = "average",
        measure_every: int = 0,
        link: Link | None = None,
        link_step_seconds: float | None = None,
        timeout: timedelta = HALF_HOUR,
        process_group_backend: str | None = None,
        start_method: StartMethod = "popen",
    ) -> None:
        super().__init__(
            plan=plans.compressed_ddp(codec),
            evaluate=evaluate,
            buffers=buffers,
            measure_every=measure_every,
            link=link,
            link_step_seconds=link_step_seconds,
            timeout=timeout,
            process_group_backend=process_group_backend,
            start_method=start_method,
        )


class LoFiStrategy(ReplicaStrategy):
    """lo-fi: no communication until one average at the end. See :func:`lightning_dopt.plans.lo_fi`.

    Args:
        evaluate: See :class:`ReplicaStrategy`, as for all that follow.
        buffers: See :class:`ReplicaStrategy`.
        measure_every: See :class:`ReplicaStrategy`.
        link: See :class:`ReplicaStrategy`.
        link_step_seconds: See :class:`ReplicaStrategy`.
        timeout: See :class:`ReplicaStrategy`.
        process_group_backend: See :class:`ReplicaStrategy`.
        start_method: See :class:`ReplicaStrategy`.
    """

    def __init__(
        self,
        evaluate: Evaluate = "consensus",
        buffers: BufferPolicy = "average",
        measure_every: int = 0,
        link: Link | None = None,
        link_step_seconds: float | None = None,
        timeout: timedelta = HALF_HOUR,
        process_group_backend: str | None = None,
        start_method: StartMethod = "popen",
    ) -> None:
        super().__init__(
            plan=plans.lo_fi(),
            evaluate=evaluate,
            buffers=buffers,
            measure_every=measure_every,
            link=link,
            link_step_seconds=link_step_seconds,
            timeout=timeout,
            process_group_backend=process_group_backend,
            start_method=start_method,
        )


NAMES: dict[str, type[ReplicaStrategy]] = {
    "local_sgd": LocalSGDStrategy,
    "diloco": DiLoCoStrategy,
    "gossip": GossipStrategy,
    "compressed_ddp": CompressedDDPStrategy,
    "lo_fi": LoFiStrategy,
}
"""The names under which ``Trainer(strategy=...)`` knows the strategies."""
