"""ShardedStrategy: fully sharded training (FSDP2) whose messages are compressed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Literal

from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer

from lightning_dopt._checks import check_choice, check_int
from lightning_dopt.comm.ledger import Ledger
from lightning_dopt.compress.base import Compressor
from lightning_dopt.sharded import Counter, ShardCodecs
from lightning_dopt.sharded._private import shard_modules
from lightning_dopt.strategies import _private
from lightning_dopt.strategies.meter import log_ledger
from lightning_dopt.strategies.wrapping import SHARDED_HERE, AfterForward, shard

_KEY = "lightning_dopt.sharded"


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 with compressed all-gathers and reduce-scatters: QSDP, ZeRO++. See :class:`ShardCodecs`.

    Parameters, gradients and optimizer states are sharded over all ranks. A module whose ``configure_model`` calls
    ``fully_shard`` is taken as it is; any other module is sharded here. The optimizer updates exact shares; forward and
    backward, validation too, compute with what the messages decode to. Checkpoints are those of ``ModelParallelStrategy``
    and hold exact weights.

    Args:
        weights: Packs weights for the all-gathers; ``None`` sends them as they are.
        gradients: Packs gradients for the reduce-scatters; ``None`` sends them as they are.
        hops: 2 sums gradients within nodes first, see :class:`ShardCodecs`.
        node_size: Ranks per node, for ``hops=2`` and ``after_forward="node"``; 0 where neither is used.
        wrap: Parts that are gathered on their own, for a module that does not shard itself: class names, or names of parts in
            which ``*`` stands for anything. ``None`` takes the elements of lists of modules.
        after_forward: What remains of a part's weights between forward and backward, for a module that does not shard itself:
            ``"free"`` the rank's own share, ``"node"`` a copy shared within the node (hpZ), ``"keep"`` all.
        seed: Of random rounding.
        save_distributed_checkpoint: A folder to which every rank writes its share, or else one file with everything.
        timeout: See ``ModelParallelStrategy``.
        process_group_backend: See ``ModelParallelStrategy``.

    Raises:
        ValueError: an argument that cannot work, when the strategy or the Trainer is made.
    """

    def __init__(
        self,
        weights: Compressor | None = None,
        gradients: Compressor | None = None,
        hops: Literal[1, 2] = 1,
        node_size: int = 0,
        wrap: Sequence[str] | None = None,
        after_forward: AfterForward = "free",
        seed: int = 0,
        save_distributed_checkpoint: bool = True,
        timeout: timedelta = timedelta(minutes=30),
        process_group_backend: str | None = None,
    ) -> None:
        name = type(self).__name__
        check_choice(name, "after_forward", after_forward, ("free", "node", "keep"))
        check_int(name, "node_size", node_size, 0)
        if after_forward == "node" and node_size < 2:
            raise ValueError(f"{name}(after_forward='node', node_size={node_size!r}): needs ranks per node, at least 2")
        if node_size and hops == 1 and after_forward != "node":
            raise ValueError(f"{name}(node_size={node_size!r}): has no effect without hops=2 or after_forward='node'")
        if isinstance(wrap, str) or not all(isinstance(entry, str) for entry in wrap or ()):
            raise ValueError(f"{name}(wrap={wrap!r}): must be a list of names, or None")
        if timeout <= timedelta(0):
            raise ValueError(f"{name}(timeout={timeout!r}): must be longer than zero")
        self.codecs = ShardCodecs(weights, gradients, hops, node_size if hops == 2 else 0, seed)
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.node_size, self.after_forward = node_size, after_forward
        self.wrap = list(wrap) if wrap is not None else None
        self.ledger = Ledger()
        self.steps = 0
        self._counter: Counter | None = None

    # ------------------------------------------------------------------ start

    def set_world_ranks(self) -> None:
        """Called while the Trainer is made, before any process starts: the place to refuse what cannot work."""
        super().set_world_ranks()
        size = self.num_nodes * self.num_processes
        self.codecs.check(size)
        if self.after_forward == "node" and (size % self.node_size or size == self.node_size):
            raise ValueError(
                f"ShardedStrategy(node_size={self.node_size!r}): must divide the number of ranks, {size}, into several nodes"
            )
        _private.shard_over(self, size)

    def setup(self, trainer: Any) -> None:
        """Shard the module if it has not done so, make its optimizers, and install the codecs.

        Raises:
            ValueError: ``wrap`` or ``after_forward`` for a module that shards itself.
        """
        module = self.lightning_module
        assert module is not None
        if not shard_modules(module):
            shard(module, self.wrap, self.device_mesh["data_parallel"], self.after_forward, self.node_size)
        elif module not in SHARDED_HERE and (self.wrap is not None or self.after_forward != "free"):
            raise ValueError(
                f"ShardedStrategy(wrap, after_forward): {type(module).__name__} calls fully_shard itself; leave them out"
            )
        with _private.configures_model(module):
            super().setup(trainer)
        self._counter = self.codecs.attach(module, self.ledger)
        if trainer.state.fn == TrainerFn.FITTING:
            self.ledger.entries.clear()
            self.steps = 0
        self._counter.step = self.steps

    # ------------------------------------------------------------------ the step

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """One optimizer step; the next forward draws new random numbers."""
        assert self._counter is not None
        assert self.lightning_module is not None
        out = super().optimizer_step(optimizer, closure, model, **kwargs)
        self.steps += 1
        self._counter.step = self.steps
        log_ledger(self.lightning_module, self.ledger, self.steps)
        return out

    # ------------------------------------------------------------------ checkpoints

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """See ``ModelParallelStrategy``; also keeps the count of steps, which seeds rounding, and rank 0's bytes."""
        checkpoint[_KEY] = {"steps": self.steps, "ledger": self.ledger.state_dict()}
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """See ``ModelParallelStrategy``; continues the count of steps and bytes, if the checkpoint has them."""
        checkpoint = super().load_checkpoint(checkpoint_path, *args, **kwargs)
        saved = checkpoint.get(_KEY)
        if saved is not None:
            assert self._counter is not None
            self.steps = self._counter.step = int(saved["steps"])
            self.ledger.load_state_dict(saved["ledger"])
        return checkpoint
