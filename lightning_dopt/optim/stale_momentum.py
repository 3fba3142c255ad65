"""Heavy-ball momentum for gradients that come late: damped by how far the weights have gone on, and clipped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_dopt._checks import check_flag, check_float
from lightning_dopt.optim.per_tensor import PerTensor

_DECAY = 0.9


class StaleMomentum(PerTensor):
    """``m <- clamp(mu m + g / L, -clip, clip)``, ``x <- x - lr m``, for a gradient ``g`` that was taken one step ago.

    ``L >= 1`` is the staleness gap penalty: ``penalty`` itself, times, if ``gap_aware``, ``1 + |x - x_before| / size`` in every
    element, where ``size`` is a running mean (decay 0.9) of the mean of ``|x - x_before|`` over the tensor. The gap to the
    weights that the gradient belongs to is the step before, ``lr m``, and needs no memory.

    Args:
        params: Tensors, or groups of them.
        lr: Learning rate, above 0.
        momentum: ``mu`` in [0, 1).
        clip: Bound on every element of ``m``, at least 0; ``None`` for none.
        penalty: Constant to divide gradients by, at least 1.
        gap_aware: Whether elements that have just moved far are divided by more.

    Raises:
        ValueError: an option out of range.

    Source: Sun et al., "CO2: Efficient Distributed Training with Full Communication-Computation Overlap", arXiv 2401.16265;
    the norm of the gap is ours.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1.0,
        momentum: float = 0.0,
        clip: float | None = 1.0,
        penalty: float = 1.0,
        gap_aware: bool = False,
    ) -> None:
        check_float("StaleMomentum", "lr", lr, 0.0, open_low=True)
        check_float("StaleMomentum", "momentum", momentum, 0.0, 1.0, open_high=True)
        check_float("StaleMomentum", "penalty", penalty, 1.0)
        check_flag("StaleMomentum", "gap_aware", gap_aware)
        if clip is not None:
            check_float("StaleMomentum", "clip", clip, 0.0)
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "clip": clip, "penalty": penalty, "gap_aware": gap_aware}
        )

    def _step(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
            if group["gap_aware"]:
                state["size"] = torch.zeros((), dtype=p.dtype, device=p.device)
        m = state["momentum_buffer"]
        if group["gap_aware"]:
            gap = m.abs().mul_(group["lr"])
            size, mean = state["size"], gap.mean()
            size.copy_(torch.where(size > 0, _DECAY * size + (1 - _DECAY) * mean, mean))
            penalty = gap.div_(size.clamp(min=torch.finfo(p.dtype).tiny)).add_(1.0).mul_(group["penalty"])
            m.mul_(group["momentum"]).addcdiv_(grad, penalty)
        else:
            m.mul_(group["momentum"]).add_(grad, alpha=1.0 / group["penalty"])
        if group["clip"] is not None:
            m.clamp_(-group["clip"], group["clip"])
        p.add_(m, alpha=-group["lr"])
