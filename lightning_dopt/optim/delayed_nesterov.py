"""Nesterov momentum for gradients that arrive one by one: every one moves the weights, the momentum moves now and then."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_dopt._checks import check_float, check_int
from lightning_dopt.optim.per_tensor import PerTensor


class DelayedNesterov(PerTensor):
    """Every gradient ``g`` counts ``1 / N`` at once; the momentum takes in ``N`` of them at a time.

    ``acc <- acc + g``. For every ``N``-th gradient ``m <- mu m + acc / N``, ``x <- x - lr ((1 - c N + c) mu m + g / N)``,
    ``acc <- 0``; for the others ``x <- x - lr (c mu m + g / N)``. ``N`` gradients, all taken at the same ``x``, are together
    one step of Nesterov momentum along their mean if ``c = 0``; with ``N = 1`` this is ``torch.optim.SGD(nesterov=True)``.
    Keeps two vectors, ``m`` and ``acc``.

    Args:
        params: Tensors, or groups of them.
        lr: Learning rate, above 0.
        momentum: ``mu`` in [0, 1).
        delay: ``N``, at least 1: gradients for one step of the momentum.
        spread: ``c`` in [0, 1 / N]: share of the momentum with which every gradient moves the weights; 0: it moves them
            with every ``N``-th alone, ``1 / N``: with all alike.

    Raises:
        ValueError: an option out of range.

    Source: Liu et al., "Asynchronous Local-SGD Training for Language Modeling", arXiv 2401.09135.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.7,
        momentum: float = 0.9,
        delay: int = 1,
        spread: float = 0.0,
    ) -> None:
        check_float("DelayedNesterov", "lr", lr, 0.0, open_low=True)
        check_float("DelayedNesterov", "momentum", momentum, 0.0, 1.0, open_high=True)
        check_int("DelayedNesterov", "delay", delay, 1)
        check_float("DelayedNesterov", "spread", spread, 0.0, 1.0 / delay)
        super().__init__(params, {"lr": lr, "momentum": momentum, "delay": delay, "spread": spread})

    def _step(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["gradients"] = 0
            state["momentum_buffer"] = torch.zeros_like(p)
            state["accumulated"] = torch.zeros_like(p)
        m, accumulated = state["momentum_buffer"], state["accumulated"]
        lr, momentum, n, c = group["lr"], group["momentum"], group["delay"], group["spread"]
        accumulated.add_(grad)
        state["gradients"] += 1
        share = c
        if state["gradients"] % n == 0:
            m.mul_(momentum).add_(accumulated, alpha=1.0 / n)
            accumulated.zero_()
            share = 1.0 - c * n + c
        p.add_(grad, alpha=-lr / n)
        if share:
            p.add_(m, alpha=-lr * share * momentum)
