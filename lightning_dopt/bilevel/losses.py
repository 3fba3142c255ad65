"""The two losses of one worker at one step, and their first derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

Loss = Callable[[], Tensor]
Tensors = list[Tensor]


class Losses:
    """An upper loss ``F(x, y)`` and a lower loss ``G(x, y)`` of one worker, on the batches of one step.

    ``G`` is evaluated several times in a step: every time with the random numbers of the first time, so that dropout makes no
    difference between the points that are compared. Buffers (running statistics) move with the first evaluation of ``G``
    only, and are restored after all others.

    Args:
        lower_loss: Evaluates ``G`` at the present values of the parameters.
        upper_loss: Evaluates ``F`` there.
        lower: ``y`` by name; leaves that require gradients.
        upper: ``x`` by name.
        buffers: Tensors that an evaluation may change.
    """

    def __init__(
        self,
        lower_loss: Loss,
        upper_loss: Loss,
        lower: Mapping[str, Tensor],
        upper: Mapping[str, Tensor],
        buffers: Sequence[Tensor] = (),
    ) -> None:
        self._lower_loss, self._upper_loss = lower_loss, upper_loss
        self.lower, self.upper = list(lower.values()), list(upper.values())
        self.buffers = list(buffers)
        self.values: dict[str, Tensor] = {}
        """The first values of both losses in this step, ``"lower"`` and ``"upper"``."""
        self._random: list[Tensor] | None = None

    def lower_value(self) -> Tensor:
        """``G`` with its graph.

        Raises:
            ValueError: it is no number, or nothing that gradients reach.
        """
        if self._random is None:
            self._random = _random_state(self.lower)
            value = _checked("lower_loss", self._lower_loss())
        else:
            with self._replayed(), self._unmoved():
                value = _checked("lower_loss", self._lower_loss())
        self.values.setdefault("lower", value.detach())
        return value

    def lower_gradient(self) -> Tensors:
        """``grad_y G``.

        Raises:
            ValueError: ``G`` does not depend on ``y``.
        """
        with torch.enable_grad():
            return filled(torch.autograd.grad(self.lower_value(), self.lower, allow_unused=True), self.lower, "lower")

    def upper_gradients(self) -> tuple[Tensors, Tensors]:
        """``grad_x F`` and ``grad_y F``; either may be zero.

        Raises:
            ValueError: ``F`` is no number, or depends on neither.
        """
        with torch.enable_grad(), self._unmoved():
            value = _checked("upper_loss", self._upper_loss())
            self.values.setdefault("upper", value.detach())
            found = torch.autograd.grad(value, [*self.upper, *self.lower], allow_unused=True)
        both = filled(found, [*self.upper, *self.lower])
        return both[: len(self.upper)], both[len(self.upper) :]

    @contextmanager
    def _replayed(self) -> Iterator[None]:
        assert self._random is not None
        now = _random_state(self.lower)
        _set_random_state(self._random, self.lower)
        try:
            yield
        finally:
            _set_random_state(now, self.lower)

    @contextmanager
    def _unmoved(self) -> Iterator[None]:
        kept = [b.detach().clone() for b in self.buffers]
        try:
            yield
        finally:
            for buffer, before in zip(self.buffers, kept, strict=True):
                buffer.data.copy_(before)  # through data, since graphs of batch norm hold it without need for its value


def filled(gradients: Sequence[Tensor | None], tensors: Sequence[Tensor], level: str = "") -> Tensors:
    """Zeros in the place of what does not depend on a tensor.

    Raises:
        ValueError: with ``level``, if nothing depends on any.
    """
    if level and all(g is None for g in gradients):
        raise ValueError(f"{level}_loss depends on no {level} parameter: there is nothing to minimise")
    return [torch.zeros_like(t) if g is None else g.detach() for g, t in zip(gradients, tensors, strict=True)]


def _checked(name: str, value: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{name}: must return a tensor with one element, got {what}")
    if not value.requires_grad:
        raise ValueError(f"{name}: its value depends on no trainable parameter, or was computed without gradients")
    return value.reshape(())


def _random_state(tensors: Tensors) -> list[Tensor]:
    cuda = tensors[0].is_cuda
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(tensors[0].device)] if cuda else [])]


def _set_random_state(state: list[Tensor], tensors: Tensors) -> None:
    torch.set_rng_state(state[0])
    if len(state) == 2:
        torch.cuda.set_rng_state(state[1], tensors[0].device)
