"""How far replicas are apart, estimated from a few hundred numbers of each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_dopt._random import key
from lightning_dopt.comm.world import Talk, World
from lightning_dopt.slots import Lane

BUCKETS = 256
"""Numbers in a sketch; the relative error of a squared distance is about ``sqrt(2 / BUCKETS)``."""


def sketch(vectors: Sequence[Tensor], seed: int) -> Tensor:
    """A linear map of the vectors of a replica to ``BUCKETS`` numbers that keeps squared norms on average (a count sketch).

    Every coordinate gets a random sign and is added to a bucket. With the same seed all ranks use the same map.
    """
    device = vectors[0].device
    total = torch.zeros(BUCKETS, dtype=torch.float64, device=device)
    for k, vector in enumerate(vectors):
        generator, d = torch.Generator(device).manual_seed(key(seed, k)), vector.numel()
        rows = -(-d // BUCKETS)
        signed = torch.zeros(rows * BUCKETS, dtype=torch.promote_types(vector.dtype, torch.float32), device=device)
        signs = torch.randint(0, 2, (d,), generator=generator, dtype=torch.int8, device=device)
        torch.mul(vector, signs.mul_(2).sub_(1), out=signed[:d])
        total += signed.view(rows, BUCKETS).sum(0, dtype=torch.float64)
    return total


def sketched_distance(
    lanes: Sequence[Lane], world: World, seed: int, label: str = "distance"
) -> Talk[tuple[float, float]]:
    """Estimates of ``sqrt(mean_i ||x_i - mean||^2)`` and of ``||mean||``, the same on all ranks.

    One all-reduce of ``BUCKETS + 1`` numbers in double precision, counted as overhead.
    """
    mine = sketch([lane.live for lane in lanes], seed)
    message = torch.cat([mine, mine.square().sum().view(1)])
    if world.size > 1:
        message = yield world.all_reduce(message, label, overhead=True)
        message = message / world.size
    squared_norm = float(message[:-1].square().sum())
    return max(0.0, float(message[-1]) - squared_norm) ** 0.5, squared_norm**0.5


def gathered_sketches(vectors: Sequence[Tensor], world: World, seed: int, label: str) -> Talk[Tensor]:
    """The sketches of all ranks, shape (n, ``BUCKETS``) in float64 on the CPU, the same on all ranks."""
    mine = sketch(vectors, seed).cpu()
    if world.size == 1:
        return mine[None]
    device = vectors[0].device
    rows = yield world.all_gather(mine.view(torch.uint8).to(device), label)
    return torch.stack([row.cpu().view(torch.float64) for row in rows])
