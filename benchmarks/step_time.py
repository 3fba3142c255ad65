"""Step time and bytes beside Lightning's DDP, in one process set-up.

``python -m benchmarks.step_time`` starts two processes that train the same byte-level GPT with each strategy in turn,
several rounds each, and prints medians, ratios to DDP of the same round and bytes. With ``--link-tool PROGRAM`` (one that
takes ``-n N --mbit R -- COMMAND`` and starts each rank behind a link of that speed) the same runs once more behind each
speed of ``--links``, and DiLoCo is compared with its own speed without a limit.

Arms: ``ddp`` (Lightning's DDPStrategy), ``every_step`` (the complete graph after every step: parameters averaged),
``gradients`` (the mean gradient, exchanged after backward), ``diloco`` (int8, one exchange per ``--sync-every`` steps).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from itertools import pairwise
from pathlib import Path
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


def run(arm: str, args: argparse.Namespace) -> tuple[float, int]:
    """Seconds per step (median; for DiLoCo the mean over one round) and bytes sent per step by this rank."""
    L.seed_everything(0)
    world, local = args.world, args.local
    steps = args.warmup + args.sync_every if arm == "diloco" else args.steps
    model = ByteGPT(n_layer=args.layers, n_head=4, n_embd=args.width, context=args.context)
    data: Any = torch.randint(0, 256, (args.batch * (steps + 2) * world, args.context + 1), dtype=torch.uint8)
    timer = Timer()
    s = strategy(arm, args.sync_every)
    trainer = L.Trainer(
        accelerator="cpu", devices=local, num_nodes=world // local, strategy=s, max_steps=steps, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[timer],
    )  # fmt: skip
    trainer.fit(model, DataLoader(data, batch_size=args.batch))
    if arm == "ddp":
        gradient = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        return statistics.median(timer.steps[args.warmup :]), 2 * (world - 1) * gradient // world
    if arm == "diloco":
        return statistics.mean(timer.steps[args.warmup :]), s.world.ledger.bytes // args.sync_every
    return statistics.median(timer.steps[args.warmup :]), s.world.ledger.bytes // steps


def worker(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    # Lightning removes these variables again after the first fit.
    rank, args.world, args.local = (int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    rows: dict[str, list[tuple[float, int]]] = {arm: [] for arm in args.arms}
    for _ in range(args.rounds):
        for arm in args.arms:
            rows[arm].append(run(arm, args))
    if rank == 0:
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
    p.add_argument("--steps", type=int, default=25)
    p.add_argument("--warmup", type=int, default=5)
    p.add_argument("--sync-every", type=int, default=100)
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--width", type=int, default=256)
    p.add_argument("--context", type=int, default=128)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--json", default="")
    p.add_argument("--link-tool", default="")
    p.add_argument("--links", nargs="*", type=float, default=[100.0, 20.0], help="Mbit/s")
    args = p.parse_args()
    if "RANK" in os.environ:
        worker(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(args, Path(folder))


def compare(args: argparse.Namespace, folder: Path) -> None:
    """Without a limit, then behind each link."""
    shape = [f"--{name}={getattr(args, name)}" for name in ("layers", "width", "context", "batch", "warmup")]
    rank = [
        sys.executable,
        "-m",
        "benchmarks.step_time",
        *shape,
        f"--sync-every={args.sync_every}",
        "--arms",
        *args.arms,
    ]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    print("no limit", flush=True)
    free = folder / "free.json"
    module = [*rank[1:], f"--rounds={args.rounds}", f"--steps={args.steps}", f"--json={free}"]
    subprocess.run([*torchrun, *module], env=env, check=True)
    results = {"unlimited": json.loads(free.read_text())}
    for mbit in args.links if args.link_tool else []:
        print(f"\n{mbit:g} Mbit/s", flush=True)
        out = folder / f"{mbit:g}.json"
        command = [*rank, "--rounds=1", f"--steps={args.warmup + 4}", f"--json={out}"]
        tool = [
            sys.executable,
            args.link_tool,
            "-n",
            "2",
            "--mbit",
            f"{mbit:g}",
            "--show",
            "first",
            "--timeout",
            "900",
            "--",
        ]
        subprocess.run([*tool, *command], env=env, check=True)
        results[f"{mbit:g}"] = json.loads(out.read_text())
        if "diloco" in args.arms:
            slower = results[f"{mbit:g}"]["diloco"]["ms"] / results["unlimited"]["diloco"]["ms"]
            print(f"diloco against its own speed without a limit: {slower:.3f} times the time per step", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
