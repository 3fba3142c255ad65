"""Corrections of the inner step: they make biased methods exact and know nothing of wires."""

from lightning_dopt.local.ascend import Ascend
from lightning_dopt.local.base import BoundCorrection, Context, Correction
from lightning_dopt.local.clip import ClipLocal, NoisyGradients
from lightning_dopt.local.controlled import ControlVariate
from lightning_dopt.local.coordinate_clip import CoordinateClip
from lightning_dopt.local.download import Download
from lightning_dopt.local.exact_diffusion import ExactDiffusion
from lightning_dopt.local.extra import Extra
from lightning_dopt.local.extragradient import Extragradient
from lightning_dopt.local.gradient_tracking import GradientTracking
from lightning_dopt.local.langevin import ConduciveGradient, Langevin
from lightning_dopt.local.local_tracking import LocalTracking
from lightning_dopt.local.loss_weights import LossWeights
from lightning_dopt.local.masks import FisherMask, NeuronMask
from lightning_dopt.local.mixed_momentum import MixedMomentum
from lightning_dopt.local.moving_average import MovingAverage
from lightning_dopt.local.prox import Prox
from lightning_dopt.local.prox_skip import ProxSkip
from lightning_dopt.local.proximal import ConsensusADMM, DualProximal, Proximal
from lightning_dopt.local.quasi_global import QuasiGlobalMomentum
from lightning_dopt.local.restart import Restart
from lightning_dopt.local.robust_tracking import RobustTracking
from lightning_dopt.local.sam import SAM
from lightning_dopt.local.scaffold import Scaffold
from lightning_dopt.local.stiefel import ConjugateGradient, Stiefel

__all__ = [
    "SAM",
    "Ascend",
    "BoundCorrection",
    "ClipLocal",
    "ConduciveGradient",
    "ConjugateGradient",
    "ConsensusADMM",
    "Context",
    "ControlVariate",
    "CoordinateClip",
    "Correction",
    "Download",
    "DualProximal",
    "ExactDiffusion",
    "Extra",
    "Extragradient",
    "FisherMask",
    "GradientTracking",
    "Langevin",
    "LocalTracking",
    "LossWeights",
    "MixedMomentum",
    "MovingAverage",
    "NeuronMask",
    "NoisyGradients",
    "Prox",
    "ProxSkip",
    "Proximal",
    "QuasiGlobalMomentum",
    "Restart",
    "RobustTracking",
    "Scaffold",
    "Stiefel",
]
