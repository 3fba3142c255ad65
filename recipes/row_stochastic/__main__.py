"""``python -m recipes.row_stochastic``: both strategies on several graphs and weights; a table, two pictures.

Trains with the engine that trains models, 16 simulated ranks, five seeds at once, less than two minutes on two cores:
errors to the minimum of the weighted loss, beside what the report of ``dopt topology NAME --lambda`` says beforehand.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import get_args

from lightning_dopt.topology import NodeRule
from recipes.row_stochastic.least_squares import LeastSquares
from recipes.row_stochastic.strategies import Outcome, cases, compare

ROOT = Path(__file__).resolve().parent.parent.parent
OUT = Path("runs") / "row_stochastic"
BLUE, RED = "#1b6ca8", "#c1442e"


def table(outcomes: list[Outcome]) -> str:
    """Rates, Theorem 7.1 and errors, one line per case."""
    head = ("graph, weights", "kappa", "match", "rho_II", "rho_I", "Thm 7.1", "error I", "error II", "I / II")
    lines = ["{:<24}{:>7}{:>7}{:>9}{:>9}{:>9}{:>10}{:>10}{:>8}".format(*head)]
    for o in outcomes:
        r, (losses, mixing) = o.report, o.last
        equal = r.kappa < 1 + 1e-9
        theorem = "-" if equal else str(r.bounds.holds).lower()
        rate = r.weighted_rate if equal else r.plain_rate  # equal weights: both have the same matrix
        lines.append(
            f"{o.case.name:<24}{r.kappa:>7.2f}{r.degree_match:>7.2f}{r.weighted_rate:>9.4f}{rate:>9.4f}{theorem:>9}"
            f"{losses:>10.4f}{mixing:>10.4f}{losses / mixing:>8.2f}"
        )
    return "\n".join(lines)


def draw_errors(outcomes: list[Outcome], path: Path) -> Path:
    """Errors over steps, one panel per case.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    rows = (len(outcomes) + 3) // 4
    figure = Figure(figsize=(13, 3.2 * rows), layout="constrained")
    for k, o in enumerate(outcomes):
        axes = figure.add_subplot(rows, min(4, len(outcomes)), k + 1)
        steps = range(1, len(o.losses) + 1)
        axes.plot(steps, o.losses, color=RED, label="I: weighted losses")
        axes.plot(steps, o.mixing, color=BLUE, label="II: weighted mixing", linestyle="--")
        axes.set_yscale("log")
        axes.set_title(f"{o.case.name} (kappa {o.report.kappa:.2f})", fontsize=10)
        axes.grid(alpha=0.3)
        axes.set_xlabel("steps")
    figure.axes[0].set_ylabel("weighted squared error")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    return path


def draw_penalties(outcomes: list[Outcome], path: Path) -> Path:
    """What Strategy I pays in the weighted geometry: bounds, and the transient growth that its matrix really has.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.add_subplot()
    bars = {
        "geometry: kappa (bound)": [o.report.penalties.geometry for o in outcomes],
        "transient prefactor (measured)": [o.report.plain_prefactor for o in outcomes],
        "injection: sqrt of the largest weight (bound)": [o.report.penalties.injection for o in outcomes],
        "largest local step: largest weight": [o.report.penalties.step for o in outcomes],
    }
    for k, ((label, heights), color) in enumerate(
        zip(bars.items(), (RED, "#e8a090", "#f2b134", "#30506d"), strict=True)
    ):
        axes.bar([at + 0.2 * (k - 1.5) for at in range(len(outcomes))], heights, 0.2, label=label, color=color)
    axes.axhline(1.0, color=BLUE, linestyle="--", label="II: weighted mixing")
    axes.set_xticks(range(len(outcomes)), [o.case.name.replace(", ", ",\n") for o in outcomes], fontsize=8)
    axes.set_ylabel("factor")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    return path


def main(arguments: list[str] | None = None) -> list[Outcome]:
    """Compare, print and draw."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.row_stochastic", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("-n", type=int, default=16, help="number of ranks")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rule", choices=get_args(NodeRule), default="paper", help="of the row-stochastic matrix")
    parser.add_argument("--format", choices=("png", "svg"), default="png")
    parser.add_argument("--out", type=Path, default=ROOT / OUT)
    given = parser.parse_args(arguments)
    problem = LeastSquares(given.n, given.seeds, given.steps)
    outcomes = [compare(case, problem, given.rule) for case in cases(given.n)]
    print(table(outcomes))
    try:
        given.out.mkdir(parents=True, exist_ok=True)
        for draw, name in ((draw_errors, "errors"), (draw_penalties, "penalties")):
            print(f"drawn in {os.path.relpath(draw(outcomes, given.out / f'{name}.{given.format}'))}")
    except ImportError:
        print("No pictures: pip install 'lightning_dopt[report]'")
    return outcomes


if __name__ == "__main__":
    main()
