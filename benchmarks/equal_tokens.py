"""What local updates lose at equal tokens: held-out loss of DDP, DiLoCo and streaming DiLoCo in four bits, by length of training.

``python -m benchmarks.equal_tokens`` trains a byte-level transformer on the Python standard library with simulated workers, which
compute what processes do, once for each arm and seed, and prints the loss of the mean model. Inner optimizer AdamW, warm-up and
cosine decay; DDP and DiLoCo have the inner learning rate of 3e-3 and 6e-3 that was better over 2000 steps, streaming has DiLoCo's.
``--plot FILE`` draws losses by step, ``--json FILE`` keeps them. Deterministic on one machine; one arm of 6000 steps takes about
seven minutes on a core.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.budgets import Text, loss
from lightning_dopt import ErrorFeedback, Plan, Simulation, Sync, plans
from lightning_dopt.compress import E3M0
from recipes.llm.model import ByteGPT, warmup_cosine

PIECES = 10
"""How often the loss is measured."""


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Args:
        plan: What workers exchange, by steps per round.
        lr: Inner learning rate at its peak.
    """

    plan: Callable[[int], Plan]
    lr: float


ARMS = {
    "DDP": Arm(lambda every: Plan([Sync(what="gradients")]), 3e-3),
    "DiLoCo": Arm(lambda every: plans.diloco(every, 0.5, 0.5), 6e-3),
    "Streaming E3M0": Arm(
        lambda every: plans.streaming_diloco(
            every, 2, 3, 0.5, 0.5, 0.5, "balanced", codec=ErrorFeedback(E3M0()), transport="two_phase"
        ),
        6e-3,
    ),
}


def train(arm: Arm, args: argparse.Namespace, seed: int) -> list[float]:
    """Held-out losses of the mean model after each tenth of the steps."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    lr = args.lr or arm.lr
    model = ByteGPT(n_layer=args.layers, n_head=4, n_embd=args.width, context=64)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    text, optimizers = Text(), list[Optimizer]()
    held_out = text.held_out()

    def backward(rank: int, mine: dict[str, Tensor], step: int) -> None:
        batch = text.batch(rank + args.workers * 2 * seed, step)
        gradients = torch.autograd.grad(loss(model, mine, batch), list(mine.values()))
        for p, g in zip(mine.values(), gradients, strict=True):
            p.grad = g

    def adamw(parameters: Iterable[Tensor]) -> Optimizer:
        own = list(parameters)
        groups = [
            {"params": [p for p in own if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in own if p.dim() < 2], "weight_decay": 0.0},
        ]
        optimizers.append(torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95)))
        return optimizers[-1]

    run = Simulation(
        arm.plan(args.sync_every), args.workers, lambda rank: {k: t.clone() for k, t in start.items()}, backward, adamw
    )
    losses = []
    for step in range(args.steps):
        for group in (g for optimizer in optimizers for g in optimizer.param_groups):
            group["lr"] = lr * warmup_cosine(step, args.steps // 10, args.steps)
        run.run(1)
        if (step + 1) % (args.steps // PIECES) == 0:
            with torch.no_grad():
                losses.append(float(loss(model, {k: run.stacked(k).mean(0) for k in start}, held_out)))
    return losses


def _job(name: str, args: argparse.Namespace, seed: int) -> list[float]:
    return train(ARMS[name], args, seed)


def plot(found: dict[str, list[list[float]]], steps: int, path: str) -> None:
    """Mean loss by step, from the second measurement on."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(7, 4.2))
    places = [steps // PIECES * (k + 1) for k in range(PIECES)]
    for name, curves in found.items():
        panel.plot(places[1:], [statistics.mean(values) for values in zip(*curves, strict=True)][1:], "o-", label=name)
    panel.set(xlabel="steps, as many tokens for all", ylabel="held-out loss (nats per byte)")
    panel.grid(alpha=0.3)
    panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--sync-every", type=int, default=8, help="steps per round")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=96, help="96 with 2 layers: 0.25 million parameters")
    parser.add_argument(
        "--lr", type=float, default=0.0, help="inner learning rate of all arms instead of each one's own"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1, help="trainings at a time")
    parser.add_argument("--json", default="", metavar="FILE")
    parser.add_argument("--plot", default="", metavar="FILE")
    args = parser.parse_args()
    if args.steps < PIECES or args.steps % PIECES:
        parser.error(f"--steps {args.steps}: must be a multiple of {PIECES}")
    for option in ("sync_every", "workers", "layers", "width", "seeds", "processes"):
        if getattr(args, option) < 1:
            parser.error(f"--{option.replace('_', '-')} {getattr(args, option)}: must be at least 1")
    found: dict[str, list[list[float]]] = {name: [] for name in args.arms}
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
        jobs = [(name, pool.submit(_job, name, args, seed)) for seed in range(args.seeds) for name in args.arms]
        for name, job in jobs:
            found[name].append(job.result())
            print(f"{name}, seed {len(found[name]) - 1}: {found[name][-1][-1]:.4f}", flush=True)
    base = [curve[-1] for curve in found.get("DDP", [])]
    print(f"\n{'arm':<16}{'losses':<32}{'mean':>8}{'more than DDP':>16}")
    for name, curves in found.items():
        ends = [curve[-1] for curve in curves]
        more = f"{100 * (statistics.mean(ends) / statistics.mean(base) - 1):+.2f} %" if base and name != "DDP" else ""
        print(f"{name:<16}{' '.join(f'{x:.4f}' for x in ends):<32}{statistics.mean(ends):>8.4f}{more:>16}")
    if args.json:
        Path(args.json).write_text(json.dumps({"options": vars(args), "losses": found}, indent=1))
    if args.plot:
        plot(found, args.steps, args.plot)


if __name__ == "__main__":
    main()
