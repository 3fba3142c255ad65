"""Mixing whose result keeps its length where many unlike messages are averaged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lightning_dopt._checks import check_float
from lightning_dopt.combine.base import WeightedSum, Wire
from lightning_dopt.comm.world import Talk

if TYPE_CHECKING:
    from lightning_dopt.plan import Sync


class Rescaled(WeightedSum):
    """``m**power sum_j W[i, j] m_j`` with the number ``m`` of messages heard, this rank's own included.

    The mean of ``m`` changes that have little in common is ``sqrt(m)`` times shorter than each of them, which ``power=0.5`` makes
    up for. Changes that agree become longer by as much: the outer learning rate must allow for that.

    Args:
        power: At least 0; 0 is plain mixing.

    Raises:
        ValueError: ``power < 0``; from the plan, anything but changes (``signal="delta"``).

    Source: the outer gradients of Douillard et al., "DiPaCo", arXiv 2403.10616, as remembered; the form could not be checked.
    """

    in_place = False

    def __init__(self, power: float = 0.5) -> None:
        self.power = check_float("Rescaled", "power", power, 0.0)

    def check(self, sync: Sync) -> None:
        """See :meth:`Combine.check`."""
        if sync.signal != "delta":
            raise ValueError(f"Sync(signal={sync.signal!r}, combine={self!r}): rescales changes, use signal='delta'")

    def talk(self, wire: Wire, value: Tensor, state: dict[str, Tensor]) -> Talk[Tensor]:
        """See :meth:`Combine.talk`."""
        heard = len({wire.rank, *wire.peers.row(wire.size, wire.rank, wire.round)})
        mixed = yield from wire.mix(value)
        return mixed.mul_(heard**self.power)
