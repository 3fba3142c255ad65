"""One message there and back: encode, send, decode, combine, for one lane of one sync."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_dopt._random import key
from lightning_dopt.comm.world import Pending, Talk, World
from lightning_dopt.compress import Identity, LowRank
from lightning_dopt.compress.base import Compressor, Rounds
from lightning_dopt.compress.memory import Memory, as_compressor
from lightning_dopt.plan import Sync
from lightning_dopt.slots import Lane


class Flight:
    """A message between its send and its apply.

    Attributes:
        own: What receivers decode of this rank's message (``None`` if nobody needs it).
        sent: The live tensor when the message left (``None`` if nobody needs it).
        step: The optimizer step of the send.
    """

    def __init__(self, talk: Talk[Tensor], step: int) -> None:
        self.step = step
        self.own: Tensor | None = None
        self.sent: Tensor | None = None
        self._talk = talk
        self._pending: Pending | None = None
        self._result: Tensor | None = None

    def start(self) -> None:
        """Run up to the first wait."""
        try:
            self._pending = next(self._talk)
        except StopIteration as stop:
            self._result = stop.value

    def finish(self) -> Talk[Tensor]:
        """Wait for the rest and return the combined result; calling it again returns the same."""
        while self._result is None:
            assert self._pending is not None
            answer = yield self._pending
            try:
                self._pending = self._talk.send(answer)
            except StopIteration as stop:
                self._result = stop.value
        return self._result

    def state_dict(self) -> dict[str, object]:
        """A landed flight (see :meth:`finish`) for a checkpoint."""
        assert self._result is not None, "finish the flight first"
        return {"step": self.step, "own": self.own, "sent": self.sent, "result": self._result}

    @classmethod
    def from_state_dict(cls, state: dict[str, object]) -> Flight:
        """The landed flight of a checkpoint."""
        flight = cls(_no_talk(), int(state["step"]))  # type: ignore[call-overload]
        flight.own, flight.sent, flight._result = state["own"], state["sent"], state["result"]  # type: ignore[assignment]
        return flight


def _no_talk() -> Talk[Tensor]:
    raise RuntimeError("a restored flight has landed already")
    yield


class Channel:
    """The wire of one lane of one sync, with the codec's memory.

    Args:
        sync: What to do.
        lane: Layout of the messages.
        world: With whom.
        seed: Seed of this channel's random codecs, the same on all ranks.
        label: Name in the ledger and in errors.
    """

    def __init__(self, sync: Sync, lane: Lane, world: World, seed: int, label: str) -> None:
        self.sync, self.lane, self.world, self.seed, self.label = sync, lane, world, seed, label
        self.compressor, self.memory = as_compressor(sync.codec)
        like = torch.zeros(0, dtype=lane.message_dtype, device=lane.live.device).new_zeros(lane.numel)
        self.memory_state = self.memory.state(like) if self.memory is not None else {}
        self.codec_state: dict[str, Tensor] = {}
        self.scale = self.memory.scale((lane.numel,)) if self.memory is not None else 1.0

    @property
    def sums(self) -> bool:
        """Whether messages are summed on the way (all-reduce) instead of being exchanged one by one."""
        return self.sync.peers.is_mean(self.world.size) and self.compressor.linear and self.sync.combine.linear

    def launch(self, message: Tensor, step: int, round_: int, need_own: bool = False) -> Flight:
        """Send ``message`` (this channel may overwrite it); ``round_`` counts the sends of the sync from 0."""
        own: list[Tensor] = []
        flight = Flight(self._talk(message, step, round_, need_own, own), step)
        flight.start()
        flight.own = own[0] if own else None
        return flight

    def _talk(self, message: Tensor, step: int, round_: int, need_own: bool, own_out: list[Tensor]) -> Talk[Tensor]:
        if isinstance(self.compressor, Identity) and self.memory is None and self.sums:
            if need_own:
                own_out.append(message.clone())
            return (yield from self._plain_mean(message))
        signal = message
        value = self.memory.load(signal, self.memory_state) if self.memory is not None else signal
        if self.sums:
            if need_own:
                own_out.append(self.compressor.roundtrip(value, key(self.seed, step)).mul_(self.scale))
            own, mixed = yield from self._summed(value, step)
            if self.memory is not None:
                self.memory.sent(own, self.memory_state)
        else:
            seed = key(self.seed, step)
            payload = self._pack(value, key(seed, self.world.rank) if self.compressor.private else seed)
            if self.memory is not None or need_own:
                own = torch.zeros_like(value)
                self._unpack_add(payload, seed, own, self.scale)
                own_out.append(own)
                if self.memory is not None:
                    self.memory.sent(own, self.memory_state)
            mixed = yield from self._exchanged(payload, seed, round_)
        return self.memory.received(mixed, signal, self.memory_state) if self.memory is not None else mixed

    def _plain_mean(self, message: Tensor) -> Talk[Tensor]:
        if self.world.size == 1:
            return message
        total = yield self.world.all_reduce(message, self.label)
        return total.mul_(1.0 / self.world.size)

    def _summed(self, value: Tensor, step: int) -> Talk[tuple[Tensor, Tensor]]:
        rounds = self.rounds(value, key(self.seed, step))
        try:
            part = next(rounds)
            while True:
                if self.world.size > 1:
                    part = yield self.world.all_reduce(part, self.label)
                part = rounds.send(part)
        except StopIteration as stop:
            own, mean = stop.value
        return own.mul_(self.scale), mean.mul_(self.scale)

    def rounds(self, value: Tensor, seed: int) -> Rounds:
        """The tensors that a linear codec sums over the ranks for one message; see :meth:`Compressor.rounds`."""
        if not isinstance(self.compressor, LowRank):
            return self.compressor.rounds(value, self.codec_state, seed, self.world.size)
        return self._matrix_rounds(self.compressor, value, seed)

    def _matrix_rounds(self, compressor: LowRank, value: Tensor, seed: int) -> Rounds:
        owns, means = yield from compressor.rounds_many(self.lane.views(value), self.codec_state, seed, self.world.size)
        return _flatten(owns, value), _flatten(means, value)

    def _exchanged(self, payload: Tensor, seed: int, round_: int) -> Talk[Tensor]:
        world, peers = self.world, self.sync.peers
        if world.size == 1:
            got: dict[int, Tensor] = {0: payload}
        elif peers.is_mean(world.size):
            rows = yield world.all_gather(payload, self.label)
            got = dict(enumerate(rows))
        else:
            send = dict.fromkeys(peers.receivers(world.size, world.rank, round_), payload)
            receive = dict.fromkeys(peers.neighbors(world.size, world.rank, round_), payload.numel())
            got = yield world.exchange(send, receive, self.label)
            got[world.rank] = payload
        weights = peers.row(world.size, world.rank, round_)
        out = torch.zeros(self.lane.numel, dtype=self.lane.message_dtype, device=payload.device)
        messages = [
            (weights.get(j, 0.0), partial(self._decode_scaled, got[j], seed)) for j in sorted(got) if j in weights
        ]
        self.sync.combine(messages, out)
        return out

    def _decode_scaled(self, payload: Tensor, seed: int, out: Tensor, weight: float) -> None:
        self._unpack_add(payload, seed, out, weight * self.scale)

    def _pack(self, value: Tensor, seed: int) -> Tensor:
        if isinstance(self.compressor, Identity):
            return (value if self.memory is None else value.clone()).view(
                torch.uint8
            )  # memories change it before it left
        if not self.compressor.layerwise:
            return self.compressor.encode(value, seed)
        return torch.cat([self.compressor.encode(v, key(seed, k)) for k, v in enumerate(self.lane.views(value))])

    def _unpack_add(self, payload: Tensor, seed: int, out: Tensor, weight: float) -> None:
        if isinstance(self.compressor, Identity):
            out.add_(payload.view(out.dtype), alpha=weight)
        elif not self.compressor.layerwise:
            self.compressor.decode_add(payload, out, weight, seed)
        else:
            start = 0
            for k, view in enumerate(self.lane.views(out)):
                end = start + self.compressor.payload_bytes(view.shape)
                self.compressor.decode_add(payload[start:end], view, weight, key(seed, k))
                start = end

    def tensors(self) -> dict[str, Tensor]:
        """The memory's and the codec's state, for a checkpoint."""
        return {f"memory.{k}": t for k, t in self.memory_state.items()} | {
            f"codec.{k}": t for k, t in self.codec_state.items()
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Continue from saved state."""
        for name, saved in tensors.items():
            kind, _, k = name.partition(".")
            if kind == "memory":
                self.memory_state[k].copy_(saved)
            else:
                self.codec_state[k] = saved.to(self.lane.live.device, copy=True)


def message_bytes(compressor: Compressor, lane: Lane) -> int:
    """Length of one encoded message of a lane."""
    if isinstance(compressor, Identity):
        return lane.numel * lane.message_dtype.itemsize
    if compressor.layerwise:
        return sum(compressor.payload_bytes(f.shape) for f in lane.fields)
    return compressor.payload_bytes((lane.numel,))


def _flatten(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    out = torch.empty_like(like)
    start = 0
    for part in parts:
        out[start : start + part.numel()].copy_(part.reshape(-1))
        start += part.numel()
    return out


__all__ = ["Channel", "Flight", "Memory", "message_bytes"]
