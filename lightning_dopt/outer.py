"""Outer: how the reference (anchor) moves once the peers' messages have been combined."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_dopt._checks import check_flag, check_float, check_int
from lightning_dopt._part import Part
from lightning_dopt.optim import delayed_nesterov
from lightning_dopt.optim.stale_momentum import StaleMomentum


class Outer(Part, ABC):
    """An optimizer on the anchor; its gradient is the combined ``anchor - live`` (so it descends with it)."""

    pull: float = 1.0
    """How strongly anchors that differ are drawn together, relative to the pull towards the mixed live weights: the gradient
    is ``anchor - mixed live + (pull - 1) (anchor - mixed anchors)``. It still takes one message, ``live + (pull - 1) anchor``."""

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
        self.nesterov = check_flag(owner, "nesterov", nesterov)
        if nesterov and momentum == 0.0:
            raise ValueError("SGD(nesterov=True): needs a momentum in (0, 1), got momentum=0")

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


class GossipMomentum(Outer):
    """NoLoCo's outer step over random pairs: ``d <- alpha d - beta D - gamma (a - A)``, ``a <- a + d``.

    ``a`` is this rank's anchor and ``A`` the mean of its group's; ``D`` is the group's mean change ``anchor - live``. As
    ``D = A - X`` with the mean ``X`` of the live weights, the step is heavy ball with rate ``beta`` along
    ``(gamma / beta) a - (X + (gamma / beta - 1) A)``: whatever ``gamma``, one tensor crosses the network. Over everybody all
    anchors are equal and ``gamma`` does nothing.

    Args:
        alpha: Outer momentum in [0, 1).
        beta: Outer learning rate, above 0.
        gamma: Pull of the anchors towards each other, above 0. Replicas in random pairs of many workers stay together for
            ``gamma < 2 (1 - alpha^2)``.

    Raises:
        ValueError: an option out of range.

    Source: Kolehmainen et al., "NoLoCo: No-all-reduce Low Communication Training Method for Large Models", arXiv 2506.10911;
    defaults of the authors' configurations.
    """

    def __init__(self, alpha: float = 0.5, beta: float = 0.7, gamma: float = 0.7) -> None:
        self.alpha = check_float("GossipMomentum", "alpha", alpha, 0.0, 1.0, open_high=True)
        self.beta = check_float("GossipMomentum", "beta", beta, 0.0, open_low=True)
        self.gamma = check_float("GossipMomentum", "gamma", gamma, 0.0, open_low=True)

    @property
    def pull(self) -> float:  # type: ignore[override]
        """``gamma / beta``; see :attr:`Outer.pull`."""
        return self.gamma / self.beta

    def build(self, anchors: list[Tensor]) -> Optimizer:
        """See :meth:`Outer.build`."""
        return torch.optim.SGD(anchors, lr=self.beta, momentum=self.alpha)


class LateMomentum(Outer):
    """CO2's outer step for changes that come a round late: heavy ball with a staleness penalty and clipped momentum.

    ``m <- clamp(mu m + g / L, -clip, clip)``, ``a <- a - lr m``; see :class:`~lightning_dopt.optim.StaleMomentum`.

    Args:
        lr: Outer learning rate.
        momentum: Outer momentum in [0, 1). The authors take 0 up to 16 workers, 0.2 up to 32, 0.5 up to 64, then 0.6.
        clip: Bound on every element of the momentum, at least 0; ``None`` for none.
        penalty: Constant part of ``L``, at least 1.
        gap_aware: Whether ``L`` is larger where the anchor has just moved far.

    Raises:
        ValueError: an option out of range.

    Source: Sun et al., "CO2", arXiv 2401.16265; how the gap is normalised is ours.
    """

    def __init__(
        self,
        lr: float = 1.0,
        momentum: float = 0.0,
        clip: float | None = 1.0,
        penalty: float = 1.0,
        gap_aware: bool = False,
    ) -> None:
        self.lr = check_float("LateMomentum", "lr", lr, 0.0, open_low=True)
        self.momentum = check_float("LateMomentum", "momentum", momentum, 0.0, 1.0, open_high=True)
        self.clip = clip if clip is None else check_float("LateMomentum", "clip", clip, 0.0)
        self.penalty = check_float("LateMomentum", "penalty", penalty, 1.0)
        self.gap_aware = check_flag("LateMomentum", "gap_aware", gap_aware)

    def build(self, anchors: list[Tensor]) -> Optimizer:
        """See :meth:`Outer.build`."""
        return StaleMomentum(anchors, self.lr, self.momentum, self.clip, self.penalty, self.gap_aware)


class DelayedNesterov(Outer):
    """Nesterov momentum for changes that arrive one by one at a hub; see :class:`~lightning_dopt.optim.DelayedNesterov`.

    Every change moves the anchor by ``lr / delay`` of itself at once, the momentum moves with every ``delay``-th. In a plan,
    where the mean over all ranks counts as one change, the momentum moves every ``delay`` rounds.

    Args:
        lr: Outer learning rate.
        momentum: Outer momentum in [0, 1).
        delay: Changes for one step of the momentum; at a hub the number of workers.
        spread: Share in [0, 1 / delay] of the momentum that acts with every change; 0 lets it act with every ``delay``-th alone.

    Raises:
        ValueError: an option out of range.

    Source: Liu et al., "Asynchronous Local-SGD Training for Language Modeling", arXiv 2401.09135; rate and momentum of DiLoCo.
    """

    def __init__(self, lr: float = 0.7, momentum: float = 0.9, delay: int = 1, spread: float = 0.0) -> None:
        self.lr = check_float("DelayedNesterov", "lr", lr, 0.0, open_low=True)
        self.momentum = check_float("DelayedNesterov", "momentum", momentum, 0.0, 1.0, open_high=True)
        self.delay = check_int("DelayedNesterov", "delay", delay, 1)
        self.spread = check_float("DelayedNesterov", "spread", spread, 0.0, 1.0 / delay)

    def build(self, anchors: list[Tensor]) -> Optimizer:
        """See :meth:`Outer.build`."""
        return delayed_nesterov.DelayedNesterov(anchors, self.lr, self.momentum, self.delay, self.spread)


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
