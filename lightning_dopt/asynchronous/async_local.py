"""Local updates with a hub between real processes: nobody waits for a slower worker unless the hub's rule says so."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dopt._checks import check_int
from lightning_dopt._random import key
from lightning_dopt.asynchronous.hub import Hub, Push, check_hub
from lightning_dopt.asynchronous.hub_desk import Answer, HubDesk
from lightning_dopt.asynchronous.hub_messages import Pack
from lightning_dopt.asynchronous.hub_rules import HubRule
from lightning_dopt.comm.ledger import Ledger
from lightning_dopt.comm.process_group import said
from lightning_dopt.comm.world import SyncError
from lightning_dopt.compress.base import Codec
from lightning_dopt.pace import LocalSteps
from lightning_dopt.slots import FlatTensors

HUB = 0
"""The rank that is the hub, beside its own training."""

_HEADER, _BODY = 1, 2
_PUSH, _LAST, _LOST = range(3)
_NEVER = timedelta(days=365)  # a hub may wait long for a worker's next push; who waits for the hub has a limit


class AsyncLocal:
    """Workers take local steps at their own speed, push to a hub, and go on from its newest reference::

        local = AsyncLocal(dict(model.named_parameters()), delayed_nesterov(n), LocalSteps(50, dynamic=True))
        local.start()
        for batch in batches:
            loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            local.local_step()
        local.stop()

    The hub is a :class:`Hub` in rank 0, which trains as well; one thread there listens to each worker, over a gloo group of
    the two. Vectors live on the CPU in at least float32; at the hub that is the reference and one message per worker that
    is being answered, beside the outer optimizer; at a worker the reference it was given and its message.

    Between two pushes a worker talks to nobody. What it pushes is packed by ``codec``, the reference comes back as floats.

    Creating the object is collective.

    Args:
        parameters: Names and tensors, in the same order on all ranks, or such tensors already in flat buffers.
        rule: What the hub does.
        local_steps: Steps between two pushes; a number means ``LocalSteps(number)``.
        codec: How pushes are packed: a compressor, or ``ErrorFeedback`` around one; ``None`` sends floats.
        total_steps: Optimizer steps of all workers together after which :attr:`done` is set, at the next push; 0: never.
        timeout: How long a worker waits for the hub's answer, and for the others at the end.
        ledger: Where to count bytes and waiting, under the label ``"hub"``; ``None`` makes a new one.

    Raises:
        ValueError: an argument outside its range, or a codec that cannot be used.
        RuntimeError: ``torch.distributed`` is not initialized.

    Source: Liu et al., "Asynchronous Local-SGD Training for Language Modeling", arXiv 2401.09135, and what the rules name.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor] | FlatTensors,
        rule: HubRule,
        local_steps: LocalSteps | int,
        codec: Codec | None = None,
        total_steps: int = 0,
        timeout: timedelta = timedelta(minutes=30),
        ledger: Ledger | None = None,
    ) -> None:
        if not dist.is_initialized():
            raise RuntimeError("AsyncLocal: call torch.distributed.init_process_group first")
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.flat = parameters if isinstance(parameters, FlatTensors) else FlatTensors(parameters)
        self.pack = Pack(self.flat.lanes, codec, rule)
        self.rule, self.timeout = rule, timeout
        self.ledger = ledger if ledger is not None else Ledger()
        steps = LocalSteps(local_steps) if isinstance(local_steps, int) else local_steps
        check_hub(rule, self.size, steps)
        check_int("AsyncLocal", "total_steps", total_steps, 0)
        start = [lane.live.detach().to("cpu", lane.message_dtype, copy=True) for lane in self.flat.lanes]
        self.desk = HubDesk(Hub(rule, start, self.size, steps), total_steps) if self.rank == HUB else None
        self.steps = 0
        """Local steps taken."""
        self.pushes = 0
        """Pushes of this rank."""
        self.done = False
        """Whether the workers together have taken ``total_steps``."""
        self.started = False
        """Whether there is a reference: after the first :meth:`start`, or a :meth:`load_state_dict`."""
        self.running = False
        """Whether phases are being worked on: between :meth:`start` and :meth:`stop`."""
        self._all = _member(dist.new_group(backend="gloo", timeout=timeout))
        others = [j for j in range(self.size) if j != HUB]
        pairs = {j: dist.new_group([HUB, j], backend="gloo", timeout=_NEVER) for j in others}
        self._pairs = {j: _member(g) for j, g in pairs.items() if self.rank in (HUB, j)}
        self._threads: list[threading.Thread] = []
        self._base = start
        self._version = self._quota = self._taken = 0
        self._since = 0.0

    # ------------------------------------------------------------------ the loop

    @torch.no_grad()
    def start(self) -> None:
        """Begin a phase, all from the hub's reference: rank 0's parameters at the first start. Collective.

        Raises:
            SyncError: a rank is lost or did not come in time.
        """
        plan = torch.zeros(2 + self.size, dtype=torch.int64)
        if self.desk is not None:
            if not self.started:
                for own, lane in zip(self.desk.hub.reference, self.flat.lanes, strict=True):
                    own.copy_(lane.live)
            self.desk.open()
            answers = [self.desk.first(j) for j in range(self.size)]
            plan.copy_(torch.tensor([answers[0].version, answers[0].done, *(a.steps for a in answers)]))
            self._base = [t.clone() for t in answers[0].reference]
        self._together(lambda: dist.broadcast(plan, HUB, group=self._all))
        for vector in self._base:
            self._together(lambda vector=vector: dist.broadcast(vector, HUB, group=self._all))  # type: ignore[misc]
        self.started = self.running = True
        self._go_on(Answer(self._base, int(plan[0]), int(plan[2 + self.rank]), bool(plan[1])))
        if self.desk is not None:
            self._threads = [
                threading.Thread(target=self._listen, args=(j,), name=f"hub for rank {j}", daemon=True)
                for j in self._pairs
            ]
            for thread in self._threads:
                thread.start()

    @torch.no_grad()
    def local_step(self) -> bool:
        """Count an optimizer step; at the end of a phase, push and go on from the hub's reference.

        Returns:
            Whether the parameters are the hub's now.

        Raises:
            RuntimeError: called before :meth:`start`.
            SyncError: a rank is lost or did not answer in time; names it.
        """
        if not self.running:
            raise RuntimeError("AsyncLocal.local_step: call start() first")
        if self.desk is not None:
            self.desk.check()
        self.steps += 1
        self._taken += 1
        if self._taken < self._quota:
            return False
        self._go_on(self._exchange(last=False))
        return True

    @torch.no_grad()
    def stop(self) -> None:
        """Push what has been done of the phase; when all have, the parameters are the hub's, the same on all ranks.

        All ranks must come here, each after as many steps as it likes.

        Raises:
            RuntimeError: called before :meth:`start`.
            SyncError: a rank is lost or did not come in time; names it.
        """
        if not self.running:
            raise RuntimeError("AsyncLocal.stop: call start() first")
        self._go_on(self._exchange(last=True))
        for thread in self._threads:
            thread.join()
        self._threads, self.running = [], False

    def abort(self) -> None:
        """Give up because of a failure elsewhere: workers that ask the hub get a :class:`SyncError`. Does not wait."""
        if self.desk is not None:
            self.desk.fail(f"rank {HUB}, the hub, gave up", HUB)

    def close(self) -> None:
        """Give the connections back, unless threads still use them. Local; the object is of no use afterwards."""
        if not self.running:
            for group in [*self._pairs.values(), self._all]:
                dist.destroy_process_group(group)
            self._pairs = {}

    # ------------------------------------------------------------------ a phase

    def _go_on(self, answer: Answer) -> None:
        self.flat.reclaim()
        for lane, base, reference in zip(self.flat.lanes, self._base, answer.reference, strict=True):
            lane.live.copy_(reference)
            if base is not reference:
                base.copy_(reference)
        self._version, self._quota, self.done = answer.version, answer.steps, answer.done
        self._taken, self._since = 0, time.perf_counter()

    def _exchange(self, last: bool) -> Answer:
        taken, seconds = self._taken, time.perf_counter() - self._since
        if taken:
            self.flat.reclaim()
            messages = self.pack.messages(self._base)
            payloads = self.pack.encode(messages, self._seed(self.rank, self.pushes))
            self.pushes += 1
        began = time.perf_counter()
        if self.desk is not None:
            push = None
            if taken:
                push = Push(
                    HUB, self.pack.decode(payloads, self._seed(HUB, self.pushes - 1)), self._version, taken, seconds
                )
            answer = self._at_desk(push, last)
        else:
            self._tell(_LAST if last else _PUSH, taken, seconds, payloads if taken else [])
            answer = self._hear()
        self.ledger.stalled("hub", time.perf_counter() - began)
        return answer

    def _seed(self, worker: int, push: int) -> int:
        return key(key(0, worker), push)

    def _at_desk(self, push: Push | None, last: bool) -> Answer:
        """The hub's own training hands in without a message; another thread does, so that there is a limit to it."""
        assert self.desk is not None
        desk, found = self.desk, []

        def hand_in() -> None:
            with suppress(SyncError):  # the desk knows
                found.append(desk.hand_in(HUB, push, last))

        if not last and not self.rule.when.waits:
            return desk.hand_in(HUB, push, last)
        thread = threading.Thread(target=hand_in, name="hub for itself", daemon=True)
        thread.start()
        thread.join(self.timeout.total_seconds())
        if not found:
            desk.fail(f"rank {HUB}: not all ranks came to the hub within {self.timeout.total_seconds():g} s")
            desk.check()
        return found[0]

    # ------------------------------------------------------------------ a worker's side of the wire

    def _tell(self, kind: int, steps: int, seconds: float, payloads: list[Tensor]) -> None:
        header = torch.tensor([kind, self._version, steps, int(1e6 * seconds)])
        self.ledger.sent("hub", sum(p.numel() for p in payloads), header.nbytes)
        self._talk([dist.isend(header, dst=HUB, group=self._pairs[self.rank], tag=_HEADER)])
        self._talk([dist.isend(p, dst=HUB, group=self._pairs[self.rank], tag=_BODY) for p in payloads])

    def _hear(self) -> Answer:
        header = torch.zeros(4, dtype=torch.int64)
        self._talk([dist.irecv(header, src=HUB, group=self._pairs[self.rank], tag=_HEADER)])
        kind, version, steps, done = header.tolist()
        if kind == _LOST:
            raise SyncError(
                f"rank {self.rank}: the hub has given up" + (f", lost rank {version}" if version >= 0 else "")
            )
        self._talk([dist.irecv(b, src=HUB, group=self._pairs[self.rank], tag=_BODY) for b in self._base])
        return Answer(self._base, version, steps, bool(done))

    def _talk(self, works: list[Any]) -> None:
        try:
            for work in works:
                work.wait(self.timeout)
        except (RuntimeError, dist.DistError) as error:
            raise SyncError(
                f"rank {self.rank}, step {self.steps}: no answer from rank {HUB}, the hub, within "
                f"{self.timeout.total_seconds():g} s ({said(error)})"
            ) from error

    # ------------------------------------------------------------------ the hub's side of the wire

    @torch.no_grad()
    def _listen(self, worker: int) -> None:
        """Serve one worker until it leaves."""
        assert self.desk is not None
        group, pushes = self._pairs[worker], self._served(worker)
        header, kind = torch.zeros(4, dtype=torch.int64), _PUSH
        try:
            while kind != _LAST:
                dist.recv(header, src=worker, group=group, tag=_HEADER)
                kind, version, steps, micros = header.tolist()
                push = None
                if steps:
                    boxes = self.pack.boxes()
                    for box in boxes:
                        dist.recv(box, src=worker, group=group, tag=_BODY)
                    message = self.pack.decode(boxes, self._seed(worker, pushes))
                    push = Push(worker, message, version, steps, 1e-6 * micros)
                    pushes += 1
                self._serve(worker, push, kind == _LAST)
        except SyncError:
            self._send_lost(worker)
        except Exception as error:  # must reach all that wait, and the computing thread
            self.desk.fail(f"rank {HUB}, the hub: lost rank {worker} ({said(error)})", worker)

    def _served(self, worker: int) -> int:
        """Pushes of a worker that the hub has been given, for the seed of the next one."""
        assert self.desk is not None
        hub = self.desk.hub
        return hub.pushes[worker] + sum(push.worker == worker for push in hub.gathered)

    def _serve(self, worker: int, push: Push | None, last: bool) -> None:
        assert self.desk is not None
        answer = self.desk.hand_in(worker, push, last)
        header = torch.tensor([_PUSH, answer.version, answer.steps, int(answer.done)])
        self.ledger.sent("hub", sum(t.nbytes for t in answer.reference), header.nbytes)
        dist.send(header, dst=worker, group=self._pairs[worker], tag=_HEADER)
        for vector in answer.reference:
            dist.send(vector, dst=worker, group=self._pairs[worker], tag=_BODY)

    def _send_lost(self, worker: int) -> None:
        assert self.desk is not None
        lost = torch.tensor([_LOST, self.desk.culprit, 0, 0])
        with suppress(RuntimeError, dist.DistError):  # it may be gone as well
            dist.send(lost, dst=worker, group=self._pairs[worker], tag=_HEADER)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """This rank's part, and the hub on rank 0, between :meth:`stop` and :meth:`start`.

        Raises:
            RuntimeError: called while phases are being worked on.
        """
        if self.running or not self.started:
            raise RuntimeError("AsyncLocal.state_dict: call stop() first (and start() before that)")
        hub = self.desk.hub.state_dict() if self.desk is not None else None
        return {"steps": self.steps, "pushes": self.pushes, "memory": self.pack.state_dict(), "hub": hub}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave on this rank; before :meth:`start`.

        Raises:
            RuntimeError: called while phases are being worked on.
            ValueError: the state belongs to another rule or codec, other local steps or another number of workers.
        """
        if self.running:
            raise RuntimeError("AsyncLocal.load_state_dict: call stop() first")
        self.steps, self.pushes = int(state["steps"]), int(state["pushes"])
        self.pack.load_state_dict(state["memory"])
        if self.desk is not None:
            self.desk.hub.load_state_dict(state["hub"])
        self.started = True

    def _together(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except (RuntimeError, dist.DistError) as error:
            seconds = self.timeout.total_seconds()
            raise SyncError(f"rank {self.rank}: not all ranks came within {seconds:g} s ({said(error)})") from error


def _member(group: object) -> dist.ProcessGroup:
    assert isinstance(group, dist.ProcessGroup)
    return group
