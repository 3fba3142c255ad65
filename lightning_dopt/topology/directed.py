"""The user's own directed graph, with weights that need the senders' or the receivers' degrees only."""

from __future__ import annotations

from typing import Literal

from lightning_dopt._checks import check_choice
from lightning_dopt.topology._graph import GraphLike, check_size, links_of, stationary_weights, strongly_connected
from lightning_dopt.topology.base import Topology

Sharing = Literal["push", "pull"]
"""Who decides on the weights of a directed graph; see :class:`Directed`."""

_EXACT = 1e-12


class Directed(Topology):
    """A fixed directed graph given by its links, with even weights on the sender's or on the receiver's side.

    * ``"push"``: a rank splits its value evenly, ``W[j, i] = 1 / (1 + out_i)`` for itself and the ``out_i`` ranks it
      sends to. Columns sum to one, rows in general do not: the plain sum is kept but not agreement, so that only
      push-sum can use it; the ratios it forms reach the plain mean.
    * ``"pull"``: a rank averages evenly what it hears, ``W[i, j] = 1 / (1 + in_i)`` for itself and the ``in_i`` ranks it
      hears. Rows sum to one and agreement is kept, but repeated mixing ends in the weighted mean with the weights
      :meth:`stationary`, the Perron vector, which is seldom the plain one.

    If every rank sends to as many as it hears, and all to equally many, both are the same doubly stochastic matrix.

    Source: push-sum, Kempe, Dobra and Gehrke, "Gossip-Based Computation of Aggregate Information" (2003).

    Args:
        links: for every rank the ranks that it sends to, for example ``[[1], [2], [0]]`` for a ring of three.
        weights: ``"push"`` or ``"pull"``.

    Raises:
        ValueError: a link to a rank that does not exist or to itself, a link given twice, a rank that cannot be reached
            from some other; from ``check``, another number of workers than there are lists.
    """

    directed = True

    def __init__(self, links: list[list[int]], weights: Sharing = "push") -> None:
        check_choice("Directed", "weights", weights, ("push", "pull"))
        self.weights = weights
        self.links = [sorted(row) for row in links]
        self._check_links()

    @classmethod
    def from_networkx(cls, graph: GraphLike, weights: Sharing = "push") -> Directed:
        """The links of a networkx graph, or of anything with ``nodes``, ``edges`` and ``is_directed()``.

        An edge ``(u, v)`` is a link from ``u`` to ``v``, both ways if the graph is undirected. Ranks are the node
        numbers if the nodes are 0 to n - 1, otherwise the places in ``graph.nodes``. Loops and repeated edges are
        dropped, edge weights are not read.

        Raises:
            ValueError: as the constructor, or the graph has no nodes.
        """
        return cls(links_of("Directed", graph), weights)

    def _check_links(self) -> None:
        n = len(self.links)
        if n == 0:
            raise ValueError("Directed(links=[]): must have one list for every rank")
        for i, row in enumerate(self.links):
            for j in row:
                if isinstance(j, bool) or not isinstance(j, int) or not 0 <= j < n or j == i:
                    raise ValueError(f"Directed: rank {i} sends to {j!r}; must be another rank in 0..{n - 1}")
                if row.count(j) > 1:
                    raise ValueError(f"Directed: rank {i} lists rank {j} more than once")
        if not strongly_connected(self.links):
            raise ValueError(f"Directed: every one of the {n} ranks must be reachable from every other; add links")

    def check(self, n: int) -> None:
        """Raise ``ValueError`` if ``n`` is not the number of ranks in ``links``."""
        check_size("Directed", len(self.links), n)

    def row(self, n: int, rank: int, step: int = 0) -> dict[int, float]:
        """The weights of ``rank`` itself and of the ranks that send to it, by the chosen side."""
        heard = [rank, *(i for i in range(n) if rank in self.links[i])]
        if self.weights == "pull":
            return dict.fromkeys(heard, 1.0 / len(heard))
        return {i: 1.0 / (1 + len(self.links[i])) for i in heard}

    def receivers(self, n: int, rank: int, step: int = 0) -> list[int]:
        """The given links of ``rank``."""
        return list(self.links[rank])

    def is_mean(self, n: int) -> bool:
        """Whether everybody sends to everybody."""
        return all(len(row) == n - 1 for row in self.links)

    def symmetric(self, n: int) -> bool:
        """Whether the matrix equals its transpose."""
        w = self.matrix(n)
        return bool((w - w.T).abs().max() <= _EXACT)

    def row_stochastic(self, n: int) -> bool:
        """Whether rows sum to one: always with ``"pull"``."""
        return self.weights == "pull" or bool((self.matrix(n).sum(1) - 1).abs().max() <= _EXACT)

    def column_stochastic(self, n: int) -> bool:
        """Whether columns sum to one: always with ``"push"``."""
        return self.weights == "push" or bool((self.matrix(n).sum(0) - 1).abs().max() <= _EXACT)

    def doubly_stochastic(self, n: int) -> bool:
        """Whether rows and columns sum to one."""
        return self.row_stochastic(n) and self.column_stochastic(n)

    def stationary(self, n: int) -> list[float]:
        """``1/n`` each for ``"push"`` (the mean that ratios reach); for ``"pull"`` the Perron vector of the matrix."""
        return [1.0 / n] * n if self.column_stochastic(n) else stationary_weights(self.matrix(n))
