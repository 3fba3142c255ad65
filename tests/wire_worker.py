"""One rank of ``test_wire.py``: runs plans in a bare loop and prints what the ledger and the interface counted."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist

import lightning_dopt as dopt
from lightning_dopt import plans

PLANS = {
    "every_step": dopt.Plan([dopt.Sync()]),
    "diloco_int8": plans.diloco(2, codec=dopt.Int8()),
    "ring": plans.gossip(dopt.Ring()),
    "one_peer": plans.gossip(),
    "choco_top_k": plans.gossip(dopt.Ring(), codec=dopt.TopK(0.05)),
    "power_sgd": plans.compressed_ddp(dopt.LowRank(32)),
    "top_k": plans.compressed_ddp(dopt.TopK(0.05)),
}
STEPS = 6
REPEATS = 2


def transmitted() -> int:
    """Bytes this rank's interface has sent: the ninth number of its line in ``/proc/net/dev``."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    line = next(text for text in lines if text.strip().startswith(os.environ["SLOWNET_IF"] + ":"))
    return int(line.partition(":")[2].split()[8])


def measure(plan: dopt.Plan) -> tuple[int, int, int]:
    """Six steps: the bytes and the messages of the ledger, and the bytes that the interface sent."""
    torch.manual_seed(dist.get_rank())
    parameters = {"w": torch.randn(1000, 400, requires_grad=True), "b": torch.randn(1000, requires_grad=True)}
    engine = dopt.Engine(plan, parameters, dopt.ProcessGroupWorld())
    engine.world.run(engine.consensus())  # connections are made here
    engine.world.ledger.entries.clear()
    dist.barrier()
    before = transmitted()
    for _ in range(STEPS):
        engine.run(engine.before_step())
        for p in parameters.values():
            p.grad = torch.randn_like(p)
        engine.run(engine.on_gradients())
        engine.run(engine.after_step())
    dist.barrier()
    sent = transmitted() - before
    ledger = engine.world.ledger
    return ledger.bytes, sum(entry.messages for entry in ledger.entries.values()), sent


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    counted = {}
    for name, plan in PLANS.items():
        # A busy machine makes TCP send again what is only late, which no program can prevent; it only ever adds bytes,
        # so the smallest of the repeats is what the plan itself sends.
        counted[name] = min((measure(plan) for _ in range(REPEATS)), key=lambda row: row[-1])
    print(json.dumps({"rank": dist.get_rank(), "counted": counted}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
