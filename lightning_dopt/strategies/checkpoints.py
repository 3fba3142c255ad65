"""What is in a checkpoint: the consensus model in the main file, each replica's own state in a file beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_dopt.strategies import _private, replica_files
from lightning_dopt.strategies.resume import ExactResume, ordinary

if TYPE_CHECKING:
    from lightning_dopt.strategies.replica import ReplicaStrategy

State = dict[str, Any]


class ReplicaCheckpoints:
    """Saves and restores the replicas of a strategy. Where the files lie: :mod:`lightning_dopt.strategies.replica_files`.

    After ``fit`` the replicas' files go on holding what they trained with last, before :meth:`Engine.finish` and the
    consensus changed it, so that training can be resumed from them exactly.

    Args:
        strategy: Whose replicas. It calls the methods from its own of like names.
    """

    def __init__(self, strategy: ReplicaStrategy) -> None:
        self.strategy = strategy
        self.resume = ExactResume()
        self._restored: State | None = None
        self._final: State | None = None
        self._consensus: State | None = None
        self._running = False
        self._alone = False

    @property
    def restored(self) -> bool:
        """Whether a replica's state waits for :meth:`restore_engine`."""
        return self._restored is not None

    # ------------------------------------------------------------------ while training

    def begin(self) -> None:
        """A fit begins, with an engine."""
        self._final = self._consensus = None
        self._running = True
        self.restore_engine()

    def end(self) -> None:
        """Training has ended: keep what it ended with, for checkpoints saved later."""
        self.resume.on_train_end(self.strategy.lightning_module.trainer)  # type: ignore[union-attr]
        self._final = self._own_state()
        if any(sync.what.slot == "optimizer" and sync.when.at_end for sync in self.strategy.plan):
            self._final["optimizer_states"] = copied(
                [self.strategy.optimizer_state(o) for o in self.strategy.optimizers]
            )

    def keep_consensus(self) -> None:
        """Keep the model that the module holds now for later main files."""
        self._consensus = copied(self._state_dict())

    def teardown(self) -> None:
        """The fit is over, in whatever way; what :meth:`end` kept stays."""
        self._running = False
        self.resume.teardown()

    # ------------------------------------------------------------------ save

    def state_dict(self) -> State:
        """The consensus model's state dict, after ``fit`` as of its end. Collective during ``fit``."""
        s = self.strategy
        if self._alone:
            return self._state_dict()
        if self._consensus is not None:
            return dict(self._consensus)
        done = s.interrupted or self._final is not None
        if done or not s.fitting or s.consensus is None or s.consensus.shown:
            return self._state_dict()
        with s.consensus.model():
            return copied(self._state_dict())

    def save(self, checkpoint: State, path: Any, write: Callable[[State, Any], None], storage_options: Any) -> None:
        """One complete file per replica, then the main file with the consensus model, then removal of older replicas.

        Args:
            checkpoint: What Lightning gathered; holds the consensus model.
            path: Of the main file.
            write: Writes the main file.
            storage_options: For ``CheckpointIO``.
        """
        s = self.strategy
        path = path if s.interrupted else s.broadcast(path)  # names may contain metrics that differ between ranks
        tag = None
        if (s.fitting or self._final is not None) and "optimizer_states" in checkpoint:
            tag = self._save_replica(checkpoint, path, storage_options)
            checkpoint = ordinary(checkpoint)
            checkpoint[replica_files.KEY] = replica_files.pointer(tag, s.world_size, repr(s.plan))
        write(checkpoint, path)
        if s.is_global_zero and tag is not None and not s.interrupted:
            replica_files.prune(path, keep=tag)

    def _save_replica(self, checkpoint: State, path: Any, storage_options: Any) -> str:
        s = self.strategy
        tag = replica_files.new_tag(int(checkpoint["global_step"]))
        tag = tag if s.interrupted else s.broadcast(tag)
        own = dict(self._final if self._final is not None else self._own_state())
        mine = _private.with_weights(checkpoint, own.pop("state_dict"))
        if "optimizer_states" in own:
            mine["optimizer_states"] = own.pop("optimizer_states")
        mine[replica_files.KEY] = own
        s.checkpoint_io.save_checkpoint(
            mine, replica_files.file(path, tag, s.global_rank, s.world_size), storage_options=storage_options
        )
        s.barrier("replicas saved")
        return tag

    def own_checkpoint(self) -> State:
        """This replica's whole checkpoint, copied into the memory of the host; no other rank is asked for anything."""
        s = self.strategy
        assert s.consensus is not None
        own = self._own_state()
        self._alone = True
        try:
            with s.consensus.own():
                mine = _private.dump_checkpoint(s.lightning_module.trainer)  # type: ignore[union-attr]
        finally:
            self._alone = False
        mine = _private.with_weights(mine, own.pop("state_dict"))
        return {**copied(mine, "cpu"), replica_files.KEY: own}

    def _own_state(self) -> State:
        """What this replica needs beyond an ordinary checkpoint, as of now."""
        s, engine = self.strategy, self.strategy.engine
        assert engine is not None
        assert s.consensus is not None
        engine.run(engine.land())
        with s.consensus.own():
            weights = copied(self._state_dict())
        return {
            "state_dict": weights,
            "engine": copied(engine.state_dict()),
            "averages_buffers": engine.buffer_runner is not None,
            "pace": s.pacer.state_dict() if s.pacer is not None else None,
            "resume": self.resume.save_state(s.lightning_module.trainer),  # type: ignore[union-attr]
        }

    def _state_dict(self) -> State:
        """Of the module as it is."""
        assert self.strategy.lightning_module is not None
        return self.strategy.lightning_module.state_dict()

    # ------------------------------------------------------------------ restore

    def load(self, path: Any, read: Callable[[Any], State]) -> State:
        """This replica's own checkpoint when training is resumed; the consensus model otherwise.

        Args:
            path: Of the main file.
            read: Reads a file.

        Raises:
            ValueError: a file cannot be read, in one line.
        """
        main = _readable(path, read)
        pointer = main.pop(replica_files.KEY, None)
        s = self.strategy
        if s.lightning_module is None or s.lightning_module.trainer.state.fn != TrainerFn.FITTING:
            self._final = self._consensus = None  # the module will no longer hold what training ended with
            return main if pointer is None or "means" not in pointer else self._mean(path, pointer, read)
        if pointer is None:
            return main
        tag, size = str(pointer["replicas"]), int(pointer["world_size"])
        if size != s.world_size:
            rank_zero_warn(
                f"{path} was written by {size} workers, this run has {s.world_size}: all start from the consensus "
                "model with rank 0's optimizer state; anchors, memories, corrections, random states and data position start anew"
            )
            return main if "means" not in pointer else self._mean(path, pointer, read)
        absent = replica_files.missing(path, tag, size)
        if absent:
            rank_zero_warn(
                f"{path}: replicas of rank(s) {', '.join(map(str, absent))} are missing (saved by a failing run?); all "
                "start from the consensus model with rank 0's optimizer state, the plan's state starts anew"
            )
            return main
        mine = _readable(replica_files.file(path, tag, s.global_rank, size), read)
        self._restored = mine.pop(replica_files.KEY)
        self.resume.load_state(self._restored["resume"], mine)
        if self._running:  # tuners save and restore in the middle of a fit
            self.restore_engine()
        return mine

    def _mean(self, path: Any, pointer: State, read: Callable[[Any], State]) -> State:
        """The checkpoint of the mean of all replicas, of which only the replicas' own files are there."""
        tag, size = str(pointer["replicas"]), int(pointer["world_size"])
        files = [replica_files.file(path, tag, rank, size) for rank in range(size)]
        first = _readable(files[0], read)
        first.pop(replica_files.KEY)
        states = (_readable(f, read)["state_dict"] for f in files)
        return ordinary({**first, "state_dict": replica_files.mean(states, pointer["means"])})

    def restore_engine(self) -> None:
        """Give the engine the state that :meth:`load` read, if any.

        Raises:
            ValueError: it belongs to another plan, or to another way to treat buffers.
        """
        state, self._restored = self._restored, None
        if state is None:
            return
        engine = self.strategy.engine
        assert engine is not None
        if state["engine"]["plan"] == repr(self.strategy.plan):  # otherwise the engine has more to say
            self._check_buffers(state["averages_buffers"], engine.buffer_runner is not None)
        engine.load_state_dict(state["engine"])
        if self.strategy.pacer is not None and state.get("pace") is not None:
            self.strategy.pacer.load_state_dict(state["pace"])

    def _check_buffers(self, then: bool, now: bool) -> None:
        if then != now:
            before, after = ("average", "local") if then else ("local", "average")
            raise ValueError(
                f"{type(self.strategy).__name__}(buffers={after!r}): the checkpoint was written with buffers={before!r}; "
                f"resume with buffers={before!r}"
            )


def _readable(path: Any, read: Callable[[Any], State]) -> State:
    try:
        return read(path)
    except FileNotFoundError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot read the checkpoint {path}: {reason}") from error


def copied(value: Any, device: str | None = None) -> Any:
    """A deep copy of tensors in nested dictionaries and lists (on ``device``), everything else as it is."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True) if device is not None else value.detach().clone()
    if isinstance(value, dict):
        return {k: copied(v, device) for k, v in value.items()}
    if isinstance(value, list):
        return [copied(v, device) for v in value]
    return value
