"""A sync at work: its lanes, their anchors, outer optimizers, memories and messages in flight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_dopt.apply import Blocking, OneRound
from lightning_dopt.comm.world import SyncError, Talk
from lightning_dopt.compress import Identity
from lightning_dopt.compress.memory import Memory
from lightning_dopt.exchange import Channel
from lightning_dopt.flight import Flight
from lightning_dopt.local.base import BoundCorrection
from lightning_dopt.packed import Packed
from lightning_dopt.plan import Sync
from lightning_dopt.schedules import Every
from lightning_dopt.slots import Lane

_HOST = torch.device("cpu")


class LaneRunner:
    """One lane of one sync: its anchor, outer optimizer, codec memory and the message in flight.

    With ``offload`` anchor and outer optimizer live in the memory of the host, pinned if the lane is on a CUDA device. They are
    read when a message is formed and moved when a result has come.

    Args:
        sync: What to do.
        lane: With what.
        channel: Its wire.
        corrections: Those of the plan.
        lr: The learning rate of a parameter by name, for memories in units of steps.
        offload: Whether anchor and outer optimizer live in the memory of the host.
    """

    def __init__(
        self,
        sync: Sync,
        lane: Lane,
        channel: Channel,
        corrections: list[BoundCorrection],
        lr: Callable[[str], float] | None = None,
        offload: bool = False,
    ) -> None:
        self.sync, self.lane, self.channel, self.offload = sync, lane, channel, offload
        self.corrections = [c for c in corrections if sync.what.slot in c.slots]
        inside = isinstance(sync.codec, Memory) and sync.codec.lr_inside
        self.lr = lr if inside else None
        self.anchor: Tensor | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.flights: list[Flight] = []
        self.last_step = 0
        self._at_rest = sync.apply == Blocking() or sync.apply == Blocking(order="cta")
        self.pull = sync.outer.pull if sync.outer is not None and sync.signal == "value" else 1.0
        if sync.signal == "delta" or sync.outer is not None:
            self.anchor = lane.live.detach().to(_HOST if offload else None, lane.message_dtype, copy=True)
            if lane.live.is_cuda and offload:
                self.anchor = self.anchor.pin_memory()
        if sync.outer is not None:
            assert self.anchor is not None
            self._anchors = lane.views(self.anchor)
            self.optimizer = sync.outer.build(self._anchors)

    @property
    def _in_place(self) -> bool:
        """Whether the live buffer itself may travel: it is at rest, and nobody needs its old value."""
        sync, same_dtype = self.sync, self.lane.live.dtype == self.lane.message_dtype
        plain = isinstance(sync.codec, Identity) and sync.combine.in_place and self._at_rest
        if self.channel.checksum and self.channel.sums:  # a sum that is refused must not have replaced it
            return False
        return sync.signal == "value" and same_dtype and plain and self.anchor is None and not self.corrections

    def send(self, step: int, round_: int) -> None:
        """The send half: snapshot, encode, start the transfer."""
        live, channel = self.lane.live, self.channel
        buffers: list[Tensor] = []
        if self.sync.signal == "delta":
            assert self.anchor is not None
            message = channel.take(buffers)
            if self.offload:
                message.copy_(self.anchor, non_blocking=True).sub_(live)
            else:
                torch.sub(self.anchor, live, out=message)
        elif self._in_place:
            message = live
        else:
            message = channel.take(buffers).copy_(live)
            if self.pull != 1.0 and self.anchor is not None:
                message.add_(self._reference(self.anchor), alpha=self.pull - 1.0)
        sent = None
        if self.sync.apply.merge.needs_sent or self.corrections:
            same = live.dtype == self.lane.message_dtype
            sent = channel.take(buffers).copy_(live) if same else live.clone()
        peers, world = self.sync.peers, channel.world
        for correction in self.corrections:
            speaks, share = peers.speaks(world.size, world.rank, round_), peers.share(world.size, round_)
            correction.on_round(self.sync.what.slot, self.lane, speaks, share)
            correction.publish(self.sync.what.slot, self.lane, message)
        if self.lr is not None:
            for field, view in zip(self.lane.fields, self.lane.views(message), strict=True):
                view.mul_(self.lr(field.name))
        if channel.checksum:
            channel.keep()
        need_own = isinstance(self.sync.apply, OneRound) and self.sync.apply.inflight != 0.0
        need_own = need_own or any(correction.needs_own for correction in self.corrections)
        flight = channel.launch(message, step, round_, need_own)
        flight.sent = sent
        flight.buffers += buffers
        self.flights.append(flight)

    def apply(self, step: int) -> Talk[None]:
        """The apply half: wait, move the reference, merge into the live tensor."""
        if isinstance(self.sync.apply, OneRound):
            flight, result = self.flights[-1], (yield from self._corrected())
        else:
            flight = self.flights.pop(0)
            result = yield from flight.finish()
            self._prepare(result, flight)
        new = self._move_reference(result)
        merge = self.sync.apply.merge
        keep = flight.sent is not None and merge.needs_sent and bool(self.corrections)  # they look at it, too
        merge(self.lane.live, new, flight.sent.clone() if keep and flight.sent is not None else flight.sent)
        for correction in self.corrections:
            assert flight.sent is not None
            correction.on_applied(self.sync.what.slot, self.lane, flight.sent, new, step - self.last_step)
        self.last_step = step
        if not isinstance(self.sync.apply, OneRound):  # there the flight goes on
            self.channel.give_back(flight)

    def _prepare(self, result: Tensor, flight: Flight) -> None:
        """Before anybody uses a result: corrections change it, and steps become gradients again."""
        for correction in self.corrections:
            if correction.needs_own:
                correction.on_received(self.sync.what.slot, self.lane, flight.own, result)
        if self.lr is not None:
            for field, view in zip(self.lane.fields, self.lane.views(result), strict=True):
                rate = self.lr(field.name)
                view.mul_(1.0 / rate if rate > 0 else 0.0)

    def _corrected(self) -> Talk[Tensor]:
        """The fresh message's in-flight share plus what the previous round brought, without the share used then."""
        assert isinstance(self.sync.apply, OneRound)
        share = self.sync.apply.share(self.channel.world.size)
        fresh = self.flights[-1]
        result = torch.zeros(self.lane.numel, dtype=self.lane.message_dtype, device=self.lane.live.device)
        if len(self.flights) == 2:
            old = self.flights.pop(0)
            result.add_((yield from old.finish()))
            if share:
                assert old.own is not None
                result.sub_(old.own, alpha=share)
        if share:
            assert fresh.own is not None
            result.add_(fresh.own, alpha=share)
        return result

    def _reference(self, anchor: Tensor) -> Tensor:
        """The anchor where the live tensors are."""
        return anchor.to(self.lane.live.device) if self.offload else anchor

    def _move_reference(self, result: Tensor) -> Tensor:
        if self.anchor is None:
            return result
        if self.offload:
            result = result.to(_HOST)
        if self.sync.signal == "delta":
            direction = result
        else:
            direction = (self.anchor if self.pull == 1.0 else self.pull * self.anchor) - result
        if self.optimizer is None:
            self.anchor.sub_(direction)
        else:
            for anchor, gradient in zip(self._anchors, self.lane.views(direction), strict=True):
                anchor.grad = gradient
            self.optimizer.step()
            for anchor in self._anchors:
                anchor.grad = None
        return self._reference(self.anchor)

    def drain(self) -> Talk[None]:
        """After the last step: apply what is still in flight; local progress made since then is kept on top."""
        while self.flights:
            if not isinstance(self.sync.apply, OneRound):
                yield from self.apply(self.last_step)
                continue
            flight = self.flights.pop(0)
            result = (yield from flight.finish()).clone()
            share = self.sync.apply.share(self.channel.world.size)
            if share:
                assert flight.own is not None
                result.sub_(flight.own, alpha=share)
            assert self.anchor is not None
            before = self._reference(self.anchor).clone()
            moved = self._move_reference(result) - before
            self.lane.live.add_(moved.to(self.lane.live.dtype))

    def due(self, step: int) -> bool:
        """Whether the oldest message in flight must be applied at ``step``, apart from any new send."""
        if isinstance(self.sync.apply, OneRound):  # its apply half belongs to the next send
            return False
        return bool(self.flights) and step >= self.flights[0].step + self.sync.apply.delay

    def _hops_by(self, flight: Flight, step: int) -> int:
        """How many of its waits a flight is to have behind it at ``step``: they are spread evenly over its time.

        Which step is known from the plan alone, so that all ranks start all messages in the same order.
        """
        apply, when = self.sync.apply, self.sync.when
        late = isinstance(apply, OneRound)
        span = when.n if late and isinstance(when, Every) else 0 if late else apply.delay
        return min(flight.hops - 1, (step - flight.step) * flight.hops // span) if span else 0

    def hop_due(self, step: int) -> bool:
        """Whether a message in flight has more than one wait, and one before its last belongs to ``step``."""
        return any(flight.done < self._hops_by(flight, step) for flight in self.flights if not flight.landed)

    def advance(self, step: int) -> Talk[None]:
        """Send what follows from messages that should have come by now, so that it travels while training goes on."""
        for flight in self.flights:
            while not flight.landed and flight.done < self._hops_by(flight, step):
                yield from flight.advance()

    def land(self) -> Talk[None]:
        """Wait for everything in flight, without applying it."""
        for flight in self.flights:
            yield from flight.finish()

    def abandon(self) -> None:
        """Drop what has landed and is not applied; the codec's memory is as before it was sent."""
        if not self.flights:
            return
        for flight in self.flights:
            self.channel.give_back(flight)
        self.flights = []
        self.channel.undo()

    @property
    def coming(self) -> list[Flight]:
        """The flights that the next :meth:`apply` waits for."""
        late = isinstance(self.sync.apply, OneRound)
        return self.flights[:1] if not late or len(self.flights) == 2 else []

    def renew(self) -> None:
        """Begin anew from what the lane holds now: anchor, outer optimizer, memories."""
        self.channel.renew()
        if self.anchor is not None:
            self.anchor.copy_(self.lane.live)
        if self.sync.outer is not None:
            self.optimizer = self.sync.outer.build(self._anchors)

    def state_dict(self) -> dict[str, Any]:
        """Everything of this lane that outlives a step (call :meth:`land` first)."""
        return {
            "anchor": self.anchor,
            "optimizer": self.optimizer.state_dict() if self.optimizer is not None else None,
            "channel": self.channel.tensors(),
            "flights": [f.state_dict() for f in self.flights],
            "last_step": self.last_step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from saved state."""
        if self.anchor is not None:
            self.anchor.copy_(state["anchor"])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        self.channel.load(state["channel"])
        self.flights = [Flight.from_state_dict(f) for f in state["flights"]]
        self.last_step = int(state["last_step"])


class SyncRunner:
    """One sync at work: its lanes and the number of rounds it has sent."""

    def __init__(self, sync: Sync, label: str, lanes: list[LaneRunner]) -> None:
        self.sync, self.label, self.lanes = sync, label, lanes
        self.rounds = 0
        self.packed: list[Packed] = []
        """Where the lanes hold chosen elements of others: the way there and back."""

    def send(self, step: int) -> None:
        """Start one round on every lane."""
        for packed in self.packed:
            packed.gather()
        for lane in self.lanes:
            lane.send(step, self.rounds)
        self.rounds += 1

    def apply(self, step: int) -> Talk[None]:
        """Apply the oldest round on every lane."""
        yield from self._arrive(self.lanes)
        for lane in self.lanes:
            yield from lane.apply(step)
        for packed in self.packed:
            packed.scatter()

    @property
    def message_bytes(self) -> int:
        """Length of the next messages of all lanes."""
        return sum(lane.channel.at(self.rounds).message_bytes for lane in self.lanes)

    def renew(self) -> None:
        """The lanes hold other elements from now on: what is remembered of the old ones is forgotten."""
        for packed in self.packed:
            packed.gather()
        for lane in self.lanes:
            lane.renew()

    def apply_due(self, step: int) -> Talk[None]:
        """Apply what is due."""
        due = [lane for lane in self.lanes if lane.due(step)]
        for lane in self.lanes:
            if lane not in due:
                yield from lane.advance(step)
        yield from self._arrive(due)
        for lane in due:
            yield from lane.apply(step)

    def _arrive(self, lanes: list[LaneRunner]) -> Talk[None]:
        """With checksums: no lane is touched before the messages of all are known to be whole.

        Raises:
            SyncError: one is not; memories are as before it was sent.
        """
        try:
            for flight in [f for lane in lanes if lane.channel.checksum for f in lane.coming]:
                yield from flight.finish()
        except SyncError:
            self._undo()
            raise

    def _undo(self) -> None:
        for lane in self.lanes:
            if lane.channel.checksum and lane.flights:
                lane.channel.undo()

    def land(self) -> Talk[None]:
        """Wait for everything in flight, without applying it."""
        try:
            for lane in self.lanes:
                yield from lane.land()
        except SyncError:
            self._undo()
            raise

    def state_dict(self) -> dict[str, Any]:
        """State of all lanes."""
        return {"label": self.label, "rounds": self.rounds, "lanes": [lane.state_dict() for lane in self.lanes]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from saved state."""
        self.rounds = int(state["rounds"])
        for lane, saved in zip(self.lanes, state["lanes"], strict=False):  # lanes of optimizer states come later
            lane.load_state_dict(saved)
