"""What the optimizers here share: one step is one update of each tensor that has a gradient."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class PerTensor(Optimizer):
    """A ``torch.optim.Optimizer`` whose subclass says how one tensor moves; tensors without a gradient stay."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; a ``closure`` is called first, with gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, p.grad, group)
        return loss

    @abstractmethod
    def _step(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        """Move ``p`` in place with the options of its group; what is remembered of it is ``self.state[p]``."""
