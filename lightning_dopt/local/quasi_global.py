"""Quasi-global momentum: the inner optimizer's momentum follows what all ranks did together."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_dopt._checks import check_float
from lightning_dopt.local.base import BoundCorrection, Context, Correction
from lightning_dopt.local.control_variate import index, zeros
from lightning_dopt.local.exact_diffusion import one_mixing
from lightning_dopt.schedules import Every
from lightning_dopt.slots import Lane

if TYPE_CHECKING:
    from lightning_dopt.plan import Plan


class QuasiGlobalMomentum(Correction):
    """QG-DSGDm: after mixing, momentum is rebuilt from the step that this rank made including the mixing.

    The inner optimizer steps as usual, with its momentum ``m``; then ``m <- mu m_before + (1 - mu) (x_before - x_after) / lr``
    with ``m_before`` from before the step: what the local gradient added to it is dropped. Works with ``torch.optim.SGD``
    with momentum (``nesterov=True``: QG-DSGDm-N; ``mu = momentum`` is the usual choice), and with Adam and its kin:
    there both moments are rebuilt from the displacement divided by its norm over all parameters ``q``,
    ``m <- mu m + (1 - mu) q`` and ``v <- nu v + (1 - nu) q^2``. Nothing more is sent than by plain gossip, whose bias it
    keeps, while local momentum multiplies it by ``1 / (1 - momentum)``.

    Args:
        mu: Share of the old momentum that stays, in [0, 1).
        nu: The same for the second moment of Adam and its kin.

    Raises:
        ValueError: ``mu`` or ``nu`` outside [0, 1), a plan that does not mix in every step with ``order="atc"``; in
            training, an inner optimizer without momentum.

    Source: Lin et al., "Quasi-Global Momentum", arXiv 2102.04761. Their Adam variant adds ``g`` to ``mu m`` in the step
    itself without the factor ``1 - mu``; here the step is torch's.
    """

    slots = frozenset({"parameters"})

    def __init__(self, mu: float = 0.9, nu: float = 0.999) -> None:
        self.mu = check_float("QuasiGlobalMomentum", "mu", mu, 0.0, 1.0, open_high=True)
        self.nu = check_float("QuasiGlobalMomentum", "nu", nu, 0.0, 1.0, open_high=True)

    def check(self, plan: Plan) -> None:
        """See :meth:`Correction.check`."""
        sync = one_mixing("QuasiGlobalMomentum", plan)
        if sync.when != Every(1) or sync.apply.delay or getattr(sync.apply, "order", "atc") != "atc":
            raise ValueError(
                f"QuasiGlobalMomentum: needs a mixing after every step, when=Every(1) and apply=Blocking(), got {sync.when!r} "
                f"and {sync.apply!r}"
            )

    def bind(self, context: Context) -> BoundCorrection:
        """See :meth:`Correction.bind`."""
        return _BoundQuasiGlobal(self.mu, self.nu, context)


class _BoundQuasiGlobal(BoundCorrection):
    slots = frozenset({"parameters"})

    def __init__(self, mu: float, nu: float, context: Context) -> None:
        self.mu, self.nu, self.context = mu, nu, context
        self.before = zeros(context.lanes)
        self.first, self.second = zeros(context.lanes), zeros(context.lanes)

    def scratch(self) -> list[Tensor]:
        return [*self.before, *self.first, *self.second]

    def _moment(self, name: str, *keys: str) -> Tensor | None:
        for key in keys:
            try:
                found = self.context.state(name, key)
            except (KeyError, ValueError):
                continue
            if isinstance(found, Tensor):
                return found
        return None

    def on_gradient(self, names: Collection[str]) -> None:
        """Keep what the step is about to change."""
        for k, lane in enumerate(self.context.lanes):
            self.before[k].copy_(lane.live)
            for field, first, second in zip(
                lane.fields, lane.views(self.first[k]), lane.views(self.second[k]), strict=True
            ):
                m = self._moment(field.name, "momentum_buffer", "exp_avg")
                v = self._moment(field.name, "exp_avg_sq")
                first.copy_(m) if m is not None else first.zero_()
                second.copy_(v) if v is not None else second.zero_()

    def on_applied(self, slot: str, lane: Lane, sent: Tensor, new: Tensor, steps: int) -> None:
        k = index(self.context.lanes, lane)
        moved = self.before[k] - lane.live
        norm = float(torch.linalg.vector_norm(moved)) + 1e-8
        for field, old, old_second, change in zip(
            lane.fields, lane.views(self.first[k]), lane.views(self.second[k]), lane.views(moved), strict=True
        ):
            momentum = self._moment(field.name, "momentum_buffer")
            rate = self.context.lr(field.name)
            if momentum is not None:
                if rate > 0:  # a learning rate of zero moved nothing
                    momentum.copy_(old.mul(self.mu).add_(change, alpha=(1 - self.mu) / rate))
                continue
            first, second = self._moment(field.name, "exp_avg"), self._moment(field.name, "exp_avg_sq")
            if first is None or second is None:
                raise ValueError(
                    f"QuasiGlobalMomentum: the optimizer keeps no momentum for {field.name!r}; use SGD(momentum=...) or Adam"
                )
            q = change / norm
            first.copy_(old.mul(self.mu).add_(q, alpha=1 - self.mu))
            second.copy_(old_second.mul(self.nu).addcmul_(q, q, value=1 - self.nu))
