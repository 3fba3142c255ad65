"""Proximal steps: a regulariser that is not smooth, such as the l1 norm."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import Tensor

from lightning_dopt._checks import check_float
from lightning_dopt.local.base import BoundCorrection, Context, Correction


class Prox(Correction):
    """Adds ``l1 * sum |x|`` to the loss, through its proximal map instead of its gradient.

    After the inner optimizer's update and before anything is sent, ``x <- sign(x) max(|x| - lr l1, 0)`` with each
    parameter's own learning rate. With :class:`GradientTracking` this is DProxSGT, with compressed messages CDProxSGT.
    Between syncs exact zeros are those of this rank: mixing fills them until all ranks agree.

    Args:
        l1: Weight of the regulariser, above 0.
        match: Pattern on parameter names, such as ``"*.weight"``.

    Raises:
        ValueError: ``l1 <= 0`` or an empty pattern; when training starts, a pattern that matches nothing.

    Source: Yan, Xie, et al., "Compressed Decentralized Proximal Stochastic Gradient Method for Nonconvex Composite
    Problems with Heterogeneous Data" (DProxSGT, CDProxSGT), arXiv 2302.14252.
    """

    def __init__(self, l1: float, match: str = "*") -> None:
        self.l1 = check_float("Prox", "l1", l1, 0.0, open_low=True)
        if not isinstance(match, str) or not match:
            raise ValueError(f"Prox(match={match!r}): must be a pattern such as '*' or '*.weight'")
        self.match = match

    def bind(self, context: Context) -> BoundCorrection:
        """See :meth:`Correction.bind`."""
        chosen = {name: p for name, p in context.parameters.items() if fnmatchcase(name, self.match)}
        if not chosen:
            raise ValueError(f"Prox(match={self.match!r}): matches none of the {len(context.parameters)} parameters")
        return _BoundProx(self.l1, chosen, context)


class _BoundProx(BoundCorrection):
    def __init__(self, l1: float, chosen: dict[str, Tensor], context: Context) -> None:
        self.l1, self.chosen, self.lr = l1, chosen, context.lr

    def on_stepped(self) -> None:
        for name, p in self.chosen.items():
            kept = (p.detach().abs() - self.lr(name) * self.l1).clamp_(min=0.0)
            p.detach().sign_().mul_(kept)
