"""How the tensors of one message are packed: which compressor sees which of them, one by one or as one vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dopt._random import key
from lightning_dopt.compress._wire import section
from lightning_dopt.compress.base import Compressor, Room, Rounds, Shape, Share, numel, together

Scale = Callable[[Shape, Compressor], float]


@dataclass(frozen=True)
class Piece:
    """Tensors of a message that one compressor sees at once."""

    codec: Compressor
    members: tuple[int, ...]
    """Their numbers within the message."""
    shape: tuple[int, ...]
    """What the compressor sees: a tensor in its own shape, or all members as one vector."""
    stretches: tuple[tuple[int, int], ...]
    """Where they lie in the flat message: first and last element, neighbours joined."""
    scale: float
    """Factor on what is decoded, see :meth:`Memory.scale`."""
    nbytes: int
    """Bytes of this part of the message."""
    whole: bool
    """Whether it is one vector of the whole message, so that it takes the message's seed as it is."""

    def take(self, flat: Tensor) -> Tensor:
        """The members' elements, a view if they lie together."""
        parts = [flat[first:last] for first, last in self.stretches]
        return (parts[0] if len(parts) == 1 else torch.cat([flat[:0], *parts])).view(self.shape)

    def give(self, value: Tensor, flat: Tensor) -> None:
        """Write elements taken by :meth:`take` back to where they lie."""
        start = 0
        for first, last in self.stretches:
            flat[first:last] = value.reshape(-1)[start : start + last - first]
            start += last - first


class Packing:
    """The layout of a message: fixed for as long as the compressor's :meth:`Compressor.parts` are.

    Args:
        parts: Compressors and the numbers of the tensors that each sees, every tensor once.
        shapes: Shapes of the tensors, which lie back to back in the flat message.
        scale: Factor on decoded tensors by shape and compressor; ``None`` is 1.
    """

    def __init__(self, parts: Sequence[Share], shapes: Sequence[Shape], scale: Scale | None = None) -> None:
        self.shapes = [tuple(shape) for shape in shapes]
        ends = [0]
        for shape in self.shapes:
            ends.append(ends[-1] + numel(shape))
        self.scale = scale
        whole = len(parts) == 1 and not parts[0][0].layerwise
        self.pieces = [self._piece(codec, tuple(members), ends, scale, whole) for codec, members in parts]
        self.nbytes = sum(piece.nbytes for piece in self.pieces)
        """Length of a message."""

    def repacked(self, parts: Sequence[Share]) -> Packing:
        """The layout of the same tensors under other compressors."""
        return Packing(parts, self.shapes, self.scale)

    def _piece(
        self, codec: Compressor, members: tuple[int, ...], ends: list[int], scale: Scale | None, whole: bool
    ) -> Piece:
        stretches: list[tuple[int, int]] = []
        for i in members:
            if stretches and stretches[-1][1] == ends[i]:
                stretches[-1] = (stretches[-1][0], ends[i + 1])
            else:
                stretches.append((ends[i], ends[i + 1]))
        shape = self.shapes[members[0]] if codec.layerwise else (sum(numel(self.shapes[i]) for i in members),)
        factor = 1.0 if scale is None else scale(shape, codec)
        return Piece(codec, members, shape, tuple(stretches), factor, codec.payload_bytes(shape), whole)

    def encode(self, value: Tensor, seed: int, own_seed: int) -> Tensor:
        """The message for a flat tensor; ``own_seed`` is for compressors whose ranks draw independently."""
        messages = [
            piece.codec.encode(piece.take(value), _seed(piece, own_seed if piece.codec.private else seed))
            for piece in self.pieces
        ]
        return messages[0] if len(messages) == 1 else torch.cat(messages)

    def decode_add(self, payload: Tensor, out: Tensor, weight: float, seed: int) -> None:
        """Add ``weight`` times the scaled decoded message to the flat tensor ``out``."""
        start = 0
        for piece in self.pieces:
            part, factor = payload[start : start + piece.nbytes], weight * piece.scale
            start += piece.nbytes
            target = piece.take(out)
            piece.codec.decode_add(part, target, factor, _seed(piece, seed))
            if len(piece.stretches) != 1:  # it was a copy
                piece.give(target, out)

    def check(self, payload: Tensor) -> None:
        """Look at what can be seen of a message before it is decoded: its length, and its scales or few values.

        Raises:
            ValueError: it is too short or too long, or holds a number that is not finite.
        """
        if payload.numel() != self.nbytes:
            raise ValueError(f"a message of {payload.numel()} bytes where {self.nbytes} are due; damaged")
        start = 0
        for piece in self.pieces:
            place = piece.codec.floats_at(piece.shape)
            if place is not None and place[1]:
                numbers = section(payload, start + place[0], place[1], torch.float32)
                if not bool(numbers.isfinite().all()):
                    raise ValueError(
                        f"{piece.codec!r}: a message with a scale or value that is not finite; damaged, or its sender's values "
                        "were not finite"
                    )
            start += piece.nbytes

    def roundtrip(self, value: Tensor, seed: int, own_seed: int) -> Tensor:
        """What receivers make of ``value``, scaled."""
        if len(self.pieces) == 1:
            (piece,) = self.pieces
            there = piece.codec.roundtrip(piece.take(value), _seed(piece, own_seed if piece.codec.private else seed))
            return there.mul_(piece.scale).view(-1)
        out = torch.zeros_like(value)
        self.decode_add(self.encode(value, seed, own_seed), out, 1.0, seed)
        return out

    def rounds(
        self,
        value: Tensor,
        state: dict[str, Tensor],
        seed: int,
        size: int,
        out: Tensor | None = None,
        moved: tuple[Tensor, float] | None = None,
    ) -> Rounds:
        """What a linear codec sums over the ranks for one message; see :meth:`Compressor.rounds`.

        The mean is written to ``out``, if there is one. With ``moved`` what this rank contributed is added to that tensor,
        times that factor, and an empty tensor stands for it in the answer; the tensor may be ``value`` itself.

        Pieces of one class go together (:meth:`Compressor.rounds_many`), and what they all sum at one time is one vector.
        The state of a piece is kept under the number of its first tensor.
        """
        if self.pieces[0].whole:
            (piece,) = self.pieces
            own, mean = yield from piece.codec.rounds(piece.take(value), state, seed, size)
            return _moved(_scaled(own, piece.scale), moved), _scaled(mean, piece.scale)
        classes: dict[type[Compressor], list[Piece]] = {}
        for piece in self.pieces:
            classes.setdefault(type(piece.codec), []).append(piece)
        groups = list(classes.values())
        states = [[_part_of(state, piece) for piece in group] for group in groups]
        mean = torch.empty_like(value) if out is None else out
        # Where all pieces are views of the message their results can go right to where they belong.
        direct = all(len(piece.stretches) == 1 and piece.scale == 1.0 for piece in self.pieces)
        own, factor = moved if direct and moved is not None else (torch.empty_like(value), None)
        rooms = [Room([p.take(mean) for p in g], [p.take(own) for p in g], factor) if direct else None for g in groups]
        talks = [
            kind.rounds_many([p.codec for p in group], [p.take(value) for p in group], those, seed, size, room)
            for (kind, group), those, room in zip(classes.items(), states, rooms, strict=True)
        ]
        results = yield from together(talks)
        for group, those, (owns, means) in zip(groups, states, results, strict=True):
            for piece, kept, mine, all_ in zip(group, those, owns, means, strict=True):
                if not direct:
                    piece.give(_scaled(mine, piece.scale), own)
                    piece.give(_scaled(all_, piece.scale), mean)
                state.update({f"{piece.members[0]}.{name}": tensor for name, tensor in kept.items()})
        return (value.new_empty(0) if factor is not None else _moved(own, moved)), mean


def _scaled(value: Tensor, scale: float) -> Tensor:
    return value if scale == 1.0 else value.mul_(scale)


def _moved(own: Tensor, moved: tuple[Tensor, float] | None) -> Tensor:
    """Add it to where it belongs, and return what is left of it."""
    if moved is None:
        return own
    moved[0].add_(own.view(-1), alpha=moved[1])
    return own.new_empty(0)


def _seed(piece: Piece, seed: int) -> int:
    return seed if piece.whole else key(seed, piece.members[0])


def _part_of(state: dict[str, Tensor], piece: Piece) -> dict[str, Tensor]:
    prefix = f"{piece.members[0]}."
    return {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}
