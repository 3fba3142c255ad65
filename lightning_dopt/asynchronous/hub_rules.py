"""What a hub does with the work of workers that come at times of their own: when it steps, with which weights, how."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import isclose
from typing import Literal

from lightning_dopt._checks import check_choice, check_flag, check_float, check_int
from lightning_dopt._part import Part
from lightning_dopt.outer import SGD, Outer


class HubWhen(Part, ABC):
    """When the hub steps, and when those that have pushed get the new reference."""

    apart: bool = False
    """Whether every push is a step of its own, or all that have gathered are one."""

    waits: bool = True
    """Whether a worker that has pushed waits for the next step; otherwise it gets the reference at once."""

    period: float | None = None
    """Seconds between steps of a hub that follows a clock; ``None``: the hub follows the pushes."""

    @abstractmethod
    def delay(self, gathered: int, alive: int) -> float | None:
        """In how many seconds the hub is to step, now that ``gathered`` pushes lie there; ``None``: nothing changes."""


class OnArrival(HubWhen):
    """Every push is a step, in the order of arrival.

    Args:
        grace: Seconds for which the first push waits for others. Then all are stepped one after the other, before any of
            their workers goes on; sooner if all workers are there.

    Raises:
        ValueError: ``grace < 0``.
    """

    apart = True

    def __init__(self, grace: float = 0.0) -> None:
        self.grace = check_float("OnArrival", "grace", grace, 0.0)

    def delay(self, gathered: int, alive: int) -> float | None:
        """See :meth:`HubWhen.delay`."""
        if gathered >= alive or self.grace == 0.0:
            return 0.0
        return self.grace if gathered == 1 else None


class Count(HubWhen):
    """One step for every ``pushes`` pushes.

    Args:
        pushes: How many.
        wait: Whether workers wait for the step that takes their push; then a step never waits for more pushes than there are
            workers. With as many pushes as workers this is the synchronous method.

    Raises:
        ValueError: ``pushes < 1``.
    """

    def __init__(self, pushes: int, wait: bool = False) -> None:
        self.pushes = check_int("Count", "pushes", pushes, 1)
        self.wait = check_flag("Count", "wait", wait)

    @property
    def waits(self) -> bool:  # type: ignore[override]
        """See :attr:`HubWhen.waits`."""
        return self.wait

    def delay(self, gathered: int, alive: int) -> float | None:
        """See :meth:`HubWhen.delay`."""
        return 0.0 if gathered >= (min(self.pushes, alive) if self.wait else self.pushes) else None


class Timer(HubWhen):
    """One step every ``seconds``, for whoever has finished; these then go on together.

    A step to which nobody came counts as a version, and leaves the reference and the outer optimizer as they are.

    Args:
        seconds: Time between steps.

    Raises:
        ValueError: ``seconds <= 0``.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = check_float("Timer", "seconds", seconds, 0.0, open_low=True)

    @property
    def period(self) -> float:  # type: ignore[override]
        """See :attr:`HubWhen.period`."""
        return self.seconds

    def delay(self, gathered: int, alive: int) -> float | None:
        """The clock alone decides."""
        return None


@dataclass(frozen=True)
class Arrival:
    """What a hub knows of a push when it steps.

    Args:
        worker: Whose.
        staleness: Steps of the hub since that worker was given the reference (this one not included).
        turn: Steps of the hub since it last took something of that worker (this one included).
        repeats: How many pushes of that worker this step takes.
        steps: Optimizer steps that the push stands for.
    """

    worker: int
    staleness: int
    turn: int = 1
    repeats: int = 1
    steps: int = 1


class HubWeights(Part, ABC):
    """How much each push counts. The outer gradient of a step is ``sum_k w_k g_k`` over the pushes that it takes."""

    @abstractmethod
    def weights(self, arrivals: Sequence[Arrival], n: int) -> list[float]:
        """One weight per push, for ``n`` workers."""

    def check(self, n: int) -> None:
        """Check that the weights suit ``n`` workers.

        Raises:
            ValueError: they do not.
        """


class EqualWeights(HubWeights):
    """The mean of what a step takes. Workers that come more often count more."""

    def weights(self, arrivals: Sequence[Arrival], n: int) -> list[float]:
        """See :meth:`HubWeights.weights`."""
        return [1.0 / len(arrivals)] * len(arrivals)


class StepWeights(HubWeights):
    """The mean of what a step takes, every push weighted by the number of optimizer steps it stands for."""

    def weights(self, arrivals: Sequence[Arrival], n: int) -> list[float]:
        """See :meth:`HubWeights.weights`."""
        total = sum(a.steps for a in arrivals)
        return [a.steps / total for a in arrivals]


class StalenessWeights(HubWeights):
    """The mean, with every push multiplied by ``(1 + staleness)^(-power)``; the weights then sum to less than one.

    Args:
        power: How fast old work loses weight; 0 is the plain mean.

    Raises:
        ValueError: ``power < 0``.

    Source: Xie et al., "Asynchronous Federated Optimization", arXiv 1903.03934 (polynomial discount).
    """

    def __init__(self, power: float = 0.5) -> None:
        self.power = check_float("StalenessWeights", "power", power, 0.0)

    def weights(self, arrivals: Sequence[Arrival], n: int) -> list[float]:
        """See :meth:`HubWeights.weights`."""
        return [(1.0 + a.staleness) ** -self.power / len(arrivals) for a in arrivals]


class TimeCorrected(HubWeights):
    """``share_i`` times the number of steps since the hub last took something of worker ``i``, divided among its pushes.

    Up to its last push worker ``i`` has had ``share_i`` times the number of steps as weight, whatever its speed: slow
    workers count as much as fast ones, and no durations need to be known. For a hub with a clock (period ``D``) and a
    worker that takes ``T`` seconds this is ``ceil(T / D) share_i``; otherwise it is on average the share over the
    fraction of steps in which the worker takes part, the published weights.

    Args:
        shares: Importance of every worker, above 0, summing to one; ``None``: all alike.

    Raises:
        ValueError: shares that are not positive, do not sum to one, or are not one per worker (when their number is known).

    Source: Fraboni et al., "A General Theory for Federated Optimization with Asynchronous and Heterogeneous Clients Updates",
    arXiv 2206.10189; counting steps in place of known durations is ours.
    """

    def __init__(self, shares: Sequence[float] | None = None) -> None:
        self.shares = shares if shares is None else [float(s) for s in shares]
        if self.shares is not None and (min(self.shares, default=0.0) <= 0.0 or not isclose(sum(self.shares), 1.0)):
            raise ValueError(f"TimeCorrected(shares={shares!r}): must be positive numbers that sum to 1")

    def check(self, n: int) -> None:
        """See :meth:`HubWeights.check`."""
        if self.shares is not None and len(self.shares) != n:
            raise ValueError(f"TimeCorrected(shares={self.shares!r}): must be {n} numbers, one per worker")

    def weights(self, arrivals: Sequence[Arrival], n: int) -> list[float]:
        """See :meth:`HubWeights.weights`."""
        shares = self.shares if self.shares is not None else [1.0 / n] * n
        return [shares[a.worker] * a.turn / a.repeats for a in arrivals]


class HubRule(Part):
    """A method with a hub: four questions and their answers.

    Args:
        when: When does the hub step? ``None``: on every arrival.
        weights: How much does each push count? ``None``: the mean of what a step takes.
        outer: How does the reference move? Any outer optimizer of a plan, with the rule's sum in place of the mean.
        signal: What is said? ``"delta"``: what the worker has done since it was given the reference, ``base - x``;
            ``"value"``: where it is, and the hub's gradient is ``reference - x`` (which moves towards old weights as well).

    Raises:
        ValueError: an unknown signal.
    """

    def __init__(
        self,
        when: HubWhen | None = None,
        weights: HubWeights | None = None,
        outer: Outer | None = None,
        signal: Literal["delta", "value"] = "delta",
    ) -> None:
        self.when = when if when is not None else OnArrival()
        self.weights = weights if weights is not None else EqualWeights()
        self.outer = outer if outer is not None else SGD()
        self.signal: Literal["delta", "value"] = signal
        check_choice("HubRule", "signal", signal, ("delta", "value"))
