"""Small tensors as they are, the others compressed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_dopt._checks import check_flag, check_int
from lightning_dopt.compress.base import Compressor, Rounds, Shape, Share, numel
from lightning_dopt.compress.dense import Identity


class DenseBelow(Compressor):
    """``DenseBelow(TopK(0.01))``: tensors of fewer than ``size`` elements, and vectors, travel whole, in one bucket.

    Biases and norms are few bytes and suffer most from what a compressor leaves out. The others go to ``codec`` as they
    would without them: as one vector, or one by one if it is :attr:`layerwise`. Linear if ``codec`` is.

    Args:
        codec: for the large tensors.
        size: elements; smaller tensors are dense.
        vectors: whether tensors of at most one dimension are dense, whatever their size.

    Raises:
        ValueError: ``codec`` is no compressor or has a budget, or ``size`` is negative.
    """

    layerwise = True

    def __init__(self, codec: Compressor, size: int = 10_000, vectors: bool = True) -> None:
        if not isinstance(codec, Compressor) or codec.adaptive:
            raise ValueError(
                f"DenseBelow(codec={codec!r}): must be a compressor without a budget (memories and budgets go around it)"
            )
        self.codec = codec
        self.size = check_int("DenseBelow", "size", size, 0)
        self.vectors = check_flag("DenseBelow", "vectors", vectors)

    @property
    def linear(self) -> bool:  # type: ignore[override]
        """As ``codec``."""
        return self.codec.linear

    @property
    def private(self) -> bool:  # type: ignore[override]
        """As ``codec``."""
        return self.codec.private

    def of(self, shape: Shape) -> Compressor:
        """The compressor of a tensor of this shape."""
        dense = numel(shape) < self.size or (self.vectors and len(shape) < 2)
        return Identity() if dense else self.codec

    def parts(self, shapes: Sequence[Shape]) -> list[Share]:
        """All dense tensors as one vector, and the parts of ``codec``."""
        dense = [i for i, shape in enumerate(shapes) if isinstance(self.of(shape), Identity)]
        rest = [i for i in range(len(shapes)) if i not in dense]
        inner = self.codec.parts([shapes[i] for i in rest]) if rest else []
        first: list[Share] = [(Identity(), dense)] if dense else []
        return first + [(codec, [rest[k] for k in members]) for codec, members in inner]

    def payload_bytes(self, shape: Shape) -> int:
        """``4 d`` or that of ``codec``."""
        return self.of(shape).payload_bytes(shape)

    def contraction(self, shape: Shape) -> float | None:
        """1 or that of ``codec``."""
        return self.of(shape).contraction(shape)

    def variance(self, shape: Shape) -> float | None:
        """That of ``codec``; of a dense tensor 0, but ``None`` if ``codec`` is biased."""
        return self.of(shape).variance(shape) if self.codec.variance(shape) is not None else None

    def encode(self, x: Tensor, seed: int = 0) -> Tensor:
        """See :meth:`Compressor.encode`."""
        return self.of(x.shape).encode(x, seed)

    def decode_add(self, payload: Tensor, out: Tensor, weight: float = 1.0, seed: int = 0) -> None:
        """See :meth:`Compressor.decode_add`."""
        self.of(out.shape).decode_add(payload, out, weight, seed)

    def decode(self, payload: Tensor, shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        """See :meth:`Compressor.decode`."""
        return self.of(shape).decode(payload, shape, dtype, seed)

    def rounds(self, x: Tensor, state: dict[str, Tensor], seed: int, size: int) -> Rounds:
        """See :meth:`Compressor.rounds`."""
        return (yield from (self.of(x.shape) if self.linear else self.codec).rounds(x, state, seed, size))
