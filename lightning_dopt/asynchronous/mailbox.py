"""SWIFT-style mailboxes: every node averages with the latest models it has been sent, and never waits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor
from torch.optim import Optimizer

from lightning_dopt._checks import check_float, check_int
from lightning_dopt.asynchronous.virtual import AsyncSimulation, Backward, VirtualNode
from lightning_dopt.topology.base import Topology


class MailboxSimulation(AsyncSimulation):
    """Virtual nodes with a mailbox that holds the latest model of each neighbour.

    When a gradient of node ``i`` is done: ``x_i <- W[i, i] x_i + sum_j W[i, j] mail_ij`` (after every ``every``-th
    gradient), then ``x_i += u``, then ``x_i`` is sent to all that hear ``i``.

    A pull changes one row: agreement is kept, the mean is not. As every pull comes with one gradient, a fast node also
    takes in more of the others' models, and the bias towards fast nodes largely cancels by itself. Dividing the learning
    rate by the speed, right for :class:`~lightning_dopt.asynchronous.PairwiseSimulation`, would create a bias here, so
    there is no such option.

    Args:
        topology: Who hears whom, with which weights; directed graphs are fine, changing ones are not.
        n: Number of nodes.
        init: See :class:`AsyncSimulation`.
        backward: See :class:`AsyncSimulation`.
        optimizer: See :class:`AsyncSimulation`.
        every: Gradients per pull.
        link_seconds: How long a message is under way.
        seconds: See :class:`AsyncSimulation`.

    Raises:
        ValueError: an argument outside its range, or a graph that changes over time.

    Source: Bornstein et al., "SWIFT: Rapid Decentralized Federated Learning via Wait-Free Model Communication", arXiv
    2210.14026; weights are the topology's, not the paper's selection by speed and data size.
    """

    def __init__(
        self,
        topology: Topology,
        n: int,
        init: Callable[[int], Mapping[str, Tensor]],
        backward: Backward | None,
        optimizer: Callable[[list[Tensor]], Optimizer],
        every: int = 1,
        link_seconds: float = 0.0,
        seconds: float | Sequence[float] = 1.0,
    ) -> None:
        owner = type(self).__name__
        topology.check(n)
        if topology.period(n) != 1:
            raise ValueError(f"{owner}(topology={topology!r}): mailboxes need a graph that stays the same")
        super().__init__(n, init, backward, optimizer, seconds)
        self.every = check_int(owner, "every", every, 1)
        self.link_seconds = check_float(owner, "link_seconds", link_seconds, 0.0)
        self.rows = [topology.row(n, rank) for rank in range(n)]
        self.receivers = [topology.receivers(n, rank) for rank in range(n)]
        self.mail = [{j: self.nodes[j].x.clone() for j in row if j != rank} for rank, row in enumerate(self.rows)]

    def landed(self, node: VirtualNode, u: Tensor | None) -> None:
        """See :meth:`AsyncSimulation.landed`."""
        if node.gradients % self.every == 0:
            self._pull(node)
        if u is not None:
            node.x.add_(u)
        self._send(node)

    def _pull(self, node: VirtualNode) -> None:
        row = self.rows[node.rank]
        node.x.mul_(row.get(node.rank, 0.0))
        for j, model in self.mail[node.rank].items():
            node.x.add_(model, alpha=row[j])

    def _send(self, node: VirtualNode) -> None:
        message = node.x.clone()
        for j in self.receivers[node.rank]:
            if self.link_seconds == 0:
                self._receive(j, node.rank, message)
            else:
                self.clock.after(self.link_seconds, lambda j=j: self._receive(j, node.rank, message))  # type: ignore[misc]

    def _receive(self, rank: int, source: int, message: Tensor) -> None:
        self.mail[rank][source] = message
        self.nodes[rank].changes += 1
