"""Sharpness-aware gradients: each step looks at the loss a little uphill."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from lightning_dopt._checks import check_float
from lightning_dopt.local.base import BoundCorrection, Context, Correction
from lightning_dopt.local.control_variate import zeros


class SAM(Correction):
    """The gradient is taken at ``x + rho g / ||g||`` on the same batch: two forward and backward passes per step.

    With local steps and gossip this is DFedSAM; with several gossip rounds (``combine=Repeated(Q)``) DFedSAM-MGS. The norm
    is over all parameters of the optimizer that steps. Statistics of BatchNorm are those of the first pass. Gradients
    cannot be accumulated over batches, and optimization must be automatic.

    Args:
        rho: Distance to go uphill; 0.01 to 0.1 is common.

    Raises:
        ValueError: ``rho < 0``; when training starts, manual optimization or accumulated gradients.

    Source: Foret et al., "Sharpness-Aware Minimization", arXiv 2010.01412; Shi et al., "Improving the Model Consistency
    of Decentralized Federated Learning" (DFedSAM), arXiv 2302.04083.
    """

    def __init__(self, rho: float = 0.05) -> None:
        self.rho = check_float("SAM", "rho", rho, 0.0)

    def bind(self, context: Context) -> BoundCorrection:
        """See :meth:`Correction.bind`."""
        return _BoundSAM(self.rho, context)


class _BoundSAM(BoundCorrection):
    def __init__(self, rho: float, context: Context) -> None:
        self.rho, self.context = rho, context
        self.passes = 2 if rho > 0 else 1
        self.before = zeros(context.lanes) if rho > 0 else []
        self.moved = False

    def scratch(self) -> list[Tensor]:
        return self.before

    def _params(self, names: Collection[str]) -> list[Tensor]:
        return [p for name in names if (p := self.context.parameters[name]).grad is not None]

    def perturb(self, names: Collection[str]) -> None:
        self.moved = True
        for lane, before in zip(self.context.lanes, self.before, strict=True):
            before.copy_(lane.live)
        params = self._params(names)
        grads = [p.grad for p in params if p.grad is not None]
        if not grads:
            return
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        scale = torch.where(torch.isfinite(norm), self.rho / (norm + 1e-12), torch.zeros_like(norm))
        for p, g in zip(params, grads, strict=True):
            p.add_(torch.nan_to_num(g) * scale)

    def restore(self, names: Collection[str]) -> None:
        if not self.moved:
            return
        self.moved = False
        for lane, before in zip(self.context.lanes, self.before, strict=True):
            lane.live.copy_(before)
