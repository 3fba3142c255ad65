"""torchft's DiLoCo as an arm of :mod:`benchmarks.local_updates`: its manager, process group and wrapper, in a plain loop."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

LIGHTHOUSE_PORT = 29610
PATIENCE = timedelta(seconds=300)


def installed() -> bool:
    """Whether torchft can be imported."""
    try:
        import torchft  # noqa: F401
    except ImportError:
        return False
    return True


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Tensor],
    loss: Any,
    steps: int,
    sync_every: int,
) -> list[float]:
    """Train with ``torchft.local_sgd.DiLoCo`` for so many steps; every rank is a replica group of one process.

    Args:
        model: What to train.
        optimizer: Its inner optimizer.
        batches: At least ``steps`` batches.
        loss: ``loss(model, batch)``.
        steps: How many steps.
        sync_every: Steps per round.

    Returns:
        Seconds of each step.
    """
    from torchft import Manager, ProcessGroupGloo
    from torchft.coordination import LighthouseServer
    from torchft.local_sgd import DiLoCo

    rank, n, host = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), os.environ.get("MASTER_ADDR", "localhost")
    lighthouse = None
    if rank == 0:
        lighthouse = LighthouseServer(bind=f"[::]:{LIGHTHOUSE_PORT}", min_replicas=n, join_timeout_ms=60_000)
    store = dist.TCPStore(_own_address(), 0, is_master=True, wait_for_workers=False)
    outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=PATIENCE), min_replica_size=n, use_async_quorum=False, rank=0, world_size=1,
        load_state_dict=lambda state: None, state_dict=dict, replica_id=f"rank{rank}", timeout=PATIENCE,
        quorum_timeout=PATIENCE, connect_timeout=PATIENCE, store_addr=_own_address(), store_port=store.port,
        lighthouse_addr=f"http://{host}:{LIGHTHOUSE_PORT}", hostname=_own_address(),
    )  # fmt: skip
    seconds, iterator = [], iter(batches)
    try:
        with DiLoCo(manager, [model], optimizer, outer, sync_every=sync_every):
            for _ in range(steps):
                began = time.perf_counter()
                optimizer.zero_grad()
                loss(model, next(iterator)).backward()
                optimizer.step()
                seconds.append(time.perf_counter() - began)
    finally:
        manager.shutdown(wait=False)
        if lighthouse is not None:
            time.sleep(1.0)
            lighthouse.shutdown()
    return seconds


def _own_address() -> str:
    """An address under which the other ranks find this one."""
    import socket

    master = os.environ.get("MASTER_ADDR", "localhost")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((socket.gethostbyname(master), 9))
        return str(probe.getsockname()[0])
