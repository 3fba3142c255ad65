"""Adam with several first momenta of different speed, and a share of the gradient itself (quasi-hyperbolic)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_dopt._checks import check_choice, check_flag, check_float
from lightning_dopt.optim.per_tensor import PerTensor


class MultiMomentumAdam(PerTensor):
    """``x <- x - lr ((1 - sum w_j) g + sum w_j u_j) / (sqrt(v) + eps)`` with ``u_j <- beta_j u_j + (1 - beta_j) g``.

    A slow momentum (``beta`` 0.99 to 0.999) outlasts many steps without communication, the share ``1 - sum w_j`` of the
    gradient keeps the step responsive. With one momentum it is quasi-hyperbolic Adam, with ``w = 1`` Adam(W), without a
    second moment quasi-hyperbolic SGD. States are called ``exp_avg``, ``exp_avg_1``, ... and ``exp_avg_sq``, so that a plan
    can average each with a period of its own (:func:`lightning_dopt.plans.mt_dao`).

    Args:
        params: Tensors, or groups of them.
        lr: Learning rate, at least 0.
        betas: Decay of each first momentum, in [0, 1).
        weights: Share of each in the step, at least 0; they sum to at most 1.
        beta2: Decay of the second moment in [0, 1); ``None`` for none.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, as in AdamW: ``x <- x (1 - lr weight_decay)`` first.
        bias_correction: Whether moments are divided by ``1 - beta^t``, as in Adam; without a second moment it is of the momenta.
        base: ``"adam"``; ``"adopt"`` divides the gradient by the root of the *previous* second moment (at least ``eps``) before the
            momenta see it, with no bias correction; its first step only starts the second moment.

    Raises:
        ValueError: an option out of range, lists of different length, or ``base="adopt"`` without a second moment.

    Source: Iacob et al., "MT-DAO", arXiv 2510.05361; Ma, Yarats, "Quasi-hyperbolic momentum and Adam", arXiv 1810.06801;
    Taniguchi et al., "ADOPT", arXiv 2411.02853.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: Sequence[float] = (0.995,),
        weights: Sequence[float] = (0.9,),
        beta2: float | None = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        base: Literal["adam", "adopt"] = "adam",
    ) -> None:
        name = "MultiMomentumAdam"
        check_float(name, "lr", lr, 0.0)
        check_float(name, "eps", eps, 0.0)
        check_float(name, "weight_decay", weight_decay, 0.0)
        check_flag(name, "bias_correction", bias_correction)
        check_choice(name, "base", base, ("adam", "adopt"))
        for beta in betas:
            check_float(name, "betas", beta, 0.0, 1.0, open_high=True)
        if len(betas) != len(weights) or not betas or min(weights) < 0 or sum(weights) > 1 + 1e-9:
            raise ValueError(
                f"{name}(betas={tuple(betas)}, weights={tuple(weights)}): needs one weight of at least 0 per momentum, in all "
                "at most 1"
            )
        if beta2 is not None:
            check_float(name, "beta2", beta2, 0.0, 1.0, open_high=True)
        elif base == "adopt":
            raise ValueError(f"{name}(base='adopt', beta2=None): ADOPT divides by a second moment, give beta2")
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": tuple(betas),
                "weights": tuple(weights),
                "beta2": beta2,
                "eps": eps,
                "weight_decay": weight_decay,
                "bias_correction": bias_correction,
                "base": base,
            },
        )

    def _step(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, beta2 = self.state[p], group["beta2"]
        if not state:
            state["step"] = torch.zeros(())
            for key in _names(group):
                state[key] = torch.zeros_like(p)
            if beta2 is not None:
                state["exp_avg_sq"] = torch.zeros_like(p)
        state["step"] += 1
        step = float(state["step"])
        if group["weight_decay"]:
            p.mul_(1.0 - group["lr"] * group["weight_decay"])
        if group["base"] == "adopt":
            self._adopt(p, grad, state, group, first=step == 1)
            return
        correct = group["bias_correction"]
        direction = _blend(state, grad, group, step if correct else None)
        if beta2 is not None:
            v = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
            root = v.sqrt()
            if correct:
                root.div_((1.0 - beta2**step) ** 0.5)
            direction.div_(root.add_(group["eps"]))
        p.add_(direction, alpha=-group["lr"])

    def _adopt(self, p: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any], first: bool) -> None:
        v, beta2 = state["exp_avg_sq"], group["beta2"]
        if first:
            v.addcmul_(grad, grad)
            return
        p.add_(_blend(state, grad / v.sqrt().clamp_(min=group["eps"]), group, None), alpha=-group["lr"])
        v.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)


def _names(group: dict[str, Any]) -> list[str]:
    """Names of the states that hold the momenta."""
    return ["exp_avg" if j == 0 else f"exp_avg_{j}" for j in range(len(group["betas"]))]


def _blend(state: dict[str, Tensor], grad: Tensor, group: dict[str, Any], step: float | None) -> Tensor:
    """Move the momenta; ``(1 - sum w) g + sum w u``, the momenta without their bias if ``step`` says how old they are."""
    direction = grad * (1.0 - sum(group["weights"]))
    for key, beta, weight in zip(_names(group), group["betas"], group["weights"], strict=True):
        u = state[key].mul_(beta).add_(grad, alpha=1.0 - beta)
        direction.add_(u, alpha=weight if step is None else weight / (1.0 - beta**step))
    return direction
