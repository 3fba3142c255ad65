"""Bilevel optimization: an upper loss at the minimum of a lower one, over workers that talk to neighbours."""

from lightning_dopt.bilevel.curvature import Curvature, FirstOrder, SecondOrder
from lightning_dopt.bilevel.engine import BilevelEngine
from lightning_dopt.bilevel.level import Level
from lightning_dopt.bilevel.losses import Losses
from lightning_dopt.bilevel.methods import double_loop, dsoba, soba, sparkle
from lightning_dopt.bilevel.plan import BilevelPlan
from lightning_dopt.bilevel.simulate import BilevelSimulation

__all__ = [
    "BilevelEngine",
    "BilevelPlan",
    "BilevelSimulation",
    "Curvature",
    "FirstOrder",
    "Level",
    "Losses",
    "SecondOrder",
    "double_loop",
    "dsoba",
    "soba",
    "sparkle",
]
