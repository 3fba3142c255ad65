"""Averages that become rarer, quadratically, as the learning rate falls."""

from __future__ import annotations

from lightning_dopt._checks import check_float, check_int
from lightning_dopt.plan import Plan, Sync
from lightning_dopt.schedules import QSR, AtEnd


def qsr(alpha: float = 0.0175, base: int = 4, power: float = 2.0, warmup: int = 0, steps: int | None = None) -> Plan:
    """Local SGD or AdamW whose rounds have ``max(base, floor((alpha / lr)^2))`` steps.

    Few averages late in training, when the rate is low, let models generalise better than an average in every step; rounds
    must become long for that. Optimizer states stay local. See :class:`~lightning_dopt.QSR`.

    Args:
        alpha: Growth of the rounds; the default is for AdamW with a peak rate of 0.008, SGD wants 0.2 to 0.3.
        base: Length of the shortest round.
        power: 2 is the rule.
        warmup: Steps in which rounds have length ``base``, however small the rate.
        steps: Optimizer steps of the whole run, where the last round ends; ``None`` adds an average at the end.

    Raises:
        ValueError: an option out of range; when training starts, a scheduler that follows a metric.

    Source: Gu et al., "A Quadratic Synchronization Rule for Distributed Deep Learning", arXiv 2310.14423.
    """
    check_float("qsr", "alpha", alpha, 0.0)
    check_int("qsr", "base", base, 1)
    check_float("qsr", "power", power, 0.0, open_low=True)
    check_int("qsr", "warmup", warmup, 0)
    if steps is not None:
        check_int("qsr", "steps", steps, 1)
    last = [Sync(AtEnd())] if steps is None else []
    return Plan([Sync(QSR(alpha, base, power, warmup, steps)), *last])
