"""Lazy sampling: a batch is used for a random number of steps before the next one is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any, Generic, TypeVar

from lightning_dopt._checks import check_float, check_int
from lightning_dopt._part import Part
from lightning_dopt._random import key, uniform

Batch = TypeVar("Batch")
_SALT = 0x1A27


class LazyClock(Part):
    """Tells in which steps a new batch is drawn: a pure function of seed and step, equal on all ranks.

    Step 0 always does, any other with ``probability``, independently; so a batch is used for ``1 / probability`` steps in
    the mean, and the lengths are geometric.

    Args:
        probability: Probability of a new batch, in (0, 1].
        seed: Seed.

    Raises:
        ValueError: An argument out of range.
    """

    def __init__(self, probability: float, seed: int = 0) -> None:
        self.probability = check_float("LazyClock", "probability", probability, 0.0, 1.0, open_low=True)
        self.seed = check_int("LazyClock", "seed", seed, 0)

    def fresh(self, step: int) -> bool:
        """Whether a new batch is drawn in that step."""
        return step == 0 or uniform(key(self.seed, _SALT), step) < self.probability


class LazyLoader(Generic[Batch]):
    """A loader that gives the batches of another one, each several times in a row.

    The same object is given again, so that augmentation and order are the same, too. An epoch has every batch of
    the other loader once or more; its length is about ``1 / probability`` times as long and is known beforehand. The
    first batch of an epoch is always a new one.

    It can be resumed in the middle of an epoch, if the other loader begins that epoch again with the same batches:
    :meth:`state_dict` counts the steps that were given out.

    Args:
        loader: The loader of batches; its length, if it has one, is that of an epoch.
        probability: Probability of a new batch, in (0, 1].
        seed: Seed of the draws, the same on all ranks.

    Raises:
        ValueError: An argument out of range.
    """

    def __init__(self, loader: Iterable[Batch], probability: float, seed: int = 0) -> None:
        check_float("LazyLoader", "probability", probability, 0.0, 1.0, open_low=True)
        check_int("LazyLoader", "seed", seed, 0)
        self.loader = loader
        self.clock = LazyClock(probability, seed)
        self.step = 0
        """Steps given out so far, over all epochs."""
        self.begin = 0
        """The step in which this epoch began."""
        self.drawn = 0
        """Batches drawn in this epoch so far."""
        self.fresh = True
        """Whether the batch given last was a new one."""
        self._resumed = False

    def __len__(self) -> int:
        """Steps of the epoch under way, or of the next one.

        Raises:
            TypeError: The other loader has no length.
        """
        if not isinstance(self.loader, Sized):
            raise TypeError(f"LazyLoader: {type(self.loader).__name__} has no length")
        step, drawn = self.begin, 0
        while not self._is_fresh(step, drawn) or drawn < len(self.loader):
            drawn += self._is_fresh(step, drawn)
            step += 1
        return step - self.begin

    def _is_fresh(self, step: int, drawn: int) -> bool:
        return drawn == 0 or self.clock.fresh(step)

    def __iter__(self) -> Iterator[Batch]:
        source = iter(self.loader)
        skip = self.drawn if self._resumed else 0
        if not self._resumed:
            self.begin, self.drawn = self.step, 0
        self._resumed = False
        batch: Any = None
        for _ in range(skip):
            batch = next(source)
        while True:
            fresh = self._is_fresh(self.step, self.drawn)
            if fresh:
                try:
                    batch = next(source)
                except StopIteration:
                    self.begin, self.drawn = self.step, 0
                    return
                self.drawn += 1
            self.fresh = fresh
            self.step += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """What is needed to go on after the batch that was given last."""
        return {"step": self.step, "begin": self.begin, "drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration go on where the saved one was."""
        self.step, self.begin, self.drawn = state["step"], state["begin"], state["drawn"]
        self._resumed = self.drawn > 0
