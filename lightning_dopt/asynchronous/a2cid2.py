"""A2CiD2: a continuous local momentum that makes pairwise averaging faster on badly connected graphs."""

from __future__ import annotations

import math

from torch import Tensor

from lightning_dopt._checks import check_float
from lightning_dopt.asynchronous.pairwise import PairRule, PairState
from lightning_dopt.topology.base import Topology
from lightning_dopt.topology.rates import rates
from lightning_dopt.topology.weights import UndirectedGraph


class Acid(PairRule):
    """Pairwise averaging with momentum: a second vector per node, mixed with the first as time goes by.

    Between events ``x' = eta (xt - x)``, ``xt' = eta (x - xt)``, integrated exactly. A gradient moves both by the same
    ``u``, whatever optimizer it comes from. A meeting with difference ``D = x_i - x_j`` does ``x_i -= D / 2``,
    ``xt_i -= alpha D``. While all ``x`` and ``xt`` start equal, ``sum x = sum xt`` at any common time, and both sums
    change by gradients only. The time to consensus falls from ``chi1`` to ``sqrt(chi1 chi2)``: there is nothing to gain
    on the complete graph.

    Args:
        eta: Speed of the mixing, per unit of time.
        alpha: What a meeting does to ``xt``, as a share of the difference.

    Raises:
        ValueError: a value that is not positive.

    Source: Nabli, Belilovsky, Oyallon, "A2CiD2: Accelerating Asynchronous Communication in Decentralized Deep
    Learning", arXiv 2306.08289. Displacements of optimizers other than SGD with momentum are an extension.
    """

    def __init__(self, eta: float, alpha: float) -> None:
        self.eta = check_float("Acid", "eta", eta, 0.0, open_low=True)
        self.alpha = check_float("Acid", "alpha", alpha, 0.0, open_low=True)

    @classmethod
    def of(cls, topology: Topology, n: int, rate: float = 1.0) -> Acid:
        """The paper's constants: ``eta = 1 / (2 sqrt(chi1 chi2))``, ``alpha = sqrt(chi1 / chi2) / 2``.

        Args:
            topology: Who may meet.
            n: Number of nodes.
            rate: Meetings per node and unit of time.

        Raises:
            ValueError: a graph that pairs cannot use, the complete graph, or fewer than two nodes.
        """
        if not isinstance(topology, UndirectedGraph):
            raise ValueError(f"Acid.of(topology={topology!r}): must be an undirected graph other than Complete()")
        known = rates(topology, n, total=check_float("Acid.of", "rate", rate, 0.0, open_low=True) * n / 2)
        return cls(known.eta, known.momentum_step)

    def begin(self, x: Tensor, time: float = 0.0) -> PairState:
        """``xt`` starts as a copy of ``x``."""
        return PairState(x, x.clone(), time)

    def drift(self, state: PairState, time: float) -> None:
        """The mean of both vectors stays, their difference shrinks by ``exp(-2 eta (time - state.time))``."""
        x, xt = _both(state)
        if time != state.time:
            moved = (xt - x).mul_(0.5 * -math.expm1(-2 * self.eta * (time - state.time)))
            x.add_(moved)
            xt.sub_(moved)
            state.time = time

    def displace(self, state: PairState, u: Tensor) -> None:
        """``x += u``, ``xt += u``."""
        for vector in _both(state):
            vector.add_(u)

    def meet(self, state: PairState, difference: Tensor) -> None:
        """``x -= difference / 2``, ``xt -= alpha difference``."""
        x, xt = _both(state)
        x.sub_(difference, alpha=0.5)
        xt.sub_(difference, alpha=self.alpha)


def _both(state: PairState) -> tuple[Tensor, Tensor]:
    assert state.xt is not None  # made by begin
    return state.x, state.xt
