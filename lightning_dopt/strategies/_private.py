"""The few private names of Lightning and torch that have no public counterpart, each with its reason, in one place.

Checked with Lightning 2.4 to 2.6 and torch 2.4 to 2.14. Each degrades to a safe default if the name disappears; a test
fails then, so that it is noticed. What resuming needs of Lightning's loops is in ``_private_loops``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist


def replace_sigterm(
    trainer: Any, on_signal: Callable[[int, object], None], before_batch: Callable[[], None]
) -> Callable[[], None]:
    """Let ``on_signal`` handle SIGTERM and ``before_batch`` take the place of Lightning's broadcast before every batch.

    Lightning (since 2.5.2) broadcasts a flag on the default group before every batch, which keeps workers in lock step
    that have nothing to say to each other, and swallows what goes wrong there. It also broadcasts inside the signal
    handler, which deadlocks if the signal finds one rank waiting for another. Call it before Lightning registers its
    handlers, as in ``Strategy.setup``. Returns the function that undoes the change.
    """
    loop, connector = trainer.fit_loop.epoch_loop, trainer._signal_connector
    if not hasattr(loop, "_broadcast_sigterm_tensor"):  # Lightning before 2.5.2 only notes the signal
        return lambda: None
    loop._broadcast_sigterm_tensor = before_batch
    connector._sigterm_notifier_fn = on_signal

    def undo() -> None:
        vars(loop).pop("_broadcast_sigterm_tensor", None)
        vars(connector).pop("_sigterm_notifier_fn", None)

    return undo


def received_sigterm(trainer: Any) -> None:
    """Make Lightning's loops raise ``SIGTERMException`` as soon as their batch is done."""
    trainer._signal_connector.received_sigterm = True


def default_store() -> Any | None:
    """The key-value store of the default process group, to leave notes for other ranks when something fails.

    torch has no public way to reach the store that ``init_process_group`` made. ``None`` if it cannot be had.
    """
    try:
        from torch.distributed.distributed_c10d import _get_default_store
    except ImportError:
        return None
    return _get_default_store() if dist.is_initialized() else None


def is_lost_connection(error: Exception) -> bool:
    """Whether an error of ``torch.distributed`` is about peers, not arguments; gloo's are plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)


def layer_sync(strategy: Any) -> object | None:
    """The plugin behind ``Trainer(sync_batchnorm=True)``, which the Trainer hands to a strategy under a private name."""
    return getattr(strategy, "_layer_sync", None)


def unwrap_optimizer(optimizer: Any) -> Any:
    """The torch optimizer inside a ``LightningOptimizer`` (or the optimizer itself)."""
    return getattr(optimizer, "_optimizer", optimizer)


def is_compiled(module: Any) -> bool:
    """Whether Lightning took a module out of ``torch.compile``, with its steps compiled."""
    return getattr(module, "_compiler_ctx", None) is not None


def dump_checkpoint(trainer: Any) -> dict[str, Any]:
    """The whole checkpoint that ``Trainer.save_checkpoint`` would write, which has no public name by itself."""
    checkpoint: dict[str, Any] = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    return checkpoint


def resume_from(trainer: Any, checkpoint: dict[str, Any]) -> None:
    """Let ``fit`` go on from a checkpoint in memory; Lightning takes paths only. Call it before the state is restored."""
    trainer._checkpoint_connector._loaded_checkpoint = checkpoint


def with_weights(checkpoint: dict[str, Any], weights: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint like this one, but of a model with these weights.

    ``WeightAveraging`` (since Lightning 2.6) puts its own average under ``state_dict`` and keeps the model under a key
    of its own.
    """
    key = "current_model_state" if "current_model_state" in checkpoint else "state_dict"
    return {**checkpoint, key: weights}


def averages_weights(callback: Any) -> bool:
    """Whether a callback is Lightning's ``WeightAveraging`` (since 2.6) or derived from it."""
    return any(cls.__name__ == "WeightAveraging" for cls in type(callback).__mro__)


def shard_over(strategy: Any, size: int) -> None:
    """Let a ``ModelParallelStrategy`` shard over all ranks: its sizes are arguments, but not known when they are given."""
    strategy._data_parallel_size, strategy._tensor_parallel_size = size, 1


@contextmanager
def configures_model(module: Any) -> Iterator[None]:
    """Within it, ``ModelParallelStrategy`` believes that a module has a ``configure_model`` of its own.

    It refuses modules without, since nothing would be sharded; here the strategy has done so itself.
    """
    had = "configure_model" in vars(module)
    before = module.configure_model
    module.configure_model = lambda: None
    try:
        yield
    finally:
        if had:
            module.configure_model = before
        else:
            del module.configure_model


def step_value(metric: Any) -> Any:
    """What a torchmetrics ``Metric`` is worth in the step it was last called in; Lightning reads it from there, too."""
    return getattr(metric, "_forward_cache", None)


def set_step_value(metric: Any, value: Any) -> None:
    """Give a metric the value of a step that another rank has taken, and let it not complain that it has seen none."""
    metric._forward_cache = value
    metric._update_count = max(1, getattr(metric, "_update_count", 1))
