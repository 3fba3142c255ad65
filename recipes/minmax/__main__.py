"""``python -m recipes.minmax``: what compressed messages do to two games, with and without a correction.

A bilinear game with full gradients whose saddle point is known (distance relative to its norm), and a small GAN on
scikit-learn's digits (Frechet distance of pixels), ranks unlike each other in both. Extragradient and descent-ascent with
exact messages, MASHA, and descent-ascent whose gradients are compressed without any correction. Writes a table, numbers and a
picture under ``runs/minmax``.

Measured with the defaults (2 processes, 200 and 400 steps) on a machine of 2 cores that others used as well (load 17 to
26): 3.4 min, with 1.3 processor minutes of its own (one run)::

    game      method                    distance  late mean   sent per worker
    bilinear  extragradient              4.4e-09    6.4e-08           0.32 MB
    bilinear  descent-ascent             2.1e-08    1.9e-07           0.16 MB
    bilinear  masha QSGD                 3.1e-05    0.00012           0.03 MB
    bilinear  descent-ascent QSGD           0.15       0.15           0.01 MB
    bilinear  masha RandK                  0.009       0.02           0.03 MB
    bilinear  descent-ascent RandK           8.8          6           0.02 MB
    bilinear  masha TopK                 0.00017    0.00069           0.03 MB
    bilinear  descent-ascent TopK           0.67       0.67           0.01 MB
    gan       extragradient                  3.3        3.7          28.68 MB
    gan       descent-ascent                 3.3        3.7          14.34 MB
    gan       masha QSGD                     4.1        4.2           3.53 MB
    gan       descent-ascent QSGD            3.4        3.7           1.85 MB
    gan       masha RandK                    4.1        4.4           2.72 MB
    gan       descent-ascent RandK           3.6        3.7           1.43 MB
    gan       masha TopK                     4.1        4.4           3.44 MB
    gan       descent-ascent TopK              4        4.2           2.15 MB

Where nothing but compression is in the way, the correction decides: without it ``QSGD`` and ``TopK`` stall, and ``RandK(0.1)``
is too coarse for this rate. In the GAN MASHA, whose reference gradients are those of single small batches, is behind
compressed gradients as they are. All distances are still falling there: it is the first 400 steps, not where they end.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from lightning_dopt import Ascend, Identity, Plan, RandK, ReplicaStrategy, Sync, TopK, plans
from lightning_dopt.compress import QSGD, Compressor
from recipes.minmax.games import Bilinear, Game, Pictures
from recipes.options import Options
from recipes.processes import on_ranks

ROOT = Path(__file__).resolve().parent.parent.parent
OUT = Path("runs") / "minmax"
POINTS = 20
GAMES = {"bilinear": 0.1, "gan": 0.1}
"""Their learning rates."""
REFRESH = {"TopK": 0.1, "RandK": 0.1, "QSGD": 0.125}
"""About the share of the bytes that the codec leaves."""


def game(name: str, workers: int) -> Game:
    """The module of that name, from the same start every time."""
    return Bilinear(GAMES[name], workers) if name == "bilinear" else Pictures(GAMES[name])


def methods(maximise: str) -> dict[str, Plan]:
    """All methods by name: exact ones, compressed changes (MASHA), and compressed gradients as they are."""
    codecs: list[Compressor] = [QSGD(7), RandK(0.1), TopK(0.1)]
    found = {
        "extragradient": plans.masha(Identity(), 1.0, maximise),
        "descent-ascent": Plan([Sync(what="gradients")], [Ascend(maximise)]),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing remembers what is left out is the point
        for codec in codecs:
            name = type(codec).__name__
            found[f"masha {name}"] = plans.masha(codec, REFRESH[name], maximise)
            found[f"descent-ascent {name}"] = Plan([Sync(what="gradients", codec=codec)], [Ascend(maximise)])
    return found


@dataclass
class Outcome:
    """Measurements of one training, in the order of its steps."""

    game: str
    method: str
    steps: list[int] = field(default_factory=list)
    distance: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    """Sent so far by rank 0."""
    seconds: float = 0.0


class Watch(Callback):
    """Measures now and then.

    Args:
        outcome: What to add to.
        every: steps between measurements.
    """

    def __init__(self, outcome: Outcome, every: int) -> None:
        self.outcome, self.every = outcome, every

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Measure, on rank 0: replicas are equal."""
        if trainer.global_step % self.every or trainer.global_rank:
            return
        assert isinstance(pl_module, Game)
        assert isinstance(trainer.strategy, ReplicaStrategy)
        assert trainer.strategy.world is not None
        self.outcome.steps.append(trainer.global_step)
        self.outcome.distance.append(pl_module.distance())
        self.outcome.bytes.append(trainer.strategy.world.ledger.bytes)


def train(name: str, method: str, steps: int, workers: int, rank: int) -> Outcome:
    """Train this rank."""
    began = time.monotonic()
    seed_everything(0, verbose=False)
    module, outcome = game(name, workers), Outcome(name, method)
    trainer = Trainer(
        accelerator="cpu",
        devices=workers,
        strategy=ReplicaStrategy(plan=methods(module.maximise)[method]),
        max_steps=steps,
        max_epochs=-1,
        use_distributed_sampler=False,  # every rank has data of its own
        callbacks=[Watch(outcome, max(1, steps // POINTS))],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, module.batches(rank, workers, steps))
    outcome.seconds = time.monotonic() - began
    return outcome


def train_all(names: list[str], steps: dict[str, int], workers: int, rank: int) -> list[Outcome]:
    """All methods on all games, one after the other, as one of the processes."""
    outcomes = []
    for name in names:
        for method in methods(game(name, workers).maximise):
            outcomes.append(train(name, method, steps[name], workers, rank))
            if rank == 0:
                print(f"{name}: {method}, {outcomes[-1].seconds:.1f} s", file=sys.stderr, flush=True)
    return outcomes


def table(outcomes: list[Outcome]) -> str:
    """What every method ended with; the last column is the mean of the last quarter of the measurements."""
    lines = [f"{'game':<10}{'method':<24}{'distance':>10}{'late mean':>11}{'sent per worker':>18}{'time':>8}"]
    for o in outcomes:
        late = o.distance[-max(1, len(o.distance) // 4) :]
        lines.append(
            f"{o.game:<10}{o.method:<24}{o.distance[-1]:>10.2g}{sum(late) / len(late):>11.2g}"
            f"{o.bytes[-1] / 1e6:>15.2f} MB{o.seconds:>6.0f} s"
        )
    return "\n".join(lines)


def plot(outcomes: list[Outcome], path: Path) -> Path:
    """Distances against steps and against bytes; compressed gradients are dashed.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(o.game for o in outcomes))
    figure = Figure(figsize=(12, 4 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), 2, squeeze=False)
    for row, name in enumerate(names):
        for k, o in enumerate(o for o in outcomes if o.game == name):
            style = "--" if o.method.startswith("descent") else "-"
            for axes, along in zip(panels[row], (o.steps, o.bytes), strict=True):
                axes.plot(along, o.distance, style, color=colormaps["tab10"](k), label=o.method)
        for axes, label in zip(panels[row], ("steps", "bytes sent per worker"), strict=True):
            axes.set_yscale("log")
            axes.set_xlabel(label)
            axes.set_title(name)
            axes.grid(alpha=0.3)
        panels[row][1].set_xscale("log")
        panels[row][0].set_ylabel("distance")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=130)
    return path


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Options; a bad value ends here in one line."""
    parser = Options(prog="python -m recipes.minmax", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--games", default=",".join(GAMES), help="names, separated by commas")
    parser.add_argument("--steps", type=int, default=200, help="of the bilinear game; the GAN takes twice as many")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--out", type=Path, default=ROOT / OUT)
    given = parser.parse_args(arguments)
    given.games = [name for name in given.games.split(",") if name]
    if not given.games or not set(given.games) <= set(GAMES):
        parser.error(f"--games {','.join(given.games)}: must be names out of {', '.join(GAMES)}")
    if not 2 <= given.workers <= 64:
        parser.error(f"--workers {given.workers}: must be 2 to 64, each is a process of this machine")
    if given.steps < 1:
        parser.error(f"--steps {given.steps}: must be at least 1")
    return given


def main(arguments: list[str] | None = None) -> list[Outcome]:
    """Train, print and draw."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    given = parse(arguments)
    steps = {"bilinear": given.steps, "gan": 2 * given.steps}
    outcomes: list[Outcome] = on_ranks(partial(train_all, given.games, steps, given.workers), given.workers)[0]
    print(table(outcomes))
    given.out.mkdir(parents=True, exist_ok=True)
    numbers = given.out / "results.json"
    numbers.write_text(json.dumps([asdict(o) for o in outcomes], indent=1) + "\n")
    print(f"numbers: {os.path.relpath(numbers)}")
    try:
        print(f"drawn in {os.path.relpath(plot(outcomes, given.out / 'distance.png'))}")
    except ImportError:
        print("No picture: pip install 'lightning_dopt[report]'")
    return outcomes


if __name__ == "__main__":
    main()
