"""Lazy sampling under a Trainer: epochs of one length, in which every batch comes once or more in a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import torch

from lightning_dopt._random import key
from lightning_dopt.pipeline.lazy import LazyClock

_SALT = 0x0DEA


class LazyBatches:
    """A loader that gives the batches of another one, each several times in a row.

    How often is drawn as :class:`~lightning_dopt.pipeline.LazyClock` draws it, once for all batches of an epoch; in each
    epoch these numbers are dealt to its batches anew. So every epoch takes the same number of steps, which Lightning
    needs, and what a batch gets is still geometric. Of a loader without a length every step is drawn by itself. All of it is
    a function of seed, epoch and step; nothing needs to be saved.

    All other attributes, and ``isinstance``, are those of the other loader.

    Args:
        loader: The loader of batches.
        probability: Probability of a new batch, in (0, 1].
        seed: Seed of the draws, the same on all ranks.
        epoch: Called for the number of the epoch that begins.
    """

    def __init__(self, loader: Any, probability: float, seed: int, epoch: Callable[[], int]) -> None:
        self._loader, self._probability, self._seed, self._epoch = loader, probability, seed, epoch
        self._starts: tuple[int, frozenset[int], int] | None = None

    def fresh(self, epoch: int, step: int) -> bool:
        """Whether the batch of a step (counted within its epoch) is a new one."""
        if step == 0:
            return True
        if self._length() is None:
            return LazyClock(self._probability, key(self._seed, _SALT, epoch)).fresh(step)
        return step in self._plan(epoch)[1]

    def __len__(self) -> int:
        return self._plan(0)[2]

    def __iter__(self) -> Iterator[Any]:
        source, epoch, end = iter(self._loader), self._epoch(), len(self) if self._length() is not None else None
        batch: Any = None
        for step in count():
            if step == end:
                return
            if self.fresh(epoch, step):
                try:
                    batch = next(source)
                except StopIteration:
                    return
            yield batch

    def _length(self) -> int | None:
        try:
            return len(self._loader)
        except (TypeError, NotImplementedError):
            return None

    def _plan(self, epoch: int) -> tuple[int, frozenset[int], int]:
        """Epoch, the steps with a new batch, and the number of all steps."""
        if self._starts is None or self._starts[0] != epoch:
            runs = self._runs(len(self._loader))
            generator = torch.Generator().manual_seed(key(self._seed, _SALT, epoch) % 2**63)
            order = torch.randperm(len(runs), generator=generator).tolist() if epoch else range(len(runs))
            starts, step = set(), 0
            for k in order:
                starts.add(step)
                step += runs[k]
            self._starts = epoch, frozenset(starts), step
        return self._starts

    def _runs(self, batches: int) -> list[int]:
        """How many steps each of so many batches gets."""
        clock, step = LazyClock(self._probability, self._seed), 0
        runs: list[int] = []
        while len(runs) < batches:
            first, step = step, step + 1
            while not clock.fresh(step):
                step += 1
            runs.append(step - first)
        return runs

    def __getattr__(self, name: str) -> Any:
        if name in ("_loader", "_probability", "_seed", "_epoch", "_starts"):  # not set yet
            raise AttributeError(name)
        return getattr(self._loader, name)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._loader)
