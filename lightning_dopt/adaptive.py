"""Adaptive outer optimizers of federated learning: FedAdagrad, FedAdam, FedYogi."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_dopt._checks import check_float
from lightning_dopt.optim.per_tensor import PerTensor
from lightning_dopt.outer import Outer

Rule = Literal["adagrad", "adam", "yogi"]


class ServerOptimizer(PerTensor):
    """The optimizer behind :class:`FedAdagrad`, :class:`FedAdam` and :class:`FedYogi`.

    ``m <- beta1 m + (1 - beta1) g``, ``v`` by the rule, ``a <- a - lr m / (sqrt(v) + tau)``: no bias correction, and ``v``
    starts at ``tau^2``, not at zero.

    Args:
        parameters: The anchors.
        rule: ``"adagrad"`` adds ``g^2`` to ``v``; ``"adam"`` takes ``beta2 v + (1 - beta2) g^2``; ``"yogi"`` takes
            ``v - (1 - beta2) g^2 sign(v - g^2)``, which changes by ``(1 - beta2) g^2`` at most.
        lr: Learning rate.
        beta1: Decay of ``m``.
        beta2: Decay of ``v``; without effect for ``"adagrad"``.
        tau: Degree of adaptivity; smaller adapts more.
    """

    def __init__(self, parameters: list[Tensor], rule: Rule, lr: float, beta1: float, beta2: float, tau: float) -> None:
        self.rule = rule
        super().__init__(parameters, {"lr": lr, "beta1": beta1, "beta2": beta2, "tau": tau})

    def _step(self, a: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        state, tau, keep = self.state[a], group["tau"], group["beta2"]
        if not state:
            state["m"], state["v"] = torch.zeros_like(a), torch.full_like(a, tau**2)
        m, v = state["m"], state["v"]
        m.lerp_(g, 1.0 - group["beta1"])
        if self.rule == "adagrad":
            v.addcmul_(g, g)
        elif self.rule == "adam":
            v.mul_(keep).addcmul_(g, g, value=1.0 - keep)
        else:
            square = g * g
            v.sub_(square.mul(torch.sign(v - square)), alpha=1.0 - keep)
        a.addcdiv_(m, v.sqrt().add_(tau), value=-group["lr"])


class FedAdagrad(Outer):
    """Adagrad on the anchor: ``v <- v + g^2``.

    Args:
        lr: Outer learning rate, above 0.
        beta1: Decay of the first moment, in [0, 1); the paper has none here.
        tau: Degree of adaptivity, above 0; ``v`` starts at its square.

    Raises:
        ValueError: an argument out of range.

    Source: Reddi et al., "Adaptive Federated Optimization", arXiv 2003.00295, algorithm 2.
    """

    def __init__(self, lr: float = 0.1, beta1: float = 0.0, tau: float = 1e-3) -> None:
        self.lr, self.beta1, self.tau = _checked(type(self).__name__, lr, beta1, tau)

    def build(self, anchors: list[Tensor]) -> Optimizer:
        """See :meth:`Outer.build`."""
        return ServerOptimizer(anchors, "adagrad", self.lr, self.beta1, 0.0, self.tau)


class FedAdam(Outer):
    """Adam on the anchor, without bias correction: ``v <- beta2 v + (1 - beta2) g^2``.

    Args:
        lr: Outer learning rate, above 0.
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
        tau: Degree of adaptivity, above 0; ``v`` starts at its square.

    Raises:
        ValueError: an argument out of range.

    Source: Reddi et al., "Adaptive Federated Optimization", arXiv 2003.00295, algorithm 2.
    """

    rule: Rule = "adam"

    def __init__(self, lr: float = 0.1, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> None:
        self.lr, self.beta1, self.tau = _checked(type(self).__name__, lr, beta1, tau)
        self.beta2 = check_float(type(self).__name__, "beta2", beta2, 0.0, 1.0, open_high=True)

    def build(self, anchors: list[Tensor]) -> Optimizer:
        """See :meth:`Outer.build`."""
        return ServerOptimizer(anchors, self.rule, self.lr, self.beta1, self.beta2, self.tau)


class FedYogi(FedAdam):
    """Yogi on the anchor: ``v <- v - (1 - beta2) g^2 sign(v - g^2)``, so that ``v`` falls slowly after large changes.

    Args:
        lr: Outer learning rate, above 0.
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
        tau: Degree of adaptivity, above 0; ``v`` starts at its square.

    Raises:
        ValueError: an argument out of range.

    Source: Reddi et al., "Adaptive Federated Optimization", arXiv 2003.00295, algorithm 2.
    """

    rule: Rule = "yogi"


def _checked(owner: str, lr: float, beta1: float, tau: float) -> tuple[float, float, float]:
    return (
        check_float(owner, "lr", lr, 0.0, open_low=True),
        check_float(owner, "beta1", beta1, 0.0, 1.0, open_high=True),
        check_float(owner, "tau", tau, 0.0, open_low=True),
    )
