"""Extragradient steps around a reference point (MASHA): min-max problems with compressed messages."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_dopt._checks import check_float
from lightning_dopt.local.ascend import Ascend
from lightning_dopt.local.base import BoundCorrection, Context, Correction
from lightning_dopt.local.control_variate import zeros
from lightning_dopt.local.loss_weights import LossWeights
from lightning_dopt.slots import Lane

if TYPE_CHECKING:
    from lightning_dopt.plan import Plan


class Extragradient(Correction):
    """Extragradient steps whose messages are changes of the operator since a reference point (MASHA1, MASHA2).

    Let ``F_i`` be the gradient of rank ``i`` (with :class:`Ascend`, the operator of a min-max problem), ``F`` the mean.
    All ranks hold the reference point ``w`` and ``F(w)``, each its own ``F_i(w)``. One step:

    * ``zbar = tau z + (1 - tau) w``, ``zh = zbar - lr F(w)``; forward and backward run at ``zh``;
    * what a rank sends is ``F_i(zh) - F_i(w)``; the inner optimizer steps from ``zbar`` with ``F(w)`` plus the mean of that,
      so with SGD ``z = zh - lr mean_i C(F_i(zh) - F_i(w))``.

    The plan needs two syncs over the complete graph. That of ``what="gradients"`` sends the differences in every step: an
    unbiased codec gives MASHA1, ``ErrorFeedback`` around a contractive one MASHA2. That of ``what="reference"`` sends
    ``F_i`` dense at the steps on which the reference moves: there ``w = z`` first and the step takes two passes, both on
    the same batch. It must be due at step 1; in the papers it is due by a shared coin with probability ``1 - tau``, which
    is best about the share of bytes that the codec leaves. Due in every step, this is the plain extragradient method.

    With full gradients it converges on unequal data at a constant rate, where compressed gradients or compressed
    extragradient steps do not. Replicas stay equal. Gradients cannot be accumulated, and optimization must be automatic.

    Args:
        tau: Weight of the iterate against the reference point, in [0, 1].
        step: Size of the step to ``zh``; ``None`` means the learning rate of each parameter, as in the papers. Give it
            where the inner optimizer is not SGD.

    Raises:
        ValueError: an argument out of range; a plan without those two syncs of all parameters, with other corrections than
            :class:`Ascend` and :class:`LossWeights`, or over a sparse graph; when training starts, manual optimization,
            accumulated gradients or loss scaling.

    Source: Beznosikov, Richtarik, Diskin, Ryabinin, Gasnikov, "Distributed Methods with Compressed Communication for
    Solving Variational Inequalities, with Theoretical Guarantees" (MASHA), arXiv 2110.03313, algorithms 1 and 2.
    """

    slots = frozenset({"reference", "gradients"})

    def __init__(self, tau: float = 0.9, step: float | None = None) -> None:
        self.tau = check_float("Extragradient", "tau", tau, 0.0, 1.0)
        self.step = None if step is None else check_float("Extragradient", "step", step, 0.0, open_low=True)

    def check(self, plan: Plan) -> None:
        """See :meth:`Correction.check`."""
        for slot in ("reference", "gradients"):
            syncs = [s for s in plan if s.what.slot == slot]
            if len(syncs) != 1 or getattr(syncs[0].what, "match", "*") != "*":
                raise ValueError(
                    f"Extragradient: needs one sync of what={slot!r}, of all parameters; use plans.masha()"
                )
            if slot == "reference" and (syncs[0].when.in_rounds or not syncs[0].when.due(1)):
                raise ValueError(
                    f"Sync(what='reference', when={syncs[0].when!r}): must be due at step 1, use "
                    f"Either(Until(1, Every(1)), {syncs[0].when!r})"
                )
            if getattr(syncs[0].codec, "codes_values", False):
                raise ValueError(
                    f"Extragradient: sends differences, codec={syncs[0].codec!r} is for values; use ErrorFeedback"
                )
        others = [c for c in plan.corrections if not isinstance(c, (Ascend, LossWeights)) and c is not self]
        if others:
            raise ValueError(f"Extragradient: works with Ascend and LossWeights, not with {others[0]!r}")

    def check_size(self, plan: Plan, n: int) -> None:
        """See :meth:`Correction.check_size`."""
        for sync in plan:
            if sync.what.slot in ("reference", "gradients") and not sync.peers.is_mean(n):
                raise ValueError(
                    f"Extragradient: all ranks must know F(w), got {sync.peers!r} for {sync.label}; use peers=Complete()"
                )

    def bind(self, context: Context) -> BoundCorrection:
        """See :meth:`Correction.bind`."""
        return _BoundExtragradient(self.tau, self.step, context)


class _BoundExtragradient(BoundCorrection):
    slots = frozenset({"reference", "gradients"})
    passes = 2

    def __init__(self, tau: float, step: float | None, context: Context) -> None:
        self.tau, self.step, self.context = tau, step, context
        self.w = [lane.live.detach().to(lane.message_dtype, copy=True) for lane in context.lanes]
        self.bar, self.own = zeros(context.lanes), zeros(context.lanes)
        self.mean: list[Tensor] = []  # of F(w): where the sync of the reference leaves it
        self.own_of = {
            f.name: f.of(flat) for lane, flat in zip(context.lanes, self.own, strict=True) for f in lane.fields
        }
        self.mean_of: dict[str, Tensor] = {}
        self.moved = False

    def prepare(self, slot: str, lanes: list[Lane]) -> None:
        if slot == "reference":
            self.mean = [lane.live for lane in lanes]
            self.mean_of = {f.name: f.of(lane.live) for lane in lanes for f in lane.fields}

    def on_begin(self, due: Collection[str]) -> None:
        self.passes = 2 if "reference" in due else 1
        if self.passes == 1:
            self._extrapolate()
            return
        for lane, w in zip(self.context.lanes, self.w, strict=True):
            w.copy_(lane.live)

    def perturb(self, names: Collection[str]) -> None:
        if len(names) != len(self.own_of):
            raise ValueError("Extragradient: one optimizer must step all parameters")
        self._extrapolate()

    def _extrapolate(self) -> None:
        """``zbar``, then the parameters at ``zh``."""
        self.moved = True
        for lane, bar, w in zip(self.context.lanes, self.bar, self.w, strict=True):
            bar.copy_(lane.live).lerp_(w, 1.0 - self.tau)  # exactly z where w = z
            for field, ahead, base in zip(lane.fields, lane.views(lane.live), lane.views(bar), strict=True):
                rate = self.step if self.step is not None else self.context.lr(field.name)
                ahead.copy_(base.sub(self.mean_of[field.name], alpha=rate))

    def restore(self, names: Collection[str]) -> None:
        if self.moved:
            self.moved = False
            for lane, bar in zip(self.context.lanes, self.bar, strict=True):
                lane.live.copy_(bar)

    def publish(self, slot: str, lane: Lane, message: Tensor) -> None:
        for field, part in zip(lane.fields, lane.views(message), strict=True):
            own = self.own_of[field.name]
            if slot == "gradients":
                part.sub_(own)
                continue
            gradient = self.context.parameters[field.name].grad
            part.zero_() if gradient is None else part.copy_(gradient)
            own.copy_(part)

    def on_applied(self, slot: str, lane: Lane, sent: Tensor, new: Tensor, steps: int) -> None:
        if slot == "gradients":
            for field, part in zip(lane.fields, lane.views(lane.live), strict=True):
                part.add_(self.mean_of[field.name])

    def scratch(self) -> list[Tensor]:
        return self.bar

    def state(self) -> dict[str, Tensor]:
        kinds = {"w": self.w, "own": self.own, "mean": self.mean}
        return {f"{kind}{k}": t for kind, tensors in kinds.items() for k, t in enumerate(tensors)}
