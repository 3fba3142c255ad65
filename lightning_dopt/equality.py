"""Whether replicas that must be equal are: a digest of every rank's parameters, compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_dopt.comm.seal import digest
from lightning_dopt.comm.world import Talk, World
from lightning_dopt.compress._wire import as_bytes
from lightning_dopt.slots import Lane


def compare(lanes: Sequence[Lane], world: World, label: str, step: int) -> Talk[None]:
    """Compare what all ranks hold, to the last bit; 16 bytes per rank cross the network.

    Args:
        lanes: What to compare.
        world: With whom.
        label: In the ledger.
        step: For the error.

    Raises:
        RuntimeError: ranks differ; names those that are not like most.
    """
    table = torch.zeros(world.size, 4, device=lanes[0].live.device)
    table[world.rank] = _digest(lanes)
    table = yield world.all_reduce(table, label, overhead=True)
    found = [tuple(row) for row in table.tolist()]
    usual = max(found, key=found.count)  # of several the one of the lowest rank
    others = [str(rank) for rank, own in enumerate(found) if own != usual]
    if others:
        raise RuntimeError(
            f"step {step}: the parameters of rank(s) {', '.join(others)} are not those of rank {found.index(usual)}, although "
            "this plan keeps replicas equal; start from a checkpoint, and look for what these ranks do differently"
        )


def _digest(lanes: Sequence[Lane]) -> Tensor:
    """64 bits as four whole numbers that float32 and sums keep."""
    total = torch.stack([digest(as_bytes(lane.live.detach()), k) for k, lane in enumerate(lanes)])
    words = digest(total.view(torch.uint8)).view(1).view(torch.uint8).to(torch.float32)
    return words[0::2] + 256.0 * words[1::2]
