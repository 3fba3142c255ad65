"""Control variates for local steps, learnt from the very messages that carry the changes."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_dopt._checks import check_float
from lightning_dopt.apply import Blocking
from lightning_dopt.compress.base import Compressor
from lightning_dopt.local.base import BoundCorrection, Context, Correction
from lightning_dopt.local.control_variate import gradients, index, zeros
from lightning_dopt.local.rounds import refuse_moments
from lightning_dopt.slots import Lane

if TYPE_CHECKING:
    from lightning_dopt.plan import Plan


_ADVICE = "Scaffold: reads gradients off displacements; use SGD without momentum, or plans.scaffold(option='mean')"


class Scaffold(Correction):
    """Local steps with ``g - c_i + c``: ``c_i`` has learnt this rank's gradients, ``c`` is the mean of all ``c_i``.

    After a round of ``K`` steps from the anchor ``x`` to ``y`` the mean gradient of the rank is
    ``s = (x - y) / (sum of the K rates) + c_i - c``. With ``v <- (1 - beta) v + beta s`` one message is sent,
    ``d = C(alpha (v - c_i))``; then ``c_i <- c_i + d``, ``c <- c + mean d``, and the anchor moves by
    ``-(sum of the K rates) c``, which is what an outer optimizer sees. As ``c_i`` learn the gradients, messages go to
    zero, and so does what a compressor does to them: exact on unequal data at a constant learning rate.

    * ``alpha = beta = 1`` and exact messages: SCAFFOLD (option II) with all workers, for one message instead of two, since
      both of its messages follow from ``x - y``.
    * an unbiased compressor, ``alpha`` about ``1 / (1 + omega)``: SCALLION.
    * a contractive compressor, ``beta < 1`` against the noise of small batches: SCAFCOM.

    For SGD without momentum, whose displacement is a sum of gradients. Two vectors, a third with ``beta < 1``.

    Args:
        alpha: Share of what is missing that is sent, in (0, 1].
        beta: Share of the new gradient in the one that is learnt, in (0, 1].

    Raises:
        ValueError: a number out of range; at the start under Lightning, or else at the first round, an inner optimizer with
            momentum or one that adapts; from the plan, anything but one sync of the parameters by ``delta`` over the
            complete graph with a compressor of whole vectors and no memory.

    Source: Karimireddy et al., "SCAFFOLD", arXiv 1910.06378, algorithm 1; Huang, Li, Li, "Stochastic Controlled Averaging
    for Federated Learning with Communication Compression" (SCALLION, SCAFCOM), arXiv 2308.08165.
    """

    slots = frozenset({"parameters"})
    remembers = True

    def __init__(self, alpha: float = 1.0, beta: float = 1.0) -> None:
        self.alpha = check_float("Scaffold", "alpha", alpha, 0.0, 1.0, open_low=True)
        self.beta = check_float("Scaffold", "beta", beta, 0.0, 1.0, open_low=True)

    def check(self, plan: Plan) -> None:
        """See :meth:`Correction.check`."""
        syncs = [sync for sync in plan if sync.what.slot in ("parameters", "gradients")]
        if len(syncs) != 1 or syncs[0].what.slot != "parameters" or syncs[0].signal != "delta":
            raise ValueError(f"Scaffold: needs one sync, of the parameters with signal='delta', not {syncs!r}")
        codec = syncs[0].codec
        if not isinstance(codec, Compressor) or codec.layerwise:
            raise ValueError(
                f"Sync(codec={codec!r}): Scaffold is its own memory and sees one long message, use a compressor such as TopK(0.1)"
            )
        if syncs[0].apply != Blocking() or not syncs[0].combine.linear:
            raise ValueError(f"Sync(apply={syncs[0].apply!r}): Scaffold needs Blocking() and combine=Mixing()")

    def suits(self, momentum: bool, adaptive: bool) -> str | None:
        """See :meth:`Correction.suits`."""
        return _ADVICE if momentum or adaptive else None

    def bind(self, context: Context) -> BoundCorrection:
        """See :meth:`Correction.bind`."""
        return _BoundScaffold(self.alpha, self.beta, context)


class _BoundScaffold(BoundCorrection):
    slots = Scaffold.slots
    needs_own = True

    def __init__(self, alpha: float, beta: float, context: Context) -> None:
        self.alpha, self.beta, self.context = alpha, beta, context
        self.own, self.mean = zeros(context.lanes), zeros(context.lanes)
        self.learnt = zeros(context.lanes) if beta < 1 else []
        self.rates = torch.zeros(len(context.parameters), dtype=torch.float64)
        self.speaks, self.share = True, 1.0
        self._place = {name: k for k, name in enumerate(context.parameters)}

    def on_gradient(self, names: Collection[str]) -> None:
        for gradient, own in gradients(self.context, self.own, names):
            gradient.sub_(own)
        for gradient, mean in gradients(self.context, self.mean, names):
            gradient.add_(mean)

    def on_stepped(self) -> None:
        for name, k in self._place.items():
            self.rates[k] += self.context.lr(name)

    def on_round(self, slot: str, lane: Lane, speaks: bool, share: float) -> None:
        self.speaks, self.share = speaks, share

    def publish(self, slot: str, lane: Lane, message: Tensor) -> None:
        if not self.speaks:
            return
        refuse_moments(self.context, lane.fields[0].name, _ADVICE)
        k = index(self.context.lanes, lane)
        for field, part, mean in zip(lane.fields, lane.views(message), lane.views(self.mean[k]), strict=True):
            rate = float(self.rates[self._place[field.name]])
            if rate > 0:
                part.mul_(1.0 / rate).sub_(mean)
            else:  # a learning rate of zero moved nothing: nothing new is known
                part.zero_()
        if self.learnt:
            v = self.learnt[k].mul_(1.0 - self.beta).add_(message.add_(self.own[k]), alpha=self.beta)
            torch.sub(v, self.own[k], out=message)
        message.mul_(self.alpha)

    def on_received(self, slot: str, lane: Lane, own: Tensor | None, result: Tensor) -> None:
        k = index(self.context.lanes, lane)
        if own is not None:
            self.own[k].add_(own)
        change = self.share * result
        result.add_(self.mean[k])
        self.mean[k].add_(change)
        for field, part in zip(lane.fields, lane.views(result), strict=True):
            place = self._place[field.name]
            part.mul_(float(self.rates[place]))
            self.rates[place] = 0.0

    def state(self) -> dict[str, Tensor]:
        kinds = {"own": self.own, "mean": self.mean, "learnt": self.learnt}
        flats = {f"{kind}{k}": t for kind, held in kinds.items() for k, t in enumerate(held)}
        return flats | {"rates": self.rates}
