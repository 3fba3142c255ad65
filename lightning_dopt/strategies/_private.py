"""The few private names of Lightning and torch that have no public counterpart, each with its reason, in one place.

Checked with Lightning 2.4 to 2.6 and torch 2.4 to 2.14. Each degrades to a safe default if the name disappears; a test
fails then, so that it is noticed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist


def quiet_sigterm_broadcast(trainer: Any, communicates: Callable[[], bool]) -> Callable[[], None]:
    """Let Lightning's per-batch broadcast of a SIGTERM flag (since 2.5.2) run only on communicating steps.

    It runs on the default group before every batch and would keep workers in lock step that have nothing to say to
    each other. All ranks must get the same answers from ``communicates``. Returns the function that undoes the change.
    """
    loop = trainer.fit_loop.epoch_loop
    original = getattr(type(loop), "_broadcast_sigterm_tensor", None)
    if original is None:  # Lightning before 2.5.2 has no such broadcast
        return lambda: None
    loop._broadcast_sigterm_tensor = lambda: original(loop) if communicates() else None

    def undo() -> None:
        vars(loop).pop("_broadcast_sigterm_tensor", None)

    return undo


def default_store() -> Any | None:
    """The key-value store of the default process group, to leave notes for other ranks when something fails.

    torch has no public way to reach the store that ``init_process_group`` made. ``None`` if it cannot be had.
    """
    try:
        from torch.distributed.distributed_c10d import _get_default_store
    except ImportError:
        return None
    return _get_default_store() if dist.is_initialized() else None


def layer_sync(strategy: Any) -> object | None:
    """The plugin behind ``Trainer(sync_batchnorm=True)``, which the Trainer hands to a strategy under a private name."""
    return getattr(strategy, "_layer_sync", None)


def unwrap_optimizer(optimizer: Any) -> Any:
    """The torch optimizer inside a ``LightningOptimizer`` (or the optimizer itself)."""
    return getattr(optimizer, "_optimizer", optimizer)


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
