"""Pictures of topologies."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_dopt.topology.base import Topology
from lightning_dopt.topology.lattice import Grid
from lightning_dopt.topology.static import Star, Tree
from lightning_dopt.topology.weights import Lazy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_ROUNDS = 8
_COLUMNS = 4
_SUFFIXES = (".png", ".svg")
_INK, _NODE = "#30506d", "#f2b134"


def draw(topology: Topology, n: int, path: str | Path) -> Path:
    """Draw the graph of ``topology`` for ``n`` workers and write it to ``path``.

    A topology that changes over time gets one panel per round, for one period but at most eight rounds. Links that go
    one way are arrows in the direction in which the value travels; a thicker line is a larger weight (own weights are
    not drawn). Needs no display.

    Args:
        topology: what to draw.
        n: number of workers.
        path: the file to write; its ending, ``.png`` or ``.svg``, selects the format.

    Returns:
        The path written.

    Raises:
        ValueError: another ending, or a topology that does not exist for ``n`` workers.
        ImportError: matplotlib is not installed; the message names the command that installs it.
    """
    target = Path(path)
    if target.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"draw(path={str(path)!r}): the file name must end in {' or '.join(_SUFFIXES)}")
    topology.check(n)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("draw() needs matplotlib: pip install lightning_dopt[report]") from None

    rounds = min(topology.period(n) or _MAX_ROUNDS, _MAX_ROUNDS)
    columns = min(rounds, _COLUMNS)
    lines = math.ceil(rounds / columns)
    side = 4.5 if rounds == 1 else 2.6
    figure = Figure(figsize=(side * columns, side * lines + 0.4), layout="constrained")
    figure.suptitle(f"{topology!r}, {n} workers", fontsize=10)
    places = _places(topology, n)
    for step in range(rounds):
        axes = figure.add_subplot(lines, columns, step + 1)
        if rounds > 1:
            axes.set_title(f"round {step}", fontsize=8)
        _draw_round(axes, topology, n, step, places)
    figure.savefig(target, dpi=150)
    return target


def _places(topology: Topology, n: int) -> list[tuple[float, float]]:
    """Where each rank goes: clockwise on a circle from the top; grids and trees as such, a star's centre in the middle."""
    inner = topology
    while isinstance(inner, Lazy):
        inner = inner.topology
    if isinstance(inner, Grid):
        _, cols = inner.shape(n)
        return [(float(rank % cols), -float(rank // cols)) for rank in range(n)]
    if isinstance(inner, Tree):
        return _levels(inner, n)
    outer = n - 1 if isinstance(inner, Star) and n > 2 else n
    angles = [2 * math.pi * k / outer for k in range(outer)]
    circle = [(math.sin(angle), math.cos(angle)) for angle in angles]
    return circle if outer == n else [(0.0, 0.0), *circle]


def _levels(tree: Tree, n: int) -> list[tuple[float, float]]:
    """The root on top, every level spread evenly below the one before."""
    found: list[tuple[float, float]] = []
    width, depth = 1, 0
    while len(found) < n:
        found += [((k + 0.5) / width, -0.3 * depth) for k in range(min(width, n - len(found)))]
        width, depth = width * tree.branching, depth + 1
    return found


def _draw_round(axes: Axes, topology: Topology, n: int, step: int, places: list[tuple[float, float]]) -> None:
    rows = [topology.row(n, i, step) for i in range(n)]
    for i, row in enumerate(rows):
        for j, weight in row.items():
            both = i in rows[j]
            if j == i or (both and j < i):
                continue
            style = "-" if both else "-|>"
            arrow = {
                "arrowstyle": style,
                "color": _INK,
                "linewidth": 0.4 + 2.5 * abs(weight),
                "shrinkA": 7,
                "shrinkB": 7,
            }
            axes.annotate("", xy=places[i], xytext=places[j], arrowprops=arrow)
    across, up = [x for x, _ in places], [y for _, y in places]
    axes.scatter(across, up, s=160 if n <= 16 else 60, color=_NODE, edgecolors=_INK, zorder=3)
    for rank, (x, y) in enumerate(places):
        axes.text(x, y, str(rank), ha="center", va="center", fontsize=7 if n <= 16 else 4, zorder=4)
    margin = 0.3 * min(1.0, max(max(across) - min(across), max(up) - min(up), 0.5))
    axes.set_xlim(min(across) - margin, max(across) + margin)
    axes.set_ylim(min(up) - margin, max(up) + margin)
    axes.set_aspect("equal")
    axes.axis("off")
