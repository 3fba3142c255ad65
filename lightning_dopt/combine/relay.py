"""RelaySum: exact averages on a tree, each model arriving once, later the farther away it started."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_dopt.combine.base import WeightedSum, Wire, check_plain, number
from lightning_dopt.comm.world import Talk
from lightning_dopt.topology.base import Topology

if TYPE_CHECKING:
    from lightning_dopt.plan import Sync


class RelaySum(WeightedSum):
    """RelaySGD's mixing: messages are relayed along a tree, so every model enters with weight exactly ``1/n``.

    To neighbour ``j`` goes the own model plus the last messages of all other neighbours, and how many models that is;
    ``x <- (sum_j m_j + (n - sum_j c_j) x) / n``: models that have not arrived yet are stood in for by the own one. Model
    ``j`` reaches rank ``i`` as many rounds late as they are apart in the tree. Unequal data leave no bias, without any
    correction; the learning rate has to shrink with the depth of the tree. One extra vector per neighbour.

    Raises:
        ValueError: from the plan, a lossy codec, another slot than parameters, an outer optimizer, an order other than
            ``"atc"``, or a topology that is no tree (``Chain``, ``Tree``, ``Star``).

    Source: Vogels et al., "RelaySum for Decentralized Deep Learning on Heterogeneous Data", arXiv 2110.04175.
    """

    extra_bytes = 8
    in_place = False

    def __init__(self) -> None:
        pass

    def check(self, sync: Sync) -> None:
        """See :meth:`Combine.check`."""
        check_plain(self, sync)

    def check_size(self, sync: Sync, n: int) -> None:
        """See :meth:`Combine.check_size`."""
        links = sum(len(sync.peers.neighbors(n, i)) for i in range(n)) if sync.peers.period(n) == 1 else -1
        if links != 2 * (n - 1) or sync.peers.directed:
            raise ValueError(
                f"Sync(peers={sync.peers!r}, combine=RelaySum()): with {n} workers this is no tree; use Tree() or Chain()"
            )

    def state(self, start: Tensor, peers: Topology, n: int, rank: int) -> dict[str, Tensor]:
        """The last message of every neighbour, and how many models it holds."""
        state: dict[str, Tensor] = {}
        for j in peers.neighbors(n, rank):
            state[f"message.{j}"] = torch.zeros_like(start)
            state[f"count.{j}"] = number(0.0, start)
        return state

    def talk(self, wire: Wire, value: Tensor, state: dict[str, Tensor]) -> Talk[Tensor]:
        """See :meth:`Combine.talk`."""
        near, nbytes = wire.peers.neighbors(wire.size, wire.rank, wire.round), value.nbytes
        send = {}
        for j in near:
            model, count = value.clone(), number(1.0, value)
            for k in near:
                if k != j:
                    model.add_(state[f"message.{k}"])
                    count.add_(state[f"count.{k}"])
            send[j] = torch.cat([model.view(torch.uint8), count.view(torch.uint8)])
        got = yield from wire.swap(send, dict.fromkeys(near, nbytes + 8))
        total, heard = torch.zeros_like(value), 0.0
        for j in near:
            state[f"message.{j}"].copy_(got[j][:nbytes].view(value.dtype))
            state[f"count.{j}"].copy_(got[j][nbytes:].clone().view(torch.float64))
            total.add_(state[f"message.{j}"])
            heard += float(state[f"count.{j}"])
        return total.add_(value, alpha=wire.size - heard).div_(wire.size)
