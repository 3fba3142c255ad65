"""Push-sum: the plain mean over directed graphs whose senders know only whom they send to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_dopt.combine.base import WeightedSum, Wire, check_plain, number
from lightning_dopt.comm.world import Talk
from lightning_dopt.topology.base import Topology

if TYPE_CHECKING:
    from lightning_dopt.plan import Sync


class PushSum(WeightedSum):
    """Stochastic gradient push: every rank pushes a numerator ``u`` and a weight ``v`` and works with ``x = u / v``.

    ``u <- sum_j C[i, j] u_j``, ``v <- sum_j C[i, j] v_j`` with the columns of ``C`` summing to one, so that the sums of
    ``u`` and ``v`` never change and ``x`` tends to the plain mean although rows do not sum to one. What the inner optimizer
    adds to ``x`` is added to ``u`` as it is. Numerator and weight travel in one message, 8 bytes longer than plain gossip's.
    Where rows sum to one as well ``v`` stays 1 and this is :class:`Mixing`.

    Gradients tracked over the same graph (Push-DIGing) need no weight: their sync keeps ``combine=Mixing()``.

    Raises:
        ValueError: from the plan, a lossy codec, another slot than parameters, an outer optimizer, an order other than
            ``"atc"``, or a topology whose columns do not sum to one.

    Source: Assran, Loizou, Ballas, Rabbat, "Stochastic Gradient Push for Distributed Deep Learning", arXiv 1811.10792.
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
        if not sync.peers.column_stochastic(n):
            raise ValueError(
                f"Sync(peers={sync.peers!r}, combine=PushSum()): columns of the matrix must sum to one with {n} workers; "
                "use weights by the sender, such as Directed(links, weights='push')"
            )

    def state(self, start: Tensor, peers: Topology, n: int, rank: int) -> dict[str, Tensor]:
        """The weight ``v`` and, where it can differ from one, ``x`` after the last round."""
        if peers.doubly_stochastic(n):
            return {}
        return {"weight": number(1.0, start), "last": start.clone()}

    def talk(self, wire: Wire, value: Tensor, state: dict[str, Tensor]) -> Talk[Tensor]:
        """See :meth:`Combine.talk`."""
        if not state:
            return (yield from wire.mix(value))
        weight, last = state["weight"], state["last"]
        numerator = value.sub_(last).addcmul_(last, weight.to(last.dtype))
        nbytes = value.nbytes
        payload = torch.cat([numerator.view(torch.uint8), weight.view(torch.uint8)])
        receivers = wire.peers.receivers(wire.size, wire.rank, wire.round)
        sources = wire.peers.neighbors(wire.size, wire.rank, wire.round)
        got = yield from wire.swap(dict.fromkeys(receivers, payload), dict.fromkeys(sources, nbytes + 8))
        got[wire.rank] = payload
        weights = wire.peers.row(wire.size, wire.rank, wire.round)
        numerator, total = torch.zeros_like(value), torch.zeros_like(weight)
        for j in sorted(got):
            numerator.add_(got[j][:nbytes].view(value.dtype), alpha=weights[j])
            total.add_(got[j][nbytes:].clone().view(torch.float64), alpha=weights[j])  # a copy is aligned
        weight.copy_(total)
        last.copy_(numerator.div_(total.to(numerator.dtype)))
        return numerator
