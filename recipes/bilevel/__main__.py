"""``python -m recipes.bilevel cleaning`` (or ``tuning``): D-SOBA and variants of SPARKLE on two graphs.

Test accuracy and upper loss of the consensus model against what a worker has sent, with centralized SOBA and the classifier
alone (no upper level) for comparison. Writes a table, numbers and a picture under ``runs/bilevel``.

Measured on digits with ``--workers 8 --steps 200`` on a machine of 2 cores that others used as well (load 10 to 22), 20 to 45 s per
training (one run each; means over the last quarter)::

    cleaning
    graph        method           test accuracy  upper loss     auc   sent per worker
    complete     SOBA                    0.9400      0.2627   0.977           3.23 MB
    complete     no upper level          0.8806      0.6732   0.500           3.23 MB
    ring         D-SOBA                  0.9300      0.2998   0.963           3.69 MB
    ring         SPARKLE-GT              0.9411      0.2633   0.977           7.38 MB
    ring         SPARKLE-ED              0.9400      0.2643   0.978           3.69 MB
    ring         SPARKLE-ED-GT           0.9406      0.2640   0.977           5.30 MB
    exponential  D-SOBA                  0.9411      0.2680   0.975           9.23 MB
    exponential  SPARKLE-GT              0.9400      0.2631   0.977          18.46 MB
    exponential  SPARKLE-ED              0.9400      0.2648   0.977           9.23 MB
    exponential  SPARKLE-ED-GT           0.9400      0.2647   0.976          13.26 MB

    tuning
    graph        method           test accuracy  upper loss     auc   sent per worker
    complete     SOBA                    0.9494      0.1859       -           2.73 MB
    complete     no upper level          0.9461      0.2265       -           2.73 MB
    ring         D-SOBA                  0.9417      0.2116       -           3.12 MB
    ring         SPARKLE-GT              0.9494      0.1839       -           6.24 MB
    ring         SPARKLE-ED              0.9517      0.1808       -           3.12 MB
    ring         SPARKLE-ED-GT           0.9517      0.1808       -           4.16 MB
    exponential  D-SOBA                  0.9489      0.1894       -           7.80 MB
    exponential  SPARKLE-GT              0.9494      0.1858       -          15.60 MB
    exponential  SPARKLE-ED              0.9522      0.1825       -           7.80 MB
    exponential  SPARKLE-ED-GT           0.9522      0.1825       -          10.40 MB

What is sent with no upper level and in ``complete`` goes through an all-reduce.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from lightning_dopt import BilevelStrategy, ReplicaStrategy, Ring
from lightning_dopt.bilevel import BilevelPlan, double_loop, dsoba, soba, sparkle
from lightning_dopt.topology import SymmetricExponential
from lightning_dopt.topology.base import Topology
from recipes.bilevel.data import TwoLevelData
from recipes.bilevel.model import Classifier, DecayTuning, HyperCleaning
from recipes.options import Options
from recipes.processes import on_ranks

ROOT = Path(__file__).resolve().parent.parent.parent
OUT = Path("runs") / "bilevel"
POINTS = 20
GRAPHS: dict[str, Topology] = {"ring": Ring(), "exponential": SymmetricExponential()}
TASKS = ("cleaning", "tuning")
ALONE = "no upper level"
MEASURES = {"val/acc": "test accuracy", "val/upper_loss": "upper loss"}


def methods() -> dict[str, dict[str, BilevelPlan]]:
    """Plans by graph and name. What needs no graph is listed under ``"complete"``."""
    found: dict[str, dict[str, BilevelPlan]] = {"complete": {"SOBA": soba(), ALONE: soba()}}
    for name, graph in GRAPHS.items():
        found[name] = {
            "D-SOBA": dsoba(graph),
            "D-SOBA-FO": dsoba(graph, "first"),
            "SPARKLE-GT": sparkle(graph, "gt", "gt", "gt"),
            "SPARKLE-EXTRA": sparkle(graph, "extra", "extra", "extra"),
            "SPARKLE-ED": sparkle(graph),
            "SPARKLE-ED-GT": sparkle(graph, upper="gt"),
            "double loop": double_loop(graph, 5, 5, theta=0.3),
        }
    return found


@dataclass
class Outcome:
    """Measurements of one training, in the order of its steps."""

    graph: str
    method: str
    steps: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    """Sent so far by rank 0."""
    values: dict[str, list[float]] = field(default_factory=dict)
    """Of the consensus model, by the names of the metrics."""
    seconds: float = 0.0

    def late(self, metric: str) -> float:
        """The mean of the last quarter of the measurements."""
        tail = self.values[metric][-max(1, len(self.steps) // 4) :]
        return sum(tail) / len(tail)


class Watch(Callback):
    """Notes every validation.

    Args:
        outcome: What to add to.
    """

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note it."""
        assert isinstance(trainer.strategy, ReplicaStrategy)
        assert trainer.strategy.world is not None
        self.outcome.steps.append(trainer.global_step)
        self.outcome.bytes.append(trainer.strategy.world.ledger.bytes)
        for name, value in trainer.callback_metrics.items():
            if name.startswith("val/"):
                self.outcome.values.setdefault(name, []).append(float(value))


def module(task: str, method: str, lr: float | None, data: TwoLevelData) -> Classifier:
    """The task's module."""
    options = {} if lr is None else {"upper_lr": lr}
    if method == ALONE:
        options = {"upper_lr": 0.0}
    if task == "cleaning":
        return HyperCleaning(pixels=data.pixels, samples=len(data.wrong), **options)
    return DecayTuning(pixels=data.pixels, **options)


def loaded(given: argparse.Namespace) -> TwoLevelData:
    """The task's data."""
    data = TwoLevelData(
        given.dataset,
        given.root,
        given.samples,
        corruption=0.3 if given.task == "cleaning" else 0.0,
        held_out=0.3,
        batch_size=given.batch,
        alpha=given.alpha,
    )
    data.setup("fit")
    return data


def train(given: argparse.Namespace, graph: str, method: str) -> Outcome:
    """Train this rank."""
    began = time.monotonic()
    seed_everything(0, verbose=False)
    outcome = Outcome(graph, method)
    data = loaded(given)
    trainer = Trainer(
        accelerator="cpu",
        devices=given.workers,
        strategy=BilevelStrategy(methods()[graph][method]),
        max_steps=given.steps,
        max_epochs=-1,
        check_val_every_n_epoch=None,
        val_check_interval=max(1, given.steps // POINTS),
        num_sanity_val_steps=0,
        callbacks=[Watch(outcome)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module(given.task, method, given.upper_lr, data), data)
    outcome.seconds = time.monotonic() - began
    return outcome


def train_all(given: argparse.Namespace, rank: int) -> list[Outcome]:
    """All methods on all graphs, one after the other, as one of the processes."""
    outcomes = []
    for graph, plans in methods().items():
        for method in plans:
            if given.methods and method not in given.methods:
                continue
            outcomes.append(train(given, graph, method))
            if rank == 0:
                print(f"{graph}: {method}, {outcomes[-1].seconds:.1f} s", file=sys.stderr, flush=True)
    return outcomes


def table(outcomes: list[Outcome]) -> str:
    """Means of the last quarter of the measurements."""
    lines = [f"{'graph':<13}{'method':<16}{'test accuracy':>14}{'upper loss':>12}{'auc':>8}{'sent per worker':>18}"]
    for o in outcomes:
        auc = f"{o.late('val/auc'):>8.3f}" if "val/auc" in o.values else f"{'-':>8}"
        lines.append(
            f"{o.graph:<13}{o.method:<16}{o.late('val/acc'):>14.4f}{o.late('val/upper_loss'):>12.4f}{auc}"
            f"{o.bytes[-1] / 1e6:>15.2f} MB"
        )
    return "\n".join(lines)


def plot(outcomes: list[Outcome], path: Path) -> Path:
    """Test accuracy and upper loss against bytes, a row per graph; without communication to neighbours dashed.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(o.method for o in outcomes))
    graphs = [g for g in GRAPHS if any(o.graph == g for o in outcomes)] or ["complete"]
    figure = Figure(figsize=(12, 4 * len(graphs)), layout="constrained")
    panels = figure.subplots(len(graphs), 2, squeeze=False)
    for row, graph in zip(panels, graphs, strict=True):
        for o in outcomes:
            if o.graph in (graph, "complete"):
                style = "--" if o.graph == "complete" else "-"
                for axes, metric in zip(row, MEASURES, strict=True):
                    color = colormaps["tab10"](names.index(o.method))
                    axes.plot([b / 1e6 for b in o.bytes], o.values[metric], style, color=color, label=o.method)
        for axes, label in zip(row, MEASURES.values(), strict=True):
            axes.set_xlabel("MB sent per worker")
            axes.set_ylabel(label)
            axes.set_title(graph)
            axes.grid(alpha=0.3)
        row[1].set_yscale("log")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=130)
    return path


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Options; a bad value ends here in one line."""
    parser = Options(prog="python -m recipes.bilevel", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--workers", type=int, default=8, help="processes")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=16, help="samples per worker, level and step")
    parser.add_argument("--dataset", default="digits", choices=("digits", "mnist", "fashion_mnist"))
    parser.add_argument("--root", default="data", help="folder with the files of the data set")
    parser.add_argument("--samples", type=int, default=0, help="training pictures to use, 0 for all")
    parser.add_argument("--alpha", type=float, default=0.3, help="of the Dirichlet partition: smaller is more unequal")
    parser.add_argument("--upper-lr", type=float, help="instead of the task's own")
    parser.add_argument("--methods", default="", help="names, separated by commas; all by default")
    parser.add_argument("--out", type=Path, default=ROOT / OUT)
    given = parser.parse_args(arguments)
    known = {name for plans in methods().values() for name in plans}
    given.methods = [name for name in given.methods.split(",") if name]
    if not set(given.methods) <= known:
        parser.error(f"--methods {','.join(given.methods)}: must be names out of {', '.join(sorted(known))}")
    if not 2 <= given.workers <= 64:
        parser.error(f"--workers {given.workers}: must be 2 to 64, each is a process of this machine")
    if given.steps < 1:
        parser.error(f"--steps {given.steps}: must be at least 1")
    try:
        module(given.task, "", given.upper_lr, loaded(given))
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    return given


def main(arguments: list[str] | None = None) -> list[Outcome]:
    """Train, print and draw."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    given = parse(arguments)
    outcomes: list[Outcome] = on_ranks(partial(train_all, given), given.workers)[0]
    print(table(outcomes))
    folder: Any = given.out / given.task
    folder.mkdir(parents=True, exist_ok=True)
    numbers = folder / "results.json"
    numbers.write_text(json.dumps([asdict(o) for o in outcomes], indent=1) + "\n")
    print(f"numbers: {os.path.relpath(numbers)}")
    try:
        print(f"drawn in {os.path.relpath(plot(outcomes, folder / 'communication.png'))}")
    except ImportError:
        print("No picture: pip install 'lightning_dopt[report]'")
    return outcomes


if __name__ == "__main__":
    main()
