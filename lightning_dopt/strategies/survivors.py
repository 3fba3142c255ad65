"""What Lightning asks of all ranks, asked of those that are left: barriers, broadcasts, metrics, decisions."""

from __future__ import annotations

import os
import pickle
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_dopt.comm import ProcessGroupWorld, SyncError

LABEL = "lightning"
OPERATIONS = {"sum": "sum", "mean": "mean", "avg": "mean", "max": "amax", "min": "amin"}


class Survivors:
    """Collectives for a strategy that goes on without lost peers; all of them go through rank 0.

    Args:
        world: With whom.
    """

    def __init__(self, world: ProcessGroupWorld) -> None:
        self.world = world

    def barrier(self) -> None:
        """Wait for all that are left."""
        self._collect(None)

    def broadcast(self, obj: Any, src: int) -> Any:
        """The object of rank ``src`` for all.

        Raises:
            SyncError: that rank is lost.
        """
        got = self._collect(obj if self.world.rank == src else None)
        if src not in got:
            raise SyncError(f"rank {self.world.rank}, step {self.world.step}: broadcast from rank {src}, which is lost")
        return got[src]

    def any_or_all(self, decision: bool, every: bool) -> bool:
        """Whether all that are left, or any of them, decided so."""
        votes = self._collect(bool(decision)).values()
        return all(votes) if every else any(votes)

    def reduce(self, tensor: Tensor, operation: Any) -> Tensor:
        """The mean, sum, maximum or minimum over the ranks that are left, in place.

        Raises:
            ValueError: another operation.
        """
        name = "mean" if operation is None else str(operation).lower().rpartition(".")[2]
        if name not in OPERATIONS:
            raise ValueError(f"reduce(reduce_op={operation!r}): with on_lost_peer='continue' use mean, sum, max or min")
        rows = self.all_gather(tensor)
        rows = rows if rows.is_floating_point() or name != "mean" else rows.double()
        return tensor.copy_(getattr(rows, OPERATIONS[name])(0))

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all that are left, stacked in the order of their ranks; no gradient flows through it."""
        rows: Tensor = self.world.all_gather(tensor.detach(), LABEL, overhead=True).wait()
        return rows

    def _collect(self, obj: Any) -> dict[int, Any]:
        """An object of every rank that is left, by rank."""
        mine = torch.frombuffer(bytearray(pickle.dumps(obj)), dtype=torch.uint8)
        got: dict[int, bytes] = {}

        def answer() -> Tensor:
            return torch.frombuffer(bytearray(pickle.dumps(got)), dtype=torch.uint8)

        pending = self.world.meet(
            mine,
            lambda j, sent: got.__setitem__(j, sent.numpy().tobytes()),
            answer,
            lambda out: pickle.loads(out.numpy().tobytes()),
            LABEL,
        )
        return {j: pickle.loads(sent) for j, sent in pending.wait().items()}


def warn_of_launcher(creates_processes: bool) -> None:
    """Warn if what started the processes kills all of them when one ends.

    Args:
        creates_processes: Whether Lightning itself starts more than one on this node.
    """
    who = "Lightning" if creates_processes else "torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else None
    if who is not None:
        rank_zero_warn(
            f"on_lost_peer='continue': {who} ends all processes that it started as soon as one of them fails; start each "
            "by hand or with srun --kill-on-bad-exit=0"
        )
