"""Fixed sparse selections: few elements are trained and sent, the others stay as they are."""

from __future__ import annotations

import math
from collections.abc import Collection
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_dopt._checks import check_float
from lightning_dopt.apply import Blocking
from lightning_dopt.local.ascend import Ascend
from lightning_dopt.local.base import BoundCorrection, Context, Correction
from lightning_dopt.local.control_variate import fields, index, zeros
from lightning_dopt.local.loss_weights import LossWeights
from lightning_dopt.slots import Lane

if TYPE_CHECKING:
    from lightning_dopt.plan import Plan

_LOOKED_AT = 4096  # steps of a schedule


class NeuronMask(Correction):
    """Trains the largest weights of every neuron, chosen once at the start; everything else stays as it is.

    Of each tensor with two or more dimensions, and of each row of it (the incoming weights of an output unit), the largest
    ``ratio`` by magnitude are trained; vectors such as biases are trained whole. Syncs of parameters and gradients send
    these elements only, packed, without indices, with any codec and over any peers. Momentum and weight decay move
    nothing else. Replicas must start from equal weights, as they do under a strategy.

    Args:
        ratio: Share of each neuron's weights, in (0, 1]; rounded half up, at least one.

    Raises:
        ValueError: ``ratio`` outside (0, 1]; syncs of a part of the parameters or with another apply than ``Blocking()``;
            corrections other than :class:`Ascend` and :class:`LossWeights`.

    Source: after Zhang et al., "Proactive Gradient Conflict Mitigation in Multi-Task Learning: A Sparse Training
    Perspective", arXiv 2411.18615, with the rule "largest weights of each neuron".
    """

    def __init__(self, ratio: float = 0.1) -> None:
        self.ratio = check_float("NeuronMask", "ratio", ratio, 0.0, 1.0, open_low=True)

    def check(self, plan: Plan) -> None:
        """See :meth:`Correction.check`."""
        check_masked(self, plan)

    def bind(self, context: Context) -> BoundCorrection:
        """See :meth:`Correction.bind`."""
        bound = _BoundMask(context, [self._positions(lane) for lane in context.lanes])
        for k in range(len(context.lanes)):
            bound.freeze(k)
        return bound

    def _positions(self, lane: Lane) -> Tensor:
        chosen = []
        for field, values in zip(lane.fields, lane.views(lane.live), strict=True):
            rows = values.detach().reshape(values.shape[0], -1) if values.dim() > 1 else values.detach().reshape(-1, 1)
            kept = rows.abs().sort(dim=1, descending=True, stable=True).indices[:, : count(self.ratio, rows.shape[1])]
            start = torch.arange(rows.shape[0], device=values.device)[:, None] * rows.shape[1] + field.offset
            chosen.append((kept + start).reshape(-1))
        return torch.cat(chosen).sort().values


class FisherMask(Correction):
    """FISH mask: trains the elements with the largest squared gradients (empirical Fisher information), no others.

    Scores are the sums of squared gradients (of batches, before anything is sent) since the last choice. The plan's sync of
    ``what="tracker"`` averages them over the ranks, dense, and each time it is due all ranks choose anew the same ``k``
    elements. Until it is first due nothing moves: these steps only score. Syncs of parameters and gradients send the ``k``
    elements, packed, without indices (``4 k`` bytes with an exact codec), with any codec. Momentum and weight decay move
    nothing else. When the choice changes, anchors begin anew, and so do outer optimizers and memories.

    Args:
        ratio: Share of the elements of each flat buffer (one per dtype) to train, in (0, 1]; ``k`` is rounded half up and
            at least 1.
        always: Pattern on names of parameters that are chosen whole, and count; such as a new classifier.

    Raises:
        ValueError: an argument out of range; a plan without exactly one sync of all trackers, over the complete graph, at
            the end of the list; one that is due where parameters are not; a sparse graph on which the choice changes; syncs
            of a part of the parameters or with another apply than ``Blocking()``; corrections other than :class:`Ascend`
            and :class:`LossWeights`; when training starts, more elements in ``always`` than are chosen.

    Source: Sung, Nair, Raffel, "Training Neural Networks with Fixed Sparse Masks", arXiv 2111.09839.
    """

    slots = frozenset({"tracker"})

    def __init__(self, ratio: float = 0.005, always: str | None = None) -> None:
        self.ratio = check_float("FisherMask", "ratio", ratio, 0.0, 1.0, open_low=True)
        if always is not None and not always:
            raise ValueError("FisherMask(always=''): must be a pattern such as 'classifier.*', or None")
        self.always = always

    def check(self, plan: Plan) -> None:
        """See :meth:`Correction.check`."""
        check_masked(self, plan)
        trackers = [s for s in plan if s.what.slot == "tracker"]
        if len(trackers) != 1 or trackers[0] is not plan.syncs[-1] or getattr(trackers[0].what, "match", "") != "*":
            raise ValueError(
                "FisherMask: needs one sync of what='tracker', the last of the plan; use plans.fish_mask()"
            )
        for sync in plan:
            if sync.when.measured or sync.when.in_rounds:
                raise ValueError(
                    f"FisherMask: when it chooses must be known beforehand, got {sync.when!r} for {sync.label!r}"
                )
            if sync.what.slot == "parameters" and any(not sync.when.due(t) for t in self._choices(plan)[1:]):
                raise ValueError(
                    f"FisherMask: chooses anew where {sync.label!r} is not due, so that replicas would stay apart; use "
                    "a schedule whose steps are among those of the parameters"
                )

    def check_size(self, plan: Plan, n: int) -> None:
        """See :meth:`Correction.check_size`."""
        if not plan.syncs[-1].peers.is_mean(n):
            raise ValueError("FisherMask: all ranks choose the same elements, use peers=Complete() for the tracker")
        sparse = [s for s in plan if not s.peers.is_mean(n)]
        if sparse and len(self._choices(plan)) > 1:
            raise ValueError(
                f"FisherMask: over {sparse[0].peers!r} replicas differ where the choice changes; let it be due once, with Until"
            )

    def _choices(self, plan: Plan) -> list[int]:
        return [t for t in range(1, _LOOKED_AT + 1) if plan.syncs[-1].when.due(t)]

    def bind(self, context: Context) -> BoundCorrection:
        """See :meth:`Correction.bind`."""
        sizes = [count(self.ratio, lane.numel) for lane in context.lanes]
        always = [
            [f for f in lane.fields if self.always is not None and fnmatchcase(f.name, self.always)]
            for lane in context.lanes
        ]
        for size, chosen in zip(sizes, always, strict=True):
            needed = sum(f.numel for f in chosen)
            if needed > size:
                raise ValueError(
                    f"FisherMask(always={self.always!r}): these are {needed} elements, more than the {size} chosen"
                )
        return _BoundFisher(context, sizes, [[(f.offset, f.offset + f.numel) for f in fs] for fs in always])


class _BoundMask(BoundCorrection):
    def __init__(self, context: Context, positions: list[Tensor]) -> None:
        self.context, self.positions = context, positions
        self.outside = [torch.ones_like(lane.live, dtype=torch.bool) for lane in context.lanes]
        self.frozen = [lane.live.detach().clone() for lane in context.lanes]

    def freeze(self, k: int) -> None:
        """What the positions of this lane leave out keeps the value that it has now."""
        self.outside[k].fill_(True).index_fill_(0, self.positions[k], False)
        self.frozen[k].copy_(self.context.lanes[k].live)

    def on_gradient(self, names: Collection[str]) -> None:
        for field, outside in fields(self.context.lanes, self.outside, names):
            gradient = self.context.parameters[field.name].grad
            if gradient is not None:
                gradient.masked_fill_(outside, 0.0)

    def on_stepped(self) -> None:
        for lane, outside, frozen in zip(self.context.lanes, self.outside, self.frozen, strict=True):
            lane.live.copy_(torch.where(outside, frozen, lane.live))

    def state(self) -> dict[str, Tensor]:
        kinds = {"positions": self.positions, "outside": self.outside, "frozen": self.frozen}
        return {f"{kind}{k}": t for kind, tensors in kinds.items() for k, t in enumerate(tensors)}


class _BoundFisher(_BoundMask):
    slots = frozenset({"tracker"})

    def __init__(self, context: Context, sizes: list[int], always: list[list[tuple[int, int]]]) -> None:
        lanes = context.lanes
        super().__init__(
            context, [torch.arange(k, device=lane.live.device) for k, lane in zip(sizes, lanes, strict=True)]
        )
        self.always, self.scores = always, zeros(lanes)
        self.changed = False
        for k, lane in enumerate(lanes):
            if sizes[k] == lane.numel:  # nothing to choose, nothing to wait for
                self.freeze(k)

    def on_gradient(self, names: Collection[str]) -> None:
        for field, score in fields(self.context.lanes, self.scores, names):
            gradient = self.context.parameters[field.name].grad
            if gradient is not None:
                score.add_(gradient.detach().to(score.dtype).square())
        super().on_gradient(names)

    def publish(self, slot: str, lane: Lane, message: Tensor) -> None:
        message.copy_(self.scores[index(self.context.lanes, lane)])

    def on_applied(self, slot: str, lane: Lane, sent: Tensor, new: Tensor, steps: int) -> None:
        k = index(self.context.lanes, lane)
        self.scores[k].zero_()
        ranking = lane.live.nan_to_num()
        for start, end in self.always[k]:
            ranking[start:end] = torch.inf
        best = ranking.sort(descending=True, stable=True).indices[: self.positions[k].numel()]  # the same on all ranks
        self.positions[k].copy_(best.sort().values)
        self.freeze(k)
        self.changed = True

    def rechosen(self) -> bool:
        changed, self.changed = self.changed, False
        return changed

    def state(self) -> dict[str, Tensor]:
        return super().state() | {f"scores{k}": t for k, t in enumerate(self.scores)}


def count(ratio: float, d: int) -> int:
    """``ratio * d`` rounded half up, at least one of at least one."""
    return min(d, max(1, math.floor(ratio * d + 0.5)))


def check_masked(mask: Correction, plan: Plan) -> None:
    """Refuse what would send or move elements that are not chosen.

    Raises:
        ValueError: see the masks.
    """
    name = type(mask).__name__
    for sync in plan:
        if sync.what.slot not in ("parameters", "gradients"):
            continue
        if getattr(sync.what, "match", "") != "*" or sync.apply != Blocking():
            raise ValueError(f"{name}: needs syncs of all parameters with apply=Blocking(), got {sync!r}")
    others = [c for c in plan.corrections if not isinstance(c, (Ascend, LossWeights)) and c is not mask]
    if others:
        raise ValueError(f"{name}: works with Ascend and LossWeights, not with {others[0]!r}")
