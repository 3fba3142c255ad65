"""Linear messages: random combinations of all elements, which may be summed over the ranks before they are decoded."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from lightning_dopt._checks import check_float
from lightning_dopt._random import key
from lightning_dopt.compress._wire import TILE, FlatCompressor, as_bytes, section, unpack_signs
from lightning_dopt.compress.base import Rounds, Shape, numel
from lightning_dopt.compress.sparse import comb

_CHUNK = 4096


class _Sketch(FlatCompressor):
    """``C(x) = R^T R x`` with an ``m x d`` matrix ``R`` of the shared seed: ``4 m`` bytes, unbiased, linear.

    Sums of ``R x`` over the ranks are formed before ``R^T`` is applied, once. Numbers on the wire are ``R x`` times a power
    of two below which no sum of a rank leaves float32.
    """

    linear = True

    def __init__(self, ratio: float) -> None:
        self.ratio = check_float(type(self).__name__, "ratio", ratio, 0.0, 1.0, open_low=True)

    @abstractmethod
    def sketch(self, flat: Tensor, seed: int) -> Tensor:
        """``R x`` (times the power of two) for a contiguous vector of at least one element, in its dtype."""

    @abstractmethod
    def lift_add(self, sketch: Tensor, flat: Tensor, weight: float, seed: int) -> None:
        """Add ``weight R^T`` of a sketch (of its dtype) to ``flat`` in place."""

    @abstractmethod
    def size(self, shape: Shape) -> int:
        """``m``: numbers in the message for a tensor of this shape."""

    def payload_bytes(self, shape: Shape) -> int:
        """``4 m``."""
        return 4 * self.size(shape)

    def contraction(self, shape: Shape) -> float | None:
        """``1 - omega`` where that is positive, else ``None``."""
        omega = self.variance(shape) or 0.0
        return 1.0 - omega if omega < 1.0 else None

    def pack(self, flat: Tensor, seed: int) -> Tensor:
        """The sketch in float32."""
        return as_bytes(self.sketch(flat, seed))

    def unpack_add(self, payload: Tensor, flat: Tensor, weight: float, seed: int) -> None:
        """Add ``R^T`` of the sketch."""
        values = section(payload, 0, self.size(flat.shape), torch.float32)
        self.lift_add(values.to(torch.promote_types(flat.dtype, torch.float32)), flat, weight, seed)

    def rounds(self, x: Tensor, state: dict[str, Tensor], seed: int, size: int) -> Rounds:
        """One sum of the ``m`` numbers, in the dtype of ``x`` (float32 if narrower)."""
        own, mean = (torch.zeros_like(x, memory_format=torch.contiguous_format) for _ in range(2))
        if not x.numel():
            return own, mean
        flat = x.detach().reshape(-1)
        values = self.sketch(flat.to(torch.promote_types(flat.dtype, torch.float32)), seed)
        self.lift_add(values, own.view(-1), 1.0, seed)
        total = yield values
        self.lift_add(total, mean.view(-1), 1.0 / size, seed)
        return own, mean


class CountSketch(_Sketch):
    """Elements are added up in ``m`` buckets with random signs; each is read back from its bucket: ``4 m`` bytes.

    Element ``i`` falls into bucket ``i mod m`` with a random sign: every bucket gets ``d / m`` elements, which keeps the
    variance as low as with a random hash, without scattered memory access. The signs alone make the mean exact,
    ``E s_i s_j = 0``, and the variance is what shares a bucket with each element. The same elements meet in every message.

    The classical sketch has several rows and decodes the median of them, which finds single large elements but is
    biased. The mean of ``r`` rows of ``m`` buckets has the variance of one row of ``r m``; so there is one row here.

    Source: Charikar, Chen, Farach-Colton, "Finding frequent items in data streams", ICALP 2002; for gradients:
    Ivkin et al., "Communication-efficient distributed SGD with sketching", NeurIPS 2019.

    Args:
        ratio: buckets as a share of the elements, in (0, 1]; ``m`` is ``ratio * d`` rounded half up, at least 1.

    Raises:
        ValueError: ``ratio`` outside (0, 1].
    """

    def size(self, shape: Shape) -> int:
        """``m``: buckets for a tensor of this shape."""
        d = numel(shape)
        return min(d, max(1, math.floor(self.ratio * d + 0.5)))

    def variance(self, shape: Shape) -> float:
        """``ceil(d / m) - 1``, attained by one nonzero element where ``m`` does not divide ``d``, else by every x."""
        return float(-(-numel(shape) // self.size(shape)) - 1) if numel(shape) else 0.0

    def sketch(self, flat: Tensor, seed: int) -> Tensor:
        """See :class:`_Sketch`."""
        m = self.size(flat.shape)
        signs, out = random_signs(flat.numel(), seed, flat.device), torch.zeros(m, dtype=flat.dtype, device=flat.device)
        for first, last in self._pieces(flat):
            rows = flat[first:last].mul(self._unit(flat)).mul_(signs[first:last]).view(-1, min(m, last - first))
            out[: rows.shape[1]].add_(rows.sum(0))
        return out

    def lift_add(self, sketch: Tensor, flat: Tensor, weight: float, seed: int) -> None:
        """See :class:`_Sketch`."""
        m, signs = sketch.numel(), random_signs(flat.numel(), seed, flat.device)
        scaled = sketch * (weight / self._unit(flat))
        for first, last in self._pieces(flat):
            rows = signs[first:last].view(-1, min(m, last - first))
            flat[first:last].view_as(rows).add_(rows * scaled[: rows.shape[1]])

    def _unit(self, flat: Tensor) -> float:
        """A power of two of which a bucket holds no more than one in all."""
        return 2.0 ** -math.ceil(math.log2(-(-flat.numel() // self.size(flat.shape))))

    def _pieces(self, flat: Tensor) -> list[tuple[int, int]]:
        """Pieces of whole rows of buckets, then the shorter row."""
        d, m = flat.numel(), self.size(flat.shape)
        step, whole = max(1, TILE // m) * m if flat.device.type == "cpu" else d, d - d % m
        pieces = [(first, min(first + step, whole)) for first in range(0, whole, step)]
        return pieces + ([(whole, d)] if whole < d else [])


class RandomProjection(_Sketch):
    """A random subset of the coordinates in a randomly rotated basis (SRHT): ``4 k`` bytes, every message alike.

    Random signs, an orthonormal Walsh-Hadamard transform of every 4096 elements, and of the result ``k`` of ``D`` numbers
    as :class:`RandK` picks them, times ``D / k``. The last chunk is filled up with zeros to a power of two, so ``D`` is at
    most ``d`` plus its length. The rotation spreads single large elements, so that messages vary much less than
    :class:`RandK`'s at equal variance. A Gaussian matrix would do no better and costs ``O(k d)``.

    Source: Ailon, Chazelle, "The fast Johnson-Lindenstrauss transform", STOC 2006; for federated averages: Konečný et
    al., "Federated learning: strategies for improving communication efficiency", arXiv 1610.05492.

    Args:
        ratio: numbers sent as a share of ``D``, in (0, 1]; ``k`` is ``ratio * D`` rounded half up, at least 1.

    Raises:
        ValueError: ``ratio`` outside (0, 1].
    """

    def padded(self, shape: Shape) -> int:
        """``D``: elements with the zeros at the end of the last chunk."""
        d = numel(shape)
        rest = d % _CHUNK
        return d - rest + (1 << (rest - 1).bit_length() if rest else 0)

    def size(self, shape: Shape) -> int:
        """``k``: numbers sent for a tensor of this shape."""
        d = self.padded(shape)
        return min(d, max(1, math.floor(self.ratio * d + 0.5)))

    def variance(self, shape: Shape) -> float:
        """``D / k - 1``, for every x if no zeros are added."""
        return self.padded(shape) / self.size(shape) - 1.0 if numel(shape) else 0.0

    def sketch(self, flat: Tensor, seed: int) -> Tensor:
        """See :class:`_Sketch`."""
        d, padded = flat.numel(), self.padded(flat.shape)
        signs, rotated = random_signs(padded, seed, flat.device), flat.new_zeros(padded)
        for first, last, n in self._pieces(padded, flat.device):
            part = rotated[first:last]
            torch.mul(flat[first:last], signs[first : min(last, d)], out=part[: d - first])
            _rotate(part.view(-1, n), 1 / 128)
        return rotated[self._positions(flat.shape, seed, flat.device)]

    def lift_add(self, sketch: Tensor, flat: Tensor, weight: float, seed: int) -> None:
        """See :class:`_Sketch`."""
        d, padded = flat.numel(), self.padded(flat.shape)
        signs, rotated = random_signs(padded, seed, flat.device), sketch.new_zeros(padded)
        rotated[self._positions(flat.shape, seed, flat.device)] = sketch * (weight * padded / sketch.numel())
        for first, last, n in self._pieces(padded, flat.device):
            _rotate(rotated[first:last].view(-1, n), 128.0)
            flat[first:last].add_(rotated[first : min(last, d)].mul_(signs[first : min(last, d)]))

    def _positions(self, shape: Shape, seed: int, device: torch.device) -> Tensor:
        # The generator of this seed has drawn the signs, on which the choice must not depend.
        d, generator = self.padded(shape), torch.Generator().manual_seed(key(seed, 1))
        phase = int(torch.randint(0, 2**63 - 1, (1,), generator=generator)) % d
        return comb(d, self.size(shape), phase, device)

    def _pieces(self, padded: int, device: torch.device) -> list[tuple[int, int, int]]:
        """``(first, last, n)``: pieces of whole chunks of ``n`` elements."""
        whole = padded - padded % _CHUNK
        step = TILE if device.type == "cpu" else max(1, whole)
        pieces = [(first, min(first + step, whole), _CHUNK) for first in range(0, whole, step)]
        return pieces + ([(whole, padded, padded - whole)] if whole < padded else [])


def random_signs(d: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """``d`` independent signs as int8, drawn on the CPU so that every device gets the same."""
    words = torch.empty(-(-d // 64), dtype=torch.int64)
    words.random_(-(2**63), None, generator=torch.Generator().manual_seed(seed))
    return unpack_signs(words.view(torch.uint8), 64 * words.numel())[:d].to(device)


def _rotate(rows: Tensor, factor: float) -> None:
    """Orthonormal Walsh-Hadamard transform of each row (a power of two of elements) times ``factor``, in place."""
    n = rows.shape[1]
    a = 1 << (n.bit_length() - 1) // 2
    left, right = _hadamard(a, rows) * (factor / math.sqrt(n)), _hadamard(n // a, rows)
    # As the Kronecker product of two small matrices, the transform is two products of cached size.
    rows.view(-1, a, n // a).copy_((left @ rows.view(-1, a, n // a)) @ right)


def _hadamard(n: int, like: Tensor) -> Tensor:
    """The ``n x n`` matrix of signs, in Sylvester's order."""
    matrix = like.new_ones(1, 1)
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix
