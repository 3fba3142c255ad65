"""How a message is encoded: compressors, the memories around them, and both by name."""

from __future__ import annotations

from lightning_dopt.compress.base import Codec, Compressor
from lightning_dopt.compress.dense import BF16, FP16, Identity
from lightning_dopt.compress.lowrank import LowRank
from lightning_dopt.compress.memory import (
    EF21,
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
from lightning_dopt.compress.quantize import Int4, Int8
from lightning_dopt.compress.registry import by_name, names
from lightning_dopt.compress.sign import Sign
from lightning_dopt.compress.sparse import RandK, TopK

__all__ = [
    "BF16",
    "EF21",
    "FP16",
    "Averaged",
    "Codec",
    "Compressor",
    "DeepSqueeze",
    "Difference",
    "Direct",
    "EControl",
    "ErrorFeedback",
    "GaussianNoise",
    "Identity",
    "Int4",
    "Int8",
    "LowRank",
    "Memory",
    "MoniQua",
    "RandK",
    "Sign",
    "TopK",
    "as_compressor",
    "by_name",
    "names",
]
