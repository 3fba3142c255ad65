"""Published methods with a hub, as rules."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_dopt.asynchronous.hub_rules import (
    Count,
    HubRule,
    OnArrival,
    StalenessWeights,
    TimeCorrected,
    Timer,
)
from lightning_dopt.outer import SGD, DelayedNesterov


def delayed_nesterov(
    n: int, lr: float = 0.7, momentum: float = 0.9, spread: float = 0.0, grace: float = 0.0
) -> HubRule:
    """Asynchronous Local-SGD with delayed Nesterov momentum (DN); ``LocalSteps(H, dynamic=True)`` beside it is DN + DyLU.

    Every push moves the reference by ``lr / n`` of itself at once, the momentum moves with every ``n``-th push.

    Args:
        n: Pushes for one step of the momentum: the number of workers.
        lr: Outer learning rate.
        momentum: Outer momentum.
        spread: The paper's ``c``; see :class:`~lightning_dopt.optim.DelayedNesterov`.
        grace: Seconds for which the first push waits for others.

    Returns:
        The rule.

    Raises:
        ValueError: an option out of range.

    Source: Liu et al., arXiv 2401.09135; rate and momentum of DiLoCo.
    """
    return HubRule(OnArrival(grace), outer=DelayedNesterov(lr, momentum, n, spread))


def fedasync(lr: float = 0.6, power: float = 0.5) -> HubRule:
    """FedAsync: ``a <- (1 - w) a + w x`` on every arrival, with ``w = lr (1 + staleness)^(-power)``.

    Args:
        lr: Weight of a model that is not stale, in (0, 1].
        power: See :class:`StalenessWeights`.

    Returns:
        The rule.

    Raises:
        ValueError: an option out of range.

    Source: Xie et al., "Asynchronous Federated Optimization", arXiv 1903.03934; the default rate is ours.
    """
    if not 0.0 < lr <= 1.0:
        raise ValueError(f"fedasync(lr={lr!r}): must be a number in (0, 1]")
    return HubRule(OnArrival(), StalenessWeights(power), SGD(lr), signal="value")


def fedbuff(pushes: int = 10, lr: float = 1.0, power: float = 0.5) -> HubRule:
    """FedBuff: one step for every ``pushes`` pushes, along their mean with old ones discounted; nobody waits.

    Args:
        pushes: Size of the buffer.
        lr: Learning rate of the hub.
        power: See :class:`StalenessWeights`; 0 is the plain mean.

    Returns:
        The rule.

    Raises:
        ValueError: an option out of range.

    Source: Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", arXiv 2106.06639.
    """
    return HubRule(Count(pushes), StalenessWeights(power), SGD(lr))


def fedfix(seconds: float, lr: float = 1.0, shares: Sequence[float] | None = None) -> HubRule:
    """FedFix: a step every ``seconds`` with whoever has finished, weighted so that slow workers count as much as fast ones.

    Args:
        seconds: Time between steps; from the slowest worker's duration on this is FedAvg.
        lr: Learning rate of the hub.
        shares: Importance of every worker; ``None``: all alike.

    Returns:
        The rule.

    Raises:
        ValueError: an option out of range.

    Source: Fraboni et al., arXiv 2206.10189; see :class:`TimeCorrected`.
    """
    return HubRule(Timer(seconds), TimeCorrected(shares), SGD(lr))
