"""Apply: when a result reaches the live tensors, and how it is merged with what they have become meanwhile."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from lightning_dopt._checks import check_choice, check_float, check_int
from lightning_dopt._part import Part


class Merge(Part, ABC):
    """How a result meets the live tensor."""

    needs_sent: bool = False
    """Whether a copy of the live tensor at the moment of sending is needed."""

    @abstractmethod
    def __call__(self, live: Tensor, new: Tensor, sent: Tensor | None) -> None:
        """Write the merged value into ``live`` in place.

        ``sent`` is the live tensor when the message left, and is not needed any more afterwards.
        """


class Replace(Merge):
    """``live <- new``: local progress since the send is dropped."""

    def __init__(self) -> None:
        pass

    def __call__(self, live: Tensor, new: Tensor, sent: Tensor | None) -> None:
        """See :class:`Merge`."""
        if new.data_ptr() != live.data_ptr():
            live.copy_(new)


class Lerp(Merge):
    """``live <- alpha * live + (1 - alpha) * new`` (Streaming DiLoCo, arXiv 2501.18512).

    Args:
        alpha: Share of the live tensor that stays; 0 takes the result as it is, 1 ignores it.

    Raises:
        ValueError: ``alpha`` outside [0, 1].
    """

    def __init__(self, alpha: float = 0.5) -> None:
        self.alpha = check_float("Lerp", "alpha", alpha, 0.0, 1.0)

    def __call__(self, live: Tensor, new: Tensor, sent: Tensor | None) -> None:
        """See :class:`Merge`."""
        live.lerp_(new.to(live.dtype), 1.0 - self.alpha)


class Rebase(Merge):
    """``live <- live + (new - live_at_send)``: local progress since the send is kept on top of the result."""

    needs_sent = True

    def __init__(self) -> None:
        pass

    def __call__(self, live: Tensor, new: Tensor, sent: Tensor | None) -> None:
        """See :class:`Merge`."""
        if sent is None:
            raise RuntimeError("Rebase needs the live tensor as it was when the message left")
        # the difference first: narrow types keep small progress, an equal result is a no-op
        live.add_(torch.sub(new, sent, out=sent) if new.dtype == sent.dtype else new - sent)


class Apply(Part, ABC):
    """When the result of a send reaches the live tensors."""

    merge: Merge
    delay: int = 0
    """Optimizer steps between send and apply."""


class Blocking(Apply):
    """In the same optimizer step.

    Args:
        order: ``"atc"`` (adapt, then combine) sends and applies after the optimizer's update. ``"cta"`` (combine, then
            adapt) does both before the forward pass of the step, so the gradient is taken at the mixed point.
            ``"awc"`` (adapt while combining) sends before the forward pass and adds the optimizer's displacement to the
            result: the message travels during forward and backward.
        merge: How the result meets the live tensor. ``None`` means :class:`Replace`, for ``"awc"`` :class:`Rebase`.

    Raises:
        ValueError: an unknown order, or ``order="awc"`` with another merge than :class:`Rebase`.
    """

    def __init__(self, order: Literal["atc", "cta", "awc"] = "atc", merge: Merge | None = None) -> None:
        self.order = check_choice("Blocking", "order", order, ("atc", "cta", "awc"))
        self.merge = merge if merge is not None else (Rebase() if order == "awc" else Replace())
        if order == "awc" and not isinstance(self.merge, Rebase):
            raise ValueError(f"Blocking(merge={merge!r}): order='awc' needs Rebase(), leave merge out")


class Delay(Apply):
    """``steps`` optimizer steps later; training goes on meanwhile.

    Args:
        steps: How many steps the message may travel before anybody waits for it (called tau in papers).
        merge: How the result meets the live tensor, which has moved on.

    Raises:
        ValueError: ``steps < 1``.
    """

    def __init__(self, steps: int, merge: Merge | None = None) -> None:
        self.steps = check_int("Delay", "steps", steps, 1)
        self.merge = merge if merge is not None else Rebase()

    @property
    def delay(self) -> int:  # type: ignore[override]
        """Optimizer steps between send and apply."""
        return self.steps


class OneRound(Apply):
    """At the next send of the same sync: a message may travel for a whole round.

    With ``D`` the result of the previous round, ``m`` this rank's message and ``w`` the in-flight share, the outer
    optimizer gets ``w * m_now + D - w * m_previous`` (Eager updates, arXiv 2502.12996; ``w = 0`` is the plain delayed
    update, ``w = 1/N`` the eager one).

    Args:
        inflight: ``w`` in [0, 1], or ``"own_share"`` for one divided by the number of workers.

    Raises:
        ValueError: ``inflight`` outside [0, 1].
    """

    def __init__(self, inflight: float | Literal["own_share"] = 0.0) -> None:
        self.inflight = inflight if inflight == "own_share" else check_float("OneRound", "inflight", inflight, 0.0, 1.0)
        self.merge = Replace()

    def arguments(self) -> dict[str, object]:
        """The constructor arguments by name."""
        return {"inflight": self.inflight}

    def share(self, size: int) -> float:
        """The in-flight share as a number, for ``size`` workers."""
        return 1.0 / size if self.inflight == "own_share" else float(self.inflight)
