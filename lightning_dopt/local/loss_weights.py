"""Strategy I for weighted objectives: weigh the local losses and keep a doubly stochastic mixing."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from torch.optim import Optimizer

from lightning_dopt.local.base import BoundCorrection, Context, Correction
from lightning_dopt.topology.node_weights import check_ranks, checked_shares

if TYPE_CHECKING:
    from lightning_dopt.plan import Plan

SCALE_FREE = frozenset(
    "Adam AdamW Adamax NAdam RAdam SparseAdam AdaBelief Adagrad Adadelta RMSprop Rprop Adafactor Lion SignSGD Signum "
    "NormalizedSGD LAMB LARS Muon Shampoo SOAP Sophia".lower().split()
)
"""Optimizers whose step (almost) does not change when all gradients are multiplied by a constant, in lower case."""


class LossWeights(Correction):
    """Multiplies the gradients of rank ``i`` by ``n lambda_i``, as if its loss were multiplied (Strategy I).

    With peers that preserve the plain mean, that mean follows the gradient of ``sum_i lambda_i f_i``, also of mean
    gradients over the complete graph. The weights come before everything else that looks at the gradients: other
    corrections, messages, clipping, the optimizer. So an optimizer that divides by the size of its gradients (Adam,
    sign methods) and clipping lose them without a sign, see :func:`warn_if_scale_free`; over
    :class:`~lightning_dopt.topology.NodeWeighted` peers, without this correction (Strategy II), they are kept. The
    learning rate of rank ``i`` is effectively ``n lambda_i lr``, which has to be small enough for the heaviest rank.

    Args:
        shares: ``lambda``, one positive number per rank, summing to one.
        counts: instead of shares, one positive whole number per rank, such as its number of samples.

    Raises:
        ValueError: shares and counts both given or both missing or not allowed; another correction before this one;
            another number of workers than shares; peers that weigh ranks unequally already.

    Source: the baseline of Liu et al., "Row-Stochastic Matrices Can Provably Outperform Doubly Stochastic Matrices in
    Decentralized Learning", arXiv 2511.19513.
    """

    def __init__(self, shares: list[float] | None = None, counts: list[int] | None = None) -> None:
        checked_shares("LossWeights", shares, counts)
        self.shares = None if shares is None else list(shares)
        self.counts = None if counts is None else list(counts)

    def check(self, plan: Plan) -> None:
        """See :meth:`Correction.check`."""
        if sum(isinstance(c, LossWeights) for c in plan.corrections) > 1:
            raise ValueError("LossWeights: given twice; losses are weighted once")
        if plan.corrections[0] != self:
            raise ValueError("LossWeights: must be the first correction, so that the others see weighted gradients")

    def check_size(self, plan: Plan, n: int) -> None:
        """See :meth:`Correction.check_size`."""
        given = checked_shares("LossWeights", self.shares, self.counts)
        check_ranks("LossWeights", "shares" if self.shares is not None else "counts", len(given), n)
        for sync in plan:
            if sync.what.slot in ("parameters", "gradients") and not sync.peers.column_stochastic(n):
                raise ValueError(
                    f"LossWeights: {sync.peers!r} weighs ranks unequally already and weights would count twice; use a doubly "
                    "stochastic topology, or no LossWeights"
                )

    def bind(self, context: Context) -> BoundCorrection:
        """See :meth:`Correction.bind`."""
        share = checked_shares("LossWeights", self.shares, self.counts)[context.rank]
        return _BoundLossWeights(share * context.size, context)


class _BoundLossWeights(BoundCorrection):
    def __init__(self, factor: float, context: Context) -> None:
        self.factor, self.parameters = factor, context.parameters

    def on_backward(self, names: Collection[str]) -> None:
        if self.factor == 1.0:
            return
        for name in names:
            gradient = self.parameters[name].grad
            if gradient is not None:
                gradient.mul_(self.factor)


def warn_if_scale_free(optimizer: Optimizer, clip: float | None = None) -> str | None:
    """Why weights on the losses would be lost, in a sentence, or ``None`` if they are not.

    Args:
        optimizer: the inner optimizer; known by its class's name or that of a class that it extends.
        clip: the largest norm or value to which gradients are clipped, ``None`` or 0 without clipping.
    """
    names = [cls.__name__ for cls in type(optimizer).__mro__]
    reason = next(
        (f"{name} divides by the size of its gradients" for name in names if name.lower() in SCALE_FREE), None
    )
    if reason is None and clip:
        reason = f"clipping to {clip:g} cuts weighted gradients back"
    if reason is None:
        return None
    return (
        f"LossWeights: {reason}, so the weights are (partly) lost and the unweighted mean loss is trained; "
        "use NodeWeighted peers instead, which keep them"
    )
