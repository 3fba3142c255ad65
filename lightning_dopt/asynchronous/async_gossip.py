"""Pairwise gossip beside a training loop of real processes, without waiting for each other's gradients."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dopt._checks import check_choice, check_float
from lightning_dopt.asynchronous.a2cid2 import Acid
from lightning_dopt.asynchronous.edges import Matchings
from lightning_dopt.asynchronous.pair_exchange import PairExchange
from lightning_dopt.asynchronous.pairwise import Averaging, PairRule, PairState
from lightning_dopt.comm.ledger import Ledger
from lightning_dopt.comm.world import SyncError
from lightning_dopt.slots import FlatTensors, Lane
from lightning_dopt.topology.base import Topology


class AsyncGossip:
    """AD-PSGD, or A2CiD2 with ``momentum="acid"``, for any optimizer and any loop::

        gossip.start()
        for batch in batches:
            loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            gossip.local_step()
        gossip.stop()

    A thread in the background meets one neighbour after the other; both ends add half of the difference between what
    they sent to what they have become. The optimizer's step ``u`` is added likewise, so that every change counts and the
    sum over the ranks changes by optimizer steps only (to rounding), whatever the order of events. Parameters change in
    :meth:`local_step` only: forward and backward see one consistent model, which may be some meetings old.

    Vectors are kept on the CPU in at least float32; with parameters elsewhere every step copies them there and back.
    Beside the parameters this takes four times their size (the vector, what was handed out, one message each way), five
    times with ``"acid"``.

    The fastest rank sets the pace: its gradients times ``rate`` decide how many meetings there are, and slower ranks
    answer from the background. Ranks that take more gradients pull harder (speed bias). In ``"acid"`` one meeting index
    is ``1 / rate`` units of time on a regular graph with perfect matchings: time passes by meetings, not by the wall
    clock, so that breaks for validation do not count.

    Creating the object is collective.

    Args:
        parameters: Names and tensors, in the same order on all ranks, or such tensors already in flat buffers.
        topology: Who may meet: undirected, connected, the same at all times.
        rate: Meetings per gradient, averaged over the ranks.
        seed: Seed of the order of meetings, shared by all ranks.
        timeout: How long a rank waits for progress before it gives up.
        momentum: ``"none"`` averages (AD-PSGD), ``"acid"`` adds a second vector that speeds up badly connected graphs
            (A2CiD2; not for ``Complete()``, where there is nothing to gain).
        max_ahead: How many meetings the training loop may be ahead of the background before it waits.
        ledger: Where to count bytes and waiting, under the label ``"pairs"``; ``None`` makes a new one.

    Raises:
        ValueError: an argument outside its range, or a graph that pairs cannot use.
        RuntimeError: ``torch.distributed`` is not initialized.

    Source: see :class:`~lightning_dopt.asynchronous.Averaging` and :class:`~lightning_dopt.asynchronous.Acid`.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor] | FlatTensors,
        topology: Topology,
        rate: float = 1.0,
        seed: int = 0,
        timeout: timedelta = timedelta(minutes=30),
        momentum: Literal["none", "acid"] = "none",
        max_ahead: int = 8,
        ledger: Ledger | None = None,
    ) -> None:
        if not dist.is_initialized():
            raise RuntimeError("AsyncGossip: call torch.distributed.init_process_group first")
        check_float("AsyncGossip", "rate", rate, 0.0, open_low=True)
        self.momentum = check_choice("AsyncGossip", "momentum", momentum, ("none", "acid"))
        n = dist.get_world_size()
        matchings = Matchings(topology, n, seed)
        self.rule: PairRule = Acid.of(topology, n, rate) if momentum == "acid" and n > 1 else Averaging()
        self._per_gradient = matchings.indexes_per_gradient(rate)
        self._exchange = PairExchange(matchings, self._take, self._give, timeout, max_ahead, ledger)
        self.timeout = timeout
        self.flat = parameters if isinstance(parameters, FlatTensors) else FlatTensors(parameters)
        self.steps = 0
        """Local steps taken."""
        self.staleness: Counter[int] = Counter()
        """How many local steps met how many meetings since the step before."""
        self._lock = threading.Lock()
        self._index = 0
        self._steps_at_start = 0
        self._started = False
        self._fresh = 0
        self._states: list[PairState] = []
        self._bases: list[Tensor] = []
        self._messages: list[Tensor] = []

    # ------------------------------------------------------------------ the loop

    def start(self) -> None:
        """Begin to meet, from rank 0's parameters at the first start and from each rank's own at later ones. Collective.

        Parameters changed since :meth:`stop` count as a new start of that rank: its momentum is reset.

        Raises:
            ValueError: some ranks have loaded a state and others have not, or they have unequal numbers of parameters.
            SyncError: a rank is lost or did not come in time.
        """
        size = sum(lane.numel for lane in self.flat.lanes)
        mine = torch.tensor([self._index, int(self._started), -int(self._started), size, -size])
        self._collective(lambda: dist.all_reduce(mine, dist.ReduceOp.MAX, group=self._exchange.group))
        index, any_started, all_started, largest, smallest = mine.tolist()
        if largest != -smallest:
            raise ValueError(f"AsyncGossip.start: ranks have between {-smallest} and {largest} parameters")
        if any_started != -all_started:
            raise ValueError("AsyncGossip.start: some ranks have loaded a state and others have not")
        self._prepare(index / self._per_gradient)
        self._index, self._steps_at_start, self._fresh = index, self.steps, 0
        self._exchange.start(index)

    @torch.no_grad()
    def _prepare(self, time: float) -> None:
        self.flat.reclaim()
        if not self._started:
            for lane in self.flat.lanes:
                start = lane.live.to("cpu", copy=True)
                self._collective(lambda start=start: dist.broadcast(start, 0, group=self._exchange.group))  # type: ignore[misc]
                lane.live.copy_(start)
            self._states = [self.rule.begin(_vector(lane), time) for lane in self.flat.lanes]
        self._started = True
        for k, lane in enumerate(self.flat.lanes):
            if self._bases and not torch.equal(self._bases[k], lane.live):
                self._states[k] = self.rule.begin(_vector(lane), time)
            self._states[k].time = time  # ranks stop at different indexes and go on at a common one
        self._bases = [lane.live.clone() for lane in self.flat.lanes]
        self._messages = [torch.empty_like(state.x) for state in self._states]

    @torch.no_grad()
    def local_step(self) -> None:
        """Take in what the optimizer has done to the parameters since the last call, and hand out the newest ones.

        Waits only if the background is more than ``max_ahead`` meetings behind.

        Raises:
            RuntimeError: called before :meth:`start`.
            SyncError: a rank is lost or did not answer in time; names it.
        """
        self._must_run("local_step")
        self._exchange.check()
        self.flat.reclaim()
        with self._lock:
            for lane, state, base in zip(self.flat.lanes, self._states, self._bases, strict=True):
                self.rule.displace(state, (lane.live.to(state.x.dtype) - base).to("cpu"))
                lane.live.copy_(state.x)
                base.copy_(lane.live)
            self.staleness[self._fresh] += 1
            self._fresh = 0
        self.steps += 1
        self._exchange.allow(self._index + int((self.steps - self._steps_at_start) * self._per_gradient))

    @torch.no_grad()
    def stop(self) -> None:
        """Hold the meetings that are still due, at all ranks, and leave this rank's newest vector in the parameters.

        All ranks must come here, each after as many steps as it likes. Replicas still differ: see :meth:`average`.

        Raises:
            RuntimeError: called before :meth:`start`.
            SyncError: a rank is lost or did not come in time; names it.
        """
        self._must_run("stop")
        self._index = self._exchange.stop()
        for lane, state, base in zip(self.flat.lanes, self._states, self._bases, strict=True):
            self.rule.drift(state, self._index / self._per_gradient)
            lane.live.copy_(state.x)
            base.copy_(lane.live)

    @torch.no_grad()
    def average(self) -> float:
        """Give all ranks the mean of all vectors and return the distance ``sqrt(mean_i ||x_i - mean||^2)`` before.

        Collective, between :meth:`stop` and :meth:`start`; the momentum of ``"acid"`` starts anew.

        Raises:
            RuntimeError: called while meetings are held, or before the first start.
            SyncError: a rank is lost or did not come in time.
        """
        self._must_rest("average")
        spread = torch.zeros(1, dtype=torch.float64)
        for k, (lane, state) in enumerate(zip(self.flat.lanes, self._states, strict=True)):
            mean = state.x.clone()
            self._collective(lambda mean=mean: dist.all_reduce(mean, group=self._exchange.group))  # type: ignore[misc]
            mean /= dist.get_world_size()
            spread += (state.x - mean).square().sum(dtype=torch.float64)
            self._states[k] = self.rule.begin(mean, state.time)
            lane.live.copy_(mean)
            self._bases[k].copy_(lane.live)
        self._collective(lambda: dist.all_reduce(spread, group=self._exchange.group))
        return float((spread / dist.get_world_size()).sqrt())

    def abort(self) -> None:
        """Give up because of a failure elsewhere: others get a :class:`SyncError`. Does not wait."""
        self._exchange.abort()

    def close(self) -> None:
        """Give the connections back, unless meetings are being held. Local; the object is of no use afterwards."""
        self._exchange.close()

    # ------------------------------------------------------------------ what the background calls

    @torch.no_grad()
    def _take(self, index: int) -> list[Tensor]:
        with self._lock:
            for state, message in zip(self._states, self._messages, strict=True):
                self.rule.drift(state, index / self._per_gradient)
                message.copy_(state.x)
        return self._messages

    @torch.no_grad()
    def _give(self, received: list[Tensor]) -> None:
        with self._lock:
            for state, sent, other in zip(self._states, self._messages, received, strict=True):
                self.rule.meet(state, sent.sub_(other))
            self._fresh += 1

    # ------------------------------------------------------------------ state

    @property
    def running(self) -> bool:
        """Whether meetings are being held: between :meth:`start` and :meth:`stop`."""
        return self._exchange.running

    @property
    def started(self) -> bool:
        """Whether there are vectors: after the first :meth:`start`, or a :meth:`load_state_dict`."""
        return self._started

    @property
    def meetings(self) -> int:
        """Meetings that this rank has held."""
        return self._exchange.meetings

    @property
    def ledger(self) -> Ledger:
        """Bytes sent and seconds waited, under the label ``"pairs"``."""
        return self._exchange.ledger

    def state_dict(self) -> dict[str, Any]:
        """This rank's vectors, counters and position in the list of meetings, between :meth:`stop` and :meth:`start`.

        Nothing is in flight then, so the saved states of all ranks fit together. Which meetings fall between which
        gradients afterwards is up to the clock again: a resumed run is not a repetition of an uninterrupted one.

        Raises:
            RuntimeError: called while meetings are held, or before the first start.
        """
        self._must_rest("state_dict")
        out: dict[str, Any] = {"steps": self.steps, "index": self._index, "momentum": self.momentum}
        out["x"] = self._named([s.x for s in self._states])
        out["xt"] = self._named([s.xt for s in self._states if s.xt is not None])
        return out

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave on this rank, and put it into the parameters; before :meth:`start`.

        Raises:
            RuntimeError: called while meetings are held.
            ValueError: the state has another momentum or other parameters.
        """
        if self.running:
            raise RuntimeError("AsyncGossip.load_state_dict: call stop() first")
        if state["momentum"] != self.momentum:
            raise ValueError(f"AsyncGossip(momentum={self.momentum!r}): the state was saved with {state['momentum']!r}")
        if set(state["x"]) != set(self.flat.tensors):
            raise ValueError("AsyncGossip.load_state_dict: the state holds other parameters")
        self.steps, self._index = int(state["steps"]), int(state["index"])
        time = self._index / self._per_gradient
        self._states = [self.rule.begin(_gathered(lane, state["x"]), time) for lane in self.flat.lanes]
        for lane, own in zip(self.flat.lanes, self._states, strict=True):
            if own.xt is not None:
                own.xt.copy_(_gathered(lane, state["xt"]))
            lane.live.copy_(own.x)
        self._bases = [lane.live.clone() for lane in self.flat.lanes]
        self._started = True

    def _named(self, vectors: list[Tensor]) -> dict[str, Tensor]:
        pairs = zip(self.flat.lanes, vectors, strict=False)  # no vectors: nothing
        return {f.name: f.of(vector).clone() for lane, vector in pairs for f in lane.fields}

    def _must_run(self, name: str) -> None:
        if not self.running:
            raise RuntimeError(f"AsyncGossip.{name}: call start() first")

    def _must_rest(self, name: str) -> None:
        if self.running or not self._started:
            raise RuntimeError(f"AsyncGossip.{name}: call stop() first (and start() before that)")

    def _collective(self, call: Callable[[], Any]) -> None:
        """Run a collective with this object's timeout: the group's own must never fire."""
        self._exchange.check()
        errors: list[Exception] = []
        done = threading.Event()

        def run() -> None:
            try:
                call()
            except (RuntimeError, dist.DistError) as error:
                errors.append(error)
            done.set()

        threading.Thread(target=run, name="collective", daemon=True).start()
        seconds = self.timeout.total_seconds()
        if not done.wait(seconds):
            raise SyncError(f"rank {self._exchange.rank}: not all ranks came within {seconds:g} s")
        if errors:
            raise SyncError(f"rank {self._exchange.rank}: lost some rank ({errors[0]})") from errors[0]


def _vector(lane: Lane) -> Tensor:
    return lane.live.to("cpu", lane.message_dtype, copy=True)


def _gathered(lane: Lane, tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensors[f.name].to("cpu", lane.message_dtype).flatten() for f in lane.fields])
