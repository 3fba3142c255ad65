"""The largest elements, their values rounded to a few clusters, their positions in close to the fewest bits (FedZip)."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from lightning_dopt._checks import check_float, check_int
from lightning_dopt.compress._codes import check_below, code_bytes, pack_codes, pack_trits, unpack_codes, unpack_trits
from lightning_dopt.compress._wire import FlatCompressor, as_bytes, pack_bits, section, unpack_signs
from lightning_dopt.compress.base import Compressor, Shape, numel
from lightning_dopt.compress.sparse import largest

_ITERATIONS = 10


class FedZip(FlatCompressor):
    """Top ``k`` of each tensor, values by k-means, positions by an entropy code: 1.27 bytes per element sent at 1 %.

    Of every tensor the ``k`` elements of largest magnitude are sent, each as the number of one of ``clusters`` values.
    A message is those values in float32, the positions, and the numbers (five to a byte for 3 clusters, else in the bits
    they need). With 1 % and 3 clusters that is 1/315 of float32, with 0.25 % 1/1100.

    *Positions.* The paper codes the differences of positions by Huffman's method, whose length depends on them; here
    all ranks must know it beforehand. The code of Elias and Fano takes ``k l + k + ((d - 1) >> l) + 1`` bits with
    ``l = floor(log2(d / k))`` whatever the positions are, less than 2 bits per element plus ``log2(d / k)``: 8.6 at 1 %, where
    the entropy is 8.1. So nothing is padded, and no message is refused for its length.

    *Clusters.* They begin as the negative and the other values; the cluster with the largest squared error is split at
    its mean until there are enough, and ten rounds of k-means follow. Neither adds error, so it is at most that of two
    means of one sign each: ``||v||^2 - ||v||_1^2 / k`` for the ``k`` values ``v``. Runs on the CPU.

    Biased and without a memory of its own, as published; use it inside an error memory.

    Source: Malekijoo et al., "FEDZIP: A Compression Framework for Communication-Efficient Federated Learning",
    arXiv 2102.01593; positions: Elias, "Efficient storage and retrieval by content and address of static files", JACM
    1974.

    Args:
        ratio: share of each tensor to send, in (0, 1]; ``k`` is ``ratio * d`` rounded half up, at least 1.
        clusters: values per tensor, 2 to 256.

    Raises:
        ValueError: ``ratio`` outside (0, 1] or ``clusters`` outside 2 to 256; in decoding, positions that cannot be.
    """

    layerwise = True

    def __init__(self, ratio: float, clusters: int = 3) -> None:
        self.ratio = check_float("FedZip", "ratio", ratio, 0.0, 1.0, open_low=True)
        self.clusters = check_int("FedZip", "clusters", clusters, 2)
        if clusters > 256:
            raise ValueError(f"FedZip(clusters={clusters!r}): must be at most 256")

    def kept(self, shape: Shape) -> int:
        """``k``: how many elements of a tensor of this shape are sent."""
        d = numel(shape)
        return min(d, max(1, math.floor(self.ratio * d + 0.5)))

    def payload_bytes(self, shape: Shape) -> int:
        """Values, low and high parts of the positions, and numbers; none for an empty tensor."""
        return sum(self._sections(shape))

    def floats_at(self, shape: Shape) -> tuple[int, int]:
        """The values of the clusters."""
        return 0, self.clusters if numel(shape) else 0

    def contraction(self, shape: Shape) -> float:
        """``1 / d``: of ``k / d`` of the energy at least ``1 / k`` survives the clusters. On real gradients far more."""
        return 1.0 / max(1, numel(shape))

    def pack(self, flat: Tensor, seed: int) -> Tensor:
        """Values, positions, numbers."""
        k = self.kept(flat.shape)
        index = largest(flat, k).sort().values
        kept = flat[index]
        means = cluster_means(kept, self.clusters)
        numbers = torch.bucketize(kept, (means[1:] + means[:-1]) / 2)
        packed = pack_trits(numbers) if self.clusters == 3 else pack_codes(numbers, self._bits)
        return torch.cat([as_bytes(means), pack_ascending(index, flat.numel()), packed])

    def unpack_add(self, payload: Tensor, flat: Tensor, weight: float, seed: int) -> None:
        """Add the value of each number at its position."""
        k, d = self.kept(flat.shape), flat.numel()
        means, positions, numbers = payload.split_with_sizes(self._sections(flat.shape))
        index = unpack_ascending(self, positions, k, d)
        which = unpack_trits(self, numbers, k) if self.clusters == 3 else unpack_codes(numbers, k, self._bits)
        which = which.to(torch.int64)
        check_below(self, which, self.clusters)
        values = section(means, 0, self.clusters, torch.float32).index_select(0, which)
        flat.index_add_(0, index, values.to(flat.dtype), alpha=weight)

    @property
    def _bits(self) -> int:
        return (self.clusters - 1).bit_length()

    def _sections(self, shape: Shape) -> list[int]:
        d, k = numel(shape), self.kept(shape)
        if not d:
            return [0, 0, 0]
        numbers = (k + 4) // 5 if self.clusters == 3 else code_bytes(k, self._bits)
        return [4 * self.clusters, ascending_bytes(k, d), numbers]


def ascending_bytes(k: int, d: int) -> int:
    """Bytes of :func:`pack_ascending` for ``k`` of ``d`` positions."""
    low, high = _split(k, d)
    return code_bytes(k, low) + (high + 7) // 8


def pack_ascending(index: Tensor, d: int) -> Tensor:
    """Ascending positions among ``d`` by the code of Elias and Fano.

    The lowest ``l`` bits as they are. The rest in unary: bit ``(index >> l) + i`` is set for the ``i``-th position.
    """
    k = index.numel()
    low, high = _split(k, d)
    bits = torch.zeros(high, dtype=torch.bool, device=index.device)
    bits[index.bitwise_right_shift(low).add_(torch.arange(k, device=index.device))] = True
    return torch.cat([pack_codes(index.bitwise_and((1 << low) - 1), low), pack_bits(bits)])


def unpack_ascending(compressor: Compressor, packed: Tensor, k: int, d: int) -> Tensor:
    """The ``k`` positions of :func:`pack_ascending`, int64.

    Raises:
        ValueError: not ``k`` of them, or one that is not below ``d``.
    """
    low, high = _split(k, d)
    start = code_bytes(k, low)
    marks = (unpack_signs(packed[start:], high) > 0).nonzero().view(-1)
    if marks.numel() != k:
        raise ValueError(f"{compressor!r}: a message with {marks.numel()} positions instead of {k}; damaged")
    index = marks.sub_(torch.arange(k, device=packed.device)).bitwise_left_shift_(low)
    index.bitwise_or_(unpack_codes(packed[:start], k, low).to(torch.int64))
    check_below(compressor, index, d)
    return index


def _split(k: int, d: int) -> tuple[int, int]:
    """``l`` and the number of bits of the part in unary."""
    low = (d // k).bit_length() - 1
    return low, k + ((d - 1) >> low) + 1


def cluster_means(values: Tensor, clusters: int) -> Tensor:
    """Ascending means of at most ``clusters`` groups of near values (the last repeated to make up the number)."""
    ordered = values.detach().double().cpu().sort().values
    sums = torch.cat([torch.zeros(2, 1, dtype=torch.float64), torch.stack([ordered, ordered.square()]).cumsum(1)], 1)

    def mean(a: int, b: int) -> float:
        return float(sums[0, b] - sums[0, a]) / (b - a)

    def error(a: int, b: int) -> float:
        return float(sums[1, b] - sums[1, a]) - mean(a, b) ** 2 * (b - a)

    def place(value: float) -> int:
        return int(torch.searchsorted(ordered, value))

    cuts = sorted({0, place(0.0), len(ordered)})
    while len(cuts) <= clusters:
        a, b = max(pairwise(cuts), key=lambda group: error(*group))
        middle = place(mean(a, b))
        if not a < middle < b:
            break
        cuts = sorted([*cuts, middle])
    for _ in range(_ITERATIONS):
        means = [mean(a, b) for a, b in pairwise(cuts)]
        cuts = sorted({0, *(place((low + high) / 2) for low, high in pairwise(means)), cuts[-1]})
    means = [mean(a, b) for a, b in pairwise(cuts)]
    return torch.tensor(means + means[-1:] * (clusters - len(means)), dtype=torch.float32, device=values.device)
