"""Channels whose compressor changes with the rounds."""

from __future__ import annotations

import copy

from torch import Tensor

from lightning_dopt.comm.world import World
from lightning_dopt.compress.base import Compressor
from lightning_dopt.compress.memory import as_compressor
from lightning_dopt.compress.phases import Phases
from lightning_dopt.exchange import Channel
from lightning_dopt.flight import Flight
from lightning_dopt.plan import Sync
from lightning_dopt.slots import Lane


def make_channel(
    sync: Sync, lane: Lane, world: World, seed: int, label: str, share: float = 1.0, checksum: bool = False
) -> Channel:
    """The channel for a sync: one per phase inside one if its compressor is :class:`Phases`."""
    phased = isinstance(as_compressor(sync.codec)[0], Phases)
    return (PhasedChannel if phased else Channel)(sync, lane, world, seed, label, share, checksum)


class PhasedChannel(Channel):
    """One channel per phase. They share what the memory and the combine hold; warm starts are each phase's own.

    A flight belongs to the channel that launched it, so what is under way at a border is decoded as it was packed.
    """

    def __init__(
        self, sync: Sync, lane: Lane, world: World, seed: int, label: str, share: float = 1.0, checksum: bool = False
    ) -> None:
        super().__init__(sync, lane, world, seed, label, share, checksum)
        phases, _ = as_compressor(sync.codec)
        assert isinstance(phases, Phases)
        self.phases = phases
        self.channels = [
            Channel(_in_phase(sync, k, c), lane, world, seed, label, checksum=checksum)
            for k, c in enumerate(phases.codecs)
        ]
        for channel in self.channels:
            channel.memory_state, channel.combine_state = self.memory_state, self.combine_state
            channel._free, channel._boxes = self._free, self._boxes

    def at(self, round_: int) -> Channel:
        """See :meth:`Channel.at`."""
        return self.channels[self.phases.phase(round_)]

    def launch(self, message: Tensor, step: int, round_: int, need_own: bool = False) -> Flight:
        """See :meth:`Channel.launch`."""
        return self.at(round_).launch(message, step, round_, need_own)

    def keep(self) -> None:
        """See :meth:`Channel.keep`."""
        for channel in self.channels:
            channel.keep()

    def undo(self) -> None:
        """See :meth:`Channel.undo`."""
        for channel in self.channels:
            channel.undo()

    def tensors(self) -> dict[str, Tensor]:
        """See :meth:`Channel.tensors`."""
        warm = {f"phase{k}.{n}": t for k, channel in enumerate(self.channels) for n, t in channel.codec_state.items()}
        for k, channel in enumerate(self.channels):
            if channel.transport == "two_phase":
                warm |= {f"phase{k}.relay.{n}": t for n, t in channel.two_phase.state.items()}
        return super().tensors() | warm

    def load(self, tensors: dict[str, Tensor]) -> None:
        """See :meth:`Channel.load`."""
        warm = {name: saved for name, saved in tensors.items() if name.startswith("phase")}
        super().load({name: saved for name, saved in tensors.items() if name not in warm})
        for name, saved in warm.items():
            phase, _, key = name.partition(".")
            channel = self.channels[int(phase.removeprefix("phase"))]
            if key.startswith("relay."):
                channel.two_phase.state[key.removeprefix("relay.")].copy_(saved)
                continue
            state = channel.codec_state
            state[key] = saved.to(self.lane.live.device, copy=True)


def _in_phase(sync: Sync, k: int, codec: Compressor) -> Sync:
    """The sync with the compressor of one phase in the place of its own."""
    _, memory = as_compressor(sync.codec)
    phase = copy.copy(sync)
    phase.codec = codec if memory is None else memory.in_phase(k, codec)
    return phase
