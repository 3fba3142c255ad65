"""Mixing with a gain that fades, against noise on the wire."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lightning_dopt._checks import check_float
from lightning_dopt.combine.base import WeightedSum, Wire
from lightning_dopt.comm.world import Talk

if TYPE_CHECKING:
    from lightning_dopt.plan import Sync


class Damped(WeightedSum):
    """``x <- x + b_t (sum_j W[i, j] m_j - x)`` with the gain ``b_t = gain (offset / (t + offset))**power`` in round ``t``.

    A constant gain below one is lazy mixing. With a fading gain what noise on the messages does to ``x`` stays bounded,
    and with learning rates that fade faster than it (``power`` below that of the learning rate's schedule) decentralized
    SGD finds local minima of non-convex losses and leaves saddle points.

    Args:
        gain: ``b_0``, in (0, 1].
        power: How fast it fades; 0 keeps it constant.
        offset: Rounds until it has fallen by ``2**power``, above 0.

    Raises:
        ValueError: an argument out of range; from the plan, ``signal="delta"``.

    Source: Swenson, Murray, Poor, Kar, "Distributed Stochastic Gradient Descent: Nonconvexity, Nonsmoothness, and
    Convergence to Local Minima", arXiv 2003.02818.
    """

    in_place = False

    def __init__(self, gain: float = 1.0, power: float = 0.0, offset: float = 1.0) -> None:
        self.gain = check_float("Damped", "gain", gain, 0.0, 1.0, open_low=True)
        self.power = check_float("Damped", "power", power, 0.0)
        self.offset = check_float("Damped", "offset", offset, 0.0, open_low=True)

    def check(self, sync: Sync) -> None:
        """See :meth:`Combine.check`."""
        if sync.signal != "value":
            raise ValueError(f"Sync(signal={sync.signal!r}, combine={self!r}): mixes values, use signal='value'")

    def talk(self, wire: Wire, value: Tensor, state: dict[str, Tensor]) -> Talk[Tensor]:
        """See :meth:`Combine.talk`."""
        gain = self.gain * (self.offset / (wire.round + self.offset)) ** self.power
        own = value.clone()
        mixed = yield from wire.mix(value)
        return own.lerp_(mixed, gain)
