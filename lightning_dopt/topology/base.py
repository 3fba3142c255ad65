"""What a topology is: who hears whom, and with which weight."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lightning_dopt._part import Part


class Topology(Part, ABC):
    """A communication graph for any number of workers, static or changing from round to round.

    The mixing matrix acts from the receiver's side: ``x_i <- sum_j W[i, j] x_j``, row ``i`` is what rank ``i`` does with
    what it receives. ``step`` counts mixing rounds (not batches); every rank computes its own row locally, from shared
    seeds only, in time that depends on its degree and not on the number of workers.

    A subclass implements :meth:`row`, and :meth:`receivers` as well if the graph is directed.
    """

    directed: bool = False
    """Whether ``i`` may hear ``j`` without ``j`` hearing ``i``."""

    def check(self, n: int) -> None:
        """Raise ``ValueError`` in one line if this graph does not exist for ``n`` workers."""

    def period(self, n: int) -> int | None:
        """Rounds after which the sequence of graphs repeats: 1 for a static graph, ``None`` if it never does."""
        return 1

    @abstractmethod
    def row(self, n: int, rank: int, step: int = 0) -> dict[int, float]:
        """The positive weights ``{j: W[rank, j]}`` of round ``step``, own weight included, summing to one."""

    def receivers(self, n: int, rank: int, step: int = 0) -> list[int]:
        """The ranks that hear ``rank`` in round ``step``, ascending, without ``rank`` itself."""
        if self.directed:
            raise NotImplementedError(f"{type(self).__name__} is directed and must say who hears a rank")
        return self.neighbors(n, rank, step)

    def neighbors(self, n: int, rank: int, step: int = 0) -> list[int]:
        """The ranks that ``rank`` hears in round ``step``, ascending, without ``rank`` itself."""
        return sorted(j for j in self.row(n, rank, step) if j != rank)

    def is_mean(self, n: int) -> bool:
        """Whether every round gives every rank the plain mean of all workers (so an all-reduce can do it)."""
        return n == 1

    def matrix(self, n: int, step: int = 0) -> Tensor:
        """The dense mixing matrix of round ``step``: float64, shape (n, n), entry (i, j) as rank ``i`` weighs rank ``j``.

        Raises:
            ValueError: the graph does not exist for ``n`` workers.
        """
        self.check(n)
        w = torch.zeros(n, n, dtype=torch.float64)
        for i in range(n):
            for j, weight in self.row(n, i, step).items():
                w[i, j] = weight
        return w
