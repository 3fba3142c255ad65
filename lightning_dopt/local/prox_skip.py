"""ProxSkip: exact local steps with a coin for the syncs, also for games."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lightning_dopt._checks import check_float
from lightning_dopt.apply import Blocking
from lightning_dopt.compress import Identity
from lightning_dopt.local.base import BoundCorrection, Context, Correction
from lightning_dopt.local.control_variate import BoundControlVariate, index
from lightning_dopt.schedules import Bernoulli, Every
from lightning_dopt.slots import Lane

if TYPE_CHECKING:
    from lightning_dopt.plan import Plan, Sync


class ProxSkip(Correction):
    """Each rank steps with ``g - h_i``; at a sync ``h_i`` learns what the others pulled it by.

    When the coin of the sync's ``Bernoulli(p)`` falls, a rank sends ``x - lr / p h_i``, takes the mean ``z`` and
    ``h_i <- h_i + p / lr (z - x)``. The ``h_i`` of all ranks sum to zero, and with full gradients all ranks reach the
    solution, however unlike their data are; also that of a game, see :class:`~lightning_dopt.local.Ascend`. Plain SGD with a
    constant learning rate; ``p = sqrt(lr mu)`` needs fewest messages for ``mu``-strongly convex losses.

    Args:
        p: The coin's probability, that of the sync's ``Bernoulli``; 1 with ``Every(1)``.
        l1: Weight of ``sum |x|`` beside the losses, at least 0; its proximal step is taken at syncs only.

    Raises:
        ValueError: ``p`` outside (0, 1] or ``l1 < 0``; from the plan, syncs that do not suit.

    Source: Mishchenko et al., "ProxSkip", arXiv 2202.09357, algorithm 2; for variational inequalities Zhang, Choudhury et al.,
    "Communication-Efficient Gradient Descent-Ascent Methods for Distributed Variational Inequalities", arXiv 2306.05100.
    """

    slots = frozenset({"parameters"})

    def __init__(self, p: float, l1: float = 0.0) -> None:
        self.p = check_float("ProxSkip", "p", p, 0.0, 1.0, open_low=True)
        self.l1 = check_float("ProxSkip", "l1", l1, 0.0)

    def check(self, plan: Plan) -> None:
        """See :meth:`Correction.check`."""
        mixing = self._sync(plan)
        plain = (
            mixing is not None
            and mixing.signal == "value"
            and isinstance(mixing.codec, Identity)
            and mixing.outer is None
        )
        if mixing is None or not plain or mixing.apply != Blocking():
            raise ValueError(
                "ProxSkip: needs one sync of the parameters with signal='value', codec=Identity(), no outer and apply=Blocking()"
            )
        coin = 1.0 if mixing.when == Every(1) else getattr(mixing.when, "p", None)
        if not isinstance(mixing.when, (Bernoulli, Every)) or coin != self.p:
            raise ValueError(
                f"ProxSkip(p={self.p:g}): Sync(when={mixing.when!r}) must be the same coin, use when=Bernoulli({self.p:g})"
            )

    def check_size(self, plan: Plan, n: int) -> None:
        """See :meth:`Correction.check_size`."""
        mixing = self._sync(plan)
        if mixing is not None and (not mixing.peers.agrees or mixing.peers.partial):
            raise ValueError(
                f"ProxSkip: Sync(peers={mixing.peers!r}) must give all ranks the mean of all, use Complete()"
            )

    @staticmethod
    def _sync(plan: Plan) -> Sync | None:
        mixing = [s for s in plan if s.what.slot == "parameters"]
        return mixing[0] if len(mixing) == 1 else None

    def bind(self, context: Context) -> BoundCorrection:
        """See :meth:`Correction.bind`."""
        return _BoundProxSkip(self.p, self.l1, context)


class _BoundProxSkip(BoundControlVariate):
    slots = frozenset({"parameters"})

    def __init__(self, p: float, l1: float, context: Context) -> None:
        super().__init__(context)
        self.p, self.l1 = p, l1

    def publish(self, slot: str, lane: Lane, message: Tensor) -> None:
        h = self.h[index(self.context.lanes, lane)]
        for field, part, shift in zip(lane.fields, lane.views(message), lane.views(h), strict=True):
            part.sub_(shift, alpha=self.context.lr(field.name) / self.p)

    def on_applied(self, slot: str, lane: Lane, sent: Tensor, new: Tensor, steps: int) -> None:
        if self.l1:
            for field, part in zip(lane.fields, lane.views(lane.live), strict=True):
                kept = (part.abs() - self.l1 * self.context.lr(field.name) / self.p).clamp_(min=0.0)
                part.sign_().mul_(kept)
        self.learn(lane, lane.live - sent, self.p, 1)
