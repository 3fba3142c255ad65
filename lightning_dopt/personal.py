"""A shared model and a personal one, mixed: what each client of APFL trains."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_dopt._checks import check_float


class Personal(nn.Module):
    """APFL's model: ``shared`` (``w``) is trained for all ranks, ``personal`` (``v``) so that the mixture suits this one.

    The mixture is ``u = alpha v + (1 - alpha) w``; called, it predicts with that. :meth:`loss` is the sum of the loss of ``w`` and
    that of ``u`` with ``w`` held fixed: one backward pass gives ``grad f(w)`` to ``w`` and ``alpha grad f(u)`` to ``v``. With
    ``plans.apfl()`` the shared copy is averaged, and nothing of the personal one, nor ``alpha``, is ever sent.

    Args:
        model: Becomes ``shared``; a copy of it ``personal``.
        alpha: Share of the personal model, in [0, 1].
        learn: Whether ``alpha`` is a parameter, trained with the others; its gradient is ``<grad f(u), v - w> + 0.02 alpha``, and
            each forward pass brings it back into [0, 1]. (The paper's code moves it once a round.)

    Raises:
        ValueError: ``alpha`` outside [0, 1], or parts of ``model`` called ``shared`` or ``personal``, which the plan's
            pattern could not tell apart.

    Source: Deng, Kamani, Mahdavi, "Adaptive Personalized Federated Learning", arXiv 2003.13461.
    """

    alpha: Tensor

    def __init__(self, model: nn.Module, alpha: float = 0.5, learn: bool = True) -> None:
        super().__init__()
        start = torch.tensor(check_float("Personal", "alpha", alpha, 0.0, 1.0))
        if any({"shared", "personal"} & set(name.split(".")) for name, _ in model.named_modules()):
            raise ValueError("Personal(model=...): no part of it may be called 'shared' or 'personal'")
        self.shared, self.personal = model, deepcopy(model)
        if learn:
            self.alpha = nn.Parameter(start)
        else:
            self.register_buffer("alpha", start)

    def forward(self, *args: Any) -> Any:
        """Predict with the mixed model."""
        return self._mixed(*args)

    def _mixed(self, *args: Any) -> Any:
        with torch.no_grad():
            self.alpha.clamp_(0.0, 1.0)
        shared = dict(self.shared.named_parameters())
        mixed = {
            name: self.alpha * v + (1.0 - self.alpha) * shared[name].detach()
            for name, v in self.personal.named_parameters()
        }
        return functional_call(self.personal, mixed, args)

    def loss(self, of: Callable[[Callable[..., Any]], Tensor]) -> Tensor:
        """What to train on; ``of`` gives the loss of a model that it may call, such as ``lambda net: mse(net(x), y)``."""
        total = of(self.shared) + of(self._mixed)
        return total + 0.01 * self.alpha.square() if isinstance(self.alpha, nn.Parameter) else total
