"""Checkpoints of a pipeline: the whole model in the main file, what each rank needs beside it in a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_dopt.strategies import _private, replica_files
from lightning_dopt.strategies.checkpoints import copied
from lightning_dopt.strategies.resume import ExactResume, ordinary

if TYPE_CHECKING:
    from lightning_dopt.strategies.pipeline import PipelineStrategy

State = dict[str, Any]
KEY = "lightning_dopt.pipeline"
"""Entry of the main checkpoint that points to the ranks' files, which lie where those of replicas do."""


class PipelineCheckpoints:
    """Saves and restores a pipeline.

    The main file is what a Trainer without stages would write: one state dict, and optimizer states that are numbered as
    in the whole model. So it loads anywhere, and into any number of stages. Beside it each rank keeps the memories of its
    links, the counters of its random numbers, and its position in the data.

    Args:
        strategy: Whose pipeline. It calls the methods from its own of like names.
    """

    def __init__(self, strategy: PipelineStrategy) -> None:
        self.strategy = strategy
        self.resume = ExactResume()
        self._restored: State | None = None
        self._final: State | None = None

    @property
    def restored(self) -> bool:
        """Whether this rank has read a state of its own, which waits for :meth:`restore`."""
        return self._restored is not None

    def begin(self) -> None:
        """A fit begins."""
        self._final = None

    def end(self) -> None:
        """Training has ended: keep what this rank ended with, for checkpoints saved later."""
        self.resume.on_train_end(self.strategy.lightning_module.trainer)  # type: ignore[union-attr]
        self._final = self._replica_state()

    # ------------------------------------------------------------------ save

    def state_dict(self) -> State:
        """That of the whole model on the rank that writes it. Collective."""
        s = self.strategy
        assert s.parts is not None
        if s.replicas is None or self._final is not None or s.replicas.consensus.shown:
            return s.parts.state_dict()
        with s.replicas.consensus.model():
            return copied(s.parts.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> State:
        """That of the whole model on the rank that writes it, elsewhere this rank's part. Collective."""
        state: State = optimizer.state_dict()
        parts = self.strategy.parts
        assert parts is not None
        for part in parts.collect(state["state"]):
            state["state"] = part | state["state"]
        state["state"] = dict(sorted(state["state"].items()))
        return state

    def save(self, checkpoint: State, path: Any, write: Callable[[State, Any], None], storage_options: Any) -> None:
        """One small file per rank, then the main file, then removal of older small files.

        Args:
            checkpoint: What Lightning gathered.
            path: Of the main file.
            write: Writes the main file, on the rank that does so.
            storage_options: For ``CheckpointIO``.
        """
        s = self.strategy
        if s.interrupted:
            rank_zero_warn(
                f"{path} is not written: the run has failed, and other stages can no longer be asked for theirs"
            )
            return
        path, tag = s.broadcast((path, replica_files.new_tag(int(checkpoint["global_step"]))))
        if s.pipeline is not None and "optimizer_states" in checkpoint:
            file = replica_files.file(path, tag, s.global_rank, s.world_size)
            s.checkpoint_io.save_checkpoint(self._own_state(checkpoint), file, storage_options=storage_options)
            s.barrier("ranks saved")
            checkpoint = ordinary(checkpoint)
            checkpoint[KEY] = {"ranks": tag, "layout": s.layout, "pipeline": s.signature}
        write(checkpoint, path)
        if s.is_global_zero and KEY in checkpoint:
            replica_files.prune(path, keep=tag)

    def _own_state(self, checkpoint: State) -> State:
        s = self.strategy
        assert s.pipeline is not None
        assert s.lightning_module is not None
        return {
            "pipeline": {rank: state | {"specs": {}} for rank, state in s.pipeline.state_dict().items()},  # told anew
            "steps": s.steps,
            "ledger": s.pipeline.ledger.state_dict(),
            "resume": self.resume.save_state(s.lightning_module.trainer),
            "loops": checkpoint["loops"],
            "replica": self._final if self._final is not None else self._replica_state(),
        }

    def _replica_state(self) -> State | None:
        """What differs between replicas, if there are several."""
        s = self.strategy
        if s.replicas is None:
            return None
        assert s.parts is not None
        own = s.replicas.own_state(s.parts.module, s.parts.foreign)
        return own | {"optimizer_states": copied([_private.unwrap_optimizer(o).state_dict() for o in s.optimizers])}

    # ------------------------------------------------------------------ restore

    def load(self, path: Any, read: Callable[[Any], State]) -> State:
        """The main file, completed for this rank if training is resumed. Collective.

        Args:
            path: Of the main file.
            read: Reads a file.
        """
        main = read(path)
        pointer = main.pop(KEY, None)
        s = self.strategy
        fitting = s.lightning_module is not None and s.lightning_module.trainer.state.fn == TrainerFn.FITTING
        if not fitting or pointer is None:
            return main
        if pointer["layout"] != s.layout:
            self._warn(path, f"was written by {pointer['layout']}, this run has {s.layout}")
            return main
        file = replica_files.file(path, str(pointer["ranks"]), s.global_rank, s.world_size)
        mine: State | None
        try:
            mine = read(file)
        except FileNotFoundError:
            mine = None
        if not s.reduce_boolean_decision(mine is not None, all=True):
            self._warn(path, "lacks the files of some ranks")
            return main
        assert mine is not None
        self._restored = {**mine, "written_by": pointer["pipeline"], "path": path}
        main["loops"] = mine["loops"]
        if mine["replica"] is not None:
            main["state_dict"] = {**main["state_dict"], **mine["replica"]["weights"]}
            main["optimizer_states"] = mine["replica"]["optimizer_states"]
        self.resume.load_state(mine["resume"], main)
        return main

    def restore(self) -> None:
        """Give the pipeline the state that :meth:`load` read, if any."""
        state, self._restored = self._restored, None
        s = self.strategy
        if state is None or s.pipeline is None:
            return
        s.steps = int(state["steps"])
        s.pipeline.ledger.load_state_dict(state["ledger"])
        if state["replica"] is not None and s.replicas is not None:
            s.replicas.engine.load_state_dict(state["replica"]["engine"])
        if state["written_by"] == s.signature:
            s.pipeline.load_state_dict(state["pipeline"])
        else:
            rank_zero_warn(
                f"{state['path']} was written by {state['written_by']}, this is {s.signature}: memories of links and the counters "
                "of dropout start anew"
            )

    def load_optimizers(self, checkpoint: Mapping[str, Any]) -> None:
        """Give the optimizers their part of the whole model's states."""
        parts = self.strategy.parts
        assert parts is not None
        own = {id(p) for p in parts.own}
        for optimizer, whole in zip(self.strategy.optimizers, checkpoint["optimizer_states"], strict=False):
            held = [p for group in _private.unwrap_optimizer(optimizer).param_groups for p in group["params"]]
            here = {k for k, p in enumerate(held) if id(p) in own}
            state = {k: v for k, v in whole["state"].items() if k in here}
            optimizer.load_state_dict({**whole, "state": copied(state)})

    def _warn(self, path: Any, why: str) -> None:
        rank_zero_warn(
            f"{path} {why}: weights and optimizer states go on; the memories of links, random numbers and the position within "
            "the epoch start anew"
        )


def forget(optimizer: Optimizer, kept: list[torch.nn.Parameter]) -> None:
    """Let an optimizer forget the states of all parameters but these; some make states before the first step."""
    own = {id(p) for p in kept}
    for parameter in [p for p in optimizer.state if id(p) not in own]:
        del optimizer.state[parameter]
