"""The documentation's tables and pictures of all topologies that have a name, made from the topologies themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_dopt.topology.base import Topology
from lightning_dopt.topology.plot import draw
from lightning_dopt.topology.registry import by_name, names
from lightning_dopt.topology.spectrum import summary

SIZES = (8, 12, 32)
PICTURED = 8


def exists(topology: Topology, n: int) -> bool:
    """Whether the topology can be made for ``n`` workers."""
    try:
        topology.check(n)
    except ValueError:
        return False
    return True


def table(sizes: Sequence[int] = SIZES) -> str:
    """A Markdown table: for every name and number of workers the degree, the messages per rank and round, the gap.

    The gap is that per round of one period (of ``n`` rounds where graphs never repeat); "exact in 3" stands for the exact
    mean after three rounds, "-" for a number of workers for which the graph does not exist.
    """
    heads = [f"{what}, n = {n}" for n in sizes for what in ("degree", "messages", "gap")]
    lines = [f"| name | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for name in names():
        topology = by_name(name)
        cells = [cell for n in sizes for cell in _cells(topology, n)]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(topology: Topology, n: int) -> tuple[str, str, str]:
    if not exists(topology, n):
        return "-", "-", "-"
    facts = summary(topology, n)
    gap = f"exact in {facts.rounds}" if facts.exact else f"{facts.spectral_gap:.3f}"
    return str(facts.max_degree), f"{facts.messages:.3g}", gap


def pictures(folder: Path, n: int = PICTURED) -> dict[str, Path]:
    """Draw every topology that has a name and exists for ``n`` workers into ``folder``, as SVG; the files by name.

    Raises:
        ImportError: matplotlib is not installed; the message names the command that installs it.
    """
    return {name: draw(by_name(name), n, folder / f"{name}.svg") for name in names() if exists(by_name(name), n)}
