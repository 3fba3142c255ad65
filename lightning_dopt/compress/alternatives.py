"""Coarser and finer settings of a compressor, for budgets to choose from."""

from __future__ import annotations

from lightning_dopt.compress.base import Compressor
from lightning_dopt.compress.compose import Compose
from lightning_dopt.compress.dense import BF16
from lightning_dopt.compress.dense_below import DenseBelow
from lightning_dopt.compress.factors import Factors
from lightning_dopt.compress.lowrank import LowRank
from lightning_dopt.compress.quantize import Int4, Int8

_FACTORS = [2.0 ** (k / 2) for k in range(-4, 5)]
_LEVELS = (1, 3, 7, 15, 31, 63, 127)


def alternatives(codec: Compressor) -> list[Compressor]:
    """The compressor and its like, coarse to fine: ranks and ratios from a quarter to four times its own, levels, bits.

    Factors are ``2^(k/2)`` with ``k = -4 .. 4``; ratios end at 1, ranks are whole. ``Int4`` and ``Int8`` are each other's (beside
    ``BF16``, unless they round at random), ``QSGD`` has the seven levels that fill 2 to 8 bits. Of ``Compose`` the first varies,
    of ``Factors`` the rank. Nothing but the compressor itself if it has no such setting.
    """
    arguments = codec.arguments()
    if isinstance(codec, Compose):
        return [Compose(first, codec.second) for first in alternatives(codec.first)]
    if isinstance(codec, Factors):
        return [
            Factors(low, codec.codec, codec.iterations)
            for low in alternatives(codec.lowrank)
            if isinstance(low, LowRank)
        ]
    if isinstance(codec, DenseBelow):
        return [DenseBelow(inner, codec.size, codec.vectors) for inner in alternatives(codec.codec)]
    if isinstance(codec, (Int4, Int8)):
        coarse = [Int4(codec.block, codec.stochastic), Int8(codec.block, codec.stochastic)]
        return [*coarse, *([] if codec.stochastic else [BF16()])]
    for name, values in _ladders(arguments):
        return [type(codec)(**{**arguments, name: value}) for value in values]
    return [codec]


def _ladders(arguments: dict[str, object]) -> list[tuple[str, list[float]]]:
    """The argument that varies and its values."""
    for name in ("ratio", "rank", "levels"):
        own = arguments.get(name)
        if name == "ratio" and isinstance(own, float):
            return [(name, sorted({min(1.0, own * factor) for factor in _FACTORS}))]
        if name == "rank" and isinstance(own, int):
            return [(name, sorted({max(1, round(own * factor)) for factor in _FACTORS}))]
        if name == "levels" and isinstance(own, int):
            return [(name, sorted({own, *_LEVELS}))]
    return []
