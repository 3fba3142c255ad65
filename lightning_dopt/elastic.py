"""Rounds that workers may miss, leave and join: an engine that decides before it applies, and what to do between steps."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, Literal

import torch

from lightning_dopt.comm.elastic import ElasticWorld
from lightning_dopt.comm.world import SyncError, Talk
from lightning_dopt.engine import Engine
from lightning_dopt.runners import LaneRunner, SyncRunner

Missed = Literal["keep", "restore"]


class ElasticEngine(Engine):
    """An engine whose rounds are decided on before they are applied, so that a round that failed leaves no trace.

    Training calls the methods of :class:`Engine`; :meth:`after_step` only counts. When a step has been counted and

    * :attr:`sends`, the members of the round are agreed on, :meth:`resize`, then :meth:`send`;
    * :attr:`lands`, :meth:`land`, then either :meth:`settle` or :meth:`abandon`.

    Args are those of :class:`Engine`, with a plan that passes :func:`~lightning_dopt.elastic_plans.check_elastic`.
    """

    def after_step(self) -> Talk[None]:
        """Count the step."""
        self.step += 1
        self.world.step = self.step
        self._begun = False
        return
        yield

    @property
    def stamp(self) -> list[int]:
        """What all members of a round must have in common: plan and step."""
        return [zlib.crc32(repr(self.plan).encode()), self.step]

    @property
    def sends(self) -> bool:
        """Whether a round begins at the step just counted."""
        return any(runner.sync.when.due(self.step) for runner in self.runners)

    @property
    def lands(self) -> bool:
        """Whether a message under way is to be applied at the step just counted."""
        return any(lane.due(self.step) for runner in self.runners for lane in runner.lanes)

    @property
    def _on_the_way(self) -> list[SyncRunner]:
        every = [*self.runners, *([self.buffer_runner] if self.buffer_runner is not None else [])]
        return [runner for runner in every if any(lane.flights for lane in runner.lanes)]

    def resize(self) -> None:
        """The world has other members than before: choose anew how messages travel."""
        for runner in self._all_runners():
            for lane in runner.lanes:
                lane.channel.resize()
        self.means = self.plan.means(self.world.size)

    def send(self) -> None:
        """Begin the round of the step just counted.

        Raises:
            SyncError: a member is gone; :meth:`abandon` what has left.
        """
        self.flat.reclaim()
        with torch.no_grad():
            for runner in self.runners:
                if runner.sync.when.due(self.step):
                    for lane in runner.lanes:
                        lane.channel.keep()
                    runner.send(self.step)
            if self.buffer_runner is not None and self.runners[0].sync.when.due(self.step):
                self.buffers.pack()
                self.buffer_runner.send(self.step)

    def settle(self) -> Talk[None]:
        """Apply what :meth:`land` has waited for."""
        for runner in self._on_the_way:
            yield from runner.apply(self.step)
            if runner is self.buffer_runner:
                self.buffers.unpack()

    def abandon(self, missed: Missed) -> None:
        """Give the round up: anchors, outer optimizers and memories are as before it.

        Args:
            missed: ``"keep"``: training goes on from the own weights, whose change the next round brings. ``"restore"``: from the
                anchor.
        """
        for runner in self._on_the_way:
            for lane in runner.lanes:
                lane.channel.undo()
                lane.flights.clear()
        if missed == "restore":
            for lane in self._anchored():
                assert lane.anchor is not None
                lane.lane.live.copy_(lane.anchor)

    def adopt(self, state: dict[str, Any], missed: Missed) -> None:
        """Take over what members share from one's :meth:`state_dict`: step, anchors, outer optimizers, shared codec state.

        Args:
            state: Its state.
            missed: ``"keep"``: the own change since the own anchor goes on top of the new one. ``"restore"``: it is given up.

        Raises:
            ValueError: the state belongs to another plan.
        """
        if state["plan"] != repr(self.plan):
            raise ValueError(f"the run to join follows another plan: {state['plan']}, this worker has {self.plan!r}")
        self.step = self.world.step = int(state["step"])
        for runner, saved in zip(self._all_runners(), state["runners"], strict=True):
            runner.rounds = int(saved["rounds"])
            for lane, theirs in zip(runner.lanes, saved["lanes"], strict=True):
                self._adopt(lane, theirs, missed)

    def _adopt(self, lane: LaneRunner, theirs: dict[str, Any], missed: Missed) -> None:
        lane.flights.clear()
        lane.last_step = int(theirs["last_step"])
        lane.channel.load({k: v for k, v in theirs["channel"].items() if k.startswith("codec.")})
        if lane.optimizer is not None:
            lane.optimizer.load_state_dict(theirs["optimizer"])
        if lane.anchor is None:
            return
        live, new = lane.lane.live, theirs["anchor"].to(lane.anchor.device)
        if missed == "keep":
            live.add_((new - lane.anchor).to(live.device, live.dtype))
        else:
            live.copy_(new)
        lane.anchor.copy_(new)

    def _anchored(self) -> list[LaneRunner]:
        return [lane for runner in self.runners for lane in runner.lanes if lane.anchor is not None]

    def anchors(self) -> list[torch.Tensor]:
        """The model that all members share: like the means of :meth:`consensus`, and nothing is sent."""
        own = [lane.live.clone() for lane in self.flat.lanes]
        for lane in self._anchored():
            assert lane.anchor is not None
            lane.lane.live.copy_(lane.anchor)
        means = [lane.live.to(lane.message_dtype, copy=True) for lane in self.flat.lanes]
        for lane_, value in zip(self.flat.lanes, own, strict=True):
            lane_.live.copy_(value)
        if self.buffers.buffers:
            self.buffers.pack()
            means.append(self.buffers.lane.live.clone())
        return means


class ElasticRounds:
    """What one worker does between steps so that a round counts for all of its members or for none.

    Args:
        engine: This worker's engine.
        world: Its world.
        missed: What becomes of its own change when a round failed or it was late for one.
        take: Gives the engine state that another member sent since it was last asked, or ``None``.
        warn: Called with what went wrong, in one line.
    """

    def __init__(
        self,
        engine: ElasticEngine,
        world: ElasticWorld,
        missed: Missed,
        take: Callable[[], dict[str, Any] | None],
        warn: Callable[[str], None],
    ) -> None:
        self.engine, self.world, self.missed, self.take, self.warn = engine, world, missed, take, warn
        self.lost = 0
        """Rounds that were abandoned."""

    def tick(self) -> None:
        """After an optimizer step: end the round whose messages are due, begin one if it is time.

        Raises:
            SyncError: no quorum came about.
            ValueError: members are at other steps, or follow other plans.
        """
        if self.engine.lands:
            self.end()
        if self.engine.sends:
            ok, state = self.world.convene(), self.take()
            if state is not None:
                self.engine.adopt(state, self.missed)
            self.begin(ok)

    def join(self, state: dict[str, Any]) -> None:
        """Take part in the round that the world has convened for, with nothing to say, from what a member has sent."""
        self.engine.adopt(state, "restore")
        self.begin(True, speaks=False)

    def begin(self, connected: bool, speaks: bool = True) -> None:
        """Send; end the round, too, if nothing is to be done meanwhile."""
        engine, world = self.engine, self.world
        try:
            if not connected:
                raise SyncError("the members could not connect to each other")
            engine.resize()
            rows = world.tell([*engine.stamp, int(speaks)])
            if any(row[:-1] != rows[world.rank][:-1] for row in rows):
                raise ValueError(
                    f"step {engine.step}: the members of the round follow other plans, or are at other steps"
                )
            world.heed([rank for rank, row in enumerate(rows) if row[-1]] or range(world.size))
            engine.send()
        except SyncError as error:
            self._abandon(str(error))
            return
        if engine.lands:
            self.end()

    def end(self) -> None:
        """Wait for what is under way, and apply it if all members have it."""
        if self.landed():
            if self.world.agreed(True):
                self.engine.run(self.engine.settle())
            else:
                self._give_up("another member could not end it")

    def landed(self) -> bool:
        """Wait for what is under way; if that fails, so has the round."""
        try:
            self.engine.run(self.engine.land())
        except SyncError as error:
            self._abandon(str(error))
            return False
        return True

    def _abandon(self, why: str) -> None:
        self.world.agreed(False)
        self._give_up(why)

    def _give_up(self, why: str) -> None:
        self.engine.abandon(self.missed)
        self.lost += 1
        rest = "the own change is kept for the next" if self.missed == "keep" else "the own change is given up"
        self.warn(f"step {self.engine.step}: the round is abandoned, {rest} ({why})")
