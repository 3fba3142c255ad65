"""Robust gradient tracking: exact gossip over links that quantise or add noise (after VRA-DGT and VRA-DSGT)."""

from __future__ import annotations

from lightning_dopt.apply import Blocking
from lightning_dopt.combine import Damped
from lightning_dopt.compress import Identity
from lightning_dopt.compress.base import Codec, Compressor
from lightning_dopt.compress.memory import Direct
from lightning_dopt.local import RobustTracking
from lightning_dopt.plan import Plan, Sync, is_exact
from lightning_dopt.topology import Ring
from lightning_dopt.topology.base import Topology


def robust_tracking(
    topology: Topology | None = None,
    codec: Codec | None = None,
    gain: float = 1.0,
    power: float = 1.0,
    offset: float = 100.0,
) -> Plan:
    """Gradient tracking of accumulated gradients with a fading gain of the mixing: noise on the messages averages out.

    Give the inner optimizer (plain SGD) a learning rate that falls like the gain, ``lr / (1 + t / offset)**power``.

    Args:
        topology: ``None`` means the ring.
        codec: For both messages; a lossy compressor is sent without memory (``Direct``). ``Averaged(codec)`` lets receivers
            average the errors of all messages.
        gain: Of the mixing at the start, in (0, 1].
        power: How fast it fades; 1 gives a mean square error that falls like ``1 / t``, 0 none that falls.
        offset: Steps until it has halved (with ``power=1``).

    Raises:
        ValueError: an option out of range.

    Source: Pu, "A Robust Gradient Tracking Method for Distributed Optimization over Directed Networks", arXiv 2003.13980;
    "Variance-reduced aggregation" (VRA) replaces what neighbours sent by an estimate, here ``Averaged``.
    """
    wire = codec or Identity()
    if isinstance(wire, Compressor) and not is_exact(wire):
        wire = Direct(wire)
    peers, combine = topology or Ring(), Damped(gain, power, offset)
    tracker = Sync(what="tracker", codec=wire, peers=peers, combine=combine)
    mix = Sync(signal="value", codec=wire, peers=peers, combine=combine, apply=Blocking("awc"))
    return Plan([tracker, mix], [RobustTracking()])
