"""A budget at work on one message: who has which choice, and what the next choice rests on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_dopt._random import key
from lightning_dopt.compress.base import Shape, Share
from lightning_dopt.compress.budget import Budget
from lightning_dopt.compress.packing import Scale


class Allocation:
    """The state of a :class:`Budget` for the tensors of one message.

    Args:
        budget: how to choose.
        shapes: of the tensors.
        share: part of all tensors of a round that are in this message.
        scale: factor on decoded tensors by shape and compressor; ``None`` is 1.

    Raises:
        ValueError: no choice keeps to the budget.
    """

    def __init__(self, budget: Budget, shapes: Sequence[Shape], share: float = 1.0, scale: Scale | None = None) -> None:
        self.budget, self.shapes, self.share, self.scale = budget, list(shapes), share, scale
        self.options = budget.options
        rows = [[option.payload_bytes(shape) for option in self.options] for shape in self.shapes]
        self.sizes = torch.tensor(rows, dtype=torch.float64).view(len(rows), len(self.options))
        self.choice = budget.first(self.sizes, share)

    @property
    def entries(self) -> int:
        """Numbers in the table of errors."""
        return self.sizes.numel() + self.budget.weighs * len(self.sizes)

    def parts(self) -> list[Share]:
        """The message as it is packed now."""
        return self.budget.parts_of(self.shapes, self.choice)

    def measure(self, values: Sequence[Tensor], seed: int) -> Tensor:
        """Squared errors of the tensors under all options, summed over flat messages, as one float32 vector."""
        device = values[0].device if values else torch.device("cpu")
        total = torch.zeros(self.entries, device=device)
        for value in values:
            if not bool(value.isfinite().all()):
                return total.fill_(torch.inf)
            start, rows = 0, []
            for k, shape in enumerate(self.shapes):
                end = start + torch.Size(shape).numel()
                rows += self._errors(value[start:end].view(tuple(shape)), key(seed, k))
                start = end
            total += torch.stack(rows).to(total)
        return total

    def _errors(self, x: Tensor, seed: int) -> list[Tensor]:
        found: dict[str, Tensor] = {}
        row = []
        for option in self.options:
            codec = option.parts([x.shape])[0][0]
            name = repr(codec)
            if name not in found:
                factor = 1.0 if self.scale is None else self.scale(x.shape, codec)
                found[name] = codec.squared_error(x, seed, factor)
            row.append(found[name])
        if self.budget.weighs:
            row.append(x.square().sum())
        return row

    def update(self, table: Tensor) -> None:
        """Choose anew; a table with an error that is not finite changes nothing."""
        squared = table.to("cpu", torch.float64).view(len(self.sizes), len(self.options) + self.budget.weighs)
        if not bool(squared.isfinite().all()):
            return
        chosen = self.budget.choose(self.sizes, squared, self.share) or self.choice
        if self.budget.falling:
            pairs = zip(self.sizes.tolist(), self.choice, chosen, strict=True)
            chosen = [new if size[new] < size[old] else old for size, old, new in pairs]
        self.choice = chosen

    def tensor(self) -> Tensor:
        """The choice, for a checkpoint."""
        return torch.tensor(self.choice, dtype=torch.int64)

    def load(self, saved: Tensor) -> None:
        """Continue with a saved choice."""
        self.choice = [int(c) for c in saved.tolist()]
