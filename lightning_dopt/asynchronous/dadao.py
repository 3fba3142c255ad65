"""DADAO: accelerated, asynchronous and exact for strongly convex problems whose constants are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dopt._checks import check_float
from lightning_dopt.asynchronous.clock import EventClock
from lightning_dopt.asynchronous.edges import edges
from lightning_dopt.topology.rates import rates
from lightning_dopt.topology.weights import UndirectedGraph

X, XT, Y, YT, Z, ZT = range(6)


@dataclass(frozen=True)
class DadaoConstants:
    """The method's constants, as functions of smoothness, convexity and the graph."""

    nu: float
    eta: float
    a: float
    theta: float
    beta: float
    beta_t: float
    delta: float
    gamma: float
    gamma_t: float
    edge_events: float
    """Meetings per unit of time in the whole graph, ``sqrt(2 chi1 chi2)`` of the graph whose links sum to rate one."""

    @classmethod
    def of(cls, topology: UndirectedGraph, n: int, mu: float, smoothness: float) -> DadaoConstants:
        """Constants for ``n`` nodes, each with a ``mu``-strongly convex function whose gradient is Lipschitz."""
        graph = rates(topology, n, total=1.0)
        meetings = graph.exchange_rate
        nu = mu / 2
        root = math.sqrt(nu / smoothness)
        return cls(
            nu=nu,
            eta=root / 8,
            a=root / 4,
            theta=0.5 / root,
            beta=0.5,
            beta_t=2 * graph.chi1 / meetings / root,
            delta=1 + root / 4,
            gamma=0.25 / smoothness,
            gamma_t=0.25 / math.sqrt(smoothness * nu),
            edge_events=meetings,
        )

    def flow(self) -> Tensor:
        """The matrix of the linear differential equation between events, float64, shape (6, 6)."""
        m = torch.zeros(6, 6, dtype=torch.float64)
        m[X, X], m[X, XT] = -self.eta, self.eta
        m[XT, X], m[XT, XT] = self.eta, -self.eta
        m[Y, Y], m[Y, YT] = -self.a, self.a
        m[YT, XT], m[YT, Y], m[YT, Z] = -self.theta * self.nu, -self.theta, -self.theta
        m[Z, Z], m[Z, ZT] = -self.a, self.a
        m[ZT, Z], m[ZT, ZT] = self.eta, -self.eta
        return m


class Dadao:
    """A reference simulator: ``n`` nodes with six vectors each, gradients and meetings at independent Poisson times.

    Converges linearly to the minimum of ``sum_i f_i`` on every node, without tracking and without inner loops; the sum of
    ``z`` over the nodes stays zero. Every node takes one gradient per unit of time on average. Needs ``mu`` and the
    smoothness, hence of little use for deep networks.

    Args:
        topology: Who may meet: undirected, connected, the same at all times.
        gradient: ``gradient(rank, x)``, float64, of the shape of ``x``.
        start: Starting points, shape (n, d).
        mu: Strong convexity of every ``f_i``.
        smoothness: Lipschitz constant of every gradient.
        seed: Seed of the random times.

    Raises:
        ValueError: constants that are not positive, ``mu > smoothness``, or a graph that pairs cannot use.

    Source: Nabli, Oyallon, "DADAO: Decoupled Accelerated Decentralized Asynchronous Optimization", arXiv 2208.00779.
    """

    def __init__(
        self,
        topology: UndirectedGraph,
        gradient: Callable[[int, Tensor], Tensor],
        start: Tensor,
        mu: float,
        smoothness: float,
        seed: int = 0,
    ) -> None:
        check_float("Dadao", "smoothness", smoothness, 0.0, open_low=True)
        check_float("Dadao", "mu", mu, 0.0, smoothness, open_low=True)
        n, d = start.shape
        self.gradient = gradient
        self.constants = DadaoConstants.of(topology, n, mu, smoothness)
        self.state = torch.zeros(n, 6, d, dtype=torch.float64)
        self.state[:, X] = start
        self.state[:, XT] = start
        self.clock = EventClock(seed)
        self._flow = self.constants.flow()
        self._time = [0.0] * n
        for i in range(n):
            self.clock.poisson(1.0, lambda i=i: self._gradient(i))  # type: ignore[misc]
        pairs = edges(topology, n)
        for i, j in pairs:
            self.clock.poisson(self.constants.edge_events / len(pairs), lambda i=i, j=j: self._meet(i, j))  # type: ignore[misc]

    def run(self, seconds: float) -> Dadao:
        """Let time pass."""
        self.clock.run(seconds)
        for i in range(len(self._time)):
            self._bring(i)
        return self

    @property
    def x(self) -> Tensor:
        """The points of all nodes, shape (n, d)."""
        return self.state[:, X].clone()

    def _bring(self, i: int) -> Tensor:
        """The state of node ``i``, moved to the present along the exact solution."""
        elapsed = self.clock.now - self._time[i]
        if elapsed > 0:
            self.state[i] = torch.linalg.matrix_exp(self._flow * elapsed) @ self.state[i]
            self._time[i] = self.clock.now
        return self.state[i]

    def _gradient(self, i: int) -> None:
        c, s = self.constants, self._bring(i)
        q = self.gradient(i, s[X].clone()) - c.nu * s[X] - s[YT]
        s[X] -= c.gamma * q
        s[XT] -= c.gamma_t * q
        s[YT] += c.delta * q

    def _meet(self, i: int, j: int) -> None:
        c, s, t = self.constants, self._bring(i), self._bring(j)
        p = (s[Y] + s[Z]) - (t[Y] + t[Z])
        for node, sign in ((s, -1.0), (t, 1.0)):
            node[Z] += sign * c.beta * p
            node[ZT] += sign * c.beta_t * p
