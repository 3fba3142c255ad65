"""Does a step of gossip get dearer with more workers? Messages, bytes and times from 4 to 16 real ranks.

``python -m benchmarks.gossip_scaling`` starts 4, 8 and 16 processes in turn. They synchronise the same buffer after every
step, without training anything: over the one-peer exponential graph, over a ring, over the complete graph, and with a
plain ``torch.distributed.all_reduce`` beside them, in turns. For every number of ranks it prints, per rank and step,

* messages and bytes that were really sent (those of an all-reduce by the formula of the ring algorithm),
* wall time, the median over rounds, and its ratio to 4 ranks,
* processor time of the rank's process, all threads: what a step costs a machine that has a core for every rank,
* the time over links of ``--mbit`` and ``--ms`` by the virtual clock (:func:`lightning_dopt.forecast.forecast`).

Where ranks outnumber cores, wall time grows with the number of ranks whatever they do; then only the other columns tell
how a method scales. One-peer gossip must send one message per step at any size, or the benchmark fails.

Measured on a machine of 2 cores that others used as well (load 11), 23 s (one run; the sizes between left out)::

    arm                    ranks  messages      MB   wall ms     x4  /torch   cpu ms     x4   link ms     x4
    one-peer exponential       4      1.00    1.00      2.18   1.00    0.42     1.11   1.00      81.0   1.00
    ring                       4      2.00    2.00      3.38   1.00    0.65     1.44   1.00     161.0   1.00
    complete (all-reduce)      4      6.00    1.50      5.54   1.00    1.07     2.21   1.00     126.0   1.00
    torch all_reduce           4      6.00    1.50      5.17   1.00    1.00     2.11   1.00     126.0   1.00
    one-peer exponential      16      1.00    1.00      8.77   4.01    0.19     1.19   1.08      81.0   1.00
    ring                      16      2.00    2.00     12.55   3.71    0.27     1.85   1.28     161.0   1.00
    complete (all-reduce)     16     30.00    1.88     42.27   7.63    0.90     5.81   2.62     180.0   1.43
    torch all_reduce          16     30.00    1.88     46.73   9.03    1.00     5.79   2.74     180.0   1.43
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dopt import Link, Plan, ProcessGroupWorld, plans
from lightning_dopt.comm import Pending
from lightning_dopt.engine import Engine
from lightning_dopt.forecast import forecast
from lightning_dopt.topology import Complete, OnePeerExponential, Ring
from recipes.options import Options
from recipes.processes import on_ranks

PLANS: dict[str, Plan] = {
    "one-peer exponential": plans.gossip(OnePeerExponential()),
    "ring": plans.gossip(Ring()),
    "complete (all-reduce)": plans.gossip(Complete()),
}
PLAIN = "torch all_reduce"


@dataclass(frozen=True)
class Row:
    """What one arm costs the busiest of ``n`` ranks per step."""

    arm: str
    n: int
    messages: float
    bytes: float
    wall_ms: float
    processor_ms: float
    link_ms: float


class CountingWorld(ProcessGroupWorld):
    """Real processes; counts the messages a rank hands to the wire.

    Args:
        timeout: see :class:`ProcessGroupWorld`.
    """

    def __init__(self, timeout: timedelta) -> None:
        super().__init__(timeout=timeout)
        self.messages = 0

    def exchange(
        self,
        send: Mapping[int, Tensor],
        receive: Mapping[int, int],
        label: str,
        boxes: Mapping[int, Tensor] | None = None,
    ) -> Pending:
        """One message to every neighbour."""
        self.messages += len(send)
        return super().exchange(send, receive, label, boxes)

    def all_reduce(self, tensor: Tensor, label: str, *, overhead: bool = False) -> Pending:
        """Those of the ring algorithm: ``n - 1`` to reduce and scatter, ``n - 1`` to gather."""
        self.messages += 2 * (self.size - 1)
        return super().all_reduce(tensor, label, overhead=overhead)


def measure(elements: int, steps: int, rounds: int, rank: int) -> dict[str, tuple[float, float, float, float]]:
    """On one rank: messages, bytes, wall and processor milliseconds per step by arm, medians over rounds."""
    n = dist.get_world_size()
    worlds = {name: CountingWorld(timedelta(minutes=5)) for name in PLANS}
    engines = {name: Engine(plan, {"x": torch.zeros(elements)}, worlds[name]) for name, plan in PLANS.items()}
    buffer = torch.zeros(elements)

    def plain() -> None:
        dist.all_reduce(buffer)
        buffer.div_(n)

    arms: dict[str, Callable[[], None]] = {name: partial(_step, engine) for name, engine in engines.items()}
    arms[PLAIN] = plain
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name, step in arms.items():
            taken = _timed(step, steps)
            if turn:  # the first round warms up
                times[name].append(taken)
    done = steps * (rounds + 1)
    found = {}
    for name, pairs in times.items():
        wall, processor = (1e3 * statistics.median(p[k] for p in pairs) / steps for k in (0, 1))
        world = worlds.get(name, worlds["complete (all-reduce)"])
        found[name] = (world.messages / done, world.ledger.bytes / done, wall, processor)
    return found


def _step(engine: Engine) -> None:
    engine.run(engine.before_step())
    engine.run(engine.after_step())


def _timed(step: Callable[[], None], steps: int) -> tuple[float, float]:
    """Seconds and processor seconds of ``steps`` steps."""
    dist.barrier()
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    return time.perf_counter() - wall, time.process_time() - processor


def rows(n: int, elements: int, steps: int, rounds: int, link: Link) -> list[Row]:
    """All arms on ``n`` real ranks, and over links by the virtual clock."""
    ranks = on_ranks(partial(measure, elements, steps, rounds), n)
    found = []
    for arm in ranks[0]:
        busiest = [max(rank[arm][k] for rank in ranks) for k in range(4)]
        plan = PLANS.get(arm, PLANS["complete (all-reduce)"])
        seconds = forecast(plan, n, {"x": (elements,)}, steps, link).seconds / steps
        messages, nbytes, wall, processor = busiest
        found.append(Row(arm, n, messages, nbytes, wall, processor, 1e3 * seconds))
    return found


def check(found: list[Row]) -> None:
    """One-peer gossip is flat in everything that can be counted exactly.

    Raises:
        SystemExit: it is not.
    """
    flat = {(r.messages, r.bytes, round(r.link_ms, 6)) for r in found if r.arm == "one-peer exponential"}
    if len(flat) != 1 or next(iter(flat))[0] != 1.0:
        raise SystemExit(f"one-peer gossip is not one message per step at every size: {sorted(flat)}")


def table(found: list[Row]) -> str:
    """One line per arm and size; ``x4`` is the ratio to the same arm on the fewest ranks, ``/torch`` to its all-reduce."""
    least = min(r.n for r in found)
    base = {r.arm: r for r in found if r.n == least}
    plain = {r.n: r for r in found if r.arm == PLAIN}
    head = (
        "arm",
        "ranks",
        "messages",
        "MB",
        "wall ms",
        f"x{least}",
        "/torch",
        "cpu ms",
        f"x{least}",
        "link ms",
        f"x{least}",
    )
    form = "{:<23}{:>5}{:>10}{:>8}{:>10}{:>7}{:>8}{:>9}{:>7}{:>10}{:>7}"
    lines = [form.format(*head)]
    for r in found:
        b = base[r.arm]
        real = [f"{r.messages:.2f}", f"{r.bytes / 1e6:.2f}", f"{r.wall_ms:.2f}", f"{r.wall_ms / b.wall_ms:.2f}"]
        real += [f"{r.wall_ms / plain[r.n].wall_ms:.2f}", f"{r.processor_ms:.2f}"]
        scaled = [f"{r.processor_ms / b.processor_ms:.2f}", f"{r.link_ms:.1f}", f"{r.link_ms / b.link_ms:.2f}"]
        lines.append(form.format(r.arm, r.n, *real, *scaled))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> list[Row]:
    """Measure all sizes, check and print."""
    p = Options(prog="python -m benchmarks.gossip_scaling", description=(__doc__ or "").split("\n")[0])
    p.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16])
    p.add_argument("--elements", type=int, default=250_000, help="float32 numbers in the buffer")
    p.add_argument("--steps", type=int, default=20, help="per arm and round")
    p.add_argument("--rounds", type=int, default=3, help="besides one that warms up")
    p.add_argument("--mbit", type=float, default=100.0, help="of the virtual links")
    p.add_argument("--ms", type=float, default=1.0, help="latency of the virtual links")
    p.add_argument("--json", type=Path)
    given = p.parse_args(arguments)
    for name in ("elements", "steps", "rounds"):
        if getattr(given, name) < 1:
            p.error(f"--{name} {getattr(given, name)}: must be at least 1")
    if min(given.ranks) < 4:
        p.error(f"--ranks {' '.join(map(str, given.ranks))}: must be at least 4 each; a smaller ring is complete")
    link, found = Link(given.mbit, given.ms), []
    for n in given.ranks:
        found += rows(n, given.elements, given.steps, given.rounds, link)
    check(found)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    print(table(found))
    if max(given.ranks) > cores:
        print(
            f"{cores} cores: from {cores + 1} ranks on wall times measure the queue for them; cpu and link columns do not"
        )
    print(f"one-peer gossip: one message of {found[0].bytes / 1e6:.2f} MB per rank and step at every size")
    if given.json:
        given.json.write_text(json.dumps([asdict(r) for r in found], indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
