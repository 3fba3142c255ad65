"""Loss, bytes, step time and time to a loss: DDP, DDP with fp16 gradients, and compressed gradients, side by side.

``python -m benchmarks.end_to_end`` has two parts, since a slow link changes when a step ends and not what it computes:

1. *What is learnt.* Two processes train the same model with every arm in turn, from the same weights on the same data, and
   measure the validation loss as they go. The learning rate is the one of ``--lr`` with which DDP ends best; all arms use
   it. With several ``--seeds`` losses are means over them.
2. *How long a step takes.* The same arms take a few steps without a limit and, with ``--link-tool PROGRAM`` (one that takes
   ``-n N --mbit R -- COMMAND`` and starts each rank behind a link of that speed), behind each link of ``--links``. There the
   bytes that the network interface has sent are compared with those that the arm says it sent.

The time to a loss is the number of steps of part 1 (interpolated) times the time of part 2. The loss is the one that DDP
has after three quarters of its steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

import lightning_dopt as dopt
from benchmarks.step_time import Timer
from lightning_dopt.compress import FP8, QSGD, BlockTopK, DCTTopK, TernGrad
from recipes.llm import ByteGPT, TextFolder
from recipes.vision import ImageData, TimmClassifier

POINTS = 12
SETTLE, TIMED = 3, 5
ROUNDS = {"DiLoCo int8": 25}
"""Arms that do not send in every step: steps per round, which are timed as a whole."""


class FP16DDP(L.pytorch.strategies.DDPStrategy):
    """DDP with torch's fp16 hook, which Lightning registers on GPUs only."""

    def configure_ddp(self) -> None:
        super().configure_ddp()
        self.model.register_comm_hook(None, fp16_compress_hook)  # type: ignore[union-attr, operator]


def codecs() -> dict[str, dopt.compress.Codec]:
    ef = dopt.ErrorFeedback
    return {
        "fp32": dopt.Identity(),
        "fp8": ef(FP8()),
        "int8": ef(dopt.Int8()),
        "int4": ef(dopt.Int4()),
        "qsgd": QSGD(),
        "terngrad": TernGrad(clip=2.5),
        "sign": ef(dopt.Sign()),
        "top 1 %": ef(dopt.TopK(0.01)),
        "block top 1 %": ef(BlockTopK(0.01)),
        "EF21 top 5 %": dopt.EF21(dopt.TopK(0.05)),
        "DCT top 1 %": ef(DCTTopK(0.01)),
        "rand 5 %": ef(dopt.RandK(0.05)),
        "PowerSGD 4": ef(dopt.LowRank(4)),
    }


def strategy(arm: str) -> Any:
    if arm == "DDP":
        return L.pytorch.strategies.DDPStrategy()
    if arm == "DDP fp16":
        return FP16DDP()
    if arm == "DiLoCo int8":
        return dopt.DiLoCoStrategy(sync_every=ROUNDS[arm], codec=dopt.ErrorFeedback(dopt.Int8()))
    return dopt.ReplicaStrategy(dopt.Sync(what="gradients", codec=codecs()[arm]))


def arms() -> list[str]:
    return ["DDP", "DDP fp16", *codecs(), "DiLoCo int8"]


def task(args: argparse.Namespace, lr: float, steps: int) -> tuple[Any, Any]:
    if args.task == "text":
        model: Any = ByteGPT(n_layer=4, n_head=4, n_embd=args.width, context=64, lr=lr, warmup_steps=steps // 10)
        return model, TextFolder(path=args.data, context=64, batch_size=8, max_bytes=4_000_000, val_fraction=0.006)
    images = ImageData(dataset="cifar10", root=args.data, batch_size=32, image_size=32)
    return TimmClassifier(in_chans=3, lr=lr, weight_decay=0.05), images


class CountingTimer(Timer):
    """Also the bytes that a network interface has sent."""

    def __init__(self, interface: str | None) -> None:
        super().__init__()
        self.interface = interface
        self.counts: list[int] = []

    def on_train_batch_start(self, *_: Any) -> None:
        super().on_train_batch_start()
        self.counts.append(self._sent())

    def on_train_batch_end(self, *_: Any) -> None:
        super().on_train_batch_end()
        self.last = self._sent()

    def _sent(self) -> int:
        if self.interface is None:
            return 0
        line = next(x for x in Path("/proc/net/dev").read_text().splitlines() if x.strip().startswith(self.interface))
        return int(line.split(":")[1].split()[8])

    @property
    def sent(self) -> list[int]:
        """Bytes by step."""
        return [b - a for a, b in pairwise([*self.counts, self.last])]


class Losses(L.Callback):
    """Validation loss by step."""

    def __init__(self) -> None:
        self.found: list[tuple[int, float]] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.found.append((trainer.global_step, float(trainer.callback_metrics["val/loss"])))


def fit(arm: str, args: argparse.Namespace, lr: float, seed: int, steps: int, measure: bool) -> dict[str, Any]:
    """One training; bytes are those of this rank."""
    L.seed_everything(seed, verbose=False)
    world, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    model, data = task(args, lr, args.steps)
    timer, losses, s = CountingTimer(os.environ.get("SLOWNET_IF")), Losses(), strategy(arm)
    validation = {"val_check_interval": steps // POINTS, "check_val_every_n_epoch": None} if measure else {}
    trainer = L.Trainer(
        accelerator="cpu", devices=local, num_nodes=world // local, strategy=s, max_steps=steps, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        limit_val_batches=None if measure else 0, callbacks=[timer, losses], **validation,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    os.environ.update(WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(local))
    if arm.startswith("DDP"):
        size = sum(p.numel() for p in model.parameters() if p.requires_grad) * (2 if arm == "DDP fp16" else 4)
        claimed = 2 * (world - 1) * size // world
    else:
        claimed = s.world.ledger.bytes // steps
    result = {"losses": losses.found, "bytes": claimed}
    if not measure:
        middle = statistics.mean if arm in ROUNDS else statistics.median
        result["seconds"] = middle(timer.steps[SETTLE:])
        result["counted"] = statistics.mean(timer.sent[SETTLE:])
    return result


def worker(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    environment = {k: os.environ[k] for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}

    def run(*arguments: Any) -> dict[str, Any]:
        os.environ.update(environment)  # Lightning removes these after a fit
        found = fit(*arguments)
        if environment["RANK"] == "0":
            tail = found["losses"][-1][1] if found["losses"] else found["seconds"]
            print(f"  {arguments[0]:<14} lr {arguments[2]:<8g} seed {arguments[3]}: {tail:.4f}", flush=True)
        return found

    results: dict[str, Any] = {}
    if args.part == "time":
        for arm in args.arms:
            results[arm] = run(arm, args, args.lr[0], 0, SETTLE + ROUNDS.get(arm, TIMED), False)
    else:
        ends = {lr: run("DDP", args, lr, 0, args.steps, True)["losses"][-1][1] for lr in args.lr}
        lr = min(ends, key=lambda lr: ends[lr])
        for arm in args.arms:
            runs = [run(arm, args, lr, seed, args.steps, True) for seed in range(args.seeds)]
            results[arm] = {"lr": lr, "bytes": runs[0]["bytes"], "losses": _mean([r["losses"] for r in runs])}
    if environment["RANK"] == "0":
        Path(args.json).write_text(json.dumps(results))


def _mean(runs: list[list[tuple[int, float]]]) -> list[tuple[int, float]]:
    return [(points[0][0], statistics.mean(loss for _, loss in points)) for points in zip(*runs, strict=True)]


def steps_to(losses: list[tuple[int, float]], goal: float) -> float | None:
    """Steps after which the loss is first at most ``goal``, between two measurements on a straight line."""
    for (a, high), (b, low) in pairwise(losses):
        if high > goal >= low:
            return a + (b - a) * (high - goal) / (high - low)
    return float(losses[0][0]) if losses[0][1] <= goal else None


def report(learnt: dict[str, Any], times: dict[str, dict[str, Any]]) -> str:
    """One line per arm."""
    reference = learnt["DDP"]["losses"]
    goal = reference[3 * len(reference) // 4 - 1][1]
    head = f"{'arm':<15}{'val loss':>9}{'bytes/step':>12}"
    for link in times:
        head += f" | {link + ': ms':>16}{'to ' + format(goal, '.3f'):>10}{'counted':>9}"
    lines = [f"lr {learnt['DDP']['lr']:g}, {reference[-1][0]} steps", head]
    for arm, found in learnt.items():
        line = f"{arm:<15}{found['losses'][-1][1]:>9.3f}{found['bytes']:>12,}"
        steps = steps_to(found["losses"], goal)
        for measured in times.values():
            seconds, counted = measured[arm]["seconds"], measured[arm]["counted"]
            reached = f"{steps * seconds:.0f} s" if steps is not None else "never"
            ratio = f"{counted / found['bytes']:.3f}" if counted and found["bytes"] else ""
            line += f" | {1e3 * seconds:>16.0f}{reached:>10}{ratio:>9}"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--task", choices=("text", "pictures"), default="text", help="byte GPT, or tiny ConvNeXt on CIFAR-10"
    )
    p.add_argument("--data", default=None, help="folder of texts (default: the standard library), or with CIFAR-10")
    p.add_argument("--arms", nargs="+", default=arms(), choices=arms())
    p.add_argument("--steps", type=int, default=300)
    p.add_argument("--seeds", type=int, default=1)
    p.add_argument("--lr", nargs="+", type=float, default=[1e-3, 2e-3, 4e-3])
    p.add_argument("--width", type=int, default=144, help="of the GPT: 144 are 1.03 million parameters")
    p.add_argument("--link-tool", default="")
    p.add_argument("--links", nargs="*", type=float, default=[100.0, 20.0], help="Mbit/s")
    p.add_argument("--json", default="")
    p.add_argument("--part", choices=("learn", "time"), help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.part:
        worker(args)
    elif "DDP" not in args.arms:
        p.error("--arms must contain DDP")
    elif args.steps % POINTS:
        p.error(f"--steps must be a multiple of {POINTS}")
    elif args.task == "pictures" and args.data is None:
        p.error("--task pictures needs --data, a folder with CIFAR-10")
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    """Both parts, and the table."""
    options = [f"--task={args.task}", f"--steps={args.steps}", f"--seeds={args.seeds}", f"--width={args.width}"]
    options += ([f"--data={args.data}"] if args.data else []) + ["--arms", *args.arms]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    with tempfile.TemporaryDirectory() as folder:

        def part(title: str, start: list[str], more: list[str]) -> dict[str, Any]:
            print(title, flush=True)
            out = Path(folder, "part.json")
            module = ["-m", "benchmarks.end_to_end", *options, *more, f"--json={out}"]
            subprocess.run([sys.executable, *start, *module], env=env, check=True)
            found: dict[str, Any] = json.loads(out.read_text())
            return found

        learnt = part("learning", torchrun, ["--part=learn", "--lr", *map(str, args.lr)])
        rate = [f"--lr={learnt['DDP']['lr']}", "--part=time"]
        times = {"no limit": part("no limit", torchrun, rate)}
        for mbit in args.links if args.link_tool else []:
            link = [args.link_tool, "-n", "2", "--mbit", f"{mbit:g}", "--show", "first", "--timeout", "1800", "--"]
            times[f"{mbit:g} Mbit/s"] = part(f"{mbit:g} Mbit/s", [*link, sys.executable], rate)
    print(report(learnt, times))
    if args.json:
        Path(args.json).write_text(json.dumps({"learnt": learnt, "times": times}, indent=1))


if __name__ == "__main__":
    main()
