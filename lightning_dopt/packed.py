"""Lanes of chosen elements: a vector of values whose positions all ranks know, so that no index is ever sent."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_dopt.slots import Field, FlatGradients, Lane


class Packed:
    """Some elements of a lane, packed into a lane of their own.

    Args:
        source: Where they live.
        positions: Which they are, int64; what this tensor holds may change.
    """

    def __init__(self, source: Lane, positions: Tensor) -> None:
        self.source, self.positions = source, positions
        shape = torch.Size([positions.numel()])
        self.lane = Lane(source.live.new_zeros(shape), [Field(source.fields[0].name, 0, shape)])
        self.gather()

    def gather(self) -> None:
        """Copy the elements in."""
        torch.index_select(self.source.live, 0, self.positions, out=self.lane.live)

    def scatter(self) -> None:
        """Copy the elements back."""
        self.source.live.index_copy_(0, self.positions, self.lane.live)


class PackedGradients(FlatGradients):
    """Chosen elements of the gradients of a lane; what comes back is zero elsewhere.

    Args:
        parameters: The parameters by name.
        lane: The lane of the parameters.
        positions: The chosen elements of that lane.
    """

    def __init__(self, parameters: Mapping[str, Tensor], lane: Lane, positions: Tensor) -> None:
        super().__init__(parameters, lane)
        self.packed = Packed(self.lane, positions)
        self.lane = self.packed.lane

    def gather(self) -> None:
        """See :meth:`FlatGradients.gather`."""
        super().gather()
        self.packed.gather()

    def scatter(self) -> None:
        """See :meth:`FlatGradients.scatter`."""
        self.packed.source.live.zero_()
        self.packed.scatter()
        super().scatter()
