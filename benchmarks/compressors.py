"""How fast do compressors encode and decode? In units of copying the tensor, on one thread, beside ``torch.topk``.

``python -m benchmarks.compressors`` packs and unpacks vectors of 1 and 25 million normal numbers (``--sizes``; 124 million, the
size of GPT-2, takes 3 GiB) and prints

* bytes per element on the wire,
* time to encode, to decode (:meth:`Compressor.decode_add`, i.e. added to a dense vector), and of a send with error feedback:
  the signal is added to the residual, the residual encoded, and what was sent taken out of it, as a ``Channel`` does,
* the same three as multiples of ``copy_`` of the same vector,
* the break-even bandwidth: over a faster link than that, two workers are quicker to send ``4 d`` bytes as they are,
  ``(4 d - payload) / (encode + decode)``.

Times are the least processor time of several repeats, each right after a ``copy_`` of the same vector, which other jobs disturb
least; they still share caches and memory. ``--rounds 3`` goes through everything three times and takes the least of each. The
line ``torch.topk`` is ``x.abs().topk(k)`` at 1 % alone, without gathering or packing anything. The quantizers of torchao and
bitsandbytes are measured beside ours if they are installed, else named as missing; their decoders write a new vector, ours
add. ``benchmarks.powersgd`` compares with PyTorch's PowerSGD. ``DOPT_COMPILE=1`` measures compiled loops. ``--plot FILE`` draws
encode and decode.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.peers import peers
from lightning_dopt.compress import (
    BF16,
    E3M0,
    FP8,
    FP16,
    QSGD,
    BlockTopK,
    Compose,
    Compressor,
    CountSketch,
    DCTTopK,
    FedZip,
    Int4,
    Int8,
    LowRank,
    Natural,
    RandK,
    RandomProjection,
    RandomShift,
    Sign,
    TernGrad,
    Threshold,
    TopK,
)

COMPRESSORS: list[Compressor] = [
    BF16(),
    FP16(),
    FP8(),
    Int8(),
    Int8(stochastic=True),
    Natural(),
    Int4(),
    E3M0(),
    QSGD(7),
    QSGD(1),
    TernGrad(),
    RandomShift(),
    Sign(),
    TopK(0.01),
    BlockTopK(0.01),
    Threshold(2.5758, capacity=0.011),
    Compose(TopK(0.01), Int8()),
    FedZip(0.01),
    DCTTopK(0.01),
    RandK(0.01),
    CountSketch(0.01),
    RandomProjection(0.01),
    LowRank(4),
]


def feed_back(c: Compressor, signal: Tensor, residual: Tensor) -> None:
    """A send with error feedback."""
    residual.add_(signal)
    c.decode_add(c.encode(residual, 1), residual, -1.0, 1)


def measure(d: int, seconds: float, only: list[str]) -> dict[str, dict[str, float]]:
    """Bytes per element, and seconds, for vectors (or square matrices) of ``d`` elements, by name."""
    x = torch.randn(d, generator=torch.Generator().manual_seed(0))
    out = torch.zeros(d)
    copies: list[float] = []

    def beside_copy(work: Callable[[], object]) -> float:
        times = pairs(work, lambda: out.copy_(x), seconds)
        copies.append(times[1])
        return times[0]

    topk = beside_copy(lambda: x.abs().topk(max(1, d // 100), sorted=False))
    rows: dict[str, dict[str, float]] = {"torch.topk at 1 %": {"bytes": 0.0, "encode": topk}}
    for peer in peers()[0] if not only or "peers" in only else []:
        packed = peer.encode(x)
        row = {"bytes": peer.nbytes(packed) / d, "encode": beside_copy(lambda p=peer: p.encode(x))}  # type: ignore[misc]
        row["decode"] = beside_copy(lambda p=peer, m=packed: p.decode(m))  # type: ignore[misc]
        row["gbits"] = 8e-9 * (4 * d - peer.nbytes(packed)) / (row["encode"] + row["decode"])
        rows[peer.name] = row
    side = int(d**0.5)
    for c in COMPRESSORS:
        if only and type(c).__name__ not in only:
            continue
        source, target = (x, out) if not c.layerwise else (t[: side * side].view(side, side) for t in (x, out))
        payload = c.encode(source, 1)
        row = {"bytes": payload.numel() / source.numel()}
        row["encode"] = beside_copy(lambda c=c, x=source: c.encode(x, 1))  # type: ignore[misc]
        row["decode"] = beside_copy(lambda c=c, p=payload, t=target: c.decode_add(p, t, 1.0, 1))  # type: ignore[misc]
        target.zero_()
        if not c.linear:
            row["send"] = beside_copy(lambda c=c, x=source, t=target: feed_back(c, x, t))  # type: ignore[misc]
        row["gbits"] = 8e-9 * (4 * source.numel() - payload.numel()) / (row["encode"] + row["decode"])
        rows[repr(c)] = row
    return {"copy_": {"seconds": min(copies)}, **rows}


def report(d: int, rows: dict[str, dict[str, float]]) -> None:
    """Print the numbers of :func:`measure` as multiples of a copy."""
    copy = rows["copy_"]["seconds"]
    print(
        f"\n{d:,} elements; copy_ takes {1e3 * copy:.2f} ms ({d / copy / 1e9:.2f} G/s); times below are multiples of it"
    )
    print(f"{'':48} {'B/elem':>7} {'encode':>7} {'decode':>7} {'send':>7} {'Gbit/s':>7}")
    for name, row in list(rows.items())[1:]:
        times = [f"{row[k] / copy:7.1f}" if k in row else " " * 7 for k in ("encode", "decode", "send")]
        print(f"{name:48} {row['bytes']:7.4f} {' '.join(times)} {row.get('gbits', 0.0):7.1f}", flush=True)


def best(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Of several rounds of :func:`measure` the one with the least time for each number, and the speed that pays anew."""
    found: dict[str, dict[str, float]] = {}
    for name, first in rounds[0].items():
        found[name] = {key: min(r[name][key] for r in rounds) for key in first}
        if "gbits" in first:
            found[name]["gbits"] = max(r[name]["gbits"] for r in rounds)
    return found


def plot(results: dict[str, dict[str, dict[str, float]]], file: str) -> None:
    """Draw encode and decode in copies, one panel for each size."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(6 * len(results), 8), squeeze=False)
    for axis, (size, rows) in zip(axes[0], results.items(), strict=True):
        copy, names = rows["copy_"]["seconds"], [n for n in rows if n != "copy_"]
        places = range(len(names))
        axis.barh([p - 0.2 for p in places], [rows[n]["encode"] / copy for n in names], 0.4, label="encode")
        axis.barh([p + 0.2 for p in places], [rows[n].get("decode", 0.0) / copy for n in names], 0.4, label="decode")
        axis.set_yticks(list(places), names, fontsize=7)
        axis.set_xscale("log")
        axis.invert_yaxis()
        axis.axvline(4.0, color="gray", linewidth=0.8)
        axis.set_xlabel(f"time / time of copy_, {int(size):,} elements")
        axis.legend()
    figure.tight_layout()
    figure.savefig(file)


def pairs(work: Callable[[], object], other: Callable[[], object], seconds: float) -> tuple[float, float]:
    """Least processor times of two calls that take turns, for about as long as told for the first, at least twice."""
    work()
    times: list[tuple[float, float]] = []
    while len(times) < 2 or sum(t for t, _ in times) < seconds:
        before = time.process_time()
        other()
        start = time.process_time()
        work()
        times.append((time.process_time() - start, start - before))
    return min(t for t, _ in times), min(t for _, t in times)


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000_000, 25_000_000], help="elements")
    parser.add_argument("--seconds", type=float, default=0.3, help="time for each number of the table")
    parser.add_argument("--only", nargs="*", default=[], help="classes of compressors, and peers; by default all")
    parser.add_argument("--rounds", type=int, default=1, help="times to go through everything; the least counts")
    parser.add_argument(
        "--plot", default="", metavar="FILE", help="draw encode and decode into this file (needs matplotlib)"
    )
    parser.add_argument("--json", default="", help="file for the numbers, times in seconds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for line in peers()[1]:
        print("missing", line)
    results = {}
    for d in options.sizes:
        results[str(d)] = best([measure(d, options.seconds, options.only) for _ in range(options.rounds)])
        report(d, results[str(d)])
    if options.plot:
        plot(results, options.plot)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
