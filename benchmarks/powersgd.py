"""PowerSGD beside PyTorch's communication hook: whole training steps, two processes, one thread each.

``python -m benchmarks.powersgd`` trains a stack of ``--layers`` linear layers of ``--width`` on one example per rank, so that
the time is that of the exchange, and prints the least processor time and wall time of a step of one rank (forward, backward,
exchange, SGD) of

* ``DDP``: ``DistributedDataParallel`` without compression,
* ``hook``: the same with ``powerSGD_hook`` (one bucket, warm start, error feedback),
* ``hook, batched``: with ``batch_tensors_with_same_shape``,
* ``ours``: ``plans.compressed_ddp(LowRank(r))`` in a bare loop.

Arms take turns, so that what else the machine does hits all alike; numbers are the least of all steps of all turns.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as hook
from torch.nn.parallel import DistributedDataParallel

import lightning_dopt as dopt

Step = Callable[[], None]


def model(args: argparse.Namespace) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(args.width, args.width) for _ in range(args.layers)))


def ddp(args: argparse.Namespace, rank: int, batched: bool | None) -> Step:
    """A step of DDP; ``batched`` is ``None`` without the hook."""
    net = DistributedDataParallel(model(args), bucket_cap_mb=1 << 14, gradient_as_bucket_view=True)
    if batched is not None:
        state = hook.PowerSGDState(
            None, args.rank, start_powerSGD_iter=2, min_compression_rate=2, batch_tensors_with_same_shape=batched
        )
        net.register_comm_hook(state, hook.powerSGD_hook)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    x = torch.randn(1, args.width, generator=torch.Generator().manual_seed(rank))

    def step() -> None:
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()

    return step


def ours(args: argparse.Namespace, rank: int) -> Step:
    net = model(args)
    plan = dopt.plans.compressed_ddp(dopt.LowRank(args.rank))
    engine = dopt.Engine(plan, dict(net.named_parameters()), dopt.ProcessGroupWorld())
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    x = torch.randn(1, args.width, generator=torch.Generator().manual_seed(rank))

    def step() -> None:
        engine.run(engine.before_step())
        optimizer.zero_grad()
        net(x).square().mean().backward()
        engine.run(engine.on_gradients())
        optimizer.step()
        engine.run(engine.after_step())

    return step


def work(rank: int, args: argparse.Namespace) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(args.port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    makers: dict[str, Callable[[], Step]] = {
        "DDP": lambda: ddp(args, rank, None),
        "hook": lambda: ddp(args, rank, False),
        "hook, batched": lambda: ddp(args, rank, True),
        "ours": lambda: ours(args, rank),
    }
    best: dict[str, tuple[float, float]] = {}
    for _ in range(args.turns):
        for name in args.arms:
            step = makers[name]()
            for k in range(args.warmup + args.steps):
                dist.barrier()
                wall, busy = time.perf_counter(), time.process_time()
                step()
                wall, busy = time.perf_counter() - wall, time.process_time() - busy
                if k >= args.warmup:
                    least = best.get(name, (wall, busy))
                    best[name] = min(least[0], wall), min(least[1], busy)
            del step
    if rank == 0:
        print(f"rank {args.rank}{'':10}{'processor':>14}{'wall':>14}")
        for name, (wall, busy) in best.items():
            print(f"{name:<16}{1e3 * busy:11.1f} ms{1e3 * wall:11.1f} ms", flush=True)
        if args.json:
            with open(args.json, "w") as f:
                json.dump(best, f, indent=1)
    dist.destroy_process_group()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--layers", type=int, default=24)
    p.add_argument("--width", type=int, default=1024)
    p.add_argument("--rank", type=int, default=4)
    p.add_argument("--arms", nargs="+", default=["DDP", "hook", "hook, batched", "ours"])
    p.add_argument("--turns", type=int, default=2)
    p.add_argument("--steps", type=int, default=5)
    p.add_argument("--warmup", type=int, default=4)
    p.add_argument("--port", type=int, default=29533)
    p.add_argument("--json", default="")
    args = p.parse_args()
    mp.start_processes(work, (args,), nprocs=2, start_method="fork")  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
