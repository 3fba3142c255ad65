"""Two sets of weights for one module: the replica's own and the consensus model, swapped in place."""

from __future__ import annotations

from torch import Tensor

from lightning_dopt.engine import Engine


class WeightSwap:
    """Holds the consensus model while the module holds its own weights, and the other way round.

    Args:
        engine: Whose parameters and buffers are swapped.
        means: What :meth:`Engine.consensus` returned.
    """

    def __init__(self, engine: Engine, means: list[Tensor]) -> None:
        self.engine = engine
        lanes = engine.flat.lanes
        self.away = [m.to(lane.live.dtype) for m, lane in zip(means, lanes, strict=False)]
        self.buffers: list[Tensor] = []
        if engine.buffers.buffers:
            own = [t.clone() for t in engine.buffers.buffers.values()]
            engine.buffers.lane.live.copy_(means[-1])
            engine.buffers.unpack()
            self.buffers = [t.clone() for t in engine.buffers.buffers.values()]
            for t, value in zip(engine.buffers.buffers.values(), own, strict=True):
                t.copy_(value)
        self.consensus_in = False

    def toggle(self) -> None:
        """Exchange the module's weights with the ones held here."""
        pairs = [(lane.live, away) for lane, away in zip(self.engine.flat.lanes, self.away, strict=True)]
        pairs += list(zip(self.engine.buffers.buffers.values(), self.buffers, strict=True)) if self.buffers else []
        for live, away in pairs:
            held = away.clone()
            away.copy_(live)
            live.copy_(held)
        self.consensus_in = not self.consensus_in

    def __enter__(self) -> WeightSwap:
        """Swap in what is held."""
        self.toggle()
        return self

    def __exit__(self, *_: object) -> None:
        """Swap back."""
        self.toggle()
