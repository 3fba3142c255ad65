"""What a rank logs about its communication, and how its virtual link clock learns of the computing between messages."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import MappingProxyType

import torch
from lightning.pytorch import LightningModule

from lightning_dopt.comm.ledger import Ledger
from lightning_dopt.comm.world import World
from lightning_dopt.engine import Engine


class Meter:
    """Beside one fit of one rank.

    Args:
        world: Whose ledger and clock.
        step_seconds: Virtual seconds of computing per optimizer step, which pass when its gradients are complete, as in
            :class:`Simulation`; ``None`` takes the wall time between messages, without waiting.
    """

    def __init__(self, world: World, step_seconds: float | None = None) -> None:
        self.world, self.step_seconds = world, step_seconds
        self._told: tuple[float, float] | None = None
        self._passed = False

    def computed(self) -> None:
        """Tell the clock how long this rank has been busy since it was last told; nothing if steps have a given length."""
        now, stalled = time.perf_counter(), self.world.ledger.stall_s
        if self.world.clock is not None and self._told is not None and self.step_seconds is None:
            self.world.clock.compute(max(0.0, now - self._told[0] - (stalled - self._told[1])))
        self._told = (now, stalled)

    def computed_gradients(self) -> None:
        """The same where a step's gradients are complete: there a step of given length passes (once, until :meth:`log`)."""
        self.computed()
        if self.world.clock is not None and self.step_seconds is not None and not self._passed:
            self.world.clock.compute(self.step_seconds)
            self._passed = True

    def log(self, module: LightningModule, engine: Engine, distance: float | None) -> None:
        """Log the numbers of the step just done: some in the progress bar, some every ``log_every_n_steps`` only."""
        self._passed = False
        ledger, clock = self.world.ledger, self.world.clock
        shown = {"consensus/distance": distance} if distance is not None else {}
        quiet: dict[str, float] = {}
        if self.world.links is not None:
            quiet |= {"comm/lost_peers": len(self.world.lost), "comm/skipped": ledger.skipped}
        if clock is not None:
            quiet |= {"comm/link_s": clock.now, "comm/link_stall_s": clock.stall_s}
        log_ledger(module, ledger, engine.step, shown, quiet)


def log_ledger(
    module: LightningModule,
    ledger: Ledger,
    steps: int,
    shown: Mapping[str, float] = MappingProxyType({}),
    quiet: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """Log what a ledger has counted in so many steps, with further numbers, of which ``shown`` go to the progress bar."""
    shown = {"comm/bytes": ledger.bytes, "comm/stall_s": ledger.stall_s, **shown}
    seldom: dict[str, float] = {}
    if steps % max(1, getattr(module.trainer, "log_every_n_steps", 1)) == 0:
        seldom = {"comm/bytes_per_step": ledger.bytes / steps, "comm/overhead_bytes": ledger.overhead}
        seldom |= {f"comm/bytes/{label}": entry.bytes for label, entry in ledger.entries.items() if entry.bytes}
    for name, value in {**shown, **seldom, **quiet}.items():
        module.log(name, exact(value), prog_bar=name in shown, on_step=True, on_epoch=False)


def exact(number: float) -> torch.Tensor:
    """A number to be logged, in double precision: single precision cannot count beyond 16 million bytes."""
    return torch.tensor(number, dtype=torch.float64)
