"""Forecast: bytes, memory and virtual time of a plan, worked out from shapes before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_dopt._checks import check_int
from lightning_dopt.apply import OneRound
from lightning_dopt.comm.ledger import Ledger, all_gather_bytes, all_reduce_bytes
from lightning_dopt.comm.link import Link, LinkClock, one_per_rank, slowest
from lightning_dopt.comm.world import Pending, Talk, World
from lightning_dopt.engine import Engine
from lightning_dopt.exchange import Channel
from lightning_dopt.flight import Flight
from lightning_dopt.local.base import BoundCorrection
from lightning_dopt.plan import Plan, Sync
from lightning_dopt.runners import LaneRunner, SyncRunner
from lightning_dopt.schedules import Drifted
from lightning_dopt.slots import FlatGradients, Lane
from lightning_dopt.topology.base import Topology
from lightning_dopt.transport import TwoPhase, busiest, may_relay, sums

T = TypeVar("T")
Shapes = Mapping[str, Sequence[int]]
_META = torch.device("meta")
_DONE = torch.empty(0)
_LONG_RUN = 1 << 62  # a round in which no compressor changes any more


@dataclass(frozen=True)
class Forecast:
    """What a run will cost, as :class:`~lightning_dopt.Simulation` would count it."""

    n: int
    """Number of workers."""
    steps: int
    """Optimizer steps; what is due at the end of training is counted, too."""
    ledgers: tuple[Ledger, ...]
    """Bytes and messages of every rank, per sync."""
    rounds: Mapping[str, int]
    """How often each sync is sent."""
    peak_step_bytes: int
    """The most payload bytes any rank sends in one optimizer step (or at the end)."""
    seconds: float
    """Virtual time until the last rank has finished."""
    stall_s: float
    """Virtual time that the rank which waits longest stands still."""
    replanned: Mapping[str, int]
    """Syncs whose codec has a budget, and after how many rounds it chooses anew: their bytes are those of the start."""
    memory: Mapping[str, int]
    """Bytes per worker beyond model, gradients and inner optimizer, by purpose."""
    transports: Mapping[str, Mapping[str, int]]
    """By sync, the transports its messages could take, the one they take first, and the payload bytes that the busiest rank
    would send for one exchange. Where parts of a sync take different ones, the first is that of most bytes."""
    reasons: Mapping[str, str]
    """By sync, why the first of :attr:`transports` is taken, for the largest message where it sends several (buckets, types)."""

    @property
    def bytes(self) -> list[int]:
        """Payload bytes that each rank sends in all."""
        return [ledger.bytes for ledger in self.ledgers]

    @property
    def bytes_per_step(self) -> float:
        """Payload bytes of the busiest rank, spread over all steps."""
        return max(self.bytes) / self.steps

    def sync_bytes(self, label: str) -> int:
        """Payload bytes of the busiest rank for one sync."""
        return max(ledger.entries[label].bytes if label in ledger.entries else 0 for ledger in self.ledgers)


def forecast(
    plan: Plan,
    n: int,
    parameters: Shapes,
    steps: int = 1000,
    link: Link | Sequence[Link] | None = None,
    step_seconds: float | Sequence[float] = 0.0,
    buffers: int = 0,
    dtype: torch.dtype = torch.float32,
    lr: Callable[[int], float] | None = None,
) -> Forecast:
    """What ``steps`` optimizer steps of a plan will cost, end of training included.

    The engine itself runs, over tensors that have a shape and no content, so the order of messages, their sizes and the
    waiting are those of a real run; only encoding, decoding and arithmetic are left out. Bytes and times equal those of
    :class:`~lightning_dopt.Simulation` exactly. Agreement flags of mixed precision and measurements of the consensus
    are no part of it. Messages of a budget are taken to stay as they start (:attr:`Forecast.replanned`). A schedule that
    measures (``Drifted``) is taken to sync whenever it may: the most it can cost.

    Args:
        plan: What to do.
        n: Number of workers.
        parameters: Shape of each trainable parameter by name, in the order of the module.
        steps: Optimizer steps.
        link: Speed of the workers' links, one for all or one per rank; ``None`` means unlimited. ``Sync(transport="auto")`` takes
            what is faster over it, or over the slowest.
        step_seconds: Seconds that one inner step takes, one number or one per rank.
        buffers: Number of floating point elements in the module's buffers, if they are averaged.
        dtype: Type of the parameters.
        lr: Learning rate after so many completed steps, for schedules that read it (``QSR``); with ``None`` their rounds are
            as short as they get.

    Raises:
        ValueError: a plan that does not suit ``n``, parameters it does not find, or a number out of range.
    """
    check_int("forecast", "steps", steps, 1)
    check_int("forecast", "buffers", buffers, 0)
    check_int("forecast", "n", n, 1)
    each = [float(step_seconds)] if isinstance(step_seconds, (int, float)) else list(step_seconds)
    if len(each) not in (1, n) or min(each) < 0:
        raise ValueError(f"forecast(step_seconds={step_seconds!r}): must be one number of at least 0, or {n} of them")
    world = _AllRanks(n, link)
    named = {name: torch.empty(tuple(shape), dtype=dtype, device=_META) for name, shape in parameters.items()}
    engine = _SizedEngine(plan, named, world, {"buffers": torch.empty(buffers, device=_META)}, lr)
    memory, peak = engine.memory(), 0
    for _ in range(steps):
        before = [worker.ledger.bytes for worker in world.workers]
        world.run(engine.before_step())
        world.run(engine.perturb())
        world.compute(each)
        world.run(engine.on_gradients())
        world.run(engine.after_step())
        peak = max(peak, world.most_since(before))
    before = [worker.ledger.bytes for worker in world.workers]
    world.run(engine.finish())
    workers = world.workers if len(world.workers) == n else world.workers * n
    return Forecast(
        n=n,
        steps=steps,
        ledgers=tuple(worker.ledger for worker in workers),
        rounds=engine.rounds(),
        peak_step_bytes=max(peak, world.most_since(before)),
        seconds=max(worker.clock.now for worker in workers),
        stall_s=max(worker.clock.stall_s for worker in workers),
        replanned=engine.replanned(),
        memory=memory,
        transports=engine.transports(),
        reasons=engine.reasons(),
    )


def square_layers(count: int, width: int = 512) -> dict[str, tuple[int, ...]]:
    """Shapes that stand for a model of ``count`` parameters: as many square matrices as fit, then what is left.

    Raises:
        ValueError: ``count < 1`` or ``width < 1``.
    """
    check_int("square_layers", "count", count, 1)
    check_int("square_layers", "width", width, 1)
    matrices, rest = divmod(count, width * width)
    rows, single = divmod(rest, width)
    shapes: dict[str, tuple[int, ...]] = {f"layer{k}.weight": (width, width) for k in range(matrices)}
    if rows:
        shapes["head.weight"] = (rows, width)
    if single:
        shapes["head.bias"] = (single,)
    return shapes


# ---------------------------------------------------------------------- all ranks at once


@dataclass
class _Worker:
    clock: LinkClock
    ledger: Ledger = field(default_factory=Ledger)


class _Arrival(Pending):
    """One operation of all ranks: when each rank's transfer began, how long it lasts, whom each waits for."""

    def __init__(
        self, world: _AllRanks, label: str, began: list[float], seconds: list[float], sources: list[list[int]] | None
    ) -> None:
        self.world, self.label, self.began, self.seconds, self.sources = world, label, began, seconds, sources

    def wait(self) -> None:
        """See :meth:`Pending.wait`."""
        count = len(self.world.workers)
        began, seconds = (x if len(x) == count else x * count for x in (self.began, self.seconds))
        latest = max(began)
        longest = max(seconds)
        for i, worker in enumerate(self.world.workers):
            ends = None if self.sources is None else (i, *self.sources[i])
            ready = latest if ends is None else max(began[j] for j in ends)
            span = seconds[i]
            if not self.world.alike:
                span = longest if ends is None else max(seconds[j] for j in ends)
            worker.clock.wait(ready + span)


class _AllRanks(World):
    """A world that stands for all of its ranks: as one worker while all have done the same, as ``n`` from then on."""

    def __init__(self, size: int, link: Link | Sequence[Link] | None) -> None:
        super().__init__(0, size)
        known = one_per_rank("forecast", link, size)
        self._common = slowest(known) if known is not None else None
        self.alike = known is None or len(set(map(repr, known))) == 1
        self._links = [known[0] if known is not None else Link()] if self.alike or known is None else known
        self.workers = [_Worker(LinkClock(each)) for each in self._links]
        self._loads: dict[tuple[int, int], list[tuple[int, list[int]]]] = {}

    @property
    def link(self) -> Link | None:
        """See :attr:`World.link`; the slowest, as all must choose alike."""
        return self._common

    def _of(self, rank: int) -> Link:
        return self._links[0] if self.alike else self._links[rank]

    def compute(self, seconds: list[float]) -> None:
        """All ranks compute."""
        spans = self._spread(seconds)
        for worker, span in zip(self.workers, spans, strict=True):
            worker.clock.compute(span)

    def most_since(self, before: list[int]) -> int:
        """The most bytes any rank has sent beyond ``before``."""
        start = before if len(before) == len(self.workers) else before * len(self.workers)
        return max(worker.ledger.bytes - old for worker, old in zip(self.workers, start, strict=True))

    def _spread(self, values: list[T]) -> list[T]:
        """One value per worker; from the first time that values differ, every rank is a worker of its own."""
        if len(self.workers) == 1 and any(v != values[0] for v in values):
            self.workers = [deepcopy(self.workers[0]) for _ in range(self.size)]
        return values[:1] if len(self.workers) == 1 else (values if len(values) == self.size else values * self.size)

    def _start(
        self,
        label: str,
        sent: list[int],
        seconds: list[float],
        sources: list[list[int]] | None = None,
        overhead: bool = False,
    ) -> _Arrival:
        loads = self._spread(list(zip(sent, seconds, strict=True)))
        began = []
        for worker, (nbytes, span) in zip(self.workers, loads, strict=True):
            worker.ledger.sent(label, 0 if overhead else nbytes, nbytes if overhead else 0)
            began.append(worker.clock.post(span) - span)
        alone = len(self.workers) == 1
        return _Arrival(self, label, began, [span for _, span in loads], None if alone else sources)

    def all_reduce(self, tensor: Tensor, label: str, *, overhead: bool = False) -> Pending:
        """See :meth:`World.all_reduce`."""
        nbytes = tensor.nbytes
        seconds = [each.all_reduce(nbytes, self.size) for each in self._links]
        return self._start(label, [all_reduce_bytes(nbytes, self.size)] * len(seconds), seconds, overhead=overhead)

    def all_gather(self, payload: Tensor, label: str) -> Pending:
        """See :meth:`World.all_gather`."""
        nbytes = payload.nbytes
        seconds = [each.all_gather(nbytes, self.size) for each in self._links]
        return self._start(label, [all_gather_bytes(nbytes, self.size)] * len(seconds), seconds)

    def gossip(self, nbytes: int, peers: Topology, round_: int, label: str) -> Pending:
        """Every rank exchanges messages of ``nbytes`` with its neighbours of that round."""
        loads = self._degrees(peers, round_)
        sent = [nbytes * out for out, _ in loads]
        most = [max(s, nbytes * len(heard)) for s, (_, heard) in zip(sent, loads, strict=True)]
        seconds = [self._of(rank).exchange(each) for rank, each in enumerate(most)]
        return self._start(label, sent, seconds, [heard for _, heard in loads])

    def chunks(self, two_phase: TwoPhase, leg: int, label: str) -> Pending:
        """Every rank sends chunks to their owners, or as an owner its chunk to all."""
        ranks = range(self.size)
        sent = [two_phase.sent_bytes(j)[leg] for j in ranks]
        got = [two_phase.sent_bytes(j)[1 - leg] for j in ranks]
        filled = [j for j in ranks if two_phase.chunks[j].nbytes]
        sources = [[i for i in (ranks if leg == 0 and j in filled else filled if leg else []) if i != j] for j in ranks]
        seconds = [self._of(rank).exchange(max(pair)) for rank, pair in enumerate(zip(sent, got, strict=True))]
        return self._start(label, sent, seconds, sources)

    def _degrees(self, peers: Topology, round_: int) -> list[tuple[int, list[int]]]:
        """For each rank, how many hear it and whom it hears."""
        period = peers.period(self.size)
        key = (id(peers), round_ % period if period else -1)
        if period is None or key not in self._loads:
            self._loads[key] = [
                (len(peers.receivers(self.size, i, round_)), peers.neighbors(self.size, i, round_))
                for i in range(self.size)
            ]
        return self._loads[key]

    def all_reduce_max(self, tensor: Tensor, label: str) -> Pending:
        """No forecast needs it."""
        raise NotImplementedError

    def exchange(
        self,
        send: Mapping[int, Tensor],
        receive: Mapping[int, int],
        label: str,
        boxes: Mapping[int, Tensor] | None = None,
    ) -> Pending:
        """One rank's view of what :meth:`gossip` does for all."""
        raise NotImplementedError

    def run(self, talk: Talk[T]) -> T:
        """See :meth:`World.run`."""
        try:
            pending = next(talk)
            while True:
                pending = talk.send(pending.wait())
        except StopIteration as stop:
            return stop.value


# ---------------------------------------------------------------------- the engine without contents


class _SizedLane(LaneRunner):
    """A lane that sends messages of the right sizes and ignores what comes back."""

    def __init__(self, sync: Sync, lane: Lane, channel: Channel, corrections: list[BoundCorrection]) -> None:
        super().__init__(sync, lane, channel, corrections)
        world = channel.world
        assert isinstance(world, _AllRanks)
        self.world = world
        self._loads: dict[int, tuple[list[Tensor], Tensor]] = {}

    def _load(self, round_: int) -> tuple[list[Tensor], Tensor]:
        """What is summed in this round, and the message if nothing is."""
        channel = self.channel.at(round_)
        if id(channel) not in self._loads:
            sums = _summands(channel) if channel.sums and self.world.size > 1 else []
            payload = torch.empty(channel.message_bytes + channel.seal, dtype=torch.uint8, device=_META)
            self._loads[id(channel)] = sums, payload
        return self._loads[id(channel)]

    def _message(self, round_: int) -> Talk[Tensor]:
        peers, label = self.sync.peers, self.channel.label
        if self.world.size == 1:
            return _DONE
        exchanges = self.channel.exchanges
        channel, (sums, payload) = self.channel.at(round_), self._load(round_)
        survey = self._survey(round_)
        for exchange in range(round_ * exchanges, (round_ + 1) * exchanges):
            for part in sums:
                yield self.world.all_reduce(part, label)
            if channel.transport == "two_phase":
                yield self.world.chunks(channel.two_phase, 0, label)
                yield self.world.chunks(channel.two_phase, 1, label)
            elif channel.transport == "all_gather":
                yield self.world.all_gather(payload, label)
            elif channel.transport == "neighbors":
                yield self.world.gossip(payload.nbytes + self._beside(), peers, exchange, label)
            if survey is not None:
                yield survey
                survey = None
        return _DONE

    def _survey(self, round_: int) -> Pending | None:
        """The sum that a budget's next choice rests on; what it will choose nobody knows."""
        allocation = self.channel.allocation
        if allocation is None or not allocation.budget.due(round_):
            return None
        return self.world.all_reduce(torch.empty(allocation.entries, device=_META), self.channel.label)

    def _beside(self) -> int:
        """Bytes that the combine sends beside each message; where its weights stay one it sends none."""
        return self.sync.combine.extra_bytes if self.channel.combine_state else 0

    def send(self, step: int, round_: int) -> None:
        """See :meth:`LaneRunner.send`."""
        flight = Flight(self._message(round_), step)
        flight.hops = self.channel.at(round_).hops
        flight.start()
        self.flights.append(flight)

    def apply(self, step: int) -> Talk[None]:
        """See :meth:`LaneRunner.apply`."""
        if not isinstance(self.sync.apply, OneRound) or len(self.flights) == 2:
            yield from self.flights.pop(0).finish()

    def drain(self) -> Talk[None]:
        """See :meth:`LaneRunner.drain`."""
        while self.flights:
            yield from self.flights.pop(0).finish()

    def memory(self) -> dict[str, int]:
        """Bytes this lane keeps, by purpose."""
        channel = self.channel.at(_LONG_RUN)
        if channel.sums:
            _summands(channel)  # its warm starts
        used = {
            "anchors": _size(self.anchor),
            "outer optimizer": self._outer_state(),
            "codec memory": _size(self.channel.tensors()) + self._copies_by_edge(),
        }
        copies = 0 if self._in_place else 1  # the message itself
        copies += self.sync.apply.merge.needs_sent or bool(self.corrections)
        copies += isinstance(self.sync.apply, OneRound) and self.sync.apply.inflight != 0.0
        flights = 2 if isinstance(self.sync.apply, OneRound) else 1
        used["in flight"] = flights * copies * self.lane.numel * self.lane.message_dtype.itemsize
        return used

    def transports(self) -> dict[str, int]:
        """Bytes of one exchange by transport, that of this lane first."""
        channel, n = self.channel.at(0), self.world.size
        if channel.transport == "neighbors":
            peers = self.sync.peers
            heard = max(len(peers.receivers(n, j, k)) for j in range(n) for k in range(peers.period(n) or 1))
            return {"neighbors": heard * (channel.message_bytes + channel.seal + self._beside())}
        found = busiest(channel.two_phase, channel.message_bytes + channel.seal)
        if not may_relay(self.sync.codec):
            del found["two_phase"]
        if sums(self.sync.codec, self.sync.combine):
            found["all_reduce"] = sum(all_reduce_bytes(part.nbytes, n) for part in _summands(channel)) if n > 1 else 0
        return {channel.transport: found.pop(channel.transport)} | found

    def _copies_by_edge(self) -> int:
        """Public copies over a changing graph: two for every rank that the busiest rank ever meets."""
        if not self.channel.by_edge:
            return 0
        n, peers = self.world.size, self.sync.peers
        period = peers.period(n)
        meets = [n - 1] * 2 if period is None else [0, 0]
        for rank in range(n if period is not None else 0):
            for k, met in enumerate((peers.receivers, peers.neighbors)):
                ranks = {j for t in range(period or 0) for j in met(n, rank, t)}
                meets[k] = max(meets[k], len(ranks))
        return sum(meets) * self.lane.numel * self.lane.message_dtype.itemsize

    def _outer_state(self) -> int:
        if self.optimizer is None:
            return 0
        for anchor in self._anchors:
            anchor.grad = torch.empty_like(anchor)
        self.optimizer.step()
        return sum(_size(dict(state)) for state in self.optimizer.state.values())


class _NoCopy(FlatGradients):
    """Gradients without contents have nothing to be copied."""

    def gather(self) -> None:
        """See :meth:`FlatGradients.gather`."""

    def scatter(self) -> None:
        """See :meth:`FlatGradients.scatter`."""


class _SizedEngine(Engine):
    """The engine over tensors without contents."""

    def __init__(
        self,
        plan: Plan,
        parameters: dict[str, Tensor],
        world: _AllRanks,
        buffers: dict[str, Tensor],
        lr: Callable[[int], float] | None,
    ) -> None:
        super().__init__(
            plan,
            parameters,
            world,
            buffers,
            lambda _: lr(self.step) if lr is not None else math.inf,
            lambda name, _: torch.empty_like(parameters[name]),
        )
        self._bound, self.corrections = self.corrections, []  # they move no bytes
        self._copies = sum(sum(map(_size, copy.views)) for gradient in self.gradients[0] for copy in gradient.copies)
        for gradient in self.gradients[0]:
            gradient.copies = [_NoCopy(self.parameters, copy.lane) for copy in gradient.copies]

    def _runner(self, index: int, sync: Sync, label: str, lanes: list[Lane]) -> SyncRunner:
        runner = super()._runner(index, sync, label, lanes)
        runner.lanes = [_SizedLane(sync, lane.lane, lane.channel, lane.corrections) for lane in runner.lanes]
        return runner

    def _refused(self, group: int, flags: Tensor) -> bool:
        """All gradients are taken to be finite."""
        return False

    def _compare(self, step: int) -> Talk[None]:
        """Parameters without contents have no digest; only its size matters."""
        label = next(g.runner.label for runners in self.gradients for g in runners)
        yield self.world.all_reduce(torch.empty(self.world.size, 4, device=_META), label, overhead=True)

    def _measure(self, step: int) -> Talk[None]:
        """Nothing is known of distances: every schedule that measures is taken to find replicas apart."""
        for runner in self.runners:
            if isinstance(runner.sync.when, Drifted) and runner.sync.when.due(step):
                self._far[repr(runner.sync.when)] = True
        return
        yield

    def transports(self) -> dict[str, dict[str, int]]:
        """Bytes of one exchange by sync and transport, the one taken first."""
        found: dict[str, dict[str, int]] = {}
        for runner in self._all_runners():
            each = [lane.transports() for lane in runner.lanes if isinstance(lane, _SizedLane)]
            each.sort(key=lambda ways: -next(iter(ways.values())))
            found[runner.label] = {way: sum(ways[way] for ways in each) for way in each[0]} if each else {}
        return found

    def reasons(self) -> dict[str, str]:
        """Why the first of :meth:`transports` is taken, by sync."""
        found = {}
        for runner in self._all_runners():
            lanes = [lane for lane in runner.lanes if isinstance(lane, _SizedLane)]
            if lanes:
                most = max(lanes, key=lambda lane: next(iter(lane.transports().values())))
                found[runner.label] = most.channel.at(0).reason
        return found

    def rounds(self) -> dict[str, int]:
        """Rounds sent by label."""
        return {runner.label: runner.rounds for runner in self._all_runners()}

    def replanned(self) -> dict[str, int]:
        """Periods of budgets by label."""
        channels = [lane.channel for runner in self._all_runners() for lane in runner.lanes]
        return {c.label: c.allocation.budget.every for c in channels if c.allocation is not None}

    def _trackers(self) -> int:
        """What corrections put messages into; some keep their state there."""
        kept = {id(t) for correction in self._bound for t in correction.state().values()}
        lanes = [
            lane.lane
            for runner in self._all_runners()
            if runner.sync.what.slot in ("tracker", "reference")
            for lane in runner.lanes
        ]
        return sum(_size(lane.live) for lane in lanes if id(lane.live) not in kept)

    def memory(self) -> dict[str, int]:
        """Bytes beyond model, gradients and inner optimizer."""
        used = {
            "gradient copy": self._copies,
            "corrections": sum(_size(c.state()) + sum(_size(t) for t in c.scratch()) for c in self._bound),
            "buffer message": _size(self.buffers.lane.live),
            "tracker copy": self._trackers(),
        }
        for lane in (lane for runner in self._all_runners() for lane in runner.lanes):
            assert isinstance(lane, _SizedLane)
            for purpose, nbytes in lane.memory().items():
                used[purpose] = used.get(purpose, 0) + nbytes
        early = [g.runner for g in self.gradients[0]] if self._undoes and not self._bound else []
        used["kept for undo"] = sum(
            sum(_size(state) for state in lane.channel._states().values())
            for runner in self._all_runners()
            for lane in runner.lanes
            if lane.channel.checksum or runner in early
        )
        return {purpose: nbytes for purpose, nbytes in used.items() if nbytes}


def _summands(channel: Channel) -> list[Tensor]:
    """What one message of a linear codec adds up over the ranks, in order; warm starts come into being with it."""
    value = torch.empty(channel.lane.numel, dtype=channel.lane.message_dtype, device=_META)
    rounds = channel.packing.rounds(value, channel.codec_state, 0, channel.world.size)
    parts = []
    try:
        part = next(rounds)
        while True:
            parts.append(part)
            part = rounds.send(part)
    except StopIteration:
        return parts


def _size(value: Any) -> int:
    """Bytes of a tensor, or of all tensors in a dictionary."""
    if isinstance(value, dict):
        return sum(_size(v) for v in value.values())
    return value.nbytes if isinstance(value, Tensor) else 0
