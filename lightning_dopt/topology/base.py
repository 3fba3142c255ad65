"""What a topology is: who hears whom, and with which weight."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lightning_dopt._checks import check_int
from lightning_dopt._part import Part


class Topology(Part, ABC):
    """A communication graph for any number of workers, static or changing from round to round.

    The mixing matrix acts from the receiver's side: ``x_i <- sum_j W[i, j] x_j``, row ``i`` is what rank ``i`` does
    with what it receives. ``step`` counts mixing rounds (not batches); every rank computes its own row locally, from
    shared seeds only, in time that depends on its degree and not on the number of workers. (A drawn graph is the
    exception: the first row of a round costs the draw of the whole graph, which is then remembered.)

    A subclass implements :meth:`row`, and :meth:`receivers` as well if the graph is directed. It overrides
    :meth:`check` if it does not exist for every number of workers, :meth:`period` and :meth:`max_degree` if it changes
    over time, :meth:`is_mean` where a round can be an exact mean, and :meth:`symmetric`, :meth:`doubly_stochastic`,
    :meth:`row_stochastic`, :meth:`column_stochastic` and :meth:`stationary` if its matrices are not symmetric or not
    doubly stochastic.

    Methods other than :meth:`check` and :meth:`matrix` trust their arguments: call :meth:`check` once, before training.
    """

    directed: bool = False
    """Whether ``i`` may hear ``j`` without ``j`` hearing ``i``."""

    agrees: bool = False
    """Whether ranks that hear each other get one and the same result in every round, so that they can share an anchor."""

    partial: bool = False
    """Whether there may be ranks that take no part in a round; see :meth:`speaks`."""

    def __init__(self) -> None:
        """A topology has no arguments unless it says so."""

    def check(self, n: int) -> None:
        """Raise ``ValueError`` in one line if this graph does not exist for ``n`` workers."""
        check_int(type(self).__name__, "n", n, 1)

    def period(self, n: int) -> int | None:
        """Rounds after which the sequence of graphs repeats: 1 for a static graph, ``None`` if it never does."""
        return 1

    @abstractmethod
    def row(self, n: int, rank: int, step: int = 0) -> dict[int, float]:
        """The weights ``{j: W[rank, j]}`` of round ``step`` that are not zero, own weight included.

        They sum to one if :meth:`row_stochastic` and are positive, except for weight rules that say otherwise.
        """

    def receivers(self, n: int, rank: int, step: int = 0) -> list[int]:
        """The ranks that hear ``rank`` in round ``step``, ascending, without ``rank`` itself."""
        if self.directed:
            raise NotImplementedError(f"{type(self).__name__} is directed and must say who hears a rank")
        return self.neighbors(n, rank, step)

    def neighbors(self, n: int, rank: int, step: int = 0) -> list[int]:
        """The ranks that ``rank`` hears in round ``step``, ascending, without ``rank`` itself."""
        return sorted(j for j in self.row(n, rank, step) if j != rank)

    def speaks(self, n: int, rank: int, step: int = 0) -> bool:
        """Whether ``rank`` takes part in round ``step``; one that does not sends nothing and only takes the result."""
        return True

    def share(self, n: int, step: int = 0) -> float:
        """The weight of the ranks that take part in round ``step``, where the weights of all ranks sum to one."""
        return 1.0

    def max_degree(self, n: int) -> int:
        """The most ranks that any rank hears in any one round."""
        period = self.period(n)
        if period is None:
            raise NotImplementedError(f"{type(self).__name__} never repeats and must say its largest degree")
        return max(len(self.neighbors(n, rank, step)) for step in range(period) for rank in range(n))

    def is_mean(self, n: int) -> bool:
        """Whether every round gives every rank the plain mean of all workers (so an all-reduce can do it)."""
        return n == 1

    def is_tree(self, n: int) -> bool:
        """Whether the graph is the same undirected tree in every round, as methods that relay sums need it."""
        return n == 1

    def symmetric(self, n: int) -> bool:
        """Whether the matrix of every round equals its transpose."""
        return not self.directed

    def reversible(self, n: int) -> bool:
        """Whether every round satisfies detailed balance, ``lambda_i W[i, j] = lambda_j W[j, i]`` with the stationary weights.

        Then the matrix is self-adjoint in the inner product weighted by ``lambda`` and its eigenvalues are real. Symmetric
        matrices are reversible with equal weights.
        """
        return self.symmetric(n)

    def stationary(self, n: int) -> list[float]:
        """The weights ``lambda`` of the mean ``sum_i lambda_i x_i`` that repeated rounds lead to (they sum to one).

        If rows sum to one, every round keeps that mean, and repeated rounds drive every rank to it; ``1/n`` each, the
        plain mean, exactly if the matrices are doubly stochastic. If only columns sum to one (push-sum), the weights
        are those of the mean that the *ratio* of mixed values to mixed ones reaches: always ``1/n`` each, since every
        round keeps the plain sums of both. Topologies that keep their mean in expectation only say so.
        """
        return [1.0 / n] * n

    def doubly_stochastic(self, n: int) -> bool:
        """Whether rows and columns of every round sum to one, so that a round keeps agreement and the plain mean."""
        return True

    def row_stochastic(self, n: int) -> bool:
        """Whether the rows of every round sum to one, so that a round keeps agreement: equal values stay equal.

        ``False`` means that plain mixing changes the scale of the values, and only push-sum, which divides by ones
        mixed in the same way, can use the topology.
        """
        return True

    def column_stochastic(self, n: int) -> bool:
        """Whether the columns of every round sum to one, so that a round keeps the plain sum over all ranks."""
        return self.doubly_stochastic(n)

    def matrix(self, n: int, step: int = 0) -> Tensor:
        """The mixing matrix of round ``step``: float64, shape (n, n), entry (i, j) what rank ``i`` gives rank ``j``.

        Raises:
            ValueError: the graph does not exist for ``n`` workers.
        """
        self.check(n)
        w = torch.zeros(n, n, dtype=torch.float64)
        for i in range(n):
            for j, weight in self.row(n, i, step).items():
                w[i, j] = weight
        return w
