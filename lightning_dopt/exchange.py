"""One message there and back: encode, send, decode, combine, for one lane of one sync."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_dopt._random import key
from lightning_dopt.apply import Blocking
from lightning_dopt.comm.seal import SEAL, is_whole, sealed
from lightning_dopt.comm.world import Pending, SyncError, Talk, World
from lightning_dopt.compress import Budget, Identity
from lightning_dopt.compress.allocation import Allocation
from lightning_dopt.compress.base import Share
from lightning_dopt.compress.memory import Difference, Memory, as_compressor
from lightning_dopt.compress.packing import Packing
from lightning_dopt.flight import Flight
from lightning_dopt.plan import Sync
from lightning_dopt.slots import Lane
from lightning_dopt.transport import TwoPhase, Way, busiest, choose, sums

_SURVEY = 1 << 20
"""Sets the seeds of measured errors apart from those of messages."""


class Channel:
    """The wire of one lane of one sync, with the memories of its codec and of its combine.

    Args:
        sync: What to do.
        lane: Layout of the messages.
        world: With whom.
        seed: Seed of this channel's random codecs, the same on all ranks.
        label: Name in the ledger and in errors.
        share: Part of the sync's elements that are in this lane.
        checksum: Whether messages end with a checksum, see :class:`~lightning_dopt.Plan`.
    """

    def __init__(
        self, sync: Sync, lane: Lane, world: World, seed: int, label: str, share: float = 1.0, checksum: bool = False
    ) -> None:
        self.checksum = checksum
        self.seal = SEAL if checksum else 0
        """Bytes at the end of each message."""
        self.sync, self.lane, self.world, self.seed, self.label = sync, lane, world, seed, label
        self.compressor, self.memory = as_compressor(sync.codec)
        self.shapes = [f.shape for f in lane.fields]
        start = lane.live.detach().to(lane.message_dtype)
        self.linked = world.links is not None and not (sync.when.at_end and sync.peers.is_mean(world.size))
        """Whether links to neighbours may be lost or rest, so that messages go from neighbour to neighbour only."""
        changing = self.linked or sync.peers.period(world.size) != 1
        self.by_edge = isinstance(self.memory, Difference) and changing
        self.memory_state = self.memory.state(start) if self.memory is not None and not self.by_edge else {}
        self.codec_state: dict[str, Tensor] = {}
        self.combine_state = sync.combine.state(start, sync.peers, world.size, world.rank)
        scale = self.memory.scale if self.memory is not None else None
        budget = self.compressor if isinstance(self.compressor, Budget) else None
        self.allocation = Allocation(budget, self.shapes, share, scale) if budget is not None else None
        self.packing = Packing(self._parts(), self.shapes, scale)
        """How the tensors of the next message are packed; it changes only between messages."""
        self.two_phase = TwoPhase(sync.codec, self._parts(), self.shapes, start, world.size, world.rank, self.seal)
        """The two legs of a mean, if messages travel so."""
        self.transport, self.reason = self._chosen()
        """How messages travel, and why; see :func:`~lightning_dopt.transport.choose`."""
        self.exchanges = sync.combine.exchanges(sync.peers, world.size)
        self._free: list[Tensor] = []
        self._boxes: dict[tuple[int, int], Tensor] = {}
        self._kept: dict[str, dict[str, Tensor]] = {}

    def _parts(self) -> list[Share]:
        return self.compressor.parts(self.shapes) if self.allocation is None else self.allocation.parts()

    def survey(self, values: Sequence[Tensor], round_: int, exchange: int, seed: int) -> Pending | Tensor | None:
        """If a budget is due: begin to sum over all ranks what :meth:`replan` rests on."""
        if self.allocation is None or exchange or not self.allocation.budget.due(round_ // self.exchanges):
            return None
        table = self.allocation.measure(values, key(seed, _SURVEY))
        return self.world.all_reduce(table, self.label) if self.world.size > 1 else table

    def replan(self, survey: Pending | Tensor | None) -> Talk[None]:
        """From the next message on, pack as the survey suggests."""
        if survey is None or self.allocation is None:
            return
        self.allocation.update(survey if isinstance(survey, Tensor) else (yield survey))
        self.packing = self.packing.repacked(self._parts())

    def _chosen(self) -> tuple[Way, str]:
        sync, n = self.sync, self.world.size
        if self.linked or not sync.peers.is_mean(n):
            return "neighbors", "not all ranks hear all"
        dense = self.lane.numel * self.lane.message_dtype.itemsize
        sent = busiest(self.two_phase, self.message_bytes + self.seal)
        return choose(sync.transport, sync.codec, sync.combine, n, dense, sent, self.world.link)

    @property
    def hops(self) -> int:
        """How many times a rank waits for others until a message has arrived."""
        legs = 1
        if self.transport == "two_phase":
            legs = 2
        elif self.transport == "all_reduce":
            legs = max((piece.codec.sums_per_message for piece in self.packing.pieces), default=1)
        return self.exchanges * legs

    def resize(self) -> None:
        """The world has another number of ranks; chunks belong to a fixed number, so messages are summed or gathered."""
        asked: Way = "all_reduce" if sums(self.sync.codec, self.sync.combine) else "all_gather"
        self.transport, self.reason = (asked, "members change") if self.sync.transport == "auto" else self._chosen()

    @property
    def sums(self) -> bool:
        """Whether messages are summed on the way (all-reduce) instead of being exchanged one by one."""
        return self.transport == "all_reduce"

    def at(self, round_: int) -> Channel:
        """The channel that carries the messages of this round: itself, unless the compressor changes with the rounds."""
        return self

    def launch(self, message: Tensor, step: int, round_: int, need_own: bool = False) -> Flight:
        """Send ``message`` (this channel may overwrite it); ``round_`` counts the sends of the sync from 0."""
        wire = _RoundWire(self, step, round_ * self.exchanges, need_own)
        flight = Flight(self.sync.combine.talk(wire, message, self.combine_state), step)
        flight.hops = self.hops
        flight.start()
        flight.own, flight.buffers = wire.own, wire.buffers
        return flight

    def take(self, buffers: list[Tensor]) -> Tensor:
        """A message-sized buffer with any content, used before if there is one; noted in ``buffers`` to be given back."""
        buffer = (
            self._free.pop() if self._free else self.lane.live.new_empty(self.lane.numel, dtype=self.lane.message_dtype)
        )
        buffers.append(buffer)
        return buffer

    def give_back(self, flight: Flight) -> None:
        """The flight's result has been used: its buffers may serve the next one."""
        self._free.extend(flight.buffers)
        flight.buffers = []

    def mix(self, message: Tensor, wire: _RoundWire, exchange: int) -> Talk[Tensor]:
        """One exchange: load the memory, encode, exchange, decode, combine; see :meth:`Wire.mix`."""
        if isinstance(self.compressor, Identity) and self.memory is None and self.sums:
            if wire.need_own:
                wire.own = message.clone()
            return (yield from self._plain_mean(message))
        seed = key(self.seed, wire.step) if exchange == 0 else key(key(self.seed, wire.step), exchange)
        round_ = wire.round + exchange
        if self.by_edge:
            return (yield from self._mixed_by_edge(message, seed, round_, exchange))
        if not self.sync.peers.speaks(self.world.size, self.world.rank, round_):  # its memory waits
            survey = self.survey([message], wire.round, exchange, seed)  # all ranks take part in that
            mixed = yield from self._exchanged(None, seed, round_, message, self.take(wire.buffers))
            yield from self.replan(survey)
            return mixed
        value = message if self.memory is None else self.memory.load_packed(message, self.memory_state, self.packing)
        survey = self.survey([value], wire.round, exchange, seed)
        own: Tensor | None = None
        if self.sums:
            if wire.need_own:
                wire.own = self.packing.roundtrip(value, seed, seed)
            own, mixed = yield from self._summed(value, seed, wire)
        elif self.transport == "two_phase":
            payloads = self.two_phase.encode(value, seed)
            if self.memory is not None or wire.need_own:
                wire.own = own = self.two_phase.decode(payloads, seed, torch.empty_like(value))
                if self.memory is not None:
                    self.memory.sent_packed(own, self.memory_state, self.packing)
            out = self.take(wire.buffers)
            mixed = yield from self.two_phase.talk(payloads, seed, self.sync.combine, self._swap_chunks, out)
        else:
            payload = self._pack(value, seed)
            own = self._noted(payload, value, seed, wire)
            mixed = yield from self._exchanged(payload, seed, round_, message, self.take(wire.buffers))
        yield from self.replan(survey)
        if self.memory is None:
            return mixed
        assert own is not None
        return self.memory.received(mixed, own, message, self.memory_state)

    def _noted(self, payload: Tensor, value: Tensor, seed: int, wire: _RoundWire) -> Tensor | None:
        """What receivers decode of this rank's message, if anybody needs it; the memory takes note of it.

        A memory that only adds it to one of its tensors gets it decoded there: no vector in between, and of a sparse
        message only the elements sent are touched. Then nobody looks at what is returned, and it is empty.
        """
        if self.memory is None and not wire.need_own:
            return None
        moved = self._moved()
        if moved is not None and not wire.need_own and all(piece.scale == 1.0 for piece in self.packing.pieces):
            self._unpack_add(payload, seed, *moved)
            return value.new_empty(0)
        wire.own = own = torch.zeros_like(value)
        self._unpack_add(payload, seed, own, 1.0)
        if self.memory is not None:
            self.memory.sent_packed(own, self.memory_state, self.packing)
        return own

    def _moved(self) -> tuple[Tensor, float] | None:
        """The memory's tensor that the own message is added to, and the factor, if that is all that becomes of it."""
        memory = self.memory
        if memory is None or memory.moved is None or type(memory).sent is not Memory.sent:
            return None
        name, factor = memory.moved
        return self.memory_state[name], factor

    def _plain_mean(self, message: Tensor) -> Talk[Tensor]:
        if self.world.size == 1:
            return message
        if self.world.weights is not None and self.world.rank not in self.world.weights:
            message.zero_()
        total = yield self.world.all_reduce(message, self.label)
        self._check_sum(total)
        return total.mul_(1.0 / len(self.world.present))

    def _summed(self, value: Tensor, seed: int, wire: _RoundWire) -> Talk[tuple[Tensor, Tensor]]:
        moved = self._moved()
        if self.compressor.layerwise and not isinstance(self.sync.apply, Blocking):
            value = value.clone()  # the codec looks at it again when a memory may have loaded the next message into it
            moved = None
        out = self.take(wire.buffers) if self.compressor.layerwise else None
        rounds = self.packing.rounds(value, self.codec_state, seed, len(self.world.present), out, moved)
        try:
            part = next(rounds)
            while True:
                if self.world.size > 1:
                    part = yield self.world.all_reduce(part, self.label)
                    self._check_sum(part)
                part = rounds.send(part)
        except StopIteration as stop:
            own, mean = stop.value
        if self.memory is not None and moved is None:
            self.memory.sent_packed(own, self.memory_state, self.packing)
        return own, mean

    def _exchanged(self, payload: Tensor | None, seed: int, round_: int, message: Tensor, out: Tensor) -> Talk[Tensor]:
        world, peers = self.world, self.sync.peers
        if world.size == 1:
            assert payload is not None
            got: dict[int, Tensor] = {0: payload}
        elif payload is not None and self.transport == "all_gather":
            step = world.step
            whole = sealed(payload, self._stamp(step, world.rank)) if self.checksum else payload
            rows = yield world.all_gather(whole, self.label)
            got = self._opened(dict(enumerate(rows)), step)
            self._check(got, dict.fromkeys(got, self.packing), step)
        else:
            heard = self._open(peers.neighbors(world.size, world.rank, round_))
            receive = dict.fromkeys(heard, self.message_bytes)
            if payload is None:  # takes no part in this round
                got = yield from self.swap({}, receive)
            else:
                send = dict.fromkeys(self._open(peers.receivers(world.size, world.rank, round_)), payload)
                got = yield from self.swap(send, receive)
            self._check(got, dict.fromkeys(got, self.packing), world.step)
            if payload is not None:
                got[world.rank] = payload
        weights = world.weights or peers.row(world.size, world.rank, round_)
        if self.linked:
            self.world.ledger.skip(self.label, len(weights.keys() - {world.rank}) - len(receive))
            weights = _absorbed(weights, got, world.rank)
        if isinstance(self.compressor, Identity) and self.memory is None and self.sync.combine.linear:
            return _weighted(got, weights, out)
        messages = [
            (weights[j], partial(self._decode_scaled, got[j], seed, message)) for j in sorted(got) if j in weights
        ]
        self.sync.combine(messages, out.zero_())
        return out

    def _open(self, ranks: list[int]) -> list[int]:
        """Those of the ranks whose links are neither lost nor resting; both ends of a link give the same answer."""
        links = self.world.links
        return ranks if links is None else links.open(ranks, self.world.step)

    def swap(self, send: Mapping[int, Tensor], receive: Mapping[int, int]) -> Talk[dict[int, Tensor]]:
        """Exchange bytes with neighbours, into buffers that the next exchange uses again."""
        step, boxes = self.world.step, {}
        if self.checksum:
            ends = {id(t): sealed(t, self._stamp(step, self.world.rank)) for t in send.values()}
            send = {j: ends[id(t)] for j, t in send.items()}
        for k, (j, nbytes) in enumerate(sorted(receive.items())):
            length = nbytes + self.seal
            if (k, length) not in self._boxes:
                self._boxes[k, length] = torch.empty(length, dtype=torch.uint8, device=self.lane.live.device)
            boxes[j] = self._boxes[k, length]
        lengths = {j: box.numel() for j, box in boxes.items()}
        got: Mapping[int, Tensor] = yield self.world.exchange(send, lengths, self.label, boxes)
        return self._opened(dict(got), step)

    # -------------------------------------------------------------- what came, and whether to believe it

    def _stamp(self, step: int, sender: int) -> int:
        """What goes into a checksum beside the message: of which channel, step and rank it is."""
        return key(self.seed, step, sender)

    def _opened(self, got: dict[int, Tensor], step: int) -> dict[int, Tensor]:
        """Messages by sender without their checksums.

        Raises:
            SyncError: one of them is not what its sender wrote.
        """
        if not self.checksum:
            return got
        whole = {j: is_whole(message, self._stamp(step, j)) for j, message in got.items()}
        damaged = [j for j, yes in whole.items() if not bool(yes)]
        if damaged:
            raise self._refused(damaged, step, "arrived damaged (checksum)")
        return {j: message[:-SEAL] for j, message in got.items()}

    def _check(self, got: Mapping[int, Tensor], packings: Mapping[int, Packing | None], step: int) -> None:
        """Look at what can be seen of messages without a checksum; ``None``: they are packed in no way.

        Raises:
            SyncError: one of them cannot be what its sender wrote, or holds a number that is not finite.
        """
        if isinstance(self.compressor, Identity):
            return
        for j, message in got.items():
            try:
                packing = packings[j]
                if packing is not None:
                    packing.check(message)
            except ValueError as error:
                raise self._refused([j], step, f"cannot be used ({error})") from error

    def _check_sum(self, total: Tensor) -> None:
        """Messages that are summed on the way have no checksum; a sum that is finite is what can be asked for.

        Raises:
            SyncError: it is not.
        """
        if self.checksum and not is_finite(total):
            raise SyncError(
                f"rank {self.world.rank}, step {self.world.step}, sync '{self.label}': the sum over all ranks is not finite; "
                "nothing of it was applied"
            )

    def _refused(self, senders: Sequence[int], step: int, why: str) -> SyncError:
        where = f"rank {self.world.rank}, step {step}, sync '{self.label}'"
        ranks = ", ".join(map(str, senders))
        return SyncError(f"{where}: the message of rank(s) {ranks} {why}; nothing of it was applied")

    def keep(self) -> None:
        """Remember what the codec, its memory and the combine hold, for :meth:`undo`."""
        for kind, state in self._states().items():
            kept = self._kept.setdefault(kind, {})
            for name in kept.keys() - state.keys():
                del kept[name]
            for name, tensor in state.items():
                if name in kept and kept[name].shape == tensor.shape:
                    kept[name].copy_(tensor)
                else:
                    kept[name] = tensor.clone()

    def undo(self) -> None:
        """Put back what :meth:`keep` saw, every bit of it; without that, nothing."""
        for kind, kept in self._kept.items():
            state = self._states()[kind]
            for name in state.keys() - kept.keys():
                del state[name]
            for name, tensor in kept.items():
                if state[name].shape == tensor.shape:
                    state[name].copy_(tensor)
                else:
                    state[name] = tensor.clone()

    def _states(self) -> dict[str, dict[str, Tensor]]:
        kinds = {"memory": self.memory_state, "codec": self.codec_state, "combine": self.combine_state}
        return kinds | ({"relay": self.two_phase.state} if self.transport == "two_phase" else {})

    def _swap_chunks(
        self, send: Mapping[int, Tensor], receive: Mapping[int, int], packings: Mapping[int, Packing | None]
    ) -> Talk[dict[int, Tensor]]:
        step = self.world.step
        got = yield from self.swap(send, receive)
        self._check(got, packings, step)
        return got

    def _mixed_by_edge(self, message: Tensor, seed: int, round_: int, exchange: int) -> Talk[Tensor]:
        """:class:`Difference` over a changing graph: a public copy for every neighbour, brought up to date when they meet.

        ``x + gamma (sum_j W[i, j] xh_{j -> i} - sum_k W[k, i] xh_{i -> k})`` keeps the mean for every doubly stochastic ``W``.
        Where links may fail or rest ``W[i, k]`` stands for ``W[k, i]``, which keeps it for every reversible ``W``, and the
        sums are over the messages that came.
        """
        world, peers, memory = self.world, self.sync.peers, self.memory
        assert isinstance(memory, Difference)
        n, rank = world.size, world.rank
        to, heard = self._open(peers.receivers(n, rank, round_)), self._open(peers.neighbors(n, rank, round_))
        survey = self.survey([message - self._copy_of("to", k, message) for k in to], round_ - exchange, exchange, seed)
        send = {}
        for k in to:
            mine = self._copy_of("to", k, message)
            send[k] = self._pack(message - mine, seed)
            self._unpack_add(send[k], seed, mine, 1.0)
        got = yield from self.swap(send, dict.fromkeys(heard, self.message_bytes))
        self._check(got, dict.fromkeys(got, self.packing), world.step)
        weights, gamma = peers.row(n, rank, round_), memory.gamma
        if self.linked:
            world.ledger.skip(self.label, len(weights.keys() - {rank}) - len(heard))
            to = heard = sorted(got)
        for j in heard:
            theirs = self._copy_of("from", j, message)
            self._unpack_add(got[j], seed, theirs, 1.0)
            message.add_(theirs, alpha=gamma * weights[j])
        for k in to:
            weight = weights[k] if self.linked else peers.row(n, k, round_)[rank]
            message.sub_(self._copy_of("to", k, message), alpha=gamma * weight)
        yield from self.replan(survey)
        return message

    def _copy_of(self, way: str, rank: int, like: Tensor) -> Tensor:
        name = f"{way}.{rank}"
        if name not in self.memory_state:
            self.memory_state[name] = torch.zeros_like(like)
        return self.memory_state[name]

    def _decode_scaled(self, payload: Tensor, seed: int, message: Tensor, out: Tensor, weight: float) -> None:
        if self.memory is None or not self.memory.relative:
            self._unpack_add(payload, seed, out, weight)
            return
        decoded = torch.zeros_like(out)
        self._unpack_add(payload, seed, decoded, 1.0)
        out.add_(self.memory.localise(decoded, message), alpha=weight)

    def _pack(self, value: Tensor, seed: int) -> Tensor:
        if isinstance(self.compressor, Identity):
            return (value if self.memory is None else value.clone()).view(
                torch.uint8
            )  # memories change it before it left
        return self.packing.encode(value, seed, key(seed, self.world.rank))

    def _unpack_add(self, payload: Tensor, seed: int, out: Tensor, weight: float) -> None:
        if isinstance(self.compressor, Identity):
            out.add_(payload.view(out.dtype), alpha=weight)
        else:
            self.packing.decode_add(payload, out, weight, seed)

    @property
    def message_bytes(self) -> int:
        """Length of the next encoded message."""
        if isinstance(self.compressor, Identity):
            return self.lane.numel * self.lane.message_dtype.itemsize
        return self.packing.nbytes

    def renew(self) -> None:
        """Forget what the codec and its memory remember; all ranks do so at once."""
        self.codec_state.clear()
        if self.by_edge:
            self.memory_state.clear()
        for tensor in self.memory_state.values():
            tensor.zero_()

    def tensors(self) -> dict[str, Tensor]:
        """The state of the codec, its memory and the combine, for a checkpoint."""
        kinds = self._states()
        if self.allocation is not None:
            kinds["budget"] = {"choice": self.allocation.tensor()}
        return {f"{kind}.{k}": t for kind, state in kinds.items() for k, t in state.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Continue from saved state.

        Raises:
            ValueError: it is of a run in which links could fail or rest, or the other way round.
        """
        for name, saved in tensors.items():
            kind, _, k = name.partition(".")
            if kind == "memory" and isinstance(self.memory, Difference) and self.by_edge == (k in self.memory.keys):
                raise ValueError(
                    f"sync '{self.label}': the checkpoint's copies of neighbours are from a run with another on_lost_peer or "
                    "patience; resume with the same"
                )
            if kind == "budget" and self.allocation is not None:
                self.allocation.load(saved)
                self.packing = self.packing.repacked(self._parts())
            elif kind == "codec" or self.by_edge:  # these come into being with the first messages
                state = self.codec_state if kind == "codec" else self.memory_state
                state[k] = saved.to(self.lane.live.device, copy=True)
            else:
                states = {"memory": self.memory_state, "combine": self.combine_state, "relay": self.two_phase.state}
                states[kind][k].copy_(saved)


def is_finite(value: Tensor) -> bool:
    """Whether all elements are finite numbers. One pass: a sum is not finite if an element is not; if it is too large, another."""
    return bool(value.sum().isfinite()) or bool(value.isfinite().all())


class _RoundWire:
    """A combine's view of the channel during one round; see :class:`~lightning_dopt.combine.Wire`."""

    def __init__(self, channel: Channel, step: int, round_: int, need_own: bool) -> None:
        self.size, self.rank, self.peers = channel.world.size, channel.world.rank, channel.sync.peers
        self.step, self.round, self.need_own = step, round_, need_own
        self.own: Tensor | None = None
        self.buffers: list[Tensor] = []
        self._channel = channel

    def mix(self, value: Tensor, exchange: int = 0) -> Talk[Tensor]:
        return (yield from self._channel.mix(value, self, exchange))

    def swap(self, send: Mapping[int, Tensor], receive: Mapping[int, int]) -> Talk[dict[int, Tensor]]:
        if self.size == 1:
            return {}
        return (yield from self._channel.swap(send, receive))


def _absorbed(weights: Mapping[int, float], got: Mapping[int, Tensor], rank: int) -> dict[int, float]:
    """The weights of a row once those of the messages that did not come are given to the own one."""
    left = {j: weight for j, weight in weights.items() if j in got}
    missing = sum(weight for j, weight in weights.items() if j not in got)
    return {**left, rank: left.get(rank, 0.0) + missing} if missing else left


def _weighted(got: Mapping[int, Tensor], weights: Mapping[int, float], out: Tensor) -> Tensor:
    """The weighted sum of exact messages, in ascending order of rank, without a pass to clear ``out`` first."""
    first, *others = [j for j in sorted(got) if j in weights]
    torch.mul(got[first].view(out.dtype), weights[first], out=out)
    for j in others:
        out.add_(got[j].view(out.dtype), alpha=weights[j])
    return out


__all__ = ["Channel", "Flight", "Memory"]
