"""Data loaders that draw from a random stream of their own, so that a pass over the data can be repeated exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_dopt.strategies.rng import RandomStream

Start = tuple[Any, torch.Tensor]
"""Which epoch it is (any hashable value) and the state of torch's CPU generator the epoch's first pass starts from."""


class SeededLoader:
    """An iterable of batches that stands in for ``loader`` and leaves the global random generators untouched.

    Everything the wrapped loader does in this process (shuffling, starting workers, loading items when there are no
    workers) draws from a random stream of the loader's own. The stream is a function of what ``start`` returns: the
    wrapped loader is asked for its iterator under exactly that state of torch's CPU generator, so samplers and
    workers are seeded as without the wrapper; batches are then loaded under a stream seeded by the next draw from it.
    The batches of a pass, random or not, hence depend on ``start()`` and on nothing the model draws meanwhile.

    A second pass within one epoch goes on with the stream if the pass before it came to its end (a short loader that
    is cycled beside a longer one) and is the same pass again if not. The wrapped loader is asked for its iterator when
    the first batch is wanted, not before: hooks that run in between draw what they draw.

    All other attributes, reading and writing, and ``isinstance`` are those of the wrapped loader.

    Args:
        loader: any iterable over batches, for instance a ``DataLoader``.
        start: called with this object when a pass begins.
    """

    __slots__ = ("_ended", "_epoch", "_loader", "_start", "_stream")

    def __init__(self, loader: Any, start: Callable[[SeededLoader], Start]) -> None:
        self._loader = loader
        self._start = start
        self._stream = RandomStream()
        self._epoch: Any = None
        self._ended = False

    def __iter__(self) -> Iterator[Any]:
        return LoaderPass(self)

    def __len__(self) -> int:
        return len(self._loader)

    def open(self) -> Iterator[Any]:
        """Begin a pass: the wrapped loader's own iterator, to be advanced by `fetch` only."""
        epoch, state = self._start(self)
        cycle = self._ended and epoch == self._epoch
        self._epoch, self._ended = epoch, False
        batches: Iterator[Any]
        if cycle:
            with self._stream.active():
                batches = iter(self._loader)
            return batches
        source = torch.Generator()
        source.set_state(state)
        self._stream.seed(draw(source))
        self.on_first_pass()
        with self._stream.active():
            seeded = torch.get_rng_state()
            torch.set_rng_state(state)
            batches = iter(self._loader)
            torch.set_rng_state(seeded)
        return batches

    def fetch(self, batches: Iterator[Any]) -> Any:
        """The next batch of a pass that `open` began.

        Raises:
            StopIteration: at the end of the pass.
        """
        with self._stream.active():
            try:
                return next(batches)
            except StopIteration:
                self._ended = True
                raise

    def restart(self) -> None:
        """Make the next pass the first of its epoch, whatever passes there were before."""
        self._ended = False

    def on_first_pass(self) -> None:
        """Called when the first pass of an epoch begins, before the wrapped loader draws anything."""

    def __getattr__(self, name: str) -> Any:
        if name in SeededLoader.__slots__:  # not set yet: half-built objects must not look into themselves for ever
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = any(name in getattr(cls, "__slots__", ()) for cls in type(self).__mro__)
        if own:
            object.__setattr__(self, name, value)
        else:
            setattr(self._loader, name, value)  # Lightning sets worker_init_fn on what it is given

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._loader)


class ResumableLoader(SeededLoader):
    """A `SeededLoader` for training that keeps the generators the user gave to the loader or its samplers.

    A ``torch.Generator`` passed as ``DataLoader(generator=...)`` or to a sampler is state of its own: it goes on from
    epoch to epoch. `state_dict` holds it as it was when the epoch began and as it is; `load_state_dict` puts one of the
    two back. The position within the epoch is not the loader's to keep, as Lightning fetches ahead and combines
    loaders: see `lightning_dopt.strategies.resume.ExactResume`, which repeats the trainer's fetches.

    By the two methods Lightning recognizes a loader that can be resumed within an epoch.
    """

    __slots__ = ("_at_epoch_start",)

    def __init__(self, loader: Any, start: Callable[[SeededLoader], Start]) -> None:
        super().__init__(loader, start)
        self._at_epoch_start: list[torch.Tensor] = []
        _warn_if_inexact(loader)

    def on_first_pass(self) -> None:
        """Remember the generators for `state_dict`."""
        self._at_epoch_start = self._generator_states()

    def state_dict(self) -> dict[str, Any]:
        """The user's generators when the epoch began (empty before the first) and now: tensors only."""
        return {"at_epoch_start": self._at_epoch_start, "now": self._generator_states()}

    def load_state_dict(self, state_dict: dict[str, Any], repeat_epoch: bool = False) -> None:
        """Put the user's generators back to what they were when saved or, on ``repeat_epoch``, when the epoch began."""
        saved = state_dict["at_epoch_start" if repeat_epoch else "now"]
        for generator, state in zip(_generators(self._loader), saved, strict=False):
            generator.set_state(state.cpu())

    @staticmethod
    def wrote(state: object) -> bool:
        """Whether ``state`` came from `state_dict`."""
        return isinstance(state, dict) and state.keys() == {"at_epoch_start", "now"}

    def _generator_states(self) -> list[torch.Tensor]:
        return [generator.get_state() for generator in _generators(self._loader)]


class LoaderPass(Iterator[Any]):
    """One pass over a `SeededLoader`, begun when its first batch is asked for."""

    def __init__(self, loader: SeededLoader) -> None:
        self._loader = loader
        self._batches: Iterator[Any] | None = None

    def __next__(self) -> Any:
        if self._batches is None:
            self._batches = self._loader.open()
        return self._loader.fetch(self._batches)


def draw(generator: torch.Generator | None = None) -> int:
    """An integer from [0, 2^63), by the draw a ``DataLoader`` makes when it is iterated."""
    return int(torch.empty((), dtype=torch.int64).random_(generator=generator).item())


def is_stateful(loader: object) -> bool:
    """Whether ``loader`` keeps its position itself (``state_dict`` and ``load_state_dict``), as torchdata's does."""
    return callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None))


def _generators(loader: Any) -> list[torch.Generator]:
    batch_sampler, sampler = getattr(loader, "batch_sampler", None), getattr(loader, "sampler", None)
    owners = (loader, sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
    found = {id(g): g for o in owners if isinstance(g := getattr(o, "generator", None), torch.Generator)}
    return list(found.values())


def _warn_if_inexact(loader: Any) -> None:
    if getattr(loader, "num_workers", 0) == 0:
        return
    if getattr(loader, "persistent_workers", False):
        rank_zero_warn(
            "DataLoader(persistent_workers=True): random numbers drawn inside the workers go on from epoch to epoch and"
            " cannot be saved. If the data set draws any, a resumed run sees other ones; set persistent_workers=False"
            " for exact resume."
        )
    if not getattr(loader, "in_order", True):
        rank_zero_warn("DataLoader(in_order=False): the order of the batches is not repeatable, nor is resume exact.")
