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
    """

    def __init__(self, runner: SyncRunner, copies: list[FlatGradients], parameters: Mapping[str, Tensor]) -> None:
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

    def watch(self) -> None:
        """Before a backward whose gradients are to be sent: send each bucket as soon as it is complete."""
        if not self._handles:
            for k, copy in enumerate(self.copies):
                for field in copy.lane.fields:
                    self._handles.append(self._hook(k, field.name))
        self._missing = [{f.name for f in copy.lane.fields} for copy in self.copies]
        self._sent = 0

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
            self.runner.lanes[k].send(self.step, self.runner.rounds)

    def run(self) -> Talk[None]:
        """After backward: send what has not left yet, then apply all and hand the gradients back."""
        step = self.step
        if self._missing is None:
            self._sent = 0
        while self._sent < len(self.order):
            self._send_next()
        self._missing = None
        self.runner.rounds += 1
        for k in self.order:
            yield from self.runner.lanes[k].apply(step)
            self.copies[k].scatter()

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
