"""Where the time goes behind a slow link, drawn: steps, waiting and what the link carries, of rank 0, for several plans.

``python -m benchmarks.timeline --link-tool PROGRAM --out FILE.png`` trains the byte GPT on ``--workers`` processes behind links of
``--mbit`` Mbit/s and draws a stretch of two rounds from the middle of a real run. Steps are Lightning's batches, waiting is
what the ledger counts, and the link's load is the interface's counter, read every few milliseconds.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812
import torch
from torch.utils.data import DataLoader

import lightning_dopt as dopt
from lightning_dopt import plans
from recipes.llm.model import ByteGPT

PAUSE = 0.004
"""Seconds between two readings of the interface."""


def plans_of(args: argparse.Namespace) -> dict[str, dopt.Plan]:
    every = args.sync_every
    streaming = plans.streaming_diloco(
        every, 2, every - 1, outer_lr=0.4, pattern="balanced", transport="two_phase" if args.workers > 2 else "auto"
    )
    return {"DiLoCo": plans.diloco(every), "Streaming DiLoCo, 4 bits": streaming}


class Recorder(L.Callback):
    """Steps, waits and bytes sent, with their times."""

    def __init__(self, interface: str) -> None:
        self.interface = interface
        self.steps: list[tuple[float, float]] = []
        self.waits: list[tuple[float, float]] = []
        self.sent: list[tuple[float, int]] = []
        self._running = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        ledger = trainer.strategy.world.ledger  # type: ignore[attr-defined]
        count = ledger.stalled

        def stalled(label: str, seconds: float) -> None:
            now = time.perf_counter()
            self.waits.append((now - seconds, now))
            count(label, seconds)

        ledger.stalled = stalled
        threading.Thread(target=self._read, daemon=True).start()

    def on_train_batch_start(self, *_: Any) -> None:
        self._began = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps.append((self._began, time.perf_counter()))

    def on_train_end(self, *_: Any) -> None:
        self._running = False

    def _read(self) -> None:
        while self._running:
            text = Path("/proc/net/dev").read_text()
            line = next(x for x in text.splitlines() if x.strip().startswith(self.interface))
            self.sent.append((time.perf_counter(), int(line.split(":")[1].split()[8])))
            time.sleep(PAUSE)


def worker(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    environment = {k: os.environ[k] for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    found = {}
    for name, plan in plans_of(args).items():
        os.environ.update(environment)
        L.seed_everything(0, verbose=False)
        model = ByteGPT(n_layer=4, n_head=4, n_embd=144, context=64)
        steps = 5 * args.sync_every
        data: Any = torch.randint(0, 256, (8 * (steps + 2) * args.workers, 65), dtype=torch.uint8)
        recorder = Recorder(os.environ.get("SLOWNET_IF", "lo"))
        trainer = L.Trainer(
            accelerator="cpu", devices=1, num_nodes=args.workers, strategy=dopt.ReplicaStrategy(plan=plan), max_steps=steps,
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[recorder],
        )  # fmt: skip
        trainer.fit(model, DataLoader(data, batch_size=8))
        found[name] = {"steps": recorder.steps, "waits": recorder.waits, "sent": recorder.sent}
    if environment["RANK"] == "0":
        Path(args.json).write_text(json.dumps(found))


def draw(found: dict[str, Any], args: argparse.Namespace, path: str) -> None:
    """One panel per plan: a bar of steps, a bar of waiting, and the load of the link below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(len(found), 1, figsize=(11, 2.4 * len(found)), sharex=True, squeeze=False)
    for panel, (name, trace) in zip(panels[:, 0], found.items(), strict=True):
        first, last = 2 * args.sync_every, 4 * args.sync_every
        start, end = trace["steps"][first][0], trace["steps"][last - 1][1]
        waits = [(a, b - a) for a, b in trace["waits"] if b > start and a < end and b - a > 5e-4]
        waiting = sum(d for _, d in waits)
        panel.broken_barh(
            [(a - start, b - a) for a, b in trace["steps"][first:last]], (1.1, 0.8), color="#4c78a8", ec="white"
        )
        panel.broken_barh([(a - start, d) for a, d in waits], (1.1, 0.8), color="#e45756")
        readings = [(t - start, n) for t, n in trace["sent"] if start <= t <= end][:: max(1, int(0.02 / PAUSE))]
        times = [t for (t, _), _ in pairwise(readings)]
        load = [8e-6 * (m - n) / (t - s) / args.mbit for (s, n), (t, m) in pairwise(readings)]
        panel.fill_between(times, [min(1.0, x) for x in load], step="post", color="#54a24b")
        panel.set(yticks=[0.5, 1.5], yticklabels=["link", "rank 0"], ylim=(0, 2.1), xlim=(0, None))
        per_step = 1e3 * (end - start) / (last - first)
        panel.set_title(
            f"{name}: {per_step:.0f} ms per step, {100 * waiting / (end - start):.0f} % waiting",
            loc="left",
            fontsize=10,
        )
    panels[-1, 0].set_xlabel(
        f"seconds; {args.workers} workers, {args.mbit:g} Mbit/s, {args.sync_every} steps per round; red: waiting"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--link-tool", required=True)
    p.add_argument("--workers", type=int, default=4)
    p.add_argument("--mbit", type=float, default=20.0)
    p.add_argument("--sync-every", type=int, default=8)
    p.add_argument("--out", default="timeline.png")
    p.add_argument("--json", default="", help="also write what was recorded")
    p.add_argument("--part", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.part:
        worker(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        out = args.json or str(Path(folder, "trace.json"))
        tool = [
            args.link_tool,
            "-n",
            str(args.workers),
            "--mbit",
            f"{args.mbit:g}",
            "--show",
            "first",
            "--timeout",
            "600",
            "--",
        ]
        module = [
            "-m",
            "benchmarks.timeline",
            "--part",
            f"--json={out}",
            f"--workers={args.workers}",
            f"--mbit={args.mbit}",
        ]
        module += [f"--sync-every={args.sync_every}", f"--link-tool={args.link_tool}"]
        env = dict(os.environ, OMP_NUM_THREADS="1")
        subprocess.run([sys.executable, *tool, sys.executable, *module], env=env, check=True)
        draw(json.loads(Path(out).read_text()), args, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
