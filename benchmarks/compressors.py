"""How fast do compressors encode and decode? In units of copying the tensor, on one thread, beside ``torch.topk``.

``python -m benchmarks.compressors`` packs and unpacks vectors of 1 and 25 million normal numbers (``--sizes``) and prints

* bytes per element on the wire,
* time to encode and to decode (:meth:`Compressor.decode_add`, i.e. added to a dense vector),
* both as multiples of ``copy_`` of the same vector, and the rate of each in 10^9 elements per second.

Times are the least processor time of several repeats, which other jobs disturb least; they still share caches and memory.
The line ``torch.topk`` is ``x.abs().topk(k)`` at 1 % alone, without gathering or packing anything.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

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


def least(work: Callable[[], object], seconds: float) -> float:
    """Least processor time of one call, in seconds; calls are repeated for about as long as told, at least twice."""
    work()
    times: list[float] = []
    while len(times) < 2 or sum(times) < seconds:
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def measure(d: int, seconds: float) -> None:
    """Print the table for vectors (or square matrices) of ``d`` elements."""
    x = torch.randn(d, generator=torch.Generator().manual_seed(0))
    out = torch.zeros(d)
    copy = least(lambda: out.copy_(x), seconds)
    topk = least(lambda: x.abs().topk(max(1, d // 100), sorted=False), seconds)
    print(f"\n{d:,} elements; copy_ takes {1e3 * copy:.2f} ms ({d / copy / 1e9:.2f} G/s)")
    print(f"{'':40} {'B/elem':>7} {'encode ms':>9} {'decode':>7} {'/copy':>6} {'/copy':>6} {'G/s':>6} {'G/s':>6}")
    print(f"{'torch.topk at 1 %':40} {'':7} {1e3 * topk:9.2f} {'':7} {topk / copy:6.1f} {'':6} {d / topk / 1e9:6.3f}")
    side = int(d**0.5)
    for c in COMPRESSORS:
        source, target = (x, out) if not c.layerwise else (t[: side * side].view(side, side) for t in (x, out))
        payload = c.encode(source, 1)
        times = [
            least(lambda c=c, x=source: c.encode(x, 1), seconds),  # type: ignore[misc]
            least(lambda c=c, p=payload, t=target: c.decode_add(p, t, 1.0, 1), seconds),  # type: ignore[misc]
        ]
        print(
            f"{c!r:40} {payload.numel() / source.numel():7.4f} {1e3 * times[0]:9.2f} {1e3 * times[1]:7.2f} "
            f"{times[0] / copy:6.1f} {times[1] / copy:6.1f} {d / times[0] / 1e9:6.2f} {d / times[1] / 1e9:6.2f}",
            flush=True,
        )


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000_000, 25_000_000], help="elements")
    parser.add_argument("--seconds", type=float, default=0.3, help="time for each number of the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for d in options.sizes:
        measure(d, options.seconds)


if __name__ == "__main__":
    main()
