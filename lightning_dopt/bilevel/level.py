"""One level of a bilevel method: how its workers agree on one variable."""

from __future__ import annotations

from typing import Literal, get_args

from lightning_dopt._checks import check_choice, check_flag, check_int
from lightning_dopt._part import Part
from lightning_dopt.compress.base import Codec
from lightning_dopt.local import Correction, ExactDiffusion, Extra, GradientTracking, LocalTracking, MovingAverage
from lightning_dopt.plan import Plan
from lightning_dopt.plans.gossip import Order, gossip
from lightning_dopt.topology import Complete, Lazy, Ring
from lightning_dopt.topology.base import Topology

LevelName = Literal["dsgd", "gt", "semi_gt", "non_atc_gt", "extra", "ed"]


class Level(Part):
    """How one of the three variables ``s`` with direction ``g`` and step ``a`` moves; what is ``None`` is that of the method.

    ===============  ==============================================================  ==================
    ``correction``   iterates (plain SGD, in every step)                             messages of ``s``
    ===============  ==============================================================  ==================
    ``"dsgd"``       ``s+ = W (s - a g)``                                            1
    ``"gt"``         ``t = W (t + g - g_prev)``, ``s+ = W (s - a t)``                2
    ``"semi_gt"``    ``t = W t + g - g_prev``, ``s+ = W (s - a t)``                  2
    ``"non_atc_gt"`` ``t = W t + g - g_prev``, ``s+ = W s - a t``                    2
    ``"extra"``      ``s++ = V (2 s+ - s) - a (g+ - g)``                             1
    ``"ed"``         ``s++ = V (2 s+ - s - a (g+ - g))``                             1
    ===============  ==============================================================  ==================

    with ``V = (I + W) / 2``, since exact diffusion and EXTRA need a matrix without negative eigenvalues.

    Args:
        correction: A name of the table, or a correction of gossip with its own settings (``ExactDiffusion(kappa=0.1)`` for Adam).
        topology: With whom this level talks. Levels may differ.
        codec: What is on the wire; a lossy compressor is wrapped in ``Difference``.
        sync_every: Steps of this level between mixings. Above 1 ``"gt"`` is K-GT (:class:`LocalTracking`).
        lazy: Whether exact diffusion mixes with ``V``, unless the topology is :class:`Lazy` or :class:`Complete` already.
            Without it eigenvalues of ``W`` must lie above -1/3. EXTRA always mixes with ``V``.

    Raises:
        ValueError: an unknown name or an option out of range.
    """

    def __init__(
        self,
        correction: LevelName | Correction = "ed",
        topology: Topology | None = None,
        codec: Codec | None = None,
        sync_every: int | None = None,
        lazy: bool = True,
    ) -> None:
        if not isinstance(correction, Correction):
            check_choice("Level", "correction", correction, get_args(LevelName))
        if sync_every is not None:
            check_int("Level", "sync_every", sync_every, 1)
        self.correction, self.topology, self.codec, self.sync_every = correction, topology, codec, sync_every
        self.lazy = check_flag("Level", "lazy", lazy)

    def plan(
        self,
        owner: str,
        option: str,
        topology: Topology | None = None,
        codec: Codec | None = None,
        sync_every: int = 1,
        theta: float = 1.0,
    ) -> Plan:
        """The plan of this level.

        Args:
            owner: Who asks, for errors.
            option: Under which name it knows this level.
            topology: Where the level has none; ``None`` means the ring.
            codec: Where the level has none.
            sync_every: Where the level has none.
            theta: Weight of new directions in a moving average; 1 makes none.

        Raises:
            ValueError: EXTRA or a form of tracking without local steps, with ``sync_every`` above 1.
        """
        peers = self.topology or topology or Ring()
        every = self.sync_every if self.sync_every is not None else sync_every
        chosen, order = _correction(self.correction, every)
        if every > 1 and isinstance(chosen, (Extra, GradientTracking)):
            raise ValueError(
                f"{owner}({option}={self.correction!r}, sync_every={every}): mixes in every step; use 'ed' or 'gt' for local steps"
            )
        if isinstance(chosen, Extra) and isinstance(peers, Lazy):
            peers = peers.topology  # EXTRA makes its matrix lazy itself
        mixed = gossip(peers, self.codec or codec, chosen or "none", order, every)
        if isinstance(chosen, ExactDiffusion) and (not self.lazy or isinstance(peers, Complete)):
            mixed = gossip(peers, self.codec or codec, "none", order, every)
            mixed = Plan(mixed.syncs, [chosen])
        average = [MovingAverage(theta)] if theta != 1.0 else []
        return Plan(mixed.syncs, [*average, *mixed.corrections])


def _correction(name: LevelName | Correction, sync_every: int) -> tuple[Correction | None, Order | None]:
    """The part of that name, and the order in which it mixes if that is not its own."""
    if isinstance(name, Correction):
        return name, None
    if name == "gt" and sync_every > 1:
        return LocalTracking(), None
    found: dict[str, tuple[Correction | None, Order | None]] = {
        "dsgd": (None, None),
        "gt": (GradientTracking("atc"), None),
        "semi_gt": (GradientTracking("semi"), None),
        "non_atc_gt": (GradientTracking("semi"), "awc"),
        "extra": (Extra(), None),
        "ed": (ExactDiffusion(), None),
    }
    return found[name]


def level_of(owner: str, option: str, level: LevelName | Level) -> Level:
    """The level of that name.

    Raises:
        ValueError: an unknown name, listing the known ones.
    """
    if isinstance(level, Level):
        return level
    check_choice(owner, option, level, get_args(LevelName))
    return Level(level)
