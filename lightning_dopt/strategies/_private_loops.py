"""What exact resume needs of Lightning's loops and loaders beyond their public names, each with its reason, in one place.

Checked with Lightning 2.4 to 2.6. Lightning has no public way to ask which batch training has come to, nor to tell its
loops where to go on. If a name disappears, resuming fails rather than go on with other data, and so do its tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.data import _set_sampler_epoch

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.utilities.combined_loader import CombinedLoader

# ---------------------------------------------------------------------- loaders


def set_sampler_epoch(loader: object, epoch: int) -> None:
    """Tell a loader's samplers the epoch; on resume Lightning does so only after the first fetch."""
    _set_sampler_epoch(loader, epoch)


def training_loaders(trainer: Trainer) -> list[Any] | None:
    """The training loaders in order; ``None`` before they are made (a tuner saves then) and after ``fit``."""
    combined: CombinedLoader | None = trainer.fit_loop._combined_loader
    return None if combined is None else combined.flattened


def begin_pass(trainer: Trainer) -> None:
    """Begin a pass over the training loaders."""
    iter(_combined(trainer))


def next_batch(trainer: Trainer) -> Any:
    """Fetch the next combined batch, as Lightning's fetcher does."""
    return next(_combined(trainer))


def next_of_passes(trainer: Trainer) -> None:
    """Fetch the next combined batch of the passes alone, without counting it.

    Raises:
        StopIteration: there is none.
    """
    next(_mode(trainer))


def passes(trainer: Trainer) -> list[Any]:
    """The iterators of the pass that was begun, one per loader; loaders that are cycled replace theirs."""
    return list(_mode(trainer).iterators)


def set_passes(trainer: Trainer, iterators: list[Any]) -> None:
    """Take batches from these iterators instead."""
    _mode(trainer).iterators = iterators


def _combined(trainer: Trainer) -> Any:
    combined = trainer.fit_loop._combined_loader
    assert combined is not None
    return combined


def _mode(trainer: Trainer) -> Any:
    """How a combined loader walks its loaders (shortest, cycling the short ones, ...)."""
    mode = _combined(trainer)._iterator
    assert mode is not None
    return mode


# ---------------------------------------------------------------------- fetching


def fetched(trainer: Trainer) -> int | None:
    """Combined batches of the epoch handed to the fetcher so far; ``None`` outside a pass."""
    combined = trainer.fit_loop._combined_loader
    return None if combined is None or combined._iterator is None else combined._iterator._idx


def ahead(trainer: Trainer) -> int:
    """How many of them wait in the fetcher."""
    return len(getattr(trainer.fit_loop._data_fetcher, "batches", ()))


def replace_ahead(trainer: Trainer, batches: list[Any]) -> None:
    """Put other batches in the place of those that wait."""
    trainer.fit_loop._data_fetcher.batches = batches  # type: ignore[union-attr]


def step_fetches(trainer: Trainer) -> bool:
    """Whether ``training_step(dataloader_iter)`` fetches: Lightning then begins a batch before there is one."""
    return not hasattr(trainer.fit_loop._data_fetcher, "batches")


def exhausted(trainer: Trainer) -> bool:
    """Whether the fetcher has handed out the last batch of the epoch."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and fetcher.done


# ---------------------------------------------------------------------- loops


def accumulates(trainer: Trainer) -> bool:
    """Whether gradients are kept for the next batch (automatic optimization)."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def validates_next(trainer: Trainer) -> bool:
    """Whether validation follows the batch that training is at."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def has_stages(trainer: Trainer) -> bool:
    """Whether Lightning (since 2.5) knows where in an epoch it restarts; before, it repeats part of a finished one."""
    return hasattr(trainer.fit_loop, "_restart_stage")


def forget_restart(trainer: Trainer) -> None:
    """Let the next epoch begin as if nothing had been restored."""
    loop: Any = trainer.fit_loop
    loop._restarting = loop.epoch_loop.restarting = False
    if hasattr(loop, "reset_restart_stage"):
        loop.reset_restart_stage()
        loop.epoch_loop.reset_restart_stage()


def forget_restart_of_epochs(trainer: Trainer) -> None:
    """Let the epoch in work go on without a restart of the loop over epochs, which steps schedulers a second time."""
    loop: Any = trainer.fit_loop
    loop._restarting = False  # the property would also tell the loop over batches


def count_one_more_step(trainer: Trainer) -> None:
    """Count one more batch among those after which loggers are stepped."""
    trainer.fit_loop.epoch_loop._batches_that_stepped += 1
