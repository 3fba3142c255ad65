"""AD-PSGD: two neighbours at a time meet and average, whenever they like."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_dopt._checks import check_choice, check_float
from lightning_dopt._part import Part
from lightning_dopt.asynchronous.edges import edge_rate, edges
from lightning_dopt.asynchronous.virtual import AsyncSimulation, Backward, VirtualNode
from lightning_dopt.topology.base import Topology


@dataclass
class PairState:
    """What a node keeps: its vector, a second one if the rule has momentum, and how far in time they are."""

    x: Tensor
    xt: Tensor | None = None
    time: float = 0.0


class PairRule(Part, ABC):
    """What gradients and meetings do to the state of a node. All methods change the state in place.

    Time is counted in gradients: one unit is the duration of one.
    """

    def begin(self, x: Tensor, time: float = 0.0) -> PairState:
        """The state of a node that starts at ``x``, which becomes part of the state."""
        return PairState(x, None, time)

    def drift(self, state: PairState, time: float) -> None:
        """Bring the state to ``time``; called before every other event."""
        state.time = time

    @abstractmethod
    def displace(self, state: PairState, u: Tensor) -> None:
        """A gradient asks for the displacement ``u`` (the optimizer's step, sign included)."""

    @abstractmethod
    def meet(self, state: PairState, difference: Tensor) -> None:
        """A meeting: ``difference = x_own - x_other``. The other end gets ``-difference``, which keeps all sums."""


class Averaging(PairRule):
    """Both ends of a meeting move half way: ``x_i = x_j = (x_i + x_j) / 2``; gradients just add up.

    Source: Lian, Zhang, Zhang, Liu, "Asynchronous Decentralized Parallel Stochastic Gradient Descent", arXiv 1710.06952.
    """

    def displace(self, state: PairState, u: Tensor) -> None:
        """``x += u``."""
        state.x.add_(u)

    def meet(self, state: PairState, difference: Tensor) -> None:
        """``x -= difference / 2``."""
        state.x.sub_(difference, alpha=0.5)


class PairwiseSimulation(AsyncSimulation):
    """Virtual nodes that take gradients at their own speed while pairs of neighbours meet at times of their own.

    A meeting is atomic. With ``link_seconds`` it starts with what both have, takes that time, and ends by adding half
    of the difference found at the start to what both have become: the sum of all nodes changes by gradients only. A
    node is in one meeting at a time, later ones queue up.

    **Speed bias.** Nodes that take more gradients pull harder: the limit solves ``sum_i r_i grad f_i = 0`` with ``r_i``
    the gradients per second of node ``i``. ``correct_speed`` scales the displacement of node ``i`` by
    ``1 / (n r_i / sum_j r_j)``, which removes it.

    Args:
        topology: Who may meet: undirected, connected, the same at all times.
        n: Number of nodes.
        init: See :class:`AsyncSimulation`.
        backward: See :class:`AsyncSimulation`.
        optimizer: See :class:`AsyncSimulation`.
        rule: What gradients and meetings do; ``None`` means :class:`Averaging` (AD-PSGD).
        rate: Meetings per node and second, averaged over the nodes; all edges meet equally often.
        arrivals: ``"poisson"``: every edge rings at random times; ``"regular"``: at equal distances, one after the other.
        link_seconds: How long a meeting takes.
        correct_speed: Remove the speed bias.
        seconds: See :class:`AsyncSimulation`.
        seed: Seed of the random times.

    Raises:
        ValueError: an argument outside its range, or a graph that pairs cannot use.

    Source: see :class:`Averaging` and :class:`~lightning_dopt.asynchronous.Acid`.
    """

    def __init__(
        self,
        topology: Topology,
        n: int,
        init: Callable[[int], Mapping[str, Tensor]],
        backward: Backward | None,
        optimizer: Callable[[list[Tensor]], Optimizer],
        rule: PairRule | None = None,
        rate: float = 1.0,
        arrivals: Literal["poisson", "regular"] = "poisson",
        link_seconds: float = 0.0,
        correct_speed: bool = False,
        seconds: float | Sequence[float] = 1.0,
        seed: int = 0,
    ) -> None:
        owner = type(self).__name__
        super().__init__(n, init, backward, optimizer, seconds, seed)
        self.rule = rule if rule is not None else Averaging()
        self.link_seconds = check_float(owner, "link_seconds", link_seconds, 0.0)
        check_float(owner, "rate", rate, 0.0, open_low=True)
        check_choice(owner, "arrivals", arrivals, ("poisson", "regular"))
        self.states = [self.rule.begin(node.x) for node in self.nodes]
        total = sum(1 / s for s in self.seconds)
        self.scale = [total * s / n if correct_speed else 1.0 for s in self.seconds]
        self.meetings = 0
        """Meetings that have ended."""
        self._free = [0.0] * n
        self._plan_meetings(edges(topology, n), rate, arrivals)

    def _plan_meetings(self, pairs: list[tuple[int, int]], rate: float, arrivals: str) -> None:
        for k, (i, j) in enumerate(pairs):
            each = edge_rate(len(pairs), self.n, rate)
            if arrivals == "poisson":
                self.clock.poisson(each, lambda i=i, j=j: self._book(i, j))  # type: ignore[misc]
            else:
                phase = (k + 0.5) / (each * len(pairs))
                self.clock.every(1 / each, lambda i=i, j=j: self._book(i, j), phase)  # type: ignore[misc]

    def _book(self, i: int, j: int) -> None:
        """The next stretch of time in which both are free."""
        if self.link_seconds == 0:
            self._end(i, j, self._difference(i, j))
            return
        start = max(self.clock.now, self._free[i], self._free[j])
        self._free[i] = self._free[j] = start + self.link_seconds
        self.clock.after(start - self.clock.now, lambda: self._start(i, j))

    def _start(self, i: int, j: int) -> None:
        difference = self._difference(i, j)
        self.clock.after(self.link_seconds, lambda: self._end(i, j, difference))

    @torch.no_grad()
    def _difference(self, i: int, j: int) -> Tensor:
        self._drift(i, j)
        return self.states[i].x - self.states[j].x

    @torch.no_grad()
    def _end(self, i: int, j: int, difference: Tensor) -> None:
        self._drift(i, j)
        self.rule.meet(self.states[i], difference)
        self.rule.meet(self.states[j], -difference)
        self.meetings += 1
        for rank in (i, j):
            self.nodes[rank].changes += 1

    def _drift(self, *ranks: int) -> None:
        for rank in ranks:
            self.rule.drift(self.states[rank], self.clock.now)

    def landed(self, node: VirtualNode, u: Tensor | None) -> None:
        """See :meth:`AsyncSimulation.landed`."""
        self._drift(node.rank)
        if u is not None:
            self.rule.displace(self.states[node.rank], u * self.scale[node.rank])

    @torch.no_grad()
    def settle(self) -> None:
        """Bring all states to the present moment."""
        self._drift(*range(self.n))
