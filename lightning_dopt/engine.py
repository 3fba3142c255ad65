"""The engine: runs a plan, the send half and the apply half of every tick."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_dopt._checks import check_int
from lightning_dopt._random import key
from lightning_dopt.apply import OneRound
from lightning_dopt.comm.world import Pending, Talk, World
from lightning_dopt.distance import sketched_distance
from lightning_dopt.equality import compare
from lightning_dopt.gradient_runner import GradientRunner
from lightning_dopt.local.base import Context
from lightning_dopt.lost_peers import check_links
from lightning_dopt.packed import Packed, PackedGradients
from lightning_dopt.phased import make_channel
from lightning_dopt.plan import Plan, Sync
from lightning_dopt.runners import LaneRunner, SyncRunner
from lightning_dopt.schedules import QSR, ByBytes, Drifted
from lightning_dopt.slots import FlatBuffers, FlatGradients, FlatTensors, Lane, buckets, tracker_lane
from lightning_dopt.topology.weights import RowNormalised
from lightning_dopt.what import OptimizerState


class Engine:
    """Runs a plan on one replica. Needs no Lightning: call it around the optimizer step of any loop.

    .. code-block:: python

        engine = Engine(plan, dict(model.named_parameters()), ProcessGroupWorld())
        for batch in data:
            engine.run(engine.before_step())
            engine.watch_gradients()
            loss(model, batch).backward()
            engine.run(engine.on_gradients())
            optimizer.step()
            optimizer.zero_grad()
            engine.run(engine.after_step())
        engine.run(engine.finish())

    Each of these methods returns a generator that yields where it must wait, so that many simulated workers can be
    driven in one process; :meth:`run` drives it on real processes.

    The order within a tick is fixed: for each sync in the plan's order first the send half, then the apply half.

    Args:
        plan: What to do.
        parameters: Trainable parameters by name, each once, in the same order on all ranks. They are moved into flat
            buffers and stay the same tensor objects.
        world: With whom.
        buffers: Buffers by name; those of floating point belong to the consensus model.
        lr: Gives the current learning rate of a parameter by name, for corrections and memories that need it.
        optimizer_state: Gives the clock optimizer's state tensor by (parameter name, key), for ``optimizer.<state>``.
        gradient_groups: Parameter names by optimizer, if several optimizers step at different times.
        sync_buffers: Whether buffers are averaged when the plan's first sync of parameters or gradients runs, unless the
            plan names them itself.
        offload: Whether anchors and outer optimizers live in the memory of the host instead of the parameters' device.
        flat: The flat buffers that hold these parameters already, where several engines share a model; ``None`` makes them.
        name: Put before the labels of the syncs, where several engines share a world.

    Raises:
        ValueError: the plan does not suit the number of workers, or selects nothing.
    """

    def __init__(
        self,
        plan: Plan,
        parameters: Mapping[str, Tensor],
        world: World,
        buffers: Mapping[str, Tensor] | None = None,
        lr: Callable[[str], float] | None = None,
        optimizer_state: Callable[[str, str], Tensor] | None = None,
        gradient_groups: Sequence[Sequence[str]] | None = None,
        sync_buffers: bool = True,
        offload: bool = False,
        flat: FlatTensors | None = None,
        name: str = "",
    ) -> None:
        plan.check(world.size)
        if world.links is not None:
            check_links(plan, world.size, world.links)
        self.plan, self.world = plan, world
        self.parameters = dict(parameters)
        self.step = 0
        self.offload = offload
        self._begun = False
        self.on_nonfinite = plan.nonfinite(world.size)
        self.skipped = 0
        """Steps that ``on_nonfinite="skip"`` has skipped since this engine was made."""
        self._far: dict[str, bool] = {}
        self._ends: dict[str, int] = {}
        self.lr = lr or _no_lr
        self.optimizer_state = optimizer_state
        self.groups = [list(g) for g in gradient_groups] if gradient_groups is not None else [list(self.parameters)]
        chosen = [self._selected(s) for s in plan if s.what.slot in ("parameters", "gradients", "tracker", "reference")]
        self.flat = flat if flat is not None else FlatTensors(self.parameters, [*chosen, *self.groups])
        self.means = plan.means(world.size)
        context = Context(
            world.rank,
            world.size,
            self.flat.lanes,
            self.parameters,
            self.lr,
            optimizer_state or _no_state,
            self.means,
        )
        self.corrections = [c.bind(context) for c in plan.corrections]
        self.positions = next((c.positions for c in self.corrections if c.positions), ())
        """Which elements of each flat buffer are trained and sent, if not all."""
        self.buffers = FlatBuffers(buffers or {})
        self.gradients: list[list[GradientRunner]] = [[] for _ in self.groups]
        self.runners: list[SyncRunner] = []
        self.between: list[SyncRunner] = []
        """The syncs that run between the two passes of a step."""
        self._prefix = f"{name}/" if name else ""
        for index, (sync, label) in enumerate(zip(plan, plan.labels(), strict=True)):
            self._add(index, sync, self._prefix + label)
        self._first_bytes = {runner.label: runner.message_bytes for runner in self.runners}
        self._buffer_host = next((s for s in plan if s.what.slot in ("parameters", "gradients")), None)
        self.buffer_runner = self._buffer_runner() if sync_buffers else None
        self.optimizer_flats: dict[str, FlatTensors] = {}

    def _selected(self, sync: Sync) -> list[str]:
        names: list[str] = sync.what.select({n: p.numel() for n, p in self.parameters.items()})  # type: ignore[attr-defined]
        if not names:
            raise ValueError(
                f"Sync(what={sync.what!r}): selects none of the {len(self.parameters)} trainable parameters"
            )
        return names

    @property
    def _guarded(self) -> bool:
        return self.on_nonfinite != "ignore"

    @property
    def _undoes(self) -> bool:
        return self.on_nonfinite == "skip"

    def _runner(self, index: int, sync: Sync, label: str, lanes: list[Lane]) -> SyncRunner:
        seed = self.plan.sync_seed(index)
        total = sum(lane.numel for lane in lanes) or 1
        channels = [
            make_channel(sync, lane, self.world, key(seed, k), label, lane.numel / total, self.plan.checksum)
            for k, lane in enumerate(lanes)
        ]
        corrections = [] if sync.what.slot == "buffers" else self.corrections
        for correction in corrections:
            if sync.what.slot in correction.slots:
                correction.prepare(sync.what.slot, lanes)
        return SyncRunner(
            sync,
            label,
            [
                LaneRunner(sync, lane, ch, corrections, self.lr, self.offload)
                for lane, ch in zip(lanes, channels, strict=True)
            ],
        )

    def _add(self, index: int, sync: Sync, label: str) -> None:
        slot = sync.what.slot
        if slot == "parameters":
            lanes = self.flat.select(self._selected(sync))
            packed = (
                [Packed(lane, chosen) for lane, chosen in zip(lanes, self.positions, strict=True)]
                if self.positions
                else []
            )
            runner = self._runner(index, sync, label, [p.lane for p in packed] or lanes)
            runner.packed = packed
            self.runners.append(runner)
        elif slot in ("tracker", "reference"):
            copies_of = [tracker_lane(lane) for lane in self.flat.select(self._selected(sync))]
            runners = self.runners if slot == "tracker" else self.between
            runners.append(self._runner(index, sync, label, copies_of))
        elif slot == "gradients":
            for gradients, group in zip(self.gradients, self.groups, strict=True):
                names = [name for name in self._selected(sync) if name in group]
                if names and self.positions:
                    pairs = zip(self.flat.select(names), self.positions, strict=True)
                    chosen: list[FlatGradients] = [
                        PackedGradients(self.parameters, lane, positions) for lane, positions in pairs
                    ]
                    runner = self._runner(index, sync, label, [c.lane for c in chosen])
                    gradients.append(GradientRunner(runner, chosen, self.parameters, self._guarded, self._undoes))
                elif names:
                    size = getattr(sync.what, "bucket_mb", 0.0) * 1e6
                    lanes = [part for lane in self.flat.select(names) for part in buckets(lane, size)]
                    copies = [FlatGradients(self.parameters, lane) for lane in lanes]
                    runner = self._runner(index, sync, label, [c.lane for c in copies])
                    gradients.append(GradientRunner(runner, copies, self.parameters, self._guarded, self._undoes))
        elif slot == "buffers":
            lanes = [self.buffers.lane] if self.buffers.buffers else []
            self.runners.append(self._runner(index, sync, label, lanes))
        else:
            self._selected(sync)
            self.runners.append(SyncRunner(sync, label, []))

    def _fill_optimizer_runner(self, runner: SyncRunner) -> None:
        """States exist only after the optimizer's first step, so their lanes are made at the first sync."""
        what, index = runner.sync.what, self.runners.index(runner)
        assert isinstance(what, OptimizerState)
        if self.optimizer_state is None:
            raise RuntimeError(f"sync '{runner.label}' needs Engine(optimizer_state=...)")
        lookup = self.optimizer_state
        states = FlatTensors({name: lookup(name, what.key) for name in self._selected(runner.sync)})
        runner.lanes = self._runner(index, runner.sync, runner.label, states.lanes).lanes
        self.optimizer_flats[runner.label] = states

    def _buffer_runner(self) -> SyncRunner | None:
        """Buffers follow the first sync of parameters or gradients unless the plan names them itself."""
        host = self._buffer_host
        if not self.buffers.buffers or host is None or any(s.what.slot == "buffers" for s in self.plan):
            return None
        when = host.when.when if isinstance(host.when, Drifted) else host.when  # the host decides
        peers = host.peers if host.peers.row_stochastic(self.world.size) else RowNormalised(host.peers)
        sync = Sync(when=when, what="buffers", peers=peers)
        return self._runner(len(self.plan.syncs), sync, f"{self._prefix}buffers", [self.buffers.lane])

    # ------------------------------------------------------------------ the tick

    def run(self, talk: Talk[Any]) -> Any:
        """Drive one of the methods below on this rank."""
        with torch.no_grad():
            return self.world.run(talk)

    def communicates(self, step: int | None = None) -> bool:
        """Whether optimizer step ``step`` (default: the coming one) sends or waits; the same on all ranks."""
        step = self.step + 1 if step is None else step
        if any(self.gradients):
            return True
        waiting = any(lane.due(step) or lane.hop_due(step) for r in self.runners for lane in r.lanes)
        return waiting or any(self._may_be_due(r.sync, step) for r in [*self.between, *self.runners])

    def meets(self, step: int | None = None) -> bool:
        """Whether all ranks wait for all at optimizer step ``step`` (default: the coming one), as in an all-reduce.

        Plans that only talk to neighbours never do; for them this is every 32nd communicating step, so that ranks can
        agree on something (such as stopping) without giving up that a slow rank delays only its neighbours.
        """
        step = self.step + 1 if step is None else step
        if not self.communicates(step):
            return False
        if all(sync.peers.is_mean(self.world.size) or sync.when.at_end or sync.when.measured for sync in self.plan):
            return True
        return step % 32 == 0

    @property
    def sent_rounds(self) -> int:
        """How many rounds the busiest sync has sent."""
        return max((runner.rounds for runner in self._all_runners()), default=0)

    @property
    def at_rest(self) -> bool:
        """Whether no message is in flight."""
        return not any(lane.flights for runner in self._all_runners() for lane in runner.lanes)

    @property
    def begun(self) -> bool:
        """Whether the coming step's :meth:`before_step` has run, or no sync needs it."""
        return self._begun or all(getattr(r.sync.apply, "order", "atc") == "atc" for r in self.runners)

    def skip(self, steps: int) -> None:
        """Let this rank leave out the coming ``steps`` optimizer steps, at none of which anything is sent or applied.

        A slow rank that takes fewer steps per round than the others thus keeps their numbering, and meets them at the round's
        end: with ``Every(H)`` a rank that is to take ``k`` of ``H`` steps takes ``k - 1``, skips ``H - k``, and takes one more.

        Args:
            steps: How many, at least 0.

        Raises:
            ValueError: a sync belongs to one of these steps, or the plan has corrections, which count every step.
            RuntimeError: called between :meth:`before_step` and :meth:`after_step`.
        """
        check_int("Engine.skip", "steps", steps, 0)
        if self._begun:
            raise RuntimeError("Engine.skip: a step has begun; call it after after_step()")
        if self.corrections:
            raise ValueError(f"Engine.skip(steps={steps}): corrections count every step, and this plan has some")
        self._begin_rounds()
        for step in range(self.step + 1, self.step + steps + 1):
            if self.communicates(step):
                raise ValueError(f"Engine.skip(steps={steps}): ranks talk at step {step}, which none may leave out")
        self.step += steps
        self.world.step = self.step

    def before_step(self) -> Talk[None]:
        """Before the forward pass of an optimizer step (its first micro-batch): syncs of order ``cta`` and ``awc``.

        A correction may move the parameters here, until :meth:`on_gradients`.
        """
        if self._begun:
            return
        self._begun = True
        self._begin_rounds()
        step = self.world.step = self.step + 1
        for runner in self.runners:
            order = getattr(runner.sync.apply, "order", "atc")
            if order != "atc" and self._may_be_due(runner.sync, step):
                self.flat.reclaim()
                runner.send(step)
                if order == "cta":
                    yield from runner.apply(step)
        due = {runner.sync.what.slot for runner in self.between if runner.sync.when.due(step)}
        if self.between:
            self.flat.reclaim()
        for correction in self.corrections:
            correction.on_begin(due)

    @property
    def passes(self) -> int:
        """How many forward and backward passes this optimizer step takes, from :meth:`before_step` on.

        Before the first step it is the most that a step can take. If it is 2, :meth:`perturb` belongs between them.
        """
        return max((correction.passes for correction in self.corrections), default=1)

    def perturb(self, group: int = 0) -> Talk[None]:
        """After the first backward of a step that takes two passes: what is sent in between, then move the parameters.

        The gradients are to be cleared before the second backward; :meth:`on_gradients` moves the parameters back.
        """
        names, step = self.groups[group], self.step + 1
        self.world.step = step
        for correction in self.corrections:
            correction.on_backward(names)
        for runner in self.between:
            if runner.sync.when.due(step):
                runner.send(step)
                yield from runner.apply(step)
        for correction in self.corrections:
            correction.perturb(names)

    def watch_gradients(self, group: int = 0) -> None:
        """Before the backward whose gradients are due: from now on, send each bucket as soon as it is complete.

        Optional: without it all buckets leave in :meth:`on_gradients`, with the same result. Nothing is watched where
        somebody must see the gradients first: corrections, a second pass, a virtual clock that knows no overlap. With loss
        scaling do not call it.
        """
        if self.corrections or self.world.clock is not None:
            return
        self.world.step = self.step + 1
        for gradient in self.gradients[group]:
            gradient.watch()

    def close(self) -> None:
        """Take everything off the parameters that this engine put there; they keep their storage and values."""
        for runners in self.gradients:
            for gradient in runners:
                gradient.close()

    def on_gradients(self, scale: float | None = None, group: int = 0) -> Talk[None]:
        """After backward, before clipping and the optimizer: corrections, then gradient syncs.

        Args:
            scale: Loss scale the gradients carry, if there is one (mixed precision); messages and memories are kept
                free of it, and a gradient that is not finite on one rank makes all ranks skip the step.
            group: Which of the gradient groups is about to step.

        Raises:
            FloatingPointError: with ``on_nonfinite="raise"``, if the gradients of a rank are not finite: on all ranks.
        """
        self.world.step = self.step + 1
        names, gradients = self.groups[group], self.gradients[group]
        early = any(gradient.watching for gradient in gradients)
        for correction in self.corrections:
            correction.restore(names)
        if scale is not None:
            if not (yield from self._finite(group)):
                return
            self._scale(names, 1.0 / scale)
        elif self._guarded and not early:
            flags = self._flags(group, _nonfinite([self.parameters[name].grad for name in names]))
            if self._refused(group, flags if isinstance(flags, Tensor) else (yield flags)):
                return
        for correction in self.corrections:
            correction.on_backward(names)
        for correction in self.corrections:
            correction.on_gradient(names)
        for gradient in gradients:
            gradient.send_rest()
        noted = self._flags(group, _any_noted(gradients)) if self._guarded and early else None
        for gradient in gradients:
            yield from gradient.land()
        if noted is not None and self._refused(group, noted if isinstance(noted, Tensor) else (yield noted)):
            return
        for gradient in gradients:
            yield from gradient.apply()
        if scale is not None:
            self._scale(names, scale)

    def _flags(self, group: int, bad: Tensor) -> Pending | Tensor:
        """Begin to tell all ranks whose gradients are not finite; without gradient syncs it is this rank's own affair."""
        flags = torch.zeros(self.world.size, device=self.flat.lanes[0].live.device)
        flags[self.world.rank] = bad
        if self.world.size == 1 or not self.gradients[group]:
            return flags
        return self.world.all_reduce(flags, self.gradients[group][0].runner.label, overhead=True)

    def _refused(self, group: int, flags: Tensor) -> bool:
        """Whether some rank's gradients are not finite. Then the step is given up, and the gradients with it."""
        ranks = [str(j) for j, bad in enumerate(flags.tolist()) if bad]
        if not ranks:
            return False
        for gradient in self.gradients[group]:
            gradient.abandon()
        label = self.gradients[group][0].runner.label if self.gradients[group] else "none"
        where = f"step {self.step + 1}, sync '{label}': the gradients of rank(s) {', '.join(ranks)} are not finite"
        if self.on_nonfinite == "raise":
            raise FloatingPointError(
                f"{where}; parameters are as before the step, memories finite. Plan(on_nonfinite='skip') goes on without it"
            )
        for name in self.groups[group]:
            self.parameters[name].grad = None
        self.skipped += 1
        if self.world.rank == int(ranks[0]):
            warnings.warn(f"{where}; the step is skipped", stacklevel=2)
        return True

    def _scale(self, names: list[str], factor: float) -> None:
        if factor != 1.0 and (any(self.gradients) or self.corrections):
            for name in names:
                grad = self.parameters[name].grad
                if grad is not None:
                    grad.mul_(factor)

    def _finite(self, group: int) -> Talk[bool]:
        """Whether all gradients of all ranks are finite. If not, every rank's become infinite, so that all ranks skip."""
        if not self.gradients[group]:
            return True
        grads = [g for name in self.groups[group] if (g := self.parameters[name].grad) is not None]
        bad = torch.zeros(1, device=self.flat.lanes[0].live.device)
        for g in grads:
            bad += (~torch.isfinite(g)).any()
        bad = yield self.world.all_reduce_max(bad, self.gradients[group][0].runner.label)
        if float(bad) == 0.0:
            return True
        for g in grads:
            g.fill_(float("inf"))
        return False

    def after_step(self) -> Talk[None]:
        """After the optimizer step (also one that loss scaling skipped): the tick."""
        self._begin_rounds()
        self.step += 1
        step = self.world.step = self.step
        self._begun = False
        for correction in self.corrections:
            correction.on_stepped()
        if self.communicates(step):
            self.flat.reclaim()
        if self.plan.compare_every and step % self.plan.compare_every == 0 and self.world.size > 1:
            yield from self._compare(step)
        yield from self._measure(step)
        for runner in self.runners:
            yield from self._tick(runner, step)
            if any(c.rechosen() for c in self.corrections):
                for other in [g.runner for runners in self.gradients for g in runners] + self.runners:
                    if other.sync.what.slot in ("parameters", "gradients"):
                        other.renew()
        if self.buffer_runner is not None and self._buffer_host is not None and self._due(self._buffer_host, step):
            yield from self._sync_buffers(self.buffer_runner, step)

    def _compare(self, step: int) -> Talk[None]:
        """See :class:`~lightning_dopt.Plan`: whether the parameters of all ranks are equal to the last bit."""
        label = next(g.runner.label for runners in self.gradients for g in runners)
        chosen = {n for s in self.plan if s.what.slot == "gradients" for n in self._selected(s)}
        lanes = self.flat.select([n for n in self.parameters if n in chosen])
        yield from compare(lanes, self.world, label, step)

    def _tick(self, runner: SyncRunner, step: int) -> Talk[None]:
        due, order = self._due(runner.sync, step), getattr(runner.sync.apply, "order", "atc")
        if due and order == "atc":
            yield from self._round(runner, step)
        else:
            yield from runner.apply_due(step)

    def _due(self, sync: Sync, step: int) -> bool:
        """Whether the sync belongs to this step; for schedules that measure, whether the distance is above theirs."""
        when = sync.when
        return self._may_be_due(sync, step) and (not isinstance(when, Drifted) or self._far[repr(when)])

    def _may_be_due(self, sync: Sync, step: int) -> bool:
        """Whether the sync belongs to this step, or is measured at it; yes if nobody knows yet how long its round will be."""
        when = sync.when
        return step >= self._ends.get(repr(when), 0) if when.in_rounds else when.due(step)

    def _begin_rounds(self) -> None:
        """Where the coming step begins a round whose length depends on the learning rate or on messages, look at them now."""
        for runner in self.runners:
            when = runner.sync.when
            if when.in_rounds and self.step >= self._ends.get(repr(when), 0):
                if isinstance(when, QSR):
                    length = when.length(self.lr(next(iter(self.parameters))), self.step)
                elif isinstance(when, ByBytes):
                    length = when.length(
                        runner.message_bytes / first if (first := self._first_bytes[runner.label]) else 1.0
                    )
                self._ends[repr(when)] = self.step + length

    def _measure(self, step: int) -> Talk[None]:
        """Ask once per step how far replicas are apart, if a schedule wants to know."""
        asking = [r.sync.when for r in self.runners if isinstance(r.sync.when, Drifted) and r.sync.when.due(step)]
        if asking:
            distance, norm = yield from sketched_distance(self.flat.lanes, self.world, key(self.plan.seed, step))
            self._far = {repr(w): distance > w.threshold * (norm if w.relative else 1.0) for w in asking}

    def _round(self, runner: SyncRunner, step: int) -> Talk[None]:
        """The send half, then the apply half if it belongs to the same tick."""
        if runner.sync.what.slot == "buffers":
            yield from self._sync_buffers(runner, step)
            return
        if runner.sync.what.slot == "optimizer":
            self._fill_optimizer_runner(runner)
        if isinstance(
            runner.sync.apply, OneRound
        ):  # it is waited for in this tick anyway, and its memory must be settled
            yield from runner.land()
        runner.send(step)
        if runner.sync.apply.delay == 0:
            yield from runner.apply(step)

    def _sync_buffers(self, runner: SyncRunner, step: int) -> Talk[None]:
        if not runner.lanes:
            return
        self.buffers.pack()
        runner.send(step)
        yield from runner.apply(step)
        self.buffers.unpack()

    def finish(self) -> Talk[None]:
        """After the last step: apply what is in flight, then run the syncs that are due at the end."""
        self.world.step = self.step
        self.flat.reclaim()
        for runner in self.runners:
            for lane in runner.lanes:
                yield from lane.drain()
        for runner in self.runners:
            if runner.sync.when.at_end:
                yield from self._round(runner, self.step)
        if self.buffer_runner is not None and self.buffer_runner.sync.when.at_end:
            yield from self._sync_buffers(self.buffer_runner, self.step)

    # ------------------------------------------------------------------ views and state

    def consensus(self, label: str = "consensus") -> Talk[tuple[Tensor, list[Tensor]]]:
        """The mean replica and how far the replicas are from it.

        The mean is the one that the plan's mixing preserves: ``sum_i lambda_i x_i`` with ``lambda`` of
        :meth:`Plan.means`, the plain mean unless the topology is weighted. If ranks were lost it is over those that are
        left, their weights scaled to sum to one.

        Returns ``(distance, means)``: ``distance`` is ``sqrt(sum_i lambda_i ||x_i - mean||^2)`` over all parameters,
        ``means`` the mean of each lane of :attr:`flat`, then of the buffers' message. Costs one all-reduce of the model
        and one of a number (counted as overhead).
        """
        means = []
        lanes = self.flat.lanes
        total = torch.zeros(1, dtype=torch.float64, device=lanes[0].live.device)
        for lane in lanes:
            mean = yield from self._mean(lane.live.to(lane.message_dtype, copy=True), label)
            total += (lane.live - mean).double().square().sum()
            means.append(mean)
        total = yield from self._mean(total, label)
        if self.buffers.buffers:
            self.buffers.pack()
            means.append((yield from self._mean(self.buffers.lane.live.clone(), label)))
        return total.sqrt(), means

    def _mean(self, value: Tensor, label: str) -> Talk[Tensor]:
        """The mean over all replicas, in place."""
        if self.world.size == 1:
            return value
        share, size = self.means[self.world.rank], self.world.size
        if share != 1.0 / size:  # the plain mean is scaled once, after the sum
            value.mul_(share * size)
        total: Tensor = yield self.world.all_reduce(value, label, overhead=True)
        present = self.world.present
        return total.mul_(1.0 / size if len(present) == size else 1.0 / (size * sum(self.means[j] for j in present)))

    def land(self) -> Talk[None]:
        """Wait for everything in flight without applying it, so that the state can be saved."""
        for runner in self.runners:
            yield from runner.land()

    def _all_runners(self) -> list[SyncRunner]:
        extra = [self.buffer_runner] if self.buffer_runner is not None else []
        return [g.runner for runners in self.gradients for g in runners] + self.between + self.runners + extra

    def state_dict(self) -> dict[str, Any]:
        """Everything of this replica's plan that outlives a step: tensors and plain values only (:meth:`land` first)."""
        return {
            "plan": repr(self.plan),
            "step": self.step,
            "begun": self._begun,
            "ends": dict(self._ends),
            "runners": [r.state_dict() for r in self._all_runners()],
            "corrections": [c.state() for c in self.corrections],
            "ledger": self.world.ledger.state_dict(),
            "clock": self.world.clock.state_dict() if self.world.clock is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where :meth:`state_dict` was taken.

        Raises:
            ValueError: the state belongs to another plan.
        """
        if state["plan"] != repr(self.plan):
            raise ValueError(f"checkpoint was written by another plan: {state['plan']}, this run has {self.plan!r}")
        self.step, self._begun = int(state["step"]), bool(state["begun"])
        self._ends = dict(state["ends"])
        for runner, saved in zip(self._all_runners(), state["runners"], strict=True):
            runner.load_state_dict(saved)
        for correction, tensors in zip(self.corrections, state["corrections"], strict=True):
            for name, tensor in correction.state().items():
                tensor.copy_(tensors[name])
        self.world.ledger.load_state_dict(state["ledger"])
        if self.world.clock is not None and state["clock"] is not None:
            self.world.clock.load_state_dict(state["clock"])


def _nonfinite(gradients: Sequence[Tensor | None]) -> Tensor:
    """Whether the sum of a gradient is not finite."""
    sums = [g.sum(dtype=torch.promote_types(g.dtype, torch.float32)).float() for g in gradients if g is not None]
    return (
        torch.stack([s.isfinite().logical_not_().to(sums[0].device) for s in sums]).any() if sums else torch.zeros(())
    )


def _any_noted(gradients: Sequence[GradientRunner]) -> Tensor:
    device = gradients[0].nonfinite.device
    return torch.stack([gradient.nonfinite.to(device) for gradient in gradients]).any()


def _no_lr(name: str) -> float:
    raise RuntimeError(f"a correction or memory needs the learning rate of {name!r}: give Engine(lr=...)")


def _no_state(name: str, key: str) -> Tensor:
    raise RuntimeError(f"a correction needs the optimizer's {key!r} of {name!r}: give Engine(optimizer_state=...)")
