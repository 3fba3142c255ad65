"""Optimizers that methods of this package need and torch does not have, each a ``torch.optim.Optimizer``."""

from lightning_dopt.optim.delayed_nesterov import DelayedNesterov
from lightning_dopt.optim.frozen_scaling import FrozenScaling
from lightning_dopt.optim.multi_momentum_adam import MultiMomentumAdam
from lightning_dopt.optim.projected import GaLore, Grass
from lightning_dopt.optim.stale_momentum import StaleMomentum

__all__ = ["DelayedNesterov", "FrozenScaling", "GaLore", "Grass", "MultiMomentumAdam", "StaleMomentum"]
