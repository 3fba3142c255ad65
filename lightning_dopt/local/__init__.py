"""Corrections of the inner step: they make biased methods exact and know nothing of wires."""

from lightning_dopt.local.base import BoundCorrection, Context, Correction
from lightning_dopt.local.exact_diffusion import ExactDiffusion
from lightning_dopt.local.gradient_tracking import GradientTracking
from lightning_dopt.local.loss_weights import LossWeights, warn_if_scale_free

__all__ = [
    "BoundCorrection",
    "Context",
    "Correction",
    "ExactDiffusion",
    "GradientTracking",
    "LossWeights",
    "warn_if_scale_free",
]
