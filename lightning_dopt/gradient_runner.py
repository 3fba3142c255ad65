"""Gradient syncs at work: buckets that are sent while backward still computes the gradients of earlier layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_dopt.comm.world import Talk
from lightning_dopt.runners import SyncRunner
from lightning_dopt.slots import FlatGradients


class GradientRunner:
    """A gradient sync of the parameters that one optimizer steps.

    Buckets are sent in one order, the same on all ranks: those whose tensors were registered last come first, as backward
    reaches them first. A bucket leaves when all its gradients are there and the buckets before it have left; what has not
    left when backward ends (tensors that nobody used) leaves then.

    Args:
        runner: The sync; one lane per bucket.
        copies: The gradients of each bucket, in the order of the lanes.
        parameters: All parameters by name, in the order of the module.
        guarded: Whether a bucket that is not finite is sent as zeros and noted, if it leaves before all gradients are known.
        undo: Whether memories are to be as before if the step is given up; costs a second copy of them.
    """

    def __init__(
        self,
        runner: SyncRunner,
        copies: list[FlatGradients],
        parameters: Mapping[str, Tensor],
        guarded: bool = False,
        undo: bool = False,
    ) -> None:
        self.guarded, self.undo = guarded, undo
        self.nonfinite = torch.zeros((), dtype=torch.bool)
        """Whether a bucket of this step was not finite."""
        self.runner, self.copies = runner, copies
        place = {name: k for k, name in enumerate(parameters)}
        first = [min(place[f.name] for f in copy.lane.fields) for copy in copies]
        self.order = sorted(range(len(copies)), key=lambda k: -first[k])
        self.parameters = parameters
        self._handles: list[RemovableHandle] = []
        self._missing: list[set[str]] | None = None
        self._sent = 0

    @property
    def step(self) -> int:
        """The coming step: this optimizer's own, counted by the rounds sent."""
        return self.runner.rounds + 1

    @property
    def watching(self) -> bool:
        """Whether buckets leave by themselves, so that none can wait for what others look like."""
        return self._missing is not None

    def watch(self) -> None:
        """Before a backward whose gradients are to be sent: send each bucket as soon as it is complete."""
        if not self._handles:
            for k, copy in enumerate(self.copies):
                for field in copy.lane.fields:
                    self._handles.append(self._hook(k, field.name))
        self._missing = [{f.name for f in copy.lane.fields} for copy in self.copies]
        self._sent = 0
        self.nonfinite = torch.zeros((), dtype=torch.bool)

    def _hook(self, bucket: int, name: str) -> RemovableHandle:
        def arrived(_: Tensor) -> None:
            if self._missing is not None:
                self._arrived(bucket, name)

        return self.parameters[name].register_post_accumulate_grad_hook(arrived)  # type: ignore[no-untyped-call]

    def _arrived(self, bucket: int, name: str) -> None:
        assert self._missing is not None
        if bucket in self.order[: self._sent]:
            raise RuntimeError(
                f"the gradient of {name!r} changed after it had been sent: backward ran twice for one step; use "
                "what=Gradients(bucket_mb=0), or manual optimization"
            )
        self._missing[bucket].discard(name)
        while self._sent < len(self.order) and not self._missing[self.order[self._sent]]:
            self._send_next()

    def _send_next(self) -> None:
        k = self.order[self._sent]
        self._sent += 1
        with torch.no_grad():
            self.copies[k].gather()
            if self.guarded and self.watching:
                self.nonfinite = _silence(self.copies[k].lane.live) | self.nonfinite.to(self.copies[k].lane.live.device)
                if self.undo:
                    self.runner.lanes[k].channel.keep()
            self.runner.lanes[k].send(self.step, self.runner.rounds)

    def send_rest(self) -> None:
        """After backward: send what has not left yet."""
        if self._missing is None:
            self._sent = 0
        while self._sent < len(self.order):
            self._send_next()
        self._missing = None

    def land(self) -> Talk[None]:
        """Wait for all buckets."""
        yield from self.runner.land()

    def apply(self) -> Talk[None]:
        """Apply all buckets and hand the gradients back."""
        step = self.step
        self.runner.rounds += 1
        for k in self.order:
            yield from self.runner.lanes[k].apply(step)
            self.copies[k].scatter()

    def abandon(self) -> None:
        """Forget this round, once it has landed: memories are as before it."""
        for lane in self.runner.lanes:
            lane.abandon()

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _silence(flat: Tensor) -> Tensor:
    """Whether the sum of a bucket is not finite; then the bucket becomes zeros. Where there is a device, without waiting for it."""
    bad = flat.sum(dtype=torch.promote_types(flat.dtype, torch.float32)).isfinite().logical_not_()
    if not bad.is_cpu:
        flat.masked_fill_(bad, 0.0)
    elif bool(bad):
        flat.zero_()
    return bad
