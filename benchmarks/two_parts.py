"""Benchmarks of two parts: what is learnt, without a limit on links, and how long steps take behind links of several speeds."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ranks import run_ranks

Results = dict[str, Any]
"""By arm."""
Curve = Callable[[str, Results, Results], Sequence[float] | None]
"""Arm, its losses and the times of all arms: the seconds at which the losses were measured; ``None``: it is not drawn."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that such benchmarks have in common."""
    parser.add_argument("--data", default=None, help="folder of texts (default: the standard library)")
    parser.add_argument("--link-tool", default="")
    parser.add_argument("--links", nargs="*", type=float, default=[100.0, 20.0], help="Mbit/s")
    parser.add_argument("--ms", type=float, default=0.0, help="latency of the links, one way")
    parser.add_argument("--only", choices=("learn", "time"), help="one part")
    parser.add_argument(
        "--learnt", default="", metavar="FILE", help="losses from the --json of an earlier run of the same setting"
    )
    parser.add_argument("--json", default="")
    parser.add_argument("--plot", default="", metavar="FILE")
    parser.add_argument("--part", choices=("learn", "time"), help=argparse.SUPPRESS)


def compare(
    args: argparse.Namespace,
    module: str,
    ranks: int,
    options: Sequence[str],
    learning: Iterable[Sequence[str]],
    report: Callable[[Results, dict[str, Results]], str],
    curve: Curve,
) -> None:
    """Both parts, the table and the picture.

    Args:
        args: With :func:`add_options`, and ``arms``.
        module: The benchmark, which runs on every rank with ``--part``.
        ranks: How many.
        options: Its other options.
        learning: Arms that learn in one start of the processes.
        report: The table of losses by arm and of times by link and arm.
        curve: Where the losses of an arm lie in time.
    """
    options = [*options, *([f"--data={args.data}"] if args.data else [])]

    def part(name: str, chosen: Sequence[str], mbit: float = 0.0, tool: str = "") -> Results:
        given = [*options, f"--part={name}", "--arms", *chosen]
        return run_ranks(module, given, ranks, tool, mbit, args.ms) or {}

    learnt: Results = json.loads(Path(args.learnt).read_text())["learnt"] if args.learnt else {}
    if args.only != "time" and not learnt:
        print("learning", flush=True)
        for chosen in learning:
            learnt |= part("learn", chosen)
    times: dict[str, Results] = {}
    for mbit in [] if args.only == "learn" else [0.0, *(args.links if args.link_tool else [])]:
        title = f"{mbit:g} Mbit/s" if mbit else "no limit"
        print(title, flush=True)
        times[title] = {}
        for arm in args.arms:
            times[title] |= part("time", [arm], mbit, args.link_tool)
    print(report(learnt, times))
    if args.json:
        Path(args.json).write_text(json.dumps({"learnt": learnt, "times": times}, indent=1))
    if args.plot and learnt and times:
        plot(learnt, times, curve, args.plot)


def plot(learnt: Results, times: dict[str, Results], curve: Curve, path: str) -> None:
    """Validation loss against time, one panel per link."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(times), figsize=(5.5 * len(times), 4.2), sharey=True, squeeze=False)
    for panel, (title, timed) in zip(panels[0], times.items(), strict=True):
        for arm, found in learnt.items():
            along = curve(arm, found, timed) if arm in timed else None
            if along is not None:
                panel.plot(along, [loss for _, loss in found["losses"]], label=arm)
        panel.set(title=title, xlabel="seconds", xscale="log")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("validation loss (nats per byte)")
    panels[0][-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
