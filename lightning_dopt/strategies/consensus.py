"""The consensus model in the place of a replica's own weights: while validation runs, and after fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lightning_dopt.engine import Engine
from lightning_dopt.strategies.weights import WeightSwap


class ConsensusModel:
    """The mean of all replicas as one model, shown in the module on request.

    Args:
        engine: Whose replicas.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.distance: float | None = None
        """How far the replicas were from their mean when it was last measured, as in :meth:`Engine.consensus`."""
        self._swap: WeightSwap | None = None

    @property
    def shown(self) -> bool:
        """Whether the module holds the consensus model now."""
        return self._swap is not None

    def measure(self) -> None:
        """Update :attr:`distance`. Collective."""
        self.distance = float(self.engine.run(self.engine.consensus())[0])

    def model(self) -> WeightSwap:
        """The mean of all replicas as of now, to be swapped in. Collective; updates :attr:`distance`."""
        distance, means = self.engine.run(self.engine.consensus())
        self.distance = float(distance)
        with torch.no_grad():
            return WeightSwap(self.engine, means)

    def show(self) -> None:
        """Put the consensus model into the module until :meth:`hide`. Collective."""
        self._swap = self.model()
        self._swap.toggle()

    def hide(self) -> None:
        """Put the replica's own weights back, if the consensus model is shown."""
        if self._swap is not None:
            self._swap.toggle()
            self._swap = None

    @contextmanager
    def own(self) -> Iterator[None]:
        """Within the block the module holds the replica's own weights, shown or not."""
        if self._swap is None:
            yield
            return
        self._swap.toggle()
        try:
            yield
        finally:
            self._swap.toggle()
