"""A sampler over one worker's own samples, of a length all workers share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from lightning_dopt._checks import check_choice, check_int
from lightning_dopt._random import key

Length = Literal["mean", "shortest", "longest"]


def common_length(parts: Sequence[Tensor], length: Length = "mean") -> int:
    """Samples per worker and epoch, the same number on every worker.

    ``mean`` is the mean size rounded up, so that an epoch is as many samples in all as the data set has; ``shortest``
    and ``longest`` are the sizes of the smallest and the largest part.

    Raises:
        ValueError: no parts, or an unknown ``length``.
    """
    check_choice("common_length", "length", length, ("mean", "shortest", "longest"))
    sizes = [len(part) for part in parts]
    if not sizes:
        raise ValueError("common_length(parts=[]): must hold at least one part")
    if length == "mean":
        return -(-sum(sizes) // len(sizes))
    return min(sizes) if length == "shortest" else max(sizes)


class PartitionSampler(DistributedSampler[int]):
    """Draws from this worker's ``indices`` only, ``length`` of them per epoch.

    The sampler walks through an endless chain of passes over ``indices`` (each pass a fresh permutation if ``shuffle``)
    and epoch ``e`` is the stretch ``[e * length, (e + 1) * length)`` of it. A part longer than ``length`` is therefore
    truncated to different samples each epoch, a shorter one wraps around, and over time every sample of the part is
    seen equally often, plus or minus one. The stretch depends on ``(seed, epoch)`` alone; Lightning calls
    :meth:`set_epoch` with the number of the epoch.

    It is a ``DistributedSampler`` because that is the one type of sampler that Lightning's ``Trainer`` leaves alone
    under its default ``use_distributed_sampler=True``; any other is wrapped and split among the workers once more.

    Args:
        indices: this worker's samples, shape (n,), at least one.
        seed: seed of the permutations.
        shuffle: whether each pass is permuted; otherwise passes follow the order of ``indices``.
        length: samples per epoch, equal on all workers (see :func:`common_length`); ``None`` is the size of the part,
            right only where all parts have one size.

    Raises:
        ValueError: no indices, or ``length`` below one.
    """

    def __init__(
        self, indices: Tensor | Sequence[int], seed: int = 0, shuffle: bool = True, length: int | None = None
    ) -> None:
        self.indices = torch.as_tensor(indices, dtype=torch.int64)
        if self.indices.dim() != 1 or len(self.indices) == 0:
            raise ValueError(f"PartitionSampler(indices=<shape {tuple(self.indices.shape)}>): must be a non-empty list")
        check_int("PartitionSampler", "seed", seed, 0)
        self.length = len(self.indices) if length is None else check_int("PartitionSampler", "length", length, 1)
        # One replica: the data set of this sampler is the part, and nobody shares it.
        super().__init__(range(len(self.indices)), num_replicas=1, rank=0, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.num_samples = self.total_size = self.length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        size, start = len(self.indices), self.epoch * self.length
        first, last = start // size, (start + self.length - 1) // size
        passes = torch.cat([self._pass(k) for k in range(first, last + 1)])
        offset = start - first * size
        return iter(passes[offset : offset + self.length].tolist())

    def _pass(self, k: int) -> Tensor:
        if not self.shuffle:
            return self.indices
        # Hashed, because torch's CPU generator reads no more than 32 bits of a seed.
        generator = torch.Generator().manual_seed(key(self.seed, k))
        return self.indices[torch.randperm(len(self.indices), generator=generator)]
