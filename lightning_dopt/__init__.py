"""Decentralized and communication-efficient training for PyTorch Lightning."""

from lightning_dopt import compress, outer, plans, topology
from lightning_dopt.apply import Blocking, Delay, Lerp, OneRound, Rebase, Replace
from lightning_dopt.combine import Median, Mixing
from lightning_dopt.comm import Link, ProcessGroupWorld, SimulatedWorld, SyncError
from lightning_dopt.compress import (
    BF16,
    EF21,
    FP16,
    Difference,
    EControl,
    ErrorFeedback,
    Identity,
    Int4,
    Int8,
    LowRank,
    RandK,
    Sign,
    TopK,
)
from lightning_dopt.engine import Engine
from lightning_dopt.local import ExactDiffusion, GradientTracking
from lightning_dopt.outer import HeavyBall, Nesterov
from lightning_dopt.plan import Plan, Sync
from lightning_dopt.schedules import After, AtEnd, Bernoulli, Every, Until
from lightning_dopt.simulate import Simulation
from lightning_dopt.topology import (
    Complete,
    Exponential,
    Hypercube,
    OnePeerExponential,
    RandomPairs,
    Ring,
    Star,
    Torus,
)
from lightning_dopt.what import Buffers, Gradients, OptimizerState, Parameters

__version__ = "0.1.0.dev0"

from lightning_dopt.strategies import (
    CompressedDDPStrategy,
    DiLoCoStrategy,
    GossipStrategy,
    LocalSGDStrategy,
    LoFiStrategy,
    ReplicaStrategy,
    register,
)

register()

__all__ = [  # noqa: RUF022
    "After",
    "AtEnd",
    "BF16",
    "Bernoulli",
    "Blocking",
    "Buffers",
    "Complete",
    "CompressedDDPStrategy",
    "Delay",
    "DiLoCoStrategy",
    "Difference",
    "EControl",
    "EF21",
    "Engine",
    "ErrorFeedback",
    "Every",
    "ExactDiffusion",
    "Exponential",
    "FP16",
    "GossipStrategy",
    "GradientTracking",
    "Gradients",
    "HeavyBall",
    "Hypercube",
    "Identity",
    "Int4",
    "Int8",
    "Lerp",
    "Link",
    "LoFiStrategy",
    "LocalSGDStrategy",
    "LowRank",
    "Median",
    "Mixing",
    "Nesterov",
    "OnePeerExponential",
    "OneRound",
    "OptimizerState",
    "Parameters",
    "Plan",
    "ProcessGroupWorld",
    "RandK",
    "RandomPairs",
    "Rebase",
    "Replace",
    "ReplicaStrategy",
    "Ring",
    "Sign",
    "SimulatedWorld",
    "Simulation",
    "Star",
    "Sync",
    "SyncError",
    "TopK",
    "Torus",
    "Until",
    "compress",
    "outer",
    "plans",
    "topology",
]
