"""Outer: how the reference (anchor) moves once the peers' messages have been combined."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_dopt._checks import check_float
from lightning_dopt._part import Part


class Outer(Part, ABC):
    """An optimizer on the anchor; its gradient is the combined ``anchor - live`` (so it descends with it)."""

    @abstractmethod
    def build(self, anchors: list[Tensor]) -> Optimizer:
        """A fresh ``torch.optim`` optimizer over the anchor tensors."""


class SGD(Outer):
    """``torch.optim.SGD`` on the anchor; ``SGD()`` is plain averaging.

    Args:
        lr: Outer learning rate; 1 without momentum moves the anchor onto the mean of the live weights.
        momentum: Outer momentum ``mu``: ``b <- mu b + d``, ``a <- a - lr b``.
        nesterov: Whether to step with ``d + mu b`` instead of ``b``.

    Raises:
        ValueError: ``lr <= 0``, ``momentum`` outside [0, 1), or ``nesterov`` without momentum.
    """

    def __init__(self, lr: float = 1.0, momentum: float = 0.0, nesterov: bool = False) -> None:
        owner = type(self).__name__
        self.lr = check_float(owner, "lr", lr, 0.0, open_low=True)
        self.momentum = check_float(owner, "momentum", momentum, 0.0, 1.0, open_high=True)
        if nesterov and momentum == 0.0:
            raise ValueError("SGD(nesterov=True): needs a momentum in (0, 1), got momentum=0")
        self.nesterov = nesterov

    def build(self, anchors: list[Tensor]) -> Optimizer:
        """See :meth:`Outer.build`."""
        return torch.optim.SGD(anchors, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)


class Nesterov(SGD):
    """Nesterov momentum as DiLoCo uses it (arXiv 2311.08105; defaults of the paper).

    Args:
        lr: Outer learning rate.
        momentum: Outer momentum in (0, 1).

    Raises:
        ValueError: ``lr <= 0`` or ``momentum`` outside (0, 1).
    """

    def __init__(self, lr: float = 0.7, momentum: float = 0.9) -> None:
        check_float("Nesterov", "momentum", momentum, 0.0, 1.0, open_low=True, open_high=True)
        super().__init__(lr=lr, momentum=momentum, nesterov=True)


class HeavyBall(SGD):
    """Heavy-ball momentum (SlowMo, arXiv 1910.00643).

    Args:
        lr: Outer learning rate.
        momentum: Outer momentum in [0, 1).

    Raises:
        ValueError: ``lr <= 0`` or ``momentum`` outside [0, 1).
    """

    def __init__(self, lr: float = 1.0, momentum: float = 0.5) -> None:
        super().__init__(lr=lr, momentum=momentum)


class Adam(Outer):
    """``torch.optim.Adam`` on the anchor, with bias correction.

    Args:
        lr: Outer learning rate.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the root of the second moment (federated optimization uses large values, about 1e-3).

    Raises:
        ValueError: ``lr <= 0``, a decay outside [0, 1), or ``eps < 0``.
    """

    def __init__(self, lr: float = 1e-2, beta1: float = 0.9, beta2: float = 0.99, eps: float = 1e-3) -> None:
        self.lr = check_float("Adam", "lr", lr, 0.0, open_low=True)
        self.beta1 = check_float("Adam", "beta1", beta1, 0.0, 1.0, open_high=True)
        self.beta2 = check_float("Adam", "beta2", beta2, 0.0, 1.0, open_high=True)
        self.eps = check_float("Adam", "eps", eps, 0.0)

    def build(self, anchors: list[Tensor]) -> Optimizer:
        """See :meth:`Outer.build`."""
        return torch.optim.Adam(anchors, lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps)


class FromOptimizer(Outer):
    """Any ``torch.optim`` optimizer on the anchor.

    Args:
        optimizer: Called with the list of anchor tensors, returns the optimizer, for example
            ``functools.partial(torch.optim.Adagrad, lr=0.1)``. In YAML: ``class_path: torch.optim.Adagrad``.

    Raises:
        TypeError: ``optimizer`` cannot be called.
    """

    def __init__(self, optimizer: Callable[[list[Tensor]], Optimizer]) -> None:
        if not callable(optimizer):
            raise TypeError(f"FromOptimizer(optimizer={optimizer!r}): must be a function of a list of tensors")
        self.optimizer = optimizer

    def __repr__(self) -> str:
        return f"FromOptimizer(optimizer={_described(self.optimizer)})"

    def build(self, anchors: list[Tensor]) -> Optimizer:
        """See :meth:`Outer.build`."""
        return self.optimizer(anchors)


def _described(value: object) -> str:
    """The printed form, without addresses: checkpoints compare plans by their text."""
    if isinstance(value, functools.partial):
        options = [f"{name}={_described(v)}" for name, v in value.keywords.items()]
        return f"partial({', '.join([*map(_described, (value.func, *value.args)), *options])})"
    name = getattr(value, "__qualname__", None)
    if name is None and type(value).__repr__ is object.__repr__:
        name = type(value).__qualname__
    return name or repr(value)
