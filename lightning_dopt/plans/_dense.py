"""Small tensors as they are, in published methods."""

from __future__ import annotations

from lightning_dopt.compress import Compressor, DenseBelow


def large_only(codec: Compressor, dense_below: int | None) -> Compressor:
    """``codec`` for tensors of at least ``dense_below`` elements that are no vectors; ``None``: for all.

    Raises:
        ValueError: a negative number.
    """
    return codec if dense_below is None else DenseBelow(codec, dense_below)
