"""Compressors and memories by name, for command lines and configuration files."""

from __future__ import annotations

import re
from collections.abc import Callable

from lightning_dopt.compress.base import Codec, Compressor
from lightning_dopt.compress.budget import ByteBudget, KeepEnergy, LGreCo
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
    MoniQua,
)
from lightning_dopt.compress.noise import GaussianNoise
from lightning_dopt.compress.phases import Phases
from lightning_dopt.compress.quantize import Int4, Int8
from lightning_dopt.compress.shift import RandomShift
from lightning_dopt.compress.sign import Sign
from lightning_dopt.compress.sketch import CountSketch, RandomProjection
from lightning_dopt.compress.sparse import RandK, TopK
from lightning_dopt.compress.sparse_blocks import BlockTopK, Threshold
from lightning_dopt.compress.transform import DCTTopK

_CLASSES: tuple[type[Codec], ...] = (
    Identity,
    BF16,
    FP16,
    Int8,
    Int4,
    FP8,
    E3M0,
    Natural,
    QSGD,
    TernGrad,
    RandomShift,
    Sign,
    TopK,
    BlockTopK,
    Threshold,
    RandK,
    CountSketch,
    RandomProjection,
    LowRank,
    Factors,
    DCTTopK,
    Compose,
    Phases,
    FedZip,
    GaussianNoise,
    DenseBelow,
    LGreCo,
    ByteBudget,
    KeepEnergy,
    ErrorFeedback,
    EF21,
    EControl,
    DGC,
    GMF,
    DIANA,
    Difference,
    DeepSqueeze,
    MoniQua,
    Direct,
    Averaged,
)


def _snake(name: str) -> str:
    if name == "LGreCo":
        return "l_greco"
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def classes() -> dict[str, type[Codec]]:
    """Compressors and memories by their name in snake case; compressors before memories."""
    return {_snake(cls.__name__): cls for cls in _CLASSES}


def names() -> list[str]:
    """The names :func:`by_name` knows, in snake case; compressors before memories."""
    return list(classes())


def by_name(name: str, **arguments: Compressor | float | bool) -> Codec:
    """The compressor or memory called ``name``.

    Args:
        name: in snake case (``"top_k"``) or as the class is called (``"TopK"``).
        **arguments: those of its constructor, e.g. ``ratio=0.01``.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
        TypeError: arguments that it does not take, or lacks.
    """
    for cls in _CLASSES:
        if name in (cls.__name__, _snake(cls.__name__)):
            make: Callable[..., Codec] = cls
            return make(**arguments)
    raise ValueError(f"by_name(name={name!r}): must be one of {', '.join(names())}")
