"""Matrices sent as two thin factors of few bits."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dopt._checks import check_int
from lightning_dopt._random import key
from lightning_dopt.compress._thin import add_products, times, transposed_times
from lightning_dopt.compress._wire import as_bytes, check_length, section
from lightning_dopt.compress.base import Compressor, Shape, numel
from lightning_dopt.compress.lowrank import LowRank, orthonormal

_SCALE = 4  # bytes of the float32 number before the factors


class Factors(Compressor):
    """``Factors(LowRank(8), Int4())``: the two thin factors of a matrix, each packed by a second compressor.

    A matrix ``M`` (a x b) is sent as its largest element, ``C(P^T)`` and ``C(Q^T)``, with ``P`` (a x r) spanning the leading
    columns after ``iterations`` power iterations from a Gaussian start. Receivers make the columns of the packed ``P``
    orthonormal again, ``P'``, and the sender takes ``Q = M^T P'`` with respect to those, so that packing ``P`` costs nothing but
    a turned subspace: ``||M - P' C(Q)^T||^2 = ||M - P' P'^T M||^2 + ||Q - C(Q)||^2``. With a second compressor that is a
    contraction the error is never longer than ``M``.

    Factors that were packed one by one cannot be summed on the way as those of :class:`LowRank` are: messages are gathered, so
    that the mean of ``n`` ranks may have the rank ``n r``, and no start is kept from message to message. What ``lowrank``
    sends whole (vectors, small matrices) goes whole, in ``4 d`` bytes.

    Args:
        lowrank: the rank, and which tensors are worth it.
        codec: how the factors are packed, each as one vector, column after column.
        iterations: power iterations, at least 0; each costs two products with the matrix.

    Raises:
        ValueError: ``lowrank`` is no :class:`LowRank`, ``codec`` no compressor of vectors, or ``iterations`` below 0.

    Source: the compression of Qi et al., "DiLoCoX", arXiv 2506.21263; that ``Q`` follows the packed ``P`` is ours.
    """

    layerwise = True

    def __init__(self, lowrank: LowRank, codec: Compressor, iterations: int = 2) -> None:
        if not isinstance(lowrank, LowRank):
            raise ValueError(f"Factors(lowrank={lowrank!r}): must be a LowRank(...)")
        if not isinstance(codec, Compressor) or codec.adaptive or codec.layerwise:
            raise ValueError(f"Factors(codec={codec!r}): must be a compressor of vectors, such as Int4()")
        self.lowrank = lowrank
        self.codec = codec
        self.iterations = check_int("Factors", "iterations", iterations, 0)

    @property
    def private(self) -> bool:  # type: ignore[override]
        """Whether the factors are rounded at random."""
        return self.codec.private

    def payload_bytes(self, shape: Shape) -> int:
        """``4`` and the bytes of ``a r`` and of ``b r`` elements, or ``4 d`` for what is sent whole."""
        matrix = self.lowrank.factors(shape)
        if matrix is None:
            return 4 * numel(shape)
        a, b, r = matrix
        return _SCALE + self.codec.payload_bytes((a * r,)) + self.codec.payload_bytes((b * r,))

    def floats_at(self, shape: Shape) -> tuple[int, int] | None:
        """The largest element of a matrix."""
        return (0, 1) if self.lowrank.factors(shape) is not None else None

    def encode(self, x: Tensor, seed: int = 0) -> Tensor:
        """See :meth:`Compressor.encode`."""
        flat = x.detach().to(torch.float32).contiguous()
        matrix = self.lowrank.factors(x.shape)
        if matrix is None:
            return as_bytes(flat)
        a, b, r = matrix
        largest = flat.abs().amax().clamp_(min=torch.finfo(torch.float32).tiny)
        m = flat.reshape(a, b) / largest  # any matrix of finite elements survives
        q = torch.randn(b, r, generator=torch.Generator().manual_seed(seed)).to(m)
        for _ in range(self.iterations):
            q = _back(m, orthonormal(_there(m, q)))
        packed = self.codec.encode(orthonormal(_there(m, q)).T.contiguous().view(-1), key(seed, 1))
        span = self._span(packed, a, r, key(seed, 1))
        other = self.codec.encode(_back(m, span).T.contiguous().view(-1), key(seed, 2))
        return torch.cat([as_bytes(largest), packed, other])

    def decode_add(self, payload: Tensor, out: Tensor, weight: float = 1.0, seed: int = 0) -> None:
        """Add ``weight P' Q^T``.

        Raises:
            ValueError: the message does not have the length that the shape of ``out`` calls for.
        """
        check_length(self, payload, out.shape)
        matrix = self.lowrank.factors(out.shape)
        target = out.detach()
        if matrix is None:
            values = section(payload, 0, out.numel(), torch.float32).to(torch.promote_types(out.dtype, torch.float32))
            target.add_(values.view(out.shape), alpha=weight)
            return
        a, b, r = matrix
        cut = _SCALE + self.codec.payload_bytes((a * r,))
        span = self._span(payload[_SCALE:cut], a, r, key(seed, 1))
        other = self.codec.decode(payload[cut:], (b * r,), seed=key(seed, 2)).view(r, b).T
        largest = section(payload, 0, 1, torch.float32)
        product = torch.empty(a, b, device=out.device)
        add_products([product], (span * largest)[None], other[None], 1.0, clear=True)
        target.add_(product.view(out.shape), alpha=weight)

    def _span(self, packed: Tensor, a: int, r: int, seed: int) -> Tensor:
        """What receivers make of the first factor: orthonormal columns."""
        return orthonormal(self.codec.decode(packed, (a * r,), seed=seed).view(r, a).T)


def _there(m: Tensor, q: Tensor) -> Tensor:
    return times([m], q[None])[0]


def _back(m: Tensor, p: Tensor) -> Tensor:
    return transposed_times([m], p[None])[0]
