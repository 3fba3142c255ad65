"""What a compressor is: a pure map from a tensor to bytes and back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from lightning_dopt._part import Part
from lightning_dopt._random import key

Shape = Sequence[int]
T = TypeVar("T")


def numel(shape: Shape) -> int:
    """Number of elements of a tensor of that shape."""
    return math.prod(shape)


class Codec(Part, ABC):
    """Whatever may stand in a sync's ``codec``: a :class:`Compressor`, or a memory wrapped around one."""

    def __init__(self) -> None:
        """Takes no arguments unless a subclass does."""


class Compressor(Codec):
    """A stateless lossy (or exact) packing of one floating point tensor into one contiguous ``uint8`` message.

    The size of the message depends on the shape alone, never on the values, so all ranks know it beforehand. Randomness
    comes from ``seed`` alone and never from the global generators.

    *Shared or private randomness.* A receiver decodes with the seed of the sender. Compressors whose decoder needs the
    seed (``RandK``) therefore get one seed that is the same on all ranks; compressors that only round stochastically
    set ``private = True``, get a different seed on every rank, and must decode without it.
    """

    linear: bool = False
    """Whether messages of several ranks may be summed before decoding; such compressors implement :meth:`rounds`."""

    sums_per_message: int = 1
    """How many sums over the ranks, one after the other, :meth:`rounds` takes."""
    private: bool = False
    """Whether ranks must draw independently (see above)."""
    layerwise: bool = False
    """Whether it must see tensors one by one in their own shape (low rank) rather than one long flat message."""

    adaptive: bool = False
    """Whether what it makes of tensors changes during training (budgets, phases); such compressors do not nest."""

    @abstractmethod
    def payload_bytes(self, shape: Shape) -> int:
        """Exact length in bytes of the message for a tensor of this shape: values, indices, scales and padding."""

    @abstractmethod
    def encode(self, x: Tensor, seed: int = 0) -> Tensor:
        """Pack ``x`` (floating point, any shape) into a 1-D ``uint8`` tensor of ``payload_bytes(x.shape)`` bytes."""

    @abstractmethod
    def decode_add(self, payload: Tensor, out: Tensor, weight: float = 1.0, seed: int = 0) -> None:
        """Add ``weight`` times the decoded message to ``out`` in place (shape and device of the encoded tensor)."""

    def decode(self, payload: Tensor, shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        """The tensor a receiver reconstructs from ``payload``."""
        out = torch.zeros(tuple(shape), dtype=dtype, device=payload.device)
        self.decode_add(payload, out, 1.0, seed)
        return out

    def roundtrip(self, x: Tensor, seed: int = 0) -> Tensor:
        """What a receiver decodes when ``x`` is sent: ``decode(encode(x))``, in the shape and dtype of ``x``."""
        return self.decode(self.encode(x, seed), x.shape, x.dtype, seed)

    def squared_error(self, x: Tensor, seed: int = 0, scale: float = 1.0) -> Tensor:
        """``||scale C(x) - x||^2``, a number in a tensor: measured, or in the mean over the seed where that is known."""
        return self.roundtrip(x, seed).mul_(scale).sub_(x).square_().sum()

    def contraction(self, shape: Shape) -> float | None:
        """Largest known ``delta`` with ``E||C(x) - x||^2 <= (1 - delta) ||x||^2`` for all x, if one is known."""
        return None

    def variance(self, shape: Shape) -> float | None:
        """Smallest known ``omega`` with ``E C(x) = x`` and ``E||C(x) - x||^2 <= omega ||x||^2``, ``None`` if biased."""
        return None

    def values_at(self, shape: Shape) -> tuple[int, int] | None:
        """Where the message holds float32 values that may be packed further (:class:`Compose`): first byte and count.

        Only of compressors that set the other coefficients of an orthonormal basis to zero, so that an error in these
        values is the error of the whole; ``None`` for all others.
        """
        return None

    def floats_at(self, shape: Shape) -> tuple[int, int] | None:
        """Where the message holds float32 numbers few enough to be looked at on arrival: first byte and count.

        Scales of blocks, or the values of few elements. One that is not finite shows that the message is damaged, or that
        what was sent was not finite.
        """
        return self.values_at(shape)

    def parts(self, shapes: Sequence[Shape]) -> list[Share]:
        """Which compressor sees which tensors of a message: pairs of a compressor and the numbers of its tensors.

        Several tensors together are one vector to their compressor, one that is :attr:`layerwise` gets single tensors.
        """
        if self.layerwise:
            return [(self, [i]) for i in range(len(shapes))]
        return [(self, list(range(len(shapes))))]

    def rounds(self, x: Tensor, state: dict[str, Tensor], seed: int, size: int) -> Rounds:
        """For linear compressors: compute the compressed mean over ``size`` ranks by summing dense tensors.

        A generator that yields one tensor at a time to be summed over all ranks in place, is sent the sum, and returns
        ``(own, mean)``: what this rank contributed and the mean of all contributions, both shaped like ``x``. ``state``
        is a dictionary that persists between calls (warm starts); ``x`` must not be modified.
        """
        raise NotImplementedError(f"{type(self).__name__} is not linear: its messages cannot be summed")
        yield

    @classmethod
    def rounds_many(
        cls,
        codecs: Sequence[Compressor],
        xs: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        seed: int,
        size: int,
        room: Room | None = None,
    ) -> ManyRounds:
        """:meth:`rounds` for several tensors, each with a codec of this class and a state of its own, in joint sums.

        Returns what this rank contributed and the mean of all contributions, in the order and shapes of ``xs``; with
        ``room`` they are put there instead.
        """
        talks = [c.rounds(x, s, key(seed, k), size) for k, (c, x, s) in enumerate(zip(codecs, xs, states, strict=True))]
        results = yield from together(talks)
        owns, means = [own for own, _ in results], [mean for _, mean in results]
        return (owns, means) if room is None else room.filled(owns, means)


Share = tuple[Compressor, list[int]]
Rounds = Generator[Tensor, Tensor, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Room:
    """Where :meth:`Compressor.rounds_many` puts its results: contiguous tensors in the shapes of the signals.

    Attributes:
        means: Overwritten by the means.
        owns: What this rank contributed is added to these, ``factor`` times. They may be the signals themselves: with the
            factor -1 what remains is the residual of error feedback, made in place.
        factor: 1 or -1; ``None`` overwrites them.
    """

    means: Sequence[Tensor]
    owns: Sequence[Tensor]
    factor: float | None = None

    def filled(self, owns: Sequence[Tensor], means: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """With these contributions and means put in their places."""
        for place, mean in zip(self.means, means, strict=True):
            place.copy_(mean)
        for k in range(len(owns)):
            self.put(k, owns[k])
        return list(self.owns), list(self.means)

    def put(self, k: int, own: Tensor) -> None:
        """What this rank contributed to tensor ``k``."""
        if self.factor is None:
            self.owns[k].copy_(own)
        else:
            self.owns[k].add_(own, alpha=self.factor)


ManyRounds = Generator[Tensor, Tensor, tuple[list[Tensor], list[Tensor]]]


def together(talks: Sequence[Generator[Tensor, Tensor, T]]) -> Generator[Tensor, Tensor, list[T]]:
    """Run generators of sums side by side: what they yield at one time is yielded as one vector."""
    results: dict[int, T] = {}
    sums: dict[int, Tensor | None] = dict.fromkeys(range(len(talks)))
    while True:
        parts: dict[int, Tensor] = {}
        for k, total in sums.items():
            try:
                parts[k] = next(talks[k]) if total is None else talks[k].send(total)
            except StopIteration as stop:
                results[k] = stop.value
        if not parts:
            return [results[k] for k in range(len(talks))]
        pieces = list(parts.values())
        answer = [(yield pieces[0])] if len(pieces) == 1 else split((yield join(pieces)), pieces)
        sums = dict(zip(parts, answer, strict=True))


def join(tensors: Sequence[Tensor]) -> Tensor:
    """One new vector of all elements."""
    return torch.cat([t.reshape(-1) for t in tensors]) if tensors else torch.empty(0)


def split(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Cut a vector of :func:`join` into views of the shapes it came from."""
    cut = torch.split_with_sizes(vector, [t.numel() for t in like])
    return [piece.view(t.shape) for piece, t in zip(cut, like, strict=True)]
