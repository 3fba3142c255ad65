"""A preconditioned step whose diagonal scaling stands still between synchronisations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_dopt._checks import check_flag, check_float, check_int
from lightning_dopt.optim.per_tensor import PerTensor


class FrozenScaling(PerTensor):
    """``x <- x - lr g / max(floor, D)`` in every coordinate; ``D`` changes once every ``every`` steps.

    Before the first change ``D = 1``. At a change ``D^2 <- beta D^2 + (1 - beta) S^2``, or without ``squared``
    ``D <- beta D + (1 - beta) |S|``; the first one takes ``S`` alone. ``S`` is the gradient of the last step before the change.
    It is kept in ``optimizer.state[p]["statistic"]``, where a sync of ``optimizer.statistic`` after that step puts the mean
    over the ranks: then all of them go on with the same ``D`` (:func:`lightning_dopt.plans.savic`).

    Args:
        params: Tensors, or groups of them.
        lr: Learning rate, at least 0.
        every: Steps between changes, the period of the plan's syncs.
        beta: Share of the old scaling that stays, in [0, 1].
        floor: Smallest scaling, above 0.
        squared: Whether squares are averaged (Adam, RMSProp) or magnitudes.

    Raises:
        ValueError: an option out of range.

    Source: Chezhegov et al., "Local Methods with Adaptivity via Scaling" (SAVIC), arXiv 2406.00846. ``S`` may be other estimates
    of curvature there; here it is the gradient.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        every: int = 8,
        beta: float = 0.999,
        floor: float = 1e-8,
        squared: bool = True,
    ) -> None:
        check_float("FrozenScaling", "lr", lr, 0.0)
        check_int("FrozenScaling", "every", every, 1)
        check_float("FrozenScaling", "beta", beta, 0.0, 1.0)
        check_float("FrozenScaling", "floor", floor, 0.0, open_low=True)
        check_flag("FrozenScaling", "squared", squared)
        super().__init__(params, {"lr": lr, "every": every, "beta": beta, "floor": floor, "squared": squared})

    def _step(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, every = self.state[p], group["every"]
        if not state:
            state["step"] = torch.zeros(())
            state["scale"] = torch.ones_like(p)  # D^2, or D
            state["statistic"] = torch.zeros_like(p)
        done = int(state["step"])
        if done and done % every == 0:
            fresh = state["statistic"].square() if group["squared"] else state["statistic"].abs()
            state["scale"].lerp_(fresh, 1.0 if done == every else 1.0 - group["beta"])
        scale = state["scale"].sqrt() if group["squared"] else state["scale"].clone()
        p.addcdiv_(grad, scale.clamp_(min=group["floor"]), value=-group["lr"])
        state["step"] += 1
        if (done + 1) % every == 0:
            state["statistic"].copy_(grad)
