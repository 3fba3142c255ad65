"""Exact resume: the data position and the random state that a Lightning checkpoint leaves out."""

from __future__ import annotations

from itertools import repeat
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.data import _set_sampler_epoch

from lightning_dopt.strategies.resumable_loader import (
    LoaderPass,
    ResumableLoader,
    SeededLoader,
    Start,
    draw,
    is_stateful,
)
from lightning_dopt.strategies.rng import rng_state, set_rng_state

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.loops.fit_loop import _FitLoop
    from lightning.pytorch.utilities.combined_loader import CombinedLoader


class ExactResume:
    """What a strategy adds to its checkpoints so that a resumed run equals the uninterrupted one bit for bit.

    The state holds the global random generators, the generators the epoch's loading started from, the number of
    batches trained on in the epoch, and, within a window of accumulated gradients, those gradients. On resume the
    fetches of the epoch are repeated and dropped, so resuming takes as long as loading them did. A loader with a
    ``state_dict`` of its own is left to it.

    Validation within ``fit`` leaves the random generators as it found them: a checkpoint of ``on_train_batch_end``
    precedes a validation due after the same batch, which Lightning does not make up for on resume.

    Not covered: random generators hidden in data sets, samplers or modules; draws by hooks that run between the save
    and the next batch; a data set that draws on an accelerator; the order in which ``in_order=False`` workers finish.

    A strategy calls, each at the end of its own method of the name::

        process_dataloader(loader)  -> return wrap(loader, trainer)
        save_checkpoint             -> checkpoint[key] = save_state(trainer), and normalize(checkpoint)
        load_checkpoint             -> load_state(checkpoint.pop(key))
        on_train_start, on_train_end, on_validation_start, on_validation_end, teardown
    """

    def __init__(self) -> None:
        self._epoch: int | None = None
        self._starts: dict[int, torch.Tensor] = {}
        self._pending: dict[str, Any] | None = None
        self._held: dict[str, Any] | None = None
        self._final: dict[str, Any] | None = None
        self._trainer: Trainer | None = None

    def wrap(self, loader: object, trainer: Trainer) -> object:
        """The loader to train or validate with in place of ``loader``; ``loader`` itself outside of ``fit``."""
        if trainer.state.fn != "fit" or is_stateful(loader):
            return loader
        self._trainer = trainer
        if trainer.training:
            self._final = None
        return ResumableLoader(loader, self._start) if trainer.training else SeededLoader(loader, _unnoticed)

    def save_state(self, trainer: Trainer) -> dict[str, Any]:
        """The state as of now, or of the end of training if that is over: plain data for ``weights_only=True``."""
        if self._final is not None:
            return self._final
        return {
            "rng": self._held if self._held is not None else rng_state(),
            "epoch": self._epoch,
            "starts": dict(self._starts),
            "batches": _consumed(trainer),
            "ended": _ended(trainer),
            "loaders": [loader.state_dict() for loader in _stateful(trainer)],
            "gradients": _open_gradients(trainer),
        }

    def load_state(self, state: dict[str, Any], checkpoint: dict[str, Any]) -> None:
        """Take what `save_state` returned, to be restored in `on_train_start`, and set right ``checkpoint["loops"]``.

        Lightning counts an epoch as done that ``max_steps`` or an early stop cut short; it is made to go on with it.
        A batch that an exception interrupted is made to be repeated from its start.
        """
        self._pending = state
        _settle_counters(checkpoint["loops"]["fit_loop"], state)

    def on_train_start(self, trainer: Trainer) -> None:
        """Restore what `load_state` was given. The last thing before the first batch."""
        self._final = None
        state, self._pending = self._pending, None
        if state is None:
            return
        set_rng_state(state["rng"])
        _settle_loops(trainer, state)
        self._restore_loading(trainer, state)
        parameters = dict(trainer.lightning_module.named_parameters())
        for name, gradient in state["gradients"].items():
            parameters[name].grad = gradient.to(parameters[name].device)

    def on_train_end(self, trainer: Trainer) -> None:
        """Remember the state for checkpoints saved after ``fit``, when the loaders are gone."""
        self._final = self.save_state(trainer)

    def on_validation_start(self, trainer: Trainer) -> None:
        """Hold the random generators; within ``fit`` only."""
        if trainer.state.fn == "fit":
            self._held = rng_state()

    def on_validation_end(self) -> None:
        """Put the random generators back to where `on_validation_start` found them."""
        if self._held is not None:
            set_rng_state(self._held)
            self._held = None

    def teardown(self) -> None:
        """Forget an unfinished validation and the trainer."""
        self._held = self._trainer = None

    def _start(self, loader: SeededLoader) -> Start:
        assert self._trainer is not None
        loop = self._trainer.fit_loop
        assert loop._combined_loader is not None
        places = [i for i, other in enumerate(loop._combined_loader.flattened) if other is loader]
        if not places:
            return _unnoticed(loader)  # Lightning also sets up validation while in the stage of training
        place, epoch = places[0], loop.epoch_progress.current.processed
        if epoch != self._epoch:
            self._epoch, self._starts = epoch, {}
        if place not in self._starts:
            self._starts[place] = torch.get_rng_state()
            draw()  # one draw per epoch and loader, as DataLoader does
        _set_sampler_epoch(loader, epoch)  # when resuming Lightning does so only after the loaders are iterated
        return epoch, self._starts[place]

    def _restore_loading(self, trainer: Trainer, state: dict[str, Any]) -> None:
        fetcher, combined = trainer.fit_loop._data_fetcher, trainer.fit_loop._combined_loader
        assert fetcher is not None
        assert combined is not None
        same_epoch = state["epoch"] == trainer.fit_loop.epoch_progress.current.processed
        again = same_epoch and not state["ended"]
        self._epoch, self._starts = (state["epoch"], dict(state["starts"])) if same_epoch else (None, {})
        for loader, saved in zip(_stateful(trainer), state["loaders"], strict=True):
            if type(loader) is ResumableLoader:
                loader.restart()
                loader.load_state_dict(saved, again)
            elif again:
                loader.load_state_dict(saved)
        iter(combined)
        if again:
            _repeat(combined, state["batches"])
        if getattr(fetcher, "batches", None):  # loaders of unknown length are fetched one batch ahead
            fetcher.batches = [next(combined)]


def _repeat(combined: CombinedLoader, batches: int) -> None:
    """Fetch and drop ``batches`` combined batches from the loaders that do not keep their position themselves."""
    mode = combined._iterator
    assert mode is not None
    passes = list(mode.iterators)
    mode.iterators = [one if isinstance(one, LoaderPass) else repeat(None) for one in passes]
    for _ in range(batches):
        next(mode)
    mode.iterators = [new if isinstance(new, LoaderPass) else old for new, old in zip(mode.iterators, passes, strict=True)]


def _consumed(trainer: Trainer) -> int:
    """How many of the epoch's combined batches the model has been trained on: fetched, not ahead, not in work."""
    loop = trainer.fit_loop
    if loop._combined_loader is None or loop._combined_loader._iterator is None:
        return 0
    fetched = loop._combined_loader._iterator._idx
    ahead = len(getattr(loop._data_fetcher, "batches", ()))
    return fetched - ahead - _in_work(trainer)


def _ended(trainer: Trainer) -> bool:
    """Whether every batch of the epoch, or all the model wants of it, has been trained on."""
    fetcher, progress = trainer.fit_loop._data_fetcher, trainer.fit_loop.epoch_loop.batch_progress
    return ((fetcher is not None and fetcher.done) or progress.is_last_batch) and not _in_work(trainer)


def _in_work(trainer: Trainer) -> int:
    if not hasattr(trainer.fit_loop._data_fetcher, "batches"):
        return 0  # training_step(dataloader_iter) fetches itself: Lightning begins a last batch that does not exist
    progress = trainer.fit_loop.epoch_loop.batch_progress.current
    return progress.ready - progress.processed


def _stateful(trainer: Trainer) -> list[Any]:
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else [loader for loader in combined.flattened if is_stateful(loader)]


def _open_gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Gradients the next batch adds to; with manual optimization all there are, as only the user knows."""
    module = trainer.lightning_module
    if module is None or (module.automatic_optimization and not trainer.fit_loop.epoch_loop._should_accumulate()):
        return {}
    return {name: p.grad.detach() for name, p in module.named_parameters() if p.grad is not None}


def _unnoticed(loader: SeededLoader) -> Start:
    return object(), torch.get_rng_state()


def _settle_counters(loops: dict[str, Any], state: dict[str, Any]) -> None:
    batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
    if batches["current"]["processed"] < batches["current"]["ready"]:
        for counts in (batches["current"], batches["total"]):
            counts["ready"] = counts["started"] = counts["processed"] = counts["completed"]
    if state["epoch"] is not None and not state["ended"] and epochs["current"]["processed"] > state["epoch"]:
        for counts in (epochs["current"], epochs["total"]):
            counts["processed"] -= 1
            counts["completed"] = counts["processed"]


def _settle_loops(trainer: Trainer, state: dict[str, Any]) -> None:
    """Make the loops go on where the checkpoint was taken, where Lightning's own bookkeeping does not."""
    loop, batches = trainer.fit_loop, trainer.fit_loop.epoch_loop.batch_progress
    staged = hasattr(loop, "_restart_stage")  # without (before 2.5) a finished batch or epoch is partly done again
    if state["ended"] and (loop.epoch_progress.current.processed > state["epoch"] or not staged):
        _settle_at_epoch_start(loop, state["epoch"] + 1)
    elif not staged:
        loop._restarting = False  # it would step the schedulers of the epoch twice
        loop.epoch_progress.total.reset_on_restart()
        for counts in (batches.current, batches.total):
            counts.completed = counts.processed


def _settle_at_epoch_start(loop: _FitLoop, epoch: int) -> None:
    """Between two epochs: nothing to restart, ``epoch`` (counted from 0) comes next.

    With ``max_steps`` Lightning would take the finished epoch for an unfinished one, and after a checkpoint of its last
    ``on_train_batch_end`` it would count one epoch less as begun than as finished.
    """
    progress, batches = loop.epoch_progress, loop.epoch_loop.batch_progress
    loop._restarting = loop.epoch_loop.restarting = False
    if hasattr(loop, "reset_restart_stage"):
        loop.reset_restart_stage()
        loop.epoch_loop.reset_restart_stage()
    for epochs in (progress.current, progress.total):
        epochs.ready = epochs.started = epochs.completed = epochs.processed = epoch
    if batches.total.completed < batches.total.processed:
        batches.total.completed = batches.total.processed
        loop.epoch_loop._batches_that_stepped += 1
