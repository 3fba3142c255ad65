"""Matrices with orthonormal columns: training on the Stiefel manifold, also by gossip."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lightning_dopt._checks import check_choice
from lightning_dopt.local.base import BoundCorrection, Context, Correction
from lightning_dopt.slots import Field, Lane

if TYPE_CHECKING:
    from lightning_dopt.plan import Plan

Method = Literal["svd", "newton_schulz"]


def polar(x: Tensor, method: Method = "svd") -> Tensor:
    """The nearest matrix with orthonormal columns (rows, if ``x`` is wide): ``U V'`` of ``x = U S V'``.

    Args:
        x: a matrix; types narrower than float32 are computed in float32.
        method: ``"svd"``, or ``"newton_schulz"``: products of matrices only, faster on accelerators, for matrices whose
            singular values lie between 0.1 and 1.7, as those of a mean of near points or after a moderate step do. Others are
            left to ``"svd"``.
    """
    if x.shape[0] < x.shape[1]:
        return polar(x.T, method).T
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    result = _newton_schulz(y) if method == "newton_schulz" else None
    if result is None:
        u, _, vh = torch.linalg.svd(y, full_matrices=False)
        result = u @ vh
    return result.to(x.dtype)


def _newton_schulz(y: Tensor) -> Tensor | None:
    """``y <- y (3 I - y'y) / 2``, which squares the error; ``None`` if that did not get there."""
    eye = torch.eye(y.shape[1], dtype=y.dtype, device=y.device)
    bound = 8 * y.shape[0] ** 0.5 * torch.finfo(y.dtype).eps
    for _ in range(20):
        gap = eye - y.T @ y
        if float(gap.abs().amax()) <= bound:
            return y
        y = y + 0.5 * (y @ gap)
    return None


def tangent(x: Tensor, z: Tensor) -> Tensor:
    """The part of ``z`` along the manifold at ``x``: ``z - x (x'z + z'x) / 2`` (of the transposed matrices, if wide)."""
    if x.shape[0] < x.shape[1]:
        return tangent(x.T, z.T).T
    wide = torch.promote_types(z.dtype, torch.float32)
    point, vector = x.to(wide), z.to(wide)
    product = point.T @ vector
    return (vector - point @ (product + product.T).mul(0.5)).to(z.dtype)


class Stiefel(Correction):
    """Keeps matrices orthonormal, ``X'X = I`` (``XX' = I`` if wide), on every rank after every step.

    Gradients of the matching parameters lose what points away from the manifold, before they are sent and again before
    the inner optimizer sees them; after its step, and after a sync has been applied, parameters take the nearest point
    (:func:`polar`). They do so once before training, too. With ``order="awc"`` and SGD that is, exactly,
    ``X_i <- polar(sum_j W_ij X_j - lr tangent(X_i, d_i))``. With momentum or Adam steps are not along the manifold and
    are only brought back to it.

    * Alone with a sync of the parameters: Riemannian DSGD, biased as DSGD is.
    * After ``GradientTracking(form="semi")``, which then tracks Riemannian gradients: Riemannian gradient tracking,
      exact under heterogeneous data at a constant learning rate.
    * Before :class:`ConjugateGradient`: DRCGD.

    The mean of replicas that differ is off the manifold: apply :func:`polar` to a consensus model before use.

    Args:
        match: Pattern on parameter names; every match must be a matrix.
        method: How the nearest point is computed, see :func:`polar`.

    Raises:
        ValueError: an empty pattern, an unknown method, a match that is no matrix, no match at all; a plan with an outer
            optimizer, with gradient tracking after this correction, or with a correction made for flat space.

    Source: Chen, Garcia, Hong, Shahrampour, "Decentralized Riemannian Gradient Descent on the Stiefel Manifold",
    arXiv 2102.07091.
    """

    slots = frozenset({"parameters", "gradients"})

    def __init__(self, match: str = "*", method: Method = "svd") -> None:
        self.match = _checked_pattern("Stiefel", match)
        check_choice("Stiefel", "method", method, ("svd", "newton_schulz"))
        self.method: Method = method

    def check(self, plan: Plan) -> None:
        """See :meth:`Correction.check`."""
        if any(sync.outer is not None for sync in plan):
            raise ValueError("Stiefel: an outer optimizer would move its anchor off the manifold, leave outer out")
        late = plan.corrections[plan.corrections.index(self) + 1 :]
        if any("gradients" in c.slots and not isinstance(c, Stiefel) for c in late):
            raise ValueError("Stiefel: must come after corrections that send gradients, such as GradientTracking")
        for other in plan.corrections:
            if other.slots & {"parameters", "tracker"} and not isinstance(other, (Stiefel, ConjugateGradient)):
                raise ValueError(
                    f"Stiefel: {other!r} adds gradients of different points, which is right in flat space only; use "
                    "GradientTracking(form='semi')"
                )

    def bind(self, context: Context) -> BoundCorrection:
        """See :meth:`Correction.bind`."""
        return _BoundStiefel(self, context)


class _BoundStiefel(BoundCorrection):
    slots = frozenset({"parameters", "gradients"})

    def __init__(self, part: Stiefel, context: Context) -> None:
        self.method: Method = part.method
        self.parameters = context.parameters
        fields = [field for _, field in _matrices("Stiefel", part.match, context)]
        self.index = {field.name: k for k, field in enumerate(fields)}
        self.travelling = torch.zeros(len(fields), dtype=torch.uint8)
        """Whether a message left and has not been applied."""
        self.lost = {field.name: torch.zeros_like(self.parameters[field.name].detach()) for field in fields}
        """What the projection after the last step took away, if a message was on its way."""
        for name in self.index:
            if not self.parameters[name].is_meta:  # shapes alone have no place on the manifold
                self._retract(name)

    def _retract(self, name: str) -> None:
        x = self.parameters[name].detach()
        x.copy_(polar(x, self.method))

    def on_gradient(self, names: Collection[str]) -> None:
        for name in self.index:
            p = self.parameters[name]
            if name in names and p.grad is not None:
                p.grad.copy_(tangent(p.detach(), p.grad))

    def publish(self, slot: str, lane: Lane, message: Tensor) -> None:
        if slot == "parameters":
            for name in self._of(lane):
                self.travelling[self.index[name]] = 1

    def on_stepped(self) -> None:
        for name, k in self.index.items():
            x = self.parameters[name].detach()
            if self.travelling[k]:
                self.lost[name].copy_(x)
            self._retract(name)
            if self.travelling[k]:
                self.lost[name].sub_(x)

    def on_applied(self, slot: str, lane: Lane, sent: Tensor, new: Tensor, steps: int) -> None:
        for field in lane.fields:
            if field.name not in self.index:
                continue
            here = field.of(lane.live)
            if slot == "gradients":
                here.copy_(tangent(self.parameters[field.name].detach(), here))
                continue
            here.add_(self.lost[field.name].view_as(here))  # one projection for the step and the result together
            self.lost[field.name].zero_()
            self.travelling[self.index[field.name]] = 0
            here.copy_(polar(here, self.method))

    def _of(self, lane: Lane) -> list[str]:
        return [field.name for field in lane.fields if field.name in self.index]

    def state(self) -> dict[str, Tensor]:
        return {"travelling": self.travelling} | {f"lost.{name}": t for name, t in self.lost.items()}


class ConjugateGradient(Correction):
    """DRCGD: the inner optimizer follows conjugate directions, which ranks mix with their neighbours.

    ``d <- g + b tangent(X, sum_j W_ij d_j)`` with the Riemannian gradient ``g`` at ``X``, ``b = min(1, |g|^2 / |g_previous|^2)``
    (Fletcher-Reeves, capped) for every matrix by itself, ``d = g`` at first. With SGD without momentum and
    ``apply=Blocking(order="awc")`` for the parameters that is the method of the paper,
    ``X <- polar(sum_j W_ij X_j - lr d_i)``; ``combine=Repeated(K)`` on both syncs makes its ``K`` rounds of consensus.
    Its gradients are not tracked: at a constant learning rate it reaches a neighbourhood, with rates falling as
    ``1 / sqrt(k)`` the optimum. Twice the messages of gossip.

    The plan needs a ``Stiefel`` with the same pattern before it, and a ``Sync(what=Tracker(match))``.

    Args:
        match: Pattern on parameter names.

    Raises:
        ValueError: an empty pattern, or a plan that lacks one of the two.

    Source: Chen, Ye, Liu, Dai, "Decentralized Riemannian Conjugate Gradient Method on the Stiefel Manifold",
    arXiv 2308.10547.
    """

    slots = frozenset({"tracker"})

    def __init__(self, match: str = "*") -> None:
        self.match = _checked_pattern("ConjugateGradient", match)

    def check(self, plan: Plan) -> None:
        """See :meth:`Correction.check`."""
        before = plan.corrections[: plan.corrections.index(self)]
        if not any(isinstance(c, Stiefel) and c.match == self.match for c in before):
            raise ValueError(f"{self!r}: needs Stiefel(match={self.match!r}) before it in the plan")
        trackers = [s for s in plan if s.what.slot == "tracker"]
        if len(trackers) != 1 or getattr(trackers[0].what, "match", "*") != self.match:
            raise ValueError(f"{self!r}: needs a plan with one Sync(what=Tracker({self.match!r})), the same pattern")

    def bind(self, context: Context) -> BoundCorrection:
        """See :meth:`Correction.bind`."""
        return _BoundConjugateGradient(self, context)


class _BoundConjugateGradient(BoundCorrection):
    slots = frozenset({"tracker"})

    def __init__(self, part: ConjugateGradient, context: Context) -> None:
        self.parameters = context.parameters
        self.directions: dict[str, Tensor] = {}
        self.norms: dict[str, Tensor] = {}
        for lane, field in _matrices("ConjugateGradient", part.match, context):
            like = field.of(lane.live)
            self.directions[field.name] = torch.zeros_like(like, dtype=lane.message_dtype)
            self.norms[field.name] = torch.zeros(1, dtype=torch.float64, device=like.device)

    def on_gradient(self, names: Collection[str]) -> None:
        for name, d in self.directions.items():
            p = self.parameters[name]
            if name not in names or p.grad is None:
                continue
            norm, before = p.grad.double().square().sum(), self.norms[name]
            share = torch.where(before > 0, norm / before, 0.0).clamp_(max=1.0)  # no previous gradient: start again
            p.grad.add_((tangent(p.detach(), d) * share.to(d.dtype)).to(p.grad.dtype))
            finite = torch.isfinite(norm)  # a step that loss scaling is about to skip leaves no trace
            before.copy_(torch.where(finite, norm, before))
            d.copy_(torch.where(finite, p.grad.to(d.dtype), d))

    def publish(self, slot: str, lane: Lane, message: Tensor) -> None:
        for field in lane.fields:
            field.of(message).copy_(self.directions[field.name])

    def on_applied(self, slot: str, lane: Lane, sent: Tensor, new: Tensor, steps: int) -> None:
        for field in lane.fields:
            self.directions[field.name].copy_(field.of(lane.live))

    def state(self) -> dict[str, Tensor]:
        return {
            f"{kind}.{name}": t
            for kind, tensors in (("d", self.directions), ("g", self.norms))
            for name, t in tensors.items()
        }


def _checked_pattern(owner: str, match: str) -> str:
    if not isinstance(match, str) or not match:
        raise ValueError(f"{owner}(match={match!r}): must be a pattern such as '*' or 'head.*'")
    return match


def _matrices(owner: str, match: str, context: Context) -> list[tuple[Lane, Field]]:
    """The matching parameters, with the lanes that hold them."""
    found = [(lane, f) for lane in context.lanes for f in lane.fields if fnmatchcase(f.name, match)]
    if not found:
        raise ValueError(f"{owner}(match={match!r}): matches none of the trainable parameters")
    for _, field in found:
        if len(field.shape) != 2:
            raise ValueError(
                f"{owner}(match={match!r}): {field.name!r} of shape {tuple(field.shape)} is no matrix, use a pattern that "
                "matches matrices only"
            )
    return found
