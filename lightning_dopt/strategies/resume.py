"""Exact resume: the data position and the random state that a Lightning checkpoint leaves out."""

from __future__ import annotations

from itertools import repeat
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.trainer.states import TrainerFn

from lightning_dopt.strategies import _private_loops as loops
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


class ExactResume:
    """What a strategy adds to its checkpoints so that a resumed run equals the uninterrupted one bit for bit.

    The state holds the global random generators, the generators the loading of the epoch started from, the number of
    batches the epoch's training has used, and, within a window of accumulated gradients, those gradients. On resume
    the fetches of the epoch are repeated and dropped, which takes as long as loading them took. A loader that has a
    ``state_dict`` of its own (torchdata's ``StatefulDataLoader``) is left to it.

    Validation within ``fit`` leaves the random generators as it found them. It has to: a checkpoint written in
    ``on_train_batch_end`` precedes the validation due after that batch, and Lightning does not make up for it.

    A checkpoint of the last batch or of the end of an epoch resumes with the start of the next epoch; one of an epoch
    that ``max_steps`` or an early stop cut short, with the rest of that epoch.

    Not covered: generators kept inside data sets, samplers or modules; numbers drawn by hooks between the save and the
    next batch; data sets that draw on an accelerator; a batch interrupted by an exception, which is repeated with other
    numbers; schedulers that follow a metric across the end of an epoch, as Lightning does not save the metric.

    A strategy calls the methods from its own of the same name, `wrap` from ``process_dataloader``, `save_state` from
    ``save_checkpoint`` and `load_state` from ``load_checkpoint``.
    """

    def __init__(self) -> None:
        self._trainer: Trainer | None = None
        self._epoch: int | None = None
        self._starts: dict[int, torch.Tensor] = {}
        self._pending: dict[str, Any] | None = None
        self._held: dict[str, Any] | None = None
        self._final: dict[str, Any] | None = None

    def wrap(self, loader: object, trainer: Trainer) -> object:
        """The loader to use in place of ``loader``: in ``fit``, and if it is not stateful, one that can be repeated."""
        if trainer.state.fn != TrainerFn.FITTING or is_stateful(loader):
            return loader
        self._trainer = trainer
        if not trainer.training:
            return SeededLoader(loader, _unnoticed)
        self._final = None
        return ResumableLoader(loader, self._start)

    def save_state(self, trainer: Trainer) -> dict[str, Any]:
        """The state as of now, after ``fit`` as of its end.

        Returns:
            Tensors, numbers, lists and dictionaries only, as ``torch.load(weights_only=True)`` requires. About 20 kB,
            plus the gradients if a window of accumulation is open (with manual optimization: if there are any).
        """
        if self._final is not None:
            return self._final
        return {
            "rng": self._held if self._held is not None else rng_state(),
            "epoch": _last_epoch(trainer),
            "starts": dict(self._starts),
            "batches": _used(trainer),
            "ended": _ended(trainer),
            "loaders": [loader.state_dict() for loader in _stateful(trainer)],
            "gradients": _open_gradients(trainer),
        }

    def load_state(self, state: dict[str, Any], checkpoint: dict[str, Any]) -> None:
        """Take what `save_state` returned, for `on_train_start`, and set right the counters in ``checkpoint["loops"]``.

        To be called before Lightning restores ``checkpoint``, which is the one ``state`` was saved with.
        """
        self._pending, self._final = state, None
        _settle_counters(checkpoint["loops"]["fit_loop"], state)

    def on_train_start(self, trainer: Trainer) -> None:
        """Restore what `load_state` was given.

        Raises:
            RuntimeError: if the training data is not that of the checkpoint: other loaders, or fewer batches.
        """
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
        """Keep the state for checkpoints saved after ``fit``, when the loaders are gone."""
        self._final = self.save_state(trainer)

    def on_validation_start(self, trainer: Trainer) -> None:
        """Hold the random generators, within ``fit``."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._held = rng_state()

    def on_validation_end(self) -> None:
        """Put the random generators back to where `on_validation_start` found them."""
        if self._held is not None:
            set_rng_state(self._held)
            self._held = None

    def teardown(self) -> None:
        """Forget the trainer and a validation that did not end."""
        self._trainer = self._held = None

    def _start(self, loader: SeededLoader) -> Start:
        loaders = loops.training_loaders(self._trainer) if self._trainer is not None else None
        if self._trainer is None or loaders is None:
            return _unnoticed(loader)  # somebody looks at the data when training is over
        places = [i for i, other in enumerate(loaders) if other is loader]
        if not places:
            return _unnoticed(loader)  # Lightning may set up validation while its stage still is training
        place, epoch = places[0], _coming_epoch(self._trainer)
        if epoch != self._epoch:
            self._epoch, self._starts = epoch, {}
        if place not in self._starts:
            self._starts[place] = torch.get_rng_state()
            draw()  # one number per loader and epoch, as an ordinary DataLoader takes
        loops.set_sampler_epoch(loader, epoch)
        return epoch, self._starts[place]

    def _restore_loading(self, trainer: Trainer, state: dict[str, Any]) -> None:
        same_epoch = state["epoch"] == _coming_epoch(trainer)
        again = same_epoch and not state["ended"]
        self._epoch, self._starts = (state["epoch"], dict(state["starts"])) if same_epoch else (None, {})
        loaders = _stateful(trainer)
        if again and len(loaders) != len(state["loaders"]):
            raise RuntimeError(
                f"{len(loaders)} training loaders can be resumed, but the checkpoint was saved with {len(state['loaders'])}"
            )
        for loader, saved in zip(loaders, state["loaders"], strict=False):  # a tuner saves before there are any
            if type(loader) is ResumableLoader:
                loader.restart()
                loader.load_state_dict(saved, again)
            elif again:  # Lightning misses this if configure_optimizers asked for the number of batches
                loader.load_state_dict(saved)
        loops.begin_pass(trainer)
        if again:
            _repeat(trainer, state["batches"])
        if loops.ahead(trainer):  # loaders of unknown length are fetched one batch ahead
            loops.replace_ahead(trainer, [loops.next_batch(trainer)])
        if same_epoch:
            set_rng_state(state["rng"])  # stateful loaders may draw when they begin; in a new epoch they should


def ordinary(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """``checkpoint`` without the states of `ResumableLoader`, for trainers that have the loaders inside it only.

    Lightning refuses a checkpoint with the states of more loaders than there are loaders with a state.
    """
    fit = checkpoint["loops"]["fit_loop"]
    states = [s for s in fit["state_dict"].get("combined_loader", ()) if not ResumableLoader.wrote(s)]
    kept = {name: value for name, value in fit["state_dict"].items() if name != "combined_loader"}
    kept |= {"combined_loader": states} if states else {}
    return {**checkpoint, "loops": {**checkpoint["loops"], "fit_loop": {**fit, "state_dict": kept}}}


def _repeat(trainer: Trainer, batches: int) -> None:
    """Fetch and drop ``batches`` combined batches from the loaders that do not keep their position themselves."""
    passes = loops.passes(trainer)
    loops.set_passes(trainer, [one if isinstance(one, LoaderPass) else repeat(None) for one in passes])
    for done in range(batches):
        try:
            loops.next_of_passes(trainer)
        except StopIteration:
            raise RuntimeError(
                f"the training data ended after {done} batches, but the checkpoint was saved after {batches} of its epoch:"
                " resume with the same data, batch size and number of processes"
            ) from None
    repeated = zip(loops.passes(trainer), passes, strict=True)
    loops.set_passes(trainer, [new if isinstance(new, LoaderPass) else old for new, old in repeated])


def _last_epoch(trainer: Trainer) -> int | None:
    """The epoch, counted from 0, that the last batch belonged to; None before the first."""
    begun: int = trainer.fit_loop.epoch_progress.current.started  # type: ignore[attr-defined]
    return begun - 1 if begun else None


def _coming_epoch(trainer: Trainer) -> int:
    """The epoch, counted from 0, that is in work or comes next."""
    return trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]


def _used(trainer: Trainer) -> int:
    """The epoch's combined batches that training has finished with: those fetched, less any ahead or in work."""
    fetched = loops.fetched(trainer)
    return fetched - loops.ahead(trainer) - _in_work(trainer) if fetched is not None else 0


def _in_work(trainer: Trainer) -> int:
    if loops.step_fetches(trainer):
        return 0
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return int(progress.ready - progress.processed)


def _ended(trainer: Trainer) -> bool:
    """Whether training has finished with all batches of the epoch, or all it wants."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    counts: Any = progress.current
    skipped = counts.started < counts.processed  # on_train_batch_start returned -1
    return (loops.exhausted(trainer) or progress.is_last_batch or skipped) and not _in_work(trainer)


def _stateful(trainer: Trainer) -> list[Any]:
    return [loader for loader in loops.training_loaders(trainer) or () if is_stateful(loader)]


def _open_gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Gradients the next batch adds to; with manual optimization all there are, as only the user knows."""
    module = trainer.lightning_module
    if module.automatic_optimization and not loops.accumulates(trainer):
        return {}
    if not module.automatic_optimization and trainer.training and loops.validates_next(trainer):
        return {}  # Lightning clears them for the validation that follows, which a resumed run does without
    return {name: p.grad.detach() for name, p in module.named_parameters() if p.grad is not None}


def _unnoticed(loader: SeededLoader) -> Start:
    return object(), torch.get_rng_state()


def _settle_counters(saved: dict[str, Any], state: dict[str, Any]) -> None:
    """Count a batch in work as not begun, a skipped one as done, and an epoch that was cut short as not finished."""
    epochs = saved["epoch_progress"]
    current, total = (saved["epoch_loop.batch_progress"][name] for name in ("current", "total"))
    if current["processed"] < current["ready"]:
        total["ready"] -= current["ready"] - current["completed"]
        current["ready"] = current["started"] = current["processed"] = current["completed"]
    for name in ("started", "processed", "completed"):  # Lightning compares the totals to tell where it was stopped
        total[name] = total["ready"] - (current["ready"] - current[name])
    if state["epoch"] is not None and not state["ended"] and epochs["current"]["processed"] > state["epoch"]:
        for counts in (epochs["current"], epochs["total"]):
            counts["processed"] = counts["completed"] = state["epoch"]


def _settle_loops(trainer: Trainer, state: dict[str, Any]) -> None:
    """Make the loops go on where the checkpoint was taken, in the cases where Lightning's own bookkeeping does not."""
    staged = loops.has_stages(trainer)
    if state["epoch"] is None:
        return
    if state["ended"] and (not staged or _coming_epoch(trainer) > state["epoch"]):
        _settle_before_epoch(trainer, state["epoch"] + 1)
    elif not staged:
        loops.forget_restart_of_epochs(trainer)
        trainer.fit_loop.epoch_progress.total.reset_on_restart()
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress
        for counts in (batches.current, batches.total):
            counts.completed = counts.processed


def _settle_before_epoch(trainer: Trainer, epoch: int) -> None:
    """Between two epochs, with nothing to be restarted; ``epoch``, counted from 0, comes next.

    With ``max_steps`` Lightning would take the finished epoch for an unfinished one, and after a checkpoint of its last
    ``on_train_batch_end`` would count one epoch less as begun than as finished, which confuses the next resume.
    """
    loops.forget_restart(trainer)
    progress: Any = trainer.fit_loop.epoch_progress
    for epochs in (progress.current, progress.total):
        epochs.ready = epochs.started = epochs.processed = epochs.completed = epoch
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress
    if batches.total.completed < batches.total.processed:
        batches.total.completed = batches.total.processed
        loops.count_one_more_step(trainer)
