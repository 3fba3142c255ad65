"""How a message is encoded: compressors, the memories around them, and both by name."""

from __future__ import annotations

from lightning_dopt.compress.base import Codec, Compressor
from lightning_dopt.compress.budget import Budget, ByteBudget, KeepEnergy, LGreCo
from lightning_dopt.compress.compose import Compose
from lightning_dopt.compress.dense import BF16, FP16, Identity
from lightning_dopt.compress.dense_below import DenseBelow
from lightning_dopt.compress.factors import Factors
from lightning_dopt.compress.fedzip import FedZip
from lightning_dopt.compress.floats import E3M0, FP8, Natural
from lightning_dopt.compress.levels import QSGD, TernGrad
from lightning_dopt.compress.lowrank import LowRank
from lightning_dopt.compress.memory import (
    DGC,
    DIANA,
    EF21,
    GMF,
    Averaged,
    DeepSqueeze,
    Difference,
    Direct,
    EControl,
    ErrorFeedback,
    Memory,
    MoniQua,
    as_compressor,
)
from lightning_dopt.compress.noise import GaussianNoise
from lightning_dopt.compress.phases import Phases
from lightning_dopt.compress.quantize import Int4, Int8
from lightning_dopt.compress.registry import by_name, names
from lightning_dopt.compress.shift import RandomShift
from lightning_dopt.compress.sign import Sign
from lightning_dopt.compress.sketch import CountSketch, RandomProjection
from lightning_dopt.compress.sparse import RandK, TopK
from lightning_dopt.compress.sparse_blocks import BlockTopK, Threshold
from lightning_dopt.compress.transform import DCTTopK

__all__ = [
    "BF16",
    "DGC",
    "DIANA",
    "E3M0",
    "EF21",
    "FP8",
    "FP16",
    "GMF",
    "QSGD",
    "Averaged",
    "BlockTopK",
    "Budget",
    "ByteBudget",
    "Codec",
    "Compose",
    "Compressor",
    "CountSketch",
    "DCTTopK",
    "DeepSqueeze",
    "DenseBelow",
    "Difference",
    "Direct",
    "EControl",
    "ErrorFeedback",
    "Factors",
    "FedZip",
    "GaussianNoise",
    "Identity",
    "Int4",
    "Int8",
    "KeepEnergy",
    "LGreCo",
    "LowRank",
    "Memory",
    "MoniQua",
    "Natural",
    "Phases",
    "RandK",
    "RandomProjection",
    "RandomShift",
    "Sign",
    "TernGrad",
    "Threshold",
    "TopK",
    "as_compressor",
    "by_name",
    "names",
]
