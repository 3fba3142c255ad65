"""Products of the lower loss's second derivatives with a vector, without a matrix: by autograd, or by differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from lightning_dopt.bilevel.losses import Losses, Tensors, filled

Order = Literal["second", "first"]
Difference = Literal["central", "forward"]


class Curvature(Protocol):
    """What is known of ``G`` around one point ``(x, y)``; neither may move as long as it is used."""

    def lower_gradient(self) -> Tensors:
        """``grad_y G``."""

    def hessian(self, z: Tensors) -> Tensors:
        """``(d^2 G / dy^2) z``, shaped like ``y``."""

    def cross(self, z: Tensors) -> Tensors:
        """``(d^2 G / dx dy) z``, shaped like ``x``."""

    def both(self, z: Tensors) -> tuple[Tensors, Tensors]:
        """:meth:`hessian` and :meth:`cross` of one vector, for less than both cost alone."""


class SecondOrder:
    """Exact products: one backward pass that keeps its graph, then one pass through that graph per product.

    Args:
        losses: Of this step.
        trusted: Whether operations that say that they can be differentiated once only need not be looked for. Autograd
            would leave out without a word what goes through them.

    Raises:
        ValueError: as :meth:`Losses.lower_gradient`; or an operation of the lower loss has no second derivative.
    """

    def __init__(self, losses: Losses, trusted: bool = False) -> None:
        self.losses = losses
        with torch.enable_grad():
            value = losses.lower_value()
            found = torch.autograd.grad(value, losses.lower, create_graph=True, allow_unused=True)
        self._gradient = found
        filled(found, losses.lower, "lower")
        if not trusted and _once_only(found):
            raise ValueError(
                "order='second': lower_loss uses an operation that is differentiable once only, use order='first'"
            )

    def lower_gradient(self) -> Tensors:
        """See :meth:`Curvature.lower_gradient`."""
        return filled(self._gradient, self.losses.lower)

    def hessian(self, z: Tensors) -> Tensors:
        """See :meth:`Curvature.hessian`."""
        return self._product(z, self.losses.lower)

    def cross(self, z: Tensors) -> Tensors:
        """See :meth:`Curvature.cross`."""
        return self._product(z, self.losses.upper)

    def both(self, z: Tensors) -> tuple[Tensors, Tensors]:
        """See :meth:`Curvature.both`."""
        found = self._product(z, [*self.losses.lower, *self.losses.upper])
        return found[: len(z)], found[len(z) :]

    def _product(self, z: Tensors, wanted: Tensors) -> Tensors:
        pairs = [
            (g, part.to(g.dtype))
            for g, part in zip(self._gradient, z, strict=True)
            if g is not None and g.requires_grad
        ]
        if not pairs:
            raise ValueError(
                "order='second': lower_loss is linear in the lower parameters, which leaves nothing to minimise, or has no second "
                "derivative; then use order='first'"
            )
        outputs, vectors = zip(*pairs, strict=True)
        try:
            found = torch.autograd.grad(outputs, wanted, vectors, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            text = " ".join(str(error).split())
            if not any(word in text for word in ("not implemented", "twice", "double backward")):
                raise
            raise ValueError(
                f"order='second': lower_loss uses an operation without second derivative, use order='first' ({text})"
            ) from error
        return filled(found, wanted)


class FirstOrder:
    """Products by differences of gradients at ``y + s z`` and ``y - s z`` with ``s = delta / ||z||``: no second derivatives.

    Both gradients are of the same batch with the same random numbers, and in full precision under autocast. On quadratics the
    products are exact for any ``delta``; elsewhere the error of ``"central"`` falls with ``delta^2`` until rounding takes over,
    that of ``"forward"`` (one gradient less) with ``delta``.

    Args:
        losses: Of this step.
        delta: Length of the step in ``y``.
        difference: ``"central"`` or ``"forward"``.
    """

    def __init__(self, losses: Losses, delta: float, difference: Difference) -> None:
        self.losses, self.delta, self.difference = losses, delta, difference
        self._here: Tensors | None = None

    def lower_gradient(self) -> Tensors:
        """See :meth:`Curvature.lower_gradient`."""
        return self.losses.lower_gradient()

    def hessian(self, z: Tensors) -> Tensors:
        """See :meth:`Curvature.hessian`."""
        return self._product(z, self.losses.lower)

    def cross(self, z: Tensors) -> Tensors:
        """See :meth:`Curvature.cross`."""
        return self._product(z, self.losses.upper)

    def both(self, z: Tensors) -> tuple[Tensors, Tensors]:
        """See :meth:`Curvature.both`."""
        found = self._product(z, [*self.losses.lower, *self.losses.upper])
        return found[: len(z)], found[len(z) :]

    def _product(self, z: Tensors, wanted: Tensors) -> Tensors:
        norm = float(torch.stack([part.double().square().sum() for part in z]).sum().sqrt())
        if norm == 0.0:
            return [torch.zeros_like(t) for t in wanted]
        step = self.delta / norm
        kept = [y.detach().clone() for y in self.losses.lower]
        try:
            ahead = self._gradient_at(kept, z, step, wanted)
            if self.difference == "central":
                behind, span = self._gradient_at(kept, z, -step, wanted), 2 * step
            else:
                behind, span = self._gradient_here(kept, z, wanted), step
        finally:
            self._put(kept)
        return [(a - b) / span for a, b in zip(ahead, behind, strict=True)]

    def _gradient_here(self, kept: Tensors, z: Tensors, wanted: Tensors) -> Tensors:
        """The gradient at the point itself, taken once for all products; of both levels, since either may follow."""
        if self._here is None:
            self._here = self._gradient_at(kept, z, 0.0, [*self.losses.lower, *self.losses.upper])
        place = {id(t): g for t, g in zip([*self.losses.lower, *self.losses.upper], self._here, strict=True)}
        return [place[id(t)] for t in wanted]

    def _gradient_at(self, kept: Tensors, z: Tensors, step: float, wanted: Tensors) -> Tensors:
        with torch.no_grad():
            for y, before, part in zip(self.losses.lower, kept, z, strict=True):
                y.copy_(before.to(part.dtype).add(part, alpha=step) if step else before)
        device = self.losses.lower[0].device.type
        with torch.enable_grad(), torch.autocast(device, enabled=False):
            value = self.losses.lower_value()
            return filled(torch.autograd.grad(value, wanted, allow_unused=True), wanted)

    def _put(self, kept: Tensors) -> None:
        with torch.no_grad():
            for y, before in zip(self.losses.lower, kept, strict=True):
                y.copy_(before)


def _once_only(gradients: Sequence[Tensor | None]) -> bool:
    """Whether the graph of these gradients ends in a node that stands for a derivative which nobody wrote."""
    waiting = [g.grad_fn for g in gradients if g is not None and g.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if type(node).__name__ == "Error":  # torch's DelayedError, the work of once_differentiable
            return True
        new = {other for other, _ in node.next_functions if other is not None} - seen
        seen |= new
        waiting += new
    return False


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether the sum of every tensor is finite."""
    return bool(
        torch.stack([t.sum(dtype=torch.promote_types(t.dtype, torch.float32)).isfinite() for t in tensors]).all()
    )
