"""Weights by contribution: messages that say what the others do not say count more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lightning_dopt._checks import check_choice, check_float
from lightning_dopt.apply import Blocking
from lightning_dopt.combine.base import Combine, Decode, Wire
from lightning_dopt.comm.world import Talk
from lightning_dopt.compress import Identity
from lightning_dopt.topology.base import Topology

if TYPE_CHECKING:
    from lightning_dopt.plan import Sync

Errors = Literal["none", "plus", "times"]
_ERROR_BYTES = 8


class Contribution(Combine):
    """``sum_i w_i m_i``, where ``w_i`` grows with how little message ``i`` looks like the sum of the others.

    With ``G_{-i} = sum_{j != i} w_j m_j``, formed with the weights of the round before (at first all alike), every rank has a
    running mean over the rounds, this one included, of ``cos(m_i, G_{-i})``. One minus that, scaled to sum to one and at least
    ``floor``, is ``c_i``. With ``errors`` there is an ``e_i``, too: the error, on the data of rank ``i``, of the model that the
    last round would have made without rank ``i``, scaled and floored in the same way (all alike in the first round). ``w_i`` is
    then in proportion to ``c_i + e_i`` or ``c_i e_i``, and again at least ``floor``.

    Every rank gets all messages and works out the same weights from their scalar products. A sync that sends several messages
    in a round (tensors of several types) weighs each by itself.

    Args:
        floor: Smallest share before shares are scaled to sum to one, in [0, 1).
        errors: Whether and how errors count. They are measured by the callback ``ClientErrors``, or by hand, see
            :mod:`lightning_dopt.client_errors`, and cost 8 bytes a message and two buffers of the size of the model.

    Raises:
        ValueError: an option out of range; from the plan, messages other than exact changes, peers other than everybody, or
            errors of results that are not taken at once; in the second round, errors that nobody measured.

    Source: "Fair Federated Medical Image Segmentation via Client Contribution Estimation" (FedCE), Jiang et al.,
    arXiv 2303.16520, and its authors' code.
    """

    linear = False
    in_place = False

    def __init__(self, floor: float = 1e-3, errors: Errors = "none") -> None:
        self.floor = check_float("Contribution", "floor", floor, 0.0, 1.0, open_high=True)
        self.errors = check_choice("Contribution", "errors", errors, ("none", "plus", "times"))
        self.extra_bytes = 0 if errors == "none" else _ERROR_BYTES

    def check(self, sync: Sync) -> None:
        """See :meth:`Combine.check`."""
        if not isinstance(sync.codec, Identity) or sync.signal != "delta":
            raise ValueError(
                f"Sync(signal={sync.signal!r}, codec={sync.codec!r}, combine={self!r}): compares exact changes, use signal='delta' "
                "and Identity()"
            )
        if self.errors != "none" and sync.apply != Blocking():
            raise ValueError(
                f"Sync(apply={sync.apply!r}, combine={self!r}): errors are of results that are taken at once, use Blocking()"
            )

    def check_size(self, sync: Sync, n: int) -> None:
        """See :meth:`Combine.check_size`."""
        if not sync.peers.is_mean(n):
            raise ValueError(f"Sync(peers={sync.peers!r}, combine={self!r}): every rank must hear all, use Complete()")

    def state(self, start: Tensor, peers: Topology, n: int, rank: int) -> dict[str, Tensor]:
        """Sums of cosines and weights, one for every rank, and the number of rounds.

        With ``errors`` also ``away``, what leads from the result of the last round to that without this rank, and ``error``, what
        was measured there (not a number before that).
        """
        state = {
            "cosines": torch.zeros(n, dtype=torch.float64),
            "weights": torch.full((n,), 1.0 / n, dtype=torch.float64),
            "rounds": torch.zeros(1, dtype=torch.int64),
        }
        if self.errors != "none":
            state["away"] = torch.zeros_like(start, dtype=torch.promote_types(start.dtype, torch.float32))
            state["error"] = torch.full((1,), math.nan, dtype=torch.float64)
        return state

    def shares(self, values: Tensor) -> Tensor:
        """Scaled to sum to one, then at least ``floor``; all alike where there is nothing."""
        total = float(values.sum())
        scaled = values / total if total > 0 else torch.full_like(values, 1.0 / len(values))
        return scaled.clamp(min=self.floor)

    def weights(self, state: dict[str, Tensor], errors: Tensor | None = None) -> Tensor:
        """The weights, which sum to one, from the cosines so far and the errors of this round, if there are any."""
        apart = self.shares(1.0 - state["cosines"] / max(1, int(state["rounds"])))
        if errors is not None:
            found = self.shares(errors)
            apart = self.shares(apart + found if self.errors == "plus" else apart * found)
        return apart / apart.sum()

    def talk(self, wire: Wire, value: Tensor, state: dict[str, Tensor]) -> Talk[Tensor]:
        """See :meth:`Combine.talk`."""
        others = [j for j in range(wire.size) if j != wire.rank]
        payload, own = value.view(torch.uint8), None
        if self.errors != "none":
            own = self._own_error(state)
            payload = torch.cat([own.view(torch.uint8).to(value.device), payload])
        got = yield from wire.swap(dict.fromkeys(others, payload), dict.fromkeys(others, payload.numel()))
        messages = [value if j == wire.rank else got[j][self.extra_bytes :].view(value.dtype) for j in range(wire.size)]
        state["cosines"] += cosines(messages, state["weights"])
        state["rounds"] += 1
        errors = None
        if own is not None:
            parts = [
                own if j == wire.rank else got[j][:_ERROR_BYTES].cpu().view(torch.float64) for j in range(wire.size)
            ]
            errors = torch.cat(parts)
        state["weights"].copy_(self.weights(state, errors))
        out = torch.zeros_like(value)
        for weight, message in zip(state["weights"].tolist(), messages, strict=True):
            out.add_(message, alpha=weight)
        if own is not None:
            share = float(state["weights"][wire.rank])
            torch.sub(value, out, out=state["away"]).mul_(share / (1.0 - share) if share < 1.0 else 0.0)
            state["error"].fill_(math.nan)
        return out

    def _own_error(self, state: dict[str, Tensor]) -> Tensor:
        """What was measured since the last round; one in the first round, in which nobody can have measured."""
        if not int(state["rounds"]):
            return torch.ones(1, dtype=torch.float64)
        if not bool(state["error"].isfinite()):
            raise ValueError(
                f"{self!r}: the error without this rank was not measured since the last round (found {float(state['error'])}); "
                "add callbacks.ClientErrors to the Trainer"
            )
        return state["error"].clone()

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
