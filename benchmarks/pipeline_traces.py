"""Pictures of all pipeline schedules, drawn from real runs, and their bubbles beside what the checker says.

``python -m benchmarks.pipeline_traces --out docs/images`` runs each schedule on ``--ranks`` processes over gloo. Its stages
wait instead of computing, ``--forward`` seconds in the forward and twice as long in the backward (half of that for the gradient
of the input, half for that of the parameters), so that a machine with few cores shows what as many devices would do. All else
is real: the engine, its messages and the times, which the stages note when they begin and end. A table and one picture per
schedule, of its quickest step, are made.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_dopt.pipeline import Program, Schedule, check, make_pipeline, make_program
from recipes.processes import on_ranks

STEPS = 5
"""Steps that are measured; one before them is not."""


@dataclass(frozen=True)
class Span:
    """A computation: ``"F"``, ``"I"`` or ``"W"`` of a stage on a micro-batch, from ``start`` to ``end`` in seconds."""

    kind: str
    stage: int
    microbatch: int
    start: float
    end: float


class _Wait(torch.autograd.Function):
    """Hands its input on; takes its time forward and backward, and notes when."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stage: WaitingStage, kind: str, microbatch: int) -> Tensor:
        ctx.stage, ctx.kind, ctx.microbatch = stage, kind, microbatch
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.stage.wait(ctx.kind, ctx.microbatch)
        return gradients[0], None, None, None


class WaitingStage(nn.Module):
    """``x + 0 w``, slowly. The number of the micro-batch travels in ``x``."""

    def __init__(self, number: int, forward: float) -> None:
        super().__init__()
        self.number, self.seconds = number, forward
        self.weight, self.first = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
        self.spans: list[Span] = []

    def wait(self, kind: str, microbatch: int) -> None:
        start = time.monotonic()
        time.sleep(self.seconds)
        self.spans.append(Span(kind, self.number, microbatch, start, time.monotonic()))

    def forward(self, x: Tensor) -> Tensor:
        m = int(x.detach().flatten()[0])
        self.wait("F", m)
        x = x if x.requires_grad else x + 0.0 * self.first  # the first stage takes as long as the others
        through = _Wait.apply(x, self, "I", m)  # type: ignore[no-untyped-call]
        result: Tensor = through + 0.0 * _Wait.apply(self.weight, self, "W", m)  # type: ignore[no-untyped-call]
        return result


def job(schedule: Schedule, engine: str, microbatches: int, forward: float, rank: int) -> list[list[Span]]:
    """The spans of one rank, step by step."""
    program = make_program(schedule, dist.get_world_size(), microbatches)
    stages = [WaitingStage(number, forward) for number in range(program.stages)]
    pipeline = make_pipeline(stages, program, _loss, lambda part: part, engine=engine)  # type: ignore[arg-type]
    held: list[Any] = list(pipeline.runners[0].stages.values())
    batch, steps = torch.arange(float(microbatches)).view(-1, 1), []
    for _ in range(STEPS + 1):
        for stage in held:
            stage.spans = []
        dist.barrier()
        pipeline.step(batch)
        steps.append(sorted((span for stage in held for span in stage.spans), key=lambda span: span.start))
    return steps[1:]


def _loss(output: Tensor, part: Tensor) -> Tensor:
    return output.mean()


def bubble(ranks: Sequence[Sequence[Span]], seconds: float) -> float:
    """The part of the time from the first start to the last end in which ranks stand still, on average."""
    start, end = min(r[0].start for r in ranks), max(r[-1].end for r in ranks)
    busy = sum(len(r) for r in ranks) * seconds
    return 1.0 - busy / (len(ranks) * (end - start))


def draw(program: Program, ranks: Sequence[Sequence[Span]], measured: float, path: Path) -> None:
    """One row per rank; forwards blue, gradients of inputs orange, of parameters green; darker in later stages of a rank."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    colours = {"F": ("#9ecae9", "#4c78a8"), "I": ("#ffbf79", "#f58518"), "W": ("#a9d8a0", "#54a24b")}
    start, end = min(r[0].start for r in ranks), max(r[-1].end for r in ranks)
    figure, panel = plt.subplots(figsize=(11, 0.42 * len(ranks) + 0.75))
    for row, spans in enumerate(ranks):
        for span in spans:
            late = span.stage >= program.ranks
            panel.broken_barh(
                [(span.start - start, span.end - span.start)],
                (row - 0.42, 0.84),
                color=colours[span.kind][late],
                ec="white",
                lw=0.5,
            )
            middle = (span.start + span.end) / 2 - start
            panel.text(middle, row, str(span.microbatch), ha="center", va="center", fontsize=6.5)
    panel.set(yticks=range(len(ranks)), yticklabels=[f"rank {r}" for r in range(len(ranks))], xlim=(0, end - start))
    panel.invert_yaxis()
    panel.tick_params(labelsize=7)
    panel.set_title(f"{program.name}: {100 * measured:.1f} % bubble, {end - start:.2f} s", loc="left", fontsize=9)
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    picture = Image.open(path).convert("P", palette=Image.Palette.ADAPTIVE, colors=64)  # a third of the bytes
    picture.save(path, optimize=True)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ranks", type=int, default=4)
    p.add_argument("--microbatches", type=int, default=8)
    p.add_argument("--forward", type=float, default=0.05)
    p.add_argument("--schedules", nargs="*", choices=get_args(Schedule), default=get_args(Schedule))
    p.add_argument("--engine", choices=("auto", "torch", "native"), default="auto")
    p.add_argument("--out", type=Path, default=None, help="folder for the pictures")
    args = p.parse_args()
    print("| schedule | stages | bubble by formula | measured | least to largest |\n|---|---|---|---|---|")
    for name in args.schedules:
        program = make_program(name, args.ranks, args.microbatches)
        steps = list(
            zip(*on_ranks(partial(job, name, args.engine, args.microbatches, args.forward), args.ranks), strict=True)
        )
        bubbles = [bubble(ranks, args.forward) for ranks in steps]
        middle = statistics.median(bubbles)
        spread = f"{min(bubbles):.3f} to {max(bubbles):.3f}"
        print(f"| `{name}` | {program.stages} | {check(program).bubble:.3f} | {middle:.3f} | {spread} |", flush=True)
        if args.out is not None:
            least = min(bubbles)
            draw(program, steps[bubbles.index(least)], least, args.out / f"pipeline_{name}.png")


if __name__ == "__main__":
    main()
