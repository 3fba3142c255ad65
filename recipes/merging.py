"""``python -m recipes.merging``: a single merging suffices, in small.

Sixteen workers hold digits of few classes each (Dirichlet, alpha 0.1) and train for 1,500 steps. How well can their
models be averaged, and when is communication best spent? Five schedules: none at all; rare random pairs (every 20 steps
each worker meets one other with probability 0.2); the same with a window of averages in every step early or late; and an
average after every step. All of them end with one global average. Two curves are drawn of each: the accuracy that
workers have on their own, and the one that their average *would* have at that moment.

It runs on the engine that trains models, all workers in one process, three seeds side by side.

Measured on a machine of 2 cores that others used as well (load 7), 155 s (one run; means over three seeds, lowest and
highest of the merged models)::

    schedule             local  merged   lowest  highest   sent per worker
    no communication     0.334   0.400    0.318    0.546           0.04 MB
    sparse pairs         0.562   0.884    0.869    0.908           0.48 MB
    early window         0.669   0.917    0.894    0.936           3.18 MB
    late window          0.721   0.931    0.922    0.944           3.18 MB
    every step           0.961   0.961    0.958    0.964          54.11 MB

Source: "A single merging suffices", arXiv 2507.06542, which does this with ResNets on TinyImageNet.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from lightning_dopt import Plan, Simulation, Sync, plans
from lightning_dopt.data.partition import dirichlet
from lightning_dopt.simulate import Replica
from recipes.options import Options
from recipes.vision.files import digits

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("runs") / "merging"
HIDDEN, CLASSES = 64, 10
COLORS = ("#9a9a9a", "#1b6ca8", "#f2b134", "#c1442e", "#2e8b57")


def schedules(steps: int, opportunity: int = 20, p: float = 0.2) -> dict[str, Plan]:
    """The five plans. Windows of a twentieth of training begin after a tenth and after nine tenths of it."""

    def window(begin: int) -> Plan:
        return plans.single_merge(opportunity, p, dense_from=begin, dense_steps=max(1, steps // 20))

    return {
        "no communication": plans.lo_fi(),
        "sparse pairs": plans.single_merge(opportunity, p),
        "early window": window(steps // 10),
        "late window": window(steps * 9 // 10),
        "every step": Plan([Sync(signal="value")]),
    }


class Digits:
    """The digits of ``workers`` workers and a perceptron 64-64-10, for several seeds at once.

    Seeds are a leading dimension of all tensors: each has its own partition, its own start and its own batches.

    Args:
        workers: number of workers.
        alpha: concentration of the Dirichlet partition; 0.1 is severe.
        seeds: independent experiments.
        batch: samples per worker and step, drawn with replacement.
    """

    def __init__(self, workers: int = 16, alpha: float = 0.1, seeds: int = 3, batch: int = 32) -> None:
        train, test = digits()
        self.workers, self.seeds, self.batch = workers, seeds, batch
        self.x, self.y = train.pictures.flatten(1) / 255, train.labels
        self.test_x, self.test_y = test.pictures.flatten(1) / 255, test.labels
        self.parts = [dirichlet(train.labels, workers, alpha, seed) for seed in range(seeds)]
        self._draws = [torch.Generator().manual_seed(rank) for rank in range(workers)]
        self._start = self._perceptrons()

    def start(self, rank: int) -> Replica:
        """The same parameters for every rank, shapes (seeds, in, out) and (seeds, 1, out)."""
        return self._start

    def _perceptrons(self) -> Replica:
        g, width = torch.Generator().manual_seed(0), self.x.shape[1]

        def matrix(rows: int, columns: int) -> Tensor:
            return (torch.rand(self.seeds, rows, columns, generator=g) * 2 - 1) / rows**0.5

        zeros = {"a": torch.zeros(self.seeds, 1, HIDDEN), "b": torch.zeros(self.seeds, 1, CLASSES)}
        return {"A": matrix(width, HIDDEN), "B": matrix(HIDDEN, CLASSES), **zeros}

    def logits(self, p: Replica, x: Tensor) -> Tensor:
        """From (seeds, samples, 64), or (samples, 64) for all seeds, to (seeds, samples, 10)."""
        return (x @ p["A"] + p["a"]).relu() @ p["B"] + p["b"]

    def backward(self, rank: int, parameters: Replica, step: int) -> None:
        """Gradients of the mean loss on a fresh batch of that rank's digits, for every seed."""
        g = self._draws[rank]
        chosen = torch.stack(
            [part[rank][torch.randint(len(part[rank]), (self.batch,), generator=g)] for part in self.parts]
        )
        logits = self.logits(parameters, self.x[chosen])
        loss = functional.cross_entropy(logits.flatten(0, 1), self.y[chosen].flatten(), reduction="sum") / self.batch
        loss.backward()  # type: ignore[no-untyped-call]

    def accuracy(self, p: Replica) -> Tensor:
        """Share of right answers on the test digits, shape (seeds,)."""
        return (self.logits(p, self.test_x).argmax(-1) == self.test_y).double().mean(-1)

    def simulation(self, plan: Plan, lr: float = 0.1) -> Simulation:
        """All workers at the start of a plan, with plain SGD; every simulation sees the same batches."""
        for rank, generator in enumerate(self._draws):
            generator.manual_seed(rank)
        return Simulation(
            plan, self.workers, self.start, self.backward, lambda parameters: torch.optim.SGD(parameters, lr)
        )


@dataclass
class Curve:
    """What became of one schedule; accuracies have shape (seeds,)."""

    name: str
    steps: list[int] = field(default_factory=list)
    local: list[Tensor] = field(default_factory=list)
    """Mean accuracy of the workers' own models, by point."""
    merged: list[Tensor] = field(default_factory=list)
    """Accuracy of the average of all models, which nobody has while training goes on."""
    bytes: int = 0
    """Sent by the busiest worker in all, by one of its seeds."""


def average(replicas: list[Replica]) -> Replica:
    """The mean of every parameter."""
    return {name: torch.stack([replica[name] for replica in replicas]).mean(0) for name in replicas[0]}


def train(
    name: str, plan: Plan, data: Digits, steps: int, every: int, tell: Callable[[str], None] = lambda _: None
) -> Curve:
    """Train with one schedule and measure every ``every`` steps, before the final average.

    Raises:
        AssertionError: the final average is not what was measured as merged.
    """
    curve, simulation = Curve(name), data.simulation(plan)
    for done in range(0, steps + 1, every):
        simulation.run(min(every, steps) if done else 0)
        with torch.no_grad():
            curve.steps.append(done)
            curve.local.append(torch.stack([data.accuracy(r) for r in simulation.replicas]).mean(0))
            curve.merged.append(data.accuracy(average(simulation.replicas)))
        tell(f"{name}: {done}/{steps}")
    simulation.finish()
    with torch.no_grad():
        kept = torch.stack([data.accuracy(r) for r in simulation.replicas])
    assert torch.allclose(kept, curve.merged[-1].expand_as(kept), atol=0.005)
    curve.bytes = max(simulation.bytes) // data.seeds
    return curve


def table(curves: list[Curve]) -> str:
    """Accuracies before and after the final average: mean over seeds, and the lowest and highest of them."""
    lines = [f"{'schedule':<18}{'local':>8}{'merged':>8}{'lowest':>9}{'highest':>9}{'sent per worker':>18}"]
    for c in curves:
        local, merged = c.local[-1], c.merged[-1]
        lines.append(
            f"{c.name:<18}{local.mean():>8.3f}{merged.mean():>8.3f}{merged.min():>9.3f}{merged.max():>9.3f}"
            f"{c.bytes / 1e6:>15.2f} MB"
        )
    return "\n".join(lines)


def plot(curves: list[Curve], path: Path) -> Path:
    """Both curves of every schedule over training, means over seeds.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, title, which in zip(
        panels, ("workers on their own (mean)", "their average, if it were formed"), ("local", "merged"), strict=True
    ):
        for curve, color in zip(curves, COLORS, strict=True):
            heights = torch.stack(getattr(curve, which)).mean(1)
            axes.plot(curve.steps, heights, color=color, label=curve.name)
        axes.set_title(title)
        axes.set_xlabel("steps")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy")
    panels[1].legend()
    figure.savefig(path, dpi=150)
    return path


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options; a bad value ends here in one line."""
    parser = Options(prog="python -m recipes.merging", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--alpha", type=float, default=0.1, help="of the Dirichlet partition")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--every", type=int, default=50, help="steps between measurements")
    parser.add_argument("--out", type=Path, default=ROOT / OUT)
    given = parser.parse_args(arguments)
    for name, least in {"steps": 20, "workers": 2, "seeds": 1, "every": 1}.items():
        if getattr(given, name) < least:
            parser.error(f"--{name} {getattr(given, name)}: must be at least {least}")
    if given.steps % given.every:
        parser.error(f"--every {given.every}: must divide --steps, {given.steps}")
    if given.workers > 1000:
        parser.error(f"--workers {given.workers}: must be at most 1000, there are 1,437 digits")
    if not 0 < given.alpha < float("inf"):
        parser.error(f"--alpha {given.alpha}: must be positive")
    return given


def main(arguments: list[str] | None = None) -> list[Curve]:
    """Train with all schedules, print and draw."""
    given = parse(arguments)
    data = Digits(given.workers, given.alpha, given.seeds)
    live = sys.stderr.isatty()
    start = "\r" if live else ""
    curves, began = [], time.monotonic()
    for name, plan in schedules(given.steps).items():
        curves.append(train(name, plan, data, given.steps, given.every, _progress if live else lambda _: None))
        print(f"{start}{name:<18}{time.monotonic() - began:>6.0f} s", file=sys.stderr, flush=True)
    print(table(curves))
    try:
        given.out.mkdir(parents=True, exist_ok=True)
        print(f"drawn in {os.path.relpath(plot(curves, given.out / 'merging.png'))}")
    except ImportError:
        print("No picture: pip install 'lightning_dopt[report]'")
    return curves


def _progress(text: str) -> None:
    print(f"\r{text:<40}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        raise SystemExit(130) from None
