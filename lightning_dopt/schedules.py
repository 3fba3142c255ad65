"""When: on which optimizer steps a sync is due."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from lightning_dopt._checks import check_float, check_int
from lightning_dopt._part import Part
from lightning_dopt._random import uniform


class When(Part, ABC):
    """A schedule over optimizer steps.

    Steps are numbered from 1 and count *attempted* steps of the clock optimizer (after gradient accumulation; a step
    that loss scaling skips still counts). The answer depends on the number and on shared seeds alone, so all ranks
    agree without talking.
    """

    at_end: bool = False
    """Whether the sync runs once more after the last step of training."""

    measured: bool = False
    """Whether the engine measures how far replicas are apart before it decides."""

    reads_lr: bool = False
    """Whether the length of a round depends on the learning rate, which the engine reads when the round begins."""

    reads_size: bool = False
    """Whether the length of a round depends on how long the messages of the sync have become."""

    @property
    def in_rounds(self) -> bool:
        """Whether the engine asks how long a round is when it begins."""
        return self.reads_lr or self.reads_size

    @abstractmethod
    def due(self, step: int) -> bool:
        """Whether the sync belongs to optimizer step ``step`` (1 is the first)."""


class Every(When):
    """Every ``n``-th step: due when ``step > offset`` and ``(step - offset) % n == 0``.

    Args:
        n: The period in optimizer steps (called H, tau or K in papers). With ``offset=0`` the first sync belongs to
            step ``n``, so every round, the first included, has exactly ``n`` steps.
        offset: Shifts the whole schedule by that many steps.

    Raises:
        ValueError: ``n < 1`` or ``offset < 0``.
    """

    def __init__(self, n: int = 1, offset: int = 0) -> None:
        self.n = check_int("Every", "n", n, 1)
        self.offset = check_int("Every", "offset", offset, 0)

    def due(self, step: int) -> bool:
        """See :meth:`When.due`."""
        return step > self.offset and (step - self.offset) % self.n == 0


class Bernoulli(When):
    """Each step is due with probability ``p``, drawn from ``(seed, step)`` and so the same on all ranks.

    Args:
        p: Probability in (0, 1].
        seed: Seed of the draws.

    Raises:
        ValueError: ``p`` outside (0, 1] or a negative seed.
    """

    def __init__(self, p: float, seed: int = 0) -> None:
        self.p = check_float("Bernoulli", "p", p, 0.0, 1.0, open_low=True)
        self.seed = check_int("Bernoulli", "seed", seed, 0)

    def due(self, step: int) -> bool:
        """See :meth:`When.due`."""
        return uniform(self.seed, step) < self.p


class Drifted(When):
    """When replicas have drifted apart: measure at the steps of ``when``, sync if the distance exceeds a threshold.

    The distance is that of ``consensus/distance``, ``sqrt(mean_i ||x_i - mean||^2)``, estimated from a random sketch: 257
    numbers per measurement cross the network instead of the model, and the estimate is right on average, to about 10 %.
    All ranks get the same estimate and so decide alike. A sync that measures needs all ranks at those steps, also over a
    sparse graph.

    Args:
        threshold: Distance above which ranks sync, above 0.
        when: At which steps to measure; ``None`` means every step.
        relative: Whether the threshold is a share of the norm of the mean model.

    Raises:
        ValueError: ``threshold <= 0`` or a schedule inside that measures itself.

    Source: Kong et al., "Consensus Control for Decentralized Deep Learning", arXiv 2102.04828.
    """

    measured = True

    def __init__(self, threshold: float, when: When | None = None, relative: bool = False) -> None:
        self.threshold = check_float("Drifted", "threshold", threshold, 0.0, open_low=True)
        self.when = _unmeasured("Drifted", when if when is not None else Every(1))
        self.relative = relative

    def due(self, step: int) -> bool:
        """Whether the distance is measured at ``step``; the engine decides whether a sync follows."""
        return self.when.due(step)


class ByBytes(When):
    """Rounds as long as messages are large: ``n`` steps at the start, ``max(least, ceil(n bytes / bytes at the start))`` later.

    For codecs whose messages change during training, such as :class:`~lightning_dopt.compress.KeepEnergy`: as they shrink ranks
    meet more often, and the traffic per step stays what it was. Of several syncs with this very schedule the first counts.

    Args:
        n: Length of the first round, in optimizer steps.
        least: Shortest round.

    Raises:
        ValueError: an option below 1, or ``least`` above ``n``.

    Source: the adaptive number of local steps of Qi et al., "DiLoCoX", arXiv 2506.21263, whose rule could not be checked; this
    one is ours.
    """

    reads_size = True

    def __init__(self, n: int, least: int = 1) -> None:
        self.n = check_int("ByBytes", "n", n, 1)
        self.least = check_int("ByBytes", "least", least, 1)
        if least > n:
            raise ValueError(f"ByBytes(n={n}, least={least}): the shortest round cannot be longer than the first")

    def due(self, step: int) -> bool:
        """Whether a sync may belong to ``step``; the engine knows when the round ends."""
        return step >= 1

    def length(self, share: float) -> int:
        """Steps of a round whose messages have ``share`` of the bytes that they had at the start."""
        return max(self.least, math.ceil(self.n * share))


class QSR(When):
    """Quadratic synchronization rule: rounds grow as the learning rate falls, ``H = max(base, floor((alpha / lr)^power))``.

    The rate is read when a round begins: after the average and after a scheduler has moved on. It is that of the first
    trainable parameter (the first group of the optimizer in most models). All ranks must have the same, so a strategy refuses
    schedulers that follow a metric. A rate of 0 tells nothing: such a round has ``base`` steps.

    Args:
        alpha: Growth: about 0.0175 for AdamW with a peak of 0.008, 0.2 to 0.3 for SGD. Rounds are longer than ``base`` where the
            rate is below ``alpha / base^(1 / power)``; 0 keeps them at ``base``.
        base: Length of the shortest round, in optimizer steps.
        power: 2 is the rule; 1 and 3 are the alternatives the paper compares with.
        warmup: Rounds that begin in the first ``warmup`` steps have ``base`` steps, however small the rate.
        steps: Optimizer steps of the whole run: the last round ends there. ``None``: add a sync with ``AtEnd()``.

    Raises:
        ValueError: an option out of range.

    Source: Gu et al., "A Quadratic Synchronization Rule for Distributed Deep Learning", arXiv 2310.14423.
    """

    reads_lr = True

    def __init__(
        self, alpha: float, base: int = 4, power: float = 2.0, warmup: int = 0, steps: int | None = None
    ) -> None:
        self.alpha = check_float("QSR", "alpha", alpha, 0.0)
        self.base = check_int("QSR", "base", base, 1)
        self.power = check_float("QSR", "power", power, 0.0, open_low=True)
        self.warmup = check_int("QSR", "warmup", warmup, 0)
        self.steps = steps if steps is None else check_int("QSR", "steps", steps, 1)

    def due(self, step: int) -> bool:
        """Whether a sync may belong to ``step``; the engine knows when the round ends."""
        return step >= 1

    def length(self, lr: float, step: int) -> int:
        """Steps of the round that begins after ``step`` completed steps, at the learning rate ``lr`` of the coming step."""
        length = self.base
        if lr > 0 and step >= self.warmup:
            ratio = self.alpha / lr
            grown = min(ratio, _FOREVER ** (1.0 / self.power)) ** self.power
            length = max(self.base, int(grown))
        return length if self.steps is None else max(1, min(length, self.steps - step))


_FOREVER = 1e9


def _unmeasured(owner: str, when: When) -> When:
    if when.measured:
        raise ValueError(
            f"{owner}(when={when!r}): cannot hold a schedule that measures; put it inside: Drifted(when=...)"
        )
    if when.in_rounds:
        raise ValueError(f"{owner}(when={when!r}): cannot hold a schedule whose rounds differ in length")
    return when


class After(When):
    """Nothing during the first ``start`` steps, then ``when`` with its steps counted from there.

    Args:
        start: Number of steps without a sync.
        when: The schedule that follows, whose step 1 is step ``start + 1``.

    Raises:
        ValueError: ``start < 0``.
    """

    def __init__(self, start: int, when: When) -> None:
        self.start = check_int("After", "start", start, 0)
        self.when = _unmeasured("After", when)

    def due(self, step: int) -> bool:
        """See :meth:`When.due`."""
        return step > self.start and self.when.due(step - self.start)


class Until(When):
    """``when`` during the first ``stop`` steps, nothing afterwards.

    Together with :class:`After` this composes phases: post-local SGD is a sync with ``Until(1000, Every(1))`` beside
    one with ``After(1000, Every(8))``.

    Args:
        stop: Last step on which ``when`` is asked.
        when: The schedule of the first phase.

    Raises:
        ValueError: ``stop < 1``.
    """

    def __init__(self, stop: int, when: When) -> None:
        self.stop = check_int("Until", "stop", stop, 1)
        self.when = _unmeasured("Until", when)

    def due(self, step: int) -> bool:
        """See :meth:`When.due`."""
        return step <= self.stop and self.when.due(step)


class Either(When):
    """Due when one of two schedules is, or both.

    ``Either(Until(1, Every(1)), Bernoulli(0.1))`` is the first step, then one in ten by chance.

    Args:
        one: A schedule.
        other: Another.

    Raises:
        ValueError: a schedule that measures, or one for the end.
    """

    def __init__(self, one: When, other: When) -> None:
        self.one, self.other = _unmeasured("Either", one), _unmeasured("Either", other)
        if one.at_end or other.at_end:
            raise ValueError("Either(AtEnd()): the end of training is no step; give it a sync of its own")

    def due(self, step: int) -> bool:
        """See :meth:`When.due`."""
        return self.one.due(step) or self.other.due(step)


class AtEnd(When):
    """Once, after the last step of training (lo-fi, final merging)."""

    at_end = True

    def __init__(self) -> None:
        pass

    def due(self, step: int) -> bool:
        """Never during training."""
        return False
