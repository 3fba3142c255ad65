"""What links do to training: a pipeline of four stages with compressed activations and gradients, at equal seeds.

``python -m benchmarks.clapping`` trains a tanh network 32-32-32-32-1 to imitate another one with larger weights: 1024 inputs from
a normal distribution, noise of 0.05 on the labels, batches of 32, SGD at 0.05 with momentum 0.9 (and as much dampening), one
stage per layer in one process. Both directions are compressed, with a tenth of each row or with three levels. Arms, with the
probability of a new batch:

* ``none``: nothing is compressed; with p < 1 only batches are repeated;
* ``FU``, ``FC``: both variants of Clapping;
* ``AQ-SGD``: one buffer per sample for activations, their gradients packed directly;
* ``direct``: packed without a memory.

Printed are, over the seeds, mean and spread (least to largest) of the mean squared error on all data, the messages' share of
dense ones and what both ends of the links remember. ``--plot FILE`` draws the errors over steps and over bytes; ``--memory``
tells how memory grows with the number of samples. Deterministic on one machine.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dopt.compress import BlockTopK, Compressor, TernGrad
from lightning_dopt.pipeline import AQSGD, Clapping, Direct, LazyClock, Link, SimulatedPipeline, cut, gpipe

WIDTH, STAGES, BATCH = 32, 4, 32
CODECS: dict[str, Compressor] = {"top": BlockTopK(0.1, block=WIDTH), "levels": TernGrad()}
ARMS: tuple[tuple[str, float], ...] = (
    ("none", 1.0),
    ("none", 0.5),
    ("none", 0.1),
    ("FU", 0.5),
    ("FU", 0.1),
    ("FC", 0.03),
    ("FC", 0.1),
    ("FC", 0.5),
    ("AQ-SGD", 1.0),
    ("direct", 1.0),
)


@dataclass
class Result:
    """One run.

    Attributes:
        error: Mean squared error on all data at the end.
        share: Bytes of activations and gradients over those of dense ones.
        memory: Bytes that both ends of all links remember.
        curve: (step, bytes sent, error on all data).
    """

    error: float
    share: float
    memory: int
    curve: list[tuple[int, int, float]] = field(default_factory=list)


def network(seed: int, scale: float = 1.0) -> nn.Sequential:
    """Weights normal with standard deviation ``scale / sqrt(width)``, no biases at the start."""
    g = torch.Generator().manual_seed(seed)
    hidden = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(STAGES - 1)]
    made = nn.Sequential(*hidden, nn.Linear(WIDTH, 1))
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * scale / WIDTH**0.5 if p.dim() == 2 else torch.zeros(p.shape))
    return made


def links(name: str, probability: float, codec: Compressor) -> tuple[Link | None, Link | None]:
    """The links of an arm, of activations and of gradients."""
    if name == "none":
        return None, None
    if name == "AQ-SGD":
        return AQSGD(codec), Direct(codec)
    link = Direct(codec) if name == "direct" else Clapping(name, probability, codec)  # type: ignore[arg-type]
    return link, link


def train(name: str, probability: float, codec: Compressor, seed: int, steps: int, samples: int = 1024) -> Result:
    """One run of one arm; of all arms with a seed, weights, data and draws of batches are the same."""
    g = torch.Generator().manual_seed(1000 + seed)
    xs = torch.randn(samples, WIDTH, generator=g)
    with torch.no_grad():
        ys = network(500 + seed, 1.5)(xs) + 0.05 * torch.randn(samples, 1, generator=g)
    student, clock = network(seed), LazyClock(probability, seed)
    pipeline = SimulatedPipeline(
        cut(student, STAGES), gpipe(STAGES, 1), _loss, _inputs, *links(name, probability, codec)
    )
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, dampening=0.9)
    curve = []
    for step in range(steps):
        if clock.fresh(step):
            rows = torch.randint(samples, (BATCH,), generator=g)
        optimizer.zero_grad()
        pipeline.step((xs[rows], ys[rows]), clock.fresh(step), rows)
        optimizer.step()
        if (step + 1) % max(1, steps // 20) == 0:
            with torch.no_grad():
                curve.append((step + 1, _sent(pipeline), float((student(xs) - ys).square().mean())))
    dense = 2 * steps * (STAGES - 1) * BATCH * WIDTH * 4
    held = [t for r in pipeline.runners for memory in r.memories.values() for t in memory.values()]
    return Result(curve[-1][2], _sent(pipeline) / dense, sum(t.nbytes for t in held), curve)


def _loss(output: Tensor, part: Any) -> Tensor:
    return nn.functional.mse_loss(output, part[1])


def _inputs(part: Any) -> Tensor:
    x: Tensor = part[0]
    return x


def _sent(pipeline: SimulatedPipeline) -> int:
    entries = [ledger.entries for ledger in pipeline.ledgers]
    return sum(e[kind].bytes for e in entries for kind in ("activations", "gradients") if kind in e)


def title(name: str, probability: float) -> str:
    """An arm in words."""
    return name if probability == 1.0 else f"{name}, p = {probability:g}"


def table(results: dict[str, Sequence[Result]]) -> str:
    """Rows of a Markdown table."""
    rows = ["| | error | least to largest | of dense bytes | remembered |", "|---|---|---|---|---|"]
    for name, runs in results.items():
        errors = [run.error for run in runs]
        share, memory = statistics.mean(run.share for run in runs), max(run.memory for run in runs)
        spread = f"{min(errors):.3f} to {max(errors):.3f}"
        rows.append(f"| {name} | {statistics.mean(errors):.3f} | {spread} | {share:.2f} | {memory / 1024:.0f} KiB |")
    return "\n".join(rows)


def memory_table(codec: Compressor, sizes: Sequence[int]) -> str:
    """What links remember after four epochs over data sets of several sizes."""
    rows = ["| samples | " + " | ".join(map(str, sizes)) + " |", "|---|" + "---|" * len(sizes)]
    for name, probability in (("FU", 0.5), ("FC", 0.1), ("AQ-SGD", 1.0)):
        held = [train(name, probability, codec, 0, 4 * n // BATCH, n).memory // 1024 for n in sizes]
        rows.append(f"| {title(name, probability)} | " + " | ".join(f"{n} KiB" for n in held) + " |")
    return "\n".join(rows)


def draw(results: dict[str, Sequence[Result]], path: str) -> None:
    """Errors over steps and over bytes: the mean over the seeds, and from the least to the largest."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for name, runs in results.items():
        errors = [[point[2] for point in run.curve] for run in runs]
        columns = list(zip(*errors, strict=True))
        mean, low, high = ([f(column) for column in columns] for f in (statistics.mean, min, max))
        for panel, k in zip(panels, (0, 1), strict=True):
            x = [point[k] / (1 if k == 0 else 1e6) for point in runs[0].curve]
            (line,) = panel.plot(x, mean, label=name)
            panel.fill_between(x, low, high, color=line.get_color(), alpha=0.12)
    panels[0].set(xlabel="step", ylabel="mean squared error on all data", yscale="log")
    panels[1].set(xlabel="megabytes between stages", xscale="log")
    panels[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, default=2000)
    p.add_argument("--seeds", type=int, default=4)
    p.add_argument("--codec", choices=sorted(CODECS), default="top")
    p.add_argument("--plot", default="", help="also draw a picture")
    p.add_argument("--memory", action="store_true", help="only tell how memory grows with the number of samples")
    args = p.parse_args()
    torch.set_num_threads(1)
    codec = CODECS[args.codec]
    if args.memory:
        print(memory_table(codec, (256, 512, 1024, 2048)))
        return
    results = {
        title(name, probability): [train(name, probability, codec, seed, args.steps) for seed in range(args.seeds)]
        for name, probability in ARMS
    }
    print(table(results))
    if args.plot:
        draw(results, args.plot)
        print(args.plot)


if __name__ == "__main__":
    main()
