"""``python -m recipes.vision.heterogeneity``: which kind of gossip stands workers whose data differ?

Eight processes, each with pictures of few classes only (Dirichlet, alpha 0.1), train the same small network under
Lightning with one method after the other: plain gossip, with local and with quasi-global momentum, the exact methods
(gradient tracking, EXTRA, Exact Diffusion, RelaySGD), compressed ones, and averaging over everybody after every step.
Ends with a table and pictures of accuracy against steps and against bytes under ``runs/heterogeneity``.

Data: scikit-learn's digits, or the files of Fashion-MNIST or CIFAR-10 in a folder that ``--data`` names.

Measured on a machine of 2 cores that others used as well (load 8 to 27): 7 min, with 8 processor minutes of this recipe's
own, so 4 to 5 min on 2 idle cores (one run; accuracy of the workers' own models and of their mean)::

    method                 local  merged  test loss  distance   sent per worker
    centralized            0.978   0.978      0.067     0.000           41.7 MB
    dsgd                   0.961   0.969      0.093     0.081           47.7 MB
    dmsgd                  0.957   0.969      0.078     0.075           47.7 MB
    qg_dsgdm               0.975   0.975      0.131     0.005           47.7 MB
    gradient_tracking      0.979   0.981      0.066     0.035           95.3 MB
    extra                  0.979   0.983      0.060     0.108           47.7 MB
    exact_diffusion        0.981   0.983      0.062     0.073           47.7 MB
    relay_sgd              0.966   0.972      0.098     0.059           71.5 MB
    choco_top10            0.937   0.953      0.117     0.172            7.1 MB
    one_peer_int8          0.971   0.972      0.076     0.087            6.1 MB
    tracking_int8          0.979   0.981      0.066     0.035           24.2 MB

Digits are easy: methods end close to each other. With 3,000 pictures of Fashion-MNIST (600 more to test on) and
``--steps 300`` they are further apart, after 3.3 min on the same busy machine::

    method                 local  merged  test loss  distance   sent per worker
    centralized            0.818   0.818      0.529     0.000           43.0 MB
    dsgd                   0.700   0.773      0.590     0.206           49.2 MB
    qg_dsgdm               0.772   0.823      0.520     0.097           49.2 MB
    gradient_tracking      0.787   0.797      0.546     0.109           98.4 MB
    exact_diffusion        0.729   0.788      0.591     0.436           49.2 MB
    one_peer_int8          0.673   0.782      0.573     0.261            6.2 MB
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from lightning_dopt import Int8, TopK, plans
from lightning_dopt.topology import Complete, OnePeerExponential, Ring, Tree
from recipes.options import Options
from recipes.vision import files
from recipes.vision.comparison import Method, Outcome, compare
from recipes.vision.data import ImageData

ROOT = Path(__file__).resolve().parent.parent.parent
LR, LR_MOMENTUM = 0.1, 0.03
SIZES = {"digits": 8, "fashion_mnist": 28, "cifar10": 32}


def methods() -> dict[str, Method]:
    """All methods by name, in the order of the table."""
    ring = Ring()
    found = [
        Method("centralized", plans.gossip(Complete()), LR),
        Method("dsgd", plans.gossip(ring), LR),
        Method("dmsgd", plans.dmsgd(ring), LR_MOMENTUM, 0.9),
        Method("qg_dsgdm", plans.qg_dsgdm(ring), LR_MOMENTUM, 0.9),
        Method("gradient_tracking", plans.gradient_tracking(ring), LR),
        Method("extra", plans.extra(ring), LR),
        Method("exact_diffusion", plans.exact_diffusion(ring), LR),
        Method("relay_sgd", plans.relay_sgd(Tree()), LR),
        Method("choco_top10", plans.choco_sgd(ring, TopK(0.1)), LR),
        Method("one_peer_int8", plans.gossip(OnePeerExponential(), Int8()), LR),
        Method("tracking_int8", plans.gradient_tracking(ring, Int8()), LR),
    ]
    return {method.name: method for method in found}


def table(outcomes: list[Outcome]) -> str:
    """What every method ended with."""
    lines = [
        f"{'method':<20}{'local':>8}{'merged':>8}{'test loss':>11}{'distance':>10}{'sent per worker':>18}{'time':>8}"
    ]
    for o in outcomes:
        lines.append(
            f"{o.name:<20}{o.local[-1]:>8.3f}{o.merged[-1]:>8.3f}{o.loss[-1]:>11.3f}{o.distance[-1]:>10.3f}"
            f"{o.bytes[-1] / 1e6:>15.1f} MB{o.seconds:>6.0f} s"
        )
    return "\n".join(lines)


def plot(outcomes: list[Outcome], path: Path) -> Path:
    """Both accuracies against steps and against bytes; what compresses is dashed.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    panels = figure.subplots(2, 2, sharey=True)
    for k, o in enumerate(outcomes):
        style = "--" if o.name.endswith(("top10", "int8")) else "-"
        for row, heights in enumerate((o.local, o.merged)):
            for column, along in enumerate((o.steps, o.bytes)):
                panels[row][column].plot(along, heights, style, color=colormaps["tab20"](k), label=o.name)
    for row, which in enumerate(("workers' own models (mean)", "mean of all models")):
        panels[row][0].set_ylabel(f"test accuracy, {which}")
        panels[row][0].set_xlabel("steps")
        panels[row][1].set_xlabel("bytes sent per worker")
        panels[row][1].set_xscale("log")
    worst, best = (pick(min(o.local[-1], o.merged[-1]) for o in outcomes) for pick in (min, max))
    for axes in figure.axes:
        axes.grid(alpha=0.3, which="both")
        axes.set_ylim(max(0.0, worst - 0.15), min(1.0, best + 0.03))  # where methods differ, not how they begin
    figure.axes[1].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=130)
    return path


def images(data: str, alpha: float, batch_size: int, seed: int) -> ImageData:
    """The data that ``--data`` names.

    Raises:
        ValueError: a folder that holds neither Fashion-MNIST nor CIFAR-10, or a bad number.
    """
    name = "digits"
    if data != "digits":
        root = Path(data).expanduser()
        there = [n for n in ("fashion_mnist", "cifar10") if files.find(n, root) is not None]
        if not there:
            raise ValueError(f"--data {data}: neither 'digits' nor a folder with files of Fashion-MNIST or CIFAR-10")
        name = there[0]
    return ImageData(
        dataset=name,  # type: ignore[arg-type]  # one of its choices
        root=data,
        batch_size=batch_size,
        image_size=SIZES[name],
        partition="dirichlet",
        alpha=alpha,
        seed=seed,
    )


def parse(
    arguments: list[str] | None = None,
    known: dict[str, Method] | None = None,
    name: str = "heterogeneity",
    steps: int = 600,
) -> tuple[argparse.Namespace, list[Method], ImageData]:
    """Options, methods and data of a comparison; a bad value ends here in one line, before any process starts."""
    known = known or methods()
    parser = Options(
        prog=f"python -m recipes.vision.{name}", description="Methods side by side on workers of unlike data"
    )
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps per method")
    parser.add_argument("--workers", type=int, default=8, help="processes")
    parser.add_argument("--alpha", type=float, default=0.1, help="of the Dirichlet partition; small is severe")
    parser.add_argument("--methods", default=",".join(known), help="names, separated by commas")
    parser.add_argument("--data", default="digits", help="'digits', or a folder with Fashion-MNIST or CIFAR-10")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures per worker and step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / name)
    given = parser.parse_args(arguments)
    if not 2 <= given.workers <= 64:
        parser.error(f"--workers {given.workers}: must be 2 to 64, each is a process of this machine")
    if given.steps < 1:
        parser.error(f"--steps {given.steps}: must be at least 1")
    names = [method for method in given.methods.split(",") if method]
    if not names or not set(names) <= set(known):
        parser.error(f"--methods {given.methods}: must be names out of {', '.join(known)}")
    try:
        for method in names:
            known[method].plan.check(given.workers)
        data = images(given.data, given.alpha, given.batch_size, given.seed)
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    return given, [known[method] for method in names], data


def main(arguments: list[str] | None = None) -> list[Outcome]:
    """Train with every method, print and draw."""
    return run(*parse(arguments))


def run(given: argparse.Namespace, chosen: list[Method], data: ImageData) -> list[Outcome]:
    """Train with every method, print and draw."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(f"{len(chosen)} methods, {given.workers} processes, {given.steps} steps each", file=sys.stderr, flush=True)
    outcomes = compare(chosen, data, given.workers, given.steps)
    print(table(outcomes))
    given.out.mkdir(parents=True, exist_ok=True)
    numbers = given.out / "results.json"
    numbers.write_text(json.dumps([asdict(o) for o in outcomes], indent=1) + "\n")
    print(f"numbers: {os.path.relpath(numbers)}")
    try:
        print(f"drawn in {os.path.relpath(plot(outcomes, given.out / 'accuracy.png'))}")
    except ImportError:
        print("No picture: pip install 'lightning_dopt[report]'")
    return outcomes


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        raise SystemExit(130) from None
