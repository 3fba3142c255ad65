"""Weights by contribution: messages that say what the others do not count more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_dopt._checks import check_float
from lightning_dopt.combine.base import Combine, Decode, Wire
from lightning_dopt.comm.world import Talk
from lightning_dopt.compress import Identity
from lightning_dopt.topology.base import Topology

if TYPE_CHECKING:
    from lightning_dopt.plan import Sync


class Contribution(Combine):
    """``sum_i w_i m_i``, where ``w_i`` grows with how little message ``i`` looked like the sum of the others so far.

    With ``G_{-i} = sum_{j != i} w_j m_j`` every rank has a running mean over the rounds of ``cos(m_i, G_{-i})``, and
    ``w_i`` is in proportion to one minus that, at least ``floor``. The first round weighs all alike; each round weighs by
    the rounds before it. Every rank gets all messages and works out the same weights from their scalar products. A sync that
    sends several messages in a round (tensors of several types) weighs each by itself.

    Args:
        floor: Smallest weight before the weights are scaled to sum to one, in [0, 1).

    Raises:
        ValueError: ``floor`` out of range; from the plan, messages other than exact changes, or peers other than everybody.

    Source: the consensus part of "Fair Federated Medical Image Segmentation via Client Contribution Estimation" (FedCE), Jiang
    et al., arXiv 2303.16520. Its other part, the errors of models made without a client, needs validation on every client
    and is not here.
    """

    linear = False
    in_place = False

    def __init__(self, floor: float = 1e-3) -> None:
        self.floor = check_float("Contribution", "floor", floor, 0.0, 1.0, open_high=True)

    def check(self, sync: Sync) -> None:
        """See :meth:`Combine.check`."""
        if not isinstance(sync.codec, Identity) or sync.signal != "delta":
            raise ValueError(
                f"Sync(signal={sync.signal!r}, codec={sync.codec!r}, combine={self!r}): compares exact changes, use signal='delta' "
                "and Identity()"
            )

    def check_size(self, sync: Sync, n: int) -> None:
        """See :meth:`Combine.check_size`."""
        if not sync.peers.is_mean(n):
            raise ValueError(f"Sync(peers={sync.peers!r}, combine={self!r}): every rank must hear all, use Complete()")

    def state(self, start: Tensor, peers: Topology, n: int, rank: int) -> dict[str, Tensor]:
        """Sums of cosines, one for every rank, and the number of rounds."""
        return {"cosines": torch.zeros(n, dtype=torch.float64), "rounds": torch.zeros(1, dtype=torch.int64)}

    def weights(self, state: dict[str, Tensor]) -> Tensor:
        """The weights of the coming round, which sum to one."""
        count = len(state["cosines"])
        if not int(state["rounds"]):
            return torch.full((count,), 1.0 / count, dtype=torch.float64)
        apart = 1.0 - state["cosines"] / int(state["rounds"])
        total = float(apart.sum())
        shares = apart / total if total > 0 else torch.full_like(apart, 1.0 / count)
        floored = shares.clamp(min=self.floor)
        return floored / floored.sum()

    def talk(self, wire: Wire, value: Tensor, state: dict[str, Tensor]) -> Talk[Tensor]:
        """See :meth:`Combine.talk`."""
        others = [j for j in range(wire.size) if j != wire.rank]
        payload = value.view(torch.uint8)
        got = yield from wire.swap(dict.fromkeys(others, payload), dict.fromkeys(others, payload.numel()))
        messages = [value if j == wire.rank else got[j].view(value.dtype) for j in range(wire.size)]
        weights = self.weights(state)
        out = torch.zeros_like(value)
        for weight, message in zip(weights.tolist(), messages, strict=True):
            out.add_(message, alpha=weight)
        state["cosines"] += cosines(messages, weights)
        state["rounds"] += 1
        return out

    def __call__(self, messages: Sequence[tuple[float, Decode]], out: Tensor) -> None:
        """See :class:`Combine`; everything happens in :meth:`talk`."""
        raise NotImplementedError


def cosines(messages: Sequence[Tensor], weights: Tensor) -> Tensor:
    """``cos(m_i, sum_{j != i} w_j m_j)`` of every message, by their scalar products; 0 where either vanishes."""
    count = len(messages)
    products = torch.zeros(count, count, dtype=torch.float64)
    for i in range(count):
        for j in range(i + 1):
            products[i, j] = products[j, i] = float(torch.dot(messages[i].double(), messages[j].double()))
    found = torch.zeros(count, dtype=torch.float64)
    for i in range(count):
        w = weights.clone()
        w[i] = 0.0
        along, own, rest = products[i] @ w, products[i, i], w @ products @ w
        if float(own) > 0 and float(rest) > 0:
            found[i] = along / (own * rest).sqrt()
    return found
