"""Pipelines behind slow links: samples per second, bytes and loss against time, with and without a link that compresses.

``python -m benchmarks.pipeline_links --link-tool PROGRAM`` trains the byte GPT in ``--stages`` stages, one per process, and
sends activations and their gradients in these ways:

* ``none``: as they are;
* ``direct``: through ``--codec``;
* ``AQ-SGD``: activations as changes since the same sample was last seen, which is dense in the first epoch; gradients
  through ``--codec``, as its authors' code does;
* ``FC``, ``FU``: Clapping, changes since the last step, on batches that are repeated with probability ``1 - p``; FU sends
  new batches as they are.

It has two parts, as a link changes when a step ends and not what it computes:

1. *What is learnt.* Every arm trains on ``--windows`` windows, from the same weights, and measures the validation loss as it
   goes. Lazy sampling is part of what FC and FU pay: ``lazy`` repeats batches as they do, and sends everything as it is.
2. *How long a step takes*, without a limit and behind each link of ``--links`` (Mbit/s). The timed steps are those of a few
   batches seen again and again, after the first epoch of AQ-SGD; its first epoch takes the time of ``none``.

``PROGRAM`` takes ``-n N --mbit R --ms L -- COMMAND`` and starts each rank behind a link of that speed. ``--plot FILE`` draws
losses against time.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import lightning_dopt as dopt
from benchmarks import two_parts
from benchmarks.end_to_end import CountingTimer, Losses
from lightning_dopt.compress import BlockTopK, Int4
from lightning_dopt.pipeline import AQSGD, Clapping, Direct, Link
from recipes.llm import ByteGPT, TextFolder

POINTS = 10
ARMS = ("none", "lazy", "direct", "AQ-SGD", "FC", "FU")
CODECS = {"int4": Int4(), "top10": BlockTopK(0.1)}


def link(arm: str, args: argparse.Namespace) -> Link | None:
    """What is put on the boundaries: on activations and, but for AQ-SGD, on their gradients."""
    codec, p = CODECS[args.codec], args.probability
    made = {
        "none": None,
        "lazy": Clapping("FC", p, dopt.Identity()),
        "direct": Direct(codec),
        "AQ-SGD": AQSGD(codec),
        "FC": Clapping("FC", p, codec),
        "FU": Clapping("FU", p, codec),
    }
    return made[arm]


class Numbered(Dataset[tuple[Tensor, int]]):
    """Windows with their numbers, which AQ-SGD's memory goes by."""

    def __init__(self, windows: Tensor) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.windows[index], index


class NumberedGPT(ByteGPT):
    """The byte GPT on numbered windows."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch[0], batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().validation_step(batch[0], batch_idx)


def loaders(args: argparse.Namespace, count: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Batches for training, of ``count`` windows, and for validation."""
    text = TextFolder(path=args.data, context=args.context, max_bytes=4_000_000, val_fraction=0.01)
    text.setup("fit")
    assert text._train is not None
    assert text._val is not None
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(text._train), generator=generator)[:count]
    train = Numbered(text._train.__getitems__(chosen.tolist()).long())
    val = Numbered(text._val.__getitems__(list(range(256))).long())
    return DataLoader(train, args.batch, shuffle=True, drop_last=True), DataLoader(val, 64)


def fit(arm: str, args: argparse.Namespace, seed: int, measure: bool) -> dict[str, Any]:
    """One training under Lightning; steps of lazy sampling are steps, too."""
    L.seed_everything(seed, verbose=False)
    world, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    timer, losses, way = CountingTimer(os.environ.get("SLOWNET_IF")), Losses(), link(arm, args)
    heads = max(1, args.width // 36)
    model = NumberedGPT(args.layers, heads, args.width, args.context, lr=args.lr, warmup_steps=args.steps // 10)
    strategy = dopt.PipelineStrategy(
        num_microbatches=args.microbatches, activation_link=way, network="",
        gradient_link=Direct(CODECS[args.codec]) if isinstance(way, AQSGD) else way,
        samples=1 if isinstance(way, AQSGD) else None, seed=seed,
    )  # fmt: skip
    steps = args.steps if measure else 4 + args.timed
    validation = {"val_check_interval": steps // POINTS, "check_val_every_n_epoch": None} if measure else {}
    trainer = L.Trainer(
        accelerator="cpu", devices=local, num_nodes=world // local, strategy=strategy, max_steps=steps, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        limit_val_batches=None if measure else 0, callbacks=[timer, losses], **validation,
    )  # fmt: skip
    trainer.fit(model, *loaders(args, args.windows if measure else 2 * args.batch))
    if measure:
        return {"losses": losses.found}
    return {
        "seconds": statistics.mean(timer.steps[-args.timed :]),
        "counted": statistics.mean(timer.sent[-args.timed :]),
    }


def worker(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    environment = {k: os.environ[k] for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    results: dict[str, Any] = {}
    for arm in args.arms:
        runs = []
        for seed in range(args.seeds if args.part == "learn" else 1):
            os.environ.update(environment)  # Lightning removes these after a fit
            runs.append(fit(arm, args, seed, args.part == "learn"))
        if args.part == "learn":
            points = zip(*(r["losses"] for r in runs), strict=True)
            mean = [(point[0][0], statistics.mean(loss for _, loss in point)) for point in points]
            results[arm] = {"losses": mean, "ends": [r["losses"][-1][1] for r in runs]}
            said = ", ".join(f"{end:.4f}" for end in results[arm]["ends"])
        else:
            results[arm] = runs[0]
            said = f"{1e3 * runs[0]['seconds']:.0f} ms per step"
        if environment["RANK"] == "0":
            print(f"  {arm:<10}{said}", flush=True)
    if environment["RANK"] == "0":
        Path(args.json).write_text(json.dumps(results))


def seconds_at(arm: str, step: int, timed: dict[str, dict[str, Any]], args: argparse.Namespace) -> float:
    """When a step ends."""
    first = min(step, args.windows // args.batch) if arm == "AQ-SGD" else 0
    return float(first * timed["none"]["seconds"] + (step - first) * timed[arm]["seconds"])


def report(learnt: dict[str, Any], times: dict[str, dict[str, Any]], args: argparse.Namespace) -> str:
    """One line per arm."""
    head = f"{'arm':<10}{'val loss':>9}{'spread':>8}"
    for title in times:
        head += f" | {title + ': ms':>16}{'samples/s':>11}{'bytes/step':>12}"
    lines = [head]
    for arm in args.arms:
        ends = learnt.get(arm, {}).get("ends")
        line = f"{arm:<10}" + (f"{statistics.mean(ends):>9.3f}{max(ends) - min(ends):>8.3f}" if ends else " " * 17)
        for timed in times.values():
            if arm in timed:
                seconds, sent = timed[arm]["seconds"], timed[arm]["counted"]
                line += f" | {1e3 * seconds:>16.0f}{args.batch / seconds:>11.1f}{f'{sent:,.0f}' if sent else '-':>12}"
        lines.append(line)
    return "\n".join(lines)


def compare(args: argparse.Namespace) -> None:
    """Both parts, the table and the picture."""
    names = ["stages", "microbatches", "codec", "probability", "steps", "seeds", "timed", "windows", "batch", "context"]
    options = [f"--{name}={getattr(args, name)}" for name in [*names, "lr", "layers", "width"]]

    def curve(arm: str, found: two_parts.Results, timed: two_parts.Results) -> list[float] | None:
        return [seconds_at(arm, step, timed, args) for step, _ in found["losses"]] if arm != "lazy" else None

    learning = [[arm] for arm in args.arms]
    table = partial(report, args=args)
    two_parts.compare(args, "benchmarks.pipeline_links", args.stages, options, learning, table, curve)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--stages", type=int, default=2)
    p.add_argument("--microbatches", type=int, default=4)
    p.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    p.add_argument("--codec", default="int4", choices=list(CODECS))
    p.add_argument("--probability", type=float, default=0.5, help="of a new batch, FC and FU")
    p.add_argument("--steps", type=int, default=600)
    p.add_argument("--seeds", type=int, default=2)
    p.add_argument("--timed", type=int, default=12, help="steps that are timed")
    p.add_argument("--windows", type=int, default=2048, help="of the training data")
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--context", type=int, default=64)
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--width", type=int, default=144, help="144 with 4 layers: 1.03 million parameters")
    two_parts.add_options(p)
    args = p.parse_args()
    if args.part:
        worker(args)
    elif args.only != "learn" and "none" not in args.arms:
        p.error("--arms must contain none")
    elif args.steps % POINTS:
        p.error(f"--steps {args.steps}: must be a multiple of {POINTS}")
    else:
        compare(args)


if __name__ == "__main__":
    main()
