"""Step time and bytes beside Lightning's DDP, in one process set-up.

``python -m benchmarks.step_time`` starts two processes that train the same byte-level GPT with each strategy in turn,
several rounds each, and prints medians, ratios to DDP of the same round and bytes. Behind slow links, start the ranks
yourself, for example with a tool that puts each rank behind a shaped interface; the script notices ``RANK`` and
``WORLD_SIZE`` in the environment and runs as one rank.

Arms: ``ddp`` (Lightning's DDPStrategy), ``every_step`` (the complete graph after every step: parameters averaged),
``gradients`` (the mean gradient, exchanged after backward), ``diloco`` (one exchange per ``--sync-every`` steps).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from itertools import pairwise
from typing import Any

import lightning as L  # noqa: N812
import torch
from torch.utils.data import DataLoader

import lightning_dopt as dopt
from recipes.llm.model import ByteGPT


class Timer(L.Callback):
    """Wall time of each step, start to start."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.marks.append(time.perf_counter())

    def on_train_batch_end(self, *_: Any) -> None:
        self.end = time.perf_counter()

    @property
    def steps(self) -> list[float]:
        return [b - a for a, b in pairwise([*self.marks, self.end])]


def strategy(arm: str, sync_every: int) -> Any:
    if arm == "ddp":
        return L.pytorch.strategies.DDPStrategy()
    if arm == "every_step":
        return dopt.ReplicaStrategy(dopt.Sync())
    if arm == "gradients":
        return dopt.ReplicaStrategy(dopt.Sync(what="gradients"))
    if arm == "gossip":
        return dopt.GossipStrategy()
    return dopt.DiLoCoStrategy(sync_every=sync_every, codec=dopt.Int8())


def run(arm: str, args: argparse.Namespace, world: int) -> tuple[float, int]:
    """Median (ddp-like arms) or mean (rounds) seconds per step, and bytes sent per step by this rank."""
    L.seed_everything(0)
    model = ByteGPT(n_layer=args.layers, n_head=4, n_embd=args.width, context=args.context)
    data: Any = torch.randint(0, 256, (args.batch * (args.steps + 2) * world, args.context + 1), dtype=torch.uint8)
    timer = Timer()
    s = strategy(arm, args.sync_every)
    trainer = L.Trainer(
        accelerator="cpu", devices=int(os.environ.get("LOCAL_WORLD_SIZE", world)), num_nodes=args.nodes, strategy=s,
        max_steps=args.steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[timer],
    )  # fmt: skip
    trainer.fit(model, DataLoader(data, batch_size=args.batch))
    seconds = timer.steps[args.warmup :]
    if arm == "ddp":
        gradient = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        sent = 2 * (world - 1) * gradient // world
    else:
        sent = s.world.ledger.bytes // args.steps
    return (statistics.mean(seconds) if arm == "diloco" else statistics.median(seconds)), sent


def worker(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    world = int(os.environ["WORLD_SIZE"])
    rows: dict[str, list[tuple[float, int]]] = {arm: [] for arm in args.arms}
    for _ in range(args.rounds):
        for arm in args.arms:
            rows[arm].append(run(arm, args, world))
    if int(os.environ["RANK"]) == 0:
        report(rows, args)


def report(rows: dict[str, list[tuple[float, int]]], args: argparse.Namespace) -> None:
    base = [s for s, _ in rows[args.arms[0]]]
    result = {}
    print(f"{'arm':<12}{'ms/step':>10}{'ratio':>8}{'min':>7}{'max':>7}{'bytes/step':>14}")
    for arm, values in rows.items():
        ratios = [s / b for (s, _), b in zip(values, base, strict=True)]
        ms = 1e3 * statistics.median(s for s, _ in values)
        ratio = statistics.median(ratios)
        print(f"{arm:<12}{ms:>10.1f}{ratio:>8.3f}{min(ratios):>7.3f}{max(ratios):>7.3f}{values[0][1]:>14,}", flush=True)
        result[arm] = {"ms": ms, "ratio": ratio, "ratios": ratios, "bytes": values[0][1]}
    if args.json:
        with open(args.json, "w") as f:
            json.dump(result, f, indent=1)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--arms", nargs="+", default=["ddp", "every_step", "gradients", "diloco"])
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--steps", type=int, default=40)
    p.add_argument("--warmup", type=int, default=5)
    p.add_argument("--sync-every", type=int, default=30)
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--width", type=int, default=256)
    p.add_argument("--context", type=int, default=128)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--nodes", type=int, default=1)
    p.add_argument("--json", default="")
    args = p.parse_args()
    if "RANK" in os.environ:
        worker(args)
        return
    env = dict(os.environ, OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", __spec__.name]
    sys.exit(subprocess.call([*command, *sys.argv[1:]], env=env))


if __name__ == "__main__":
    main()
