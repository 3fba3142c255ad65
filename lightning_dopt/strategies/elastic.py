"""ElasticStrategy: workers that are runs of their own, and meet at the end of each round with whoever is there."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import CheckpointIO, ClusterEnvironment, Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_dopt import plans
from lightning_dopt._checks import check_choice, check_int
from lightning_dopt.comm import ProcessGroupWorld, SyncError
from lightning_dopt.comm.elastic import ElasticWorld, Members, TorchftMembers
from lightning_dopt.elastic import ElasticEngine, ElasticRounds, Missed
from lightning_dopt.elastic_plans import check_elastic
from lightning_dopt.plan import Plan
from lightning_dopt.strategies import _private, replica_files, start
from lightning_dopt.strategies.between_batches import AnchorModel, BetweenBatches
from lightning_dopt.strategies.checkpoints import copied
from lightning_dopt.strategies.replica import ReplicaStrategy
from lightning_dopt.strategies.rng import rng_state

WORKER, WORKERS, LIGHTHOUSE, HOST = "DOPT_WORKER", "DOPT_WORKERS", "TORCHFT_LIGHTHOUSE", "DOPT_HOST"
"""What ``dopt workers`` tells each worker in its environment."""
NAP = 0.2
"""Seconds between two looks at who is there at the start."""


class ElasticStrategy(ReplicaStrategy):
    """Workers that may die, miss rounds, leave and join while the others go on; needs ``torchft``.

    Every worker is a process with a Trainer of its own, ``Trainer(devices=1)``, started by ``dopt workers`` or by hand with the
    same command. Between rounds they know nothing of each other. At the end of a round those that are alive agree on who takes part
    (torchft's quorum), average what they have to say, and each moves its anchor, if the round went well for all. So:

    * A worker that dies takes its own steps since the last round with it. If that happens while messages travel, the round is
      abandoned and the others go on at once; what they have learned comes with the next.
    * A worker that joins, or was started again, gets everything from a member at the next round's end (anchors, outer and inner
      optimizer, schedules, place in the data) and says nothing in that round.
    * A worker that was late for a round gets the anchors, and keeps its own change (``on_missed_round``).

    While nobody dies or joins the run is that of :class:`ReplicaStrategy` with the same plan. Evaluation and checkpoints hold the
    anchors, which are equal on all members; the member with the lowest number in the last round writes the checkpoints.

    Args:
        plan: A plan over ``Complete()`` whose syncs send ``signal="delta"`` with one period; ``None`` means ``plans.diloco()``.
        workers: How many workers there are when all are; ``None`` reads ``DOPT_WORKERS``. Data is cut into so many shares, and the
            start waits for so many.
        worker: Number of this one, from 0; ``None`` reads ``DOPT_WORKER``. Says which share of the data is its own.
        lighthouse: Address of torchft's lighthouse; ``None`` reads ``TORCHFT_LIGHTHOUSE``.
        min_workers: Members that a round needs to count.
        on_missed_round: What a worker does with its own change when a round failed or it was late: ``"keep"`` brings it to the next
            round, ``"restore"`` goes back to the anchor, as torchft does.
        joiner_optimizer: Inner optimizer state of a worker that joins: a member's (``"peer"``), or none (``"fresh"``).
        start_timeout: How long the start waits for all ``workers``; then those that are there begin.
        evaluate: Which model validation measures: ``"consensus"``, the anchors, or ``"local"``, the own weights.
        buffers: See :class:`ReplicaStrategy`.
        offload: See :class:`ReplicaStrategy`.
        clock: See :class:`ReplicaStrategy`.
        timeout: How long a worker waits for others, in every wait; a worker that joins waits for the end of a round.
        accelerator: See ``DDPStrategy``.
        parallel_devices: See ``DDPStrategy``.
        cluster_environment: See ``DDPStrategy``.
        checkpoint_io: See ``DDPStrategy``.
        precision_plugin: See ``DDPStrategy``.

    Raises:
        ValueError: an option or a plan that cannot work, when the strategy or the Trainer is made.
        ImportError: torchft is not installed, when training starts.
    """

    consensus_class = AnchorModel

    def __init__(
        self,
        plan: Plan | None = None,
        workers: int | None = None,
        worker: int | None = None,
        lighthouse: str | None = None,
        min_workers: int = 1,
        on_missed_round: Missed = "keep",
        joiner_optimizer: Literal["peer", "fresh"] = "peer",
        start_timeout: timedelta = timedelta(minutes=5),
        evaluate: Literal["consensus", "local"] = "consensus",
        buffers: Literal["average", "local"] = "average",
        offload: bool = False,
        clock: int = 0,
        timeout: timedelta = timedelta(minutes=30),
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(
            plan=plan if plan is not None else plans.diloco(),
            evaluate=evaluate,
            buffers=buffers,
            offload=offload,
            clock=clock,
            timeout=timeout,
            process_group_backend="gloo",
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        name = type(self).__name__
        check_elastic(self.plan, name)
        self.workers = check_int(name, "workers", _number(name, "workers", workers, WORKERS), 1)
        self.worker = check_int(name, "worker", _number(name, "worker", worker, WORKER), 0)
        if self.worker >= self.workers:
            raise ValueError(f"{name}(worker={self.worker}, workers={self.workers}): workers are numbered from 0")
        address = lighthouse if lighthouse is not None else os.environ.get(LIGHTHOUSE, "")
        if not address:
            raise ValueError(
                f"{name}(lighthouse=...): where is it? Give its address, set {LIGHTHOUSE}, or use `dopt workers`"
            )
        self.lighthouse = address
        self.min_workers = check_int(name, "min_workers", min_workers, 1)
        if self.min_workers > self.workers:
            raise ValueError(f"{name}(min_workers={min_workers}): there are only {self.workers} workers")
        self.on_missed_round: Missed = check_choice(name, "on_missed_round", on_missed_round, ("keep", "restore"))  # type: ignore[assignment]
        self.joiner_optimizer = check_choice(name, "joiner_optimizer", joiner_optimizer, ("peer", "fresh"))
        if start_timeout <= timedelta(0):
            raise ValueError(f"{name}(start_timeout={start_timeout!r}): must be longer than zero")
        self.start_timeout = start_timeout
        self._received: dict[str, Any] | None = None
        self._restore: dict[str, Any] | None = None
        self._members: Members | None = None
        self._made: ElasticRounds | None = None
        self._between: BetweenBatches | None = None

    # ------------------------------------------------------------------ start

    @property
    def writes(self) -> bool:  # type: ignore[override]
        """Whether this worker writes checkpoints: the first of the last round."""
        return self.world is None or self.world.rank == 0

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Yes: a worker that joins has its checkpoint from a member, whom it meets in :meth:`setup`."""
        return True

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """The share of the data that is this worker's own."""
        return {"num_replicas": self.workers, "rank": self.worker}

    def set_world_ranks(self) -> None:
        """See :class:`ReplicaStrategy`; more than one process per Trainer is refused."""
        size = self.num_nodes * self.num_processes
        if size != 1:
            raise ValueError(
                f"Trainer(strategy={type(self).__name__}, ...): has {size} processes; every worker is a run of its own, with "
                "devices=1 and num_nodes=1, started by `dopt workers`"
            )
        super().set_world_ranks()

    def _make_world(self) -> ProcessGroupWorld:
        return ElasticWorld(_Nobody())

    @property
    def _elastic(self) -> ElasticWorld:
        assert isinstance(self.world, ElasticWorld)
        return self.world

    @property
    def rounds(self) -> ElasticRounds:
        """The rounds of this worker, within ``fit``."""
        assert self._made is not None
        return self._made

    def _make_engine(self) -> ElasticEngine:
        assert self.lightning_module is not None
        assert self.world is not None
        average = self.buffer_policy == "average"
        made = start.make_engine(
            self.plan, self.lightning_module, self._index, self.world, average, self.offload, ElasticEngine
        )
        assert isinstance(made, ElasticEngine)
        return made

    def make_members(self) -> Members:
        """Join those that train."""
        try:
            return TorchftMembers(
                self.worker,
                self.lighthouse,
                self.min_workers,
                self.timeout,
                self._state,
                self._receive,
                os.environ.get(HOST),
            )
        except ImportError as error:
            raise ImportError(
                f"{type(self).__name__} needs torchft: pip install 'lightning_dopt[elastic]' ({error})"
            ) from error

    def setup(self, trainer: Trainer) -> None:
        """Meet the others: begin together, or take over what a member of a run that is under way has."""
        if trainer.state.fn != TrainerFn.FITTING:
            super().setup(trainer)
            return
        self._restore = self._received = None
        self.engine = None
        super().setup(trainer)
        assert isinstance(self.engine, ElasticEngine)
        self._made = ElasticRounds(self.engine, self._elastic, self.on_missed_round, self._take, self._warn)
        self._between = BetweenBatches(self)
        trainer.callbacks.insert(0, self._between)
        if self._restore is not None:
            self._join(trainer, self._restore)

    def _share_start(self, module: LightningModule) -> None:
        """Wait until all are there, all with the weights of one; or until a run that is under way has come to a round's end."""
        world = self._elastic
        self._members = world.members = self.make_members()
        deadline = time.monotonic() + self.start_timeout.total_seconds()
        while True:
            ok = world.convene()
            received, self._received = self._received, None
            if received is not None and received["checkpoint"] is not None:
                self._restore = received["checkpoint"]
                rank_zero_info(f"worker {self.worker} joins at step {self._restore['global_step']}")
                return
            if received is not None:
                module.load_state_dict(received["weights"])
            if not ok:
                world.agreed(False)
            elif self._all_here(time.monotonic() > deadline):
                return
            time.sleep(NAP)

    def _all_here(self, late: bool) -> bool:
        """Whether the members begin; the same answer on all of them."""
        world = self._elastic
        try:
            late = any(row[0] for row in world.tell([int(late)]))
        except SyncError:  # one is gone; those that are left meet again
            return world.agreed(False)
        return (world.size >= self.workers or late) and world.agreed(True)

    def _join(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        """Take part in the round that the others are in, with nothing to say; Lightning restores the rest afterwards."""
        module = self.lightning_module
        assert module is not None
        own = checkpoint.pop(replica_files.KEY)
        module.load_state_dict(checkpoint["state_dict"])
        self.rounds.join(own["engine"])
        checkpoint = _private.with_weights(checkpoint, copied(module.state_dict()))
        if self.joiner_optimizer == "fresh":
            checkpoint["optimizer_states"] = [{**s, "state": {}} for s in checkpoint["optimizer_states"]]
        own["resume"]["rng"] = rng_state()
        self._checkpoints.resume.load_state(own["resume"], checkpoint)
        self._restore = checkpoint
        _private.resume_from(trainer, checkpoint)

    def load_checkpoint(self, checkpoint_path: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """What a member gave a worker that joins, whatever file it was told to begin with; otherwise the file."""
        return self._restore if self._restore is not None else super().load_checkpoint(checkpoint_path, **kwargs)

    def on_train_start(self) -> None:
        """See :class:`ReplicaStrategy`."""
        super().on_train_start()
        self._restore = None
        assert self._between is not None
        self._between.begin(self._trainer)

    # ------------------------------------------------------------------ what members give each other

    def _state(self) -> dict[str, Any]:
        """For a member that is behind, while this one waits for the quorum."""
        module = self.lightning_module
        assert module is not None
        if self.engine is None:
            return {"checkpoint": None, "weights": copied(module.state_dict(), "cpu")}
        return {"checkpoint": self.own_checkpoint()}

    def _receive(self, state: dict[str, Any]) -> None:
        self._received = state

    def _take(self) -> dict[str, Any] | None:
        state, self._received = self._received, None
        return state["checkpoint"][replica_files.KEY]["engine"] if state is not None else None

    def _warn(self, line: str) -> None:
        rank_zero_warn(f"worker {self.worker}, {line}")

    # ------------------------------------------------------------------ checkpoints and end

    def own_checkpoint(self) -> dict[str, Any]:
        """See :class:`ReplicaStrategy`."""
        self.rounds.landed()
        return super().own_checkpoint()

    def on_train_end(self) -> None:
        """End the round that is under way, and leave the anchors in the module."""
        if self.engine is not None and not self.interrupted and not self.engine.at_rest:
            self.rounds.end()
        super().on_train_end()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """See :class:`ReplicaStrategy`; one worker writes."""
        if self.writes:
            if self.fitting and not self.interrupted:
                self.rounds.landed()
            super().save_checkpoint(checkpoint, filepath, storage_options)

    def remove_checkpoint(self, filepath: Any) -> None:
        """See :class:`ReplicaStrategy`; one worker removes."""
        if self.writes and os.path.exists(filepath):
            super().remove_checkpoint(filepath)

    def teardown(self) -> None:
        """Leave."""
        if self._members is not None:
            self._members.close()
            self._members = None
        if self._between is not None:
            callbacks = self._trainer.callbacks
            if self._between in callbacks:
                callbacks.remove(self._between)
            self._between = None
        super().teardown()


class _Nobody:
    """The members before there is a run."""

    rank, size = 0, 1

    def meet(self) -> bool:
        return False

    def all_reduce(self, tensor: torch.Tensor, op: Any) -> Any:
        raise AssertionError

    def all_gather(self, out: list[torch.Tensor], tensor: torch.Tensor) -> Any:
        raise AssertionError

    def commit(self, ok: bool) -> bool:
        return False

    def close(self) -> None:
        pass


def _number(owner: str, name: str, given: int | None, variable: str) -> int:
    if given is not None:
        return given
    text = os.environ.get(variable, "")
    if not text.isdigit():
        raise ValueError(f"{owner}({name}=...): give it, set {variable}, or use `dopt workers`")
    return int(text)
