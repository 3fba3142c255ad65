"""What do low-rank methods give at a matched budget? One table; and what a low-rank layer costs beside a dense one.

``python -m benchmarks.lowrank`` trains a small LLaMA-style model on bytes with each method, several seeds each, and prints

* validation loss (nats per byte): mean and standard deviation over seeds, which change initialisation and order of the data;
* parameters, and how many of them are trained;
* forward FLOPs per token, counted by torch;
* peak memory of activations: the most that tensors made in one forward and backward pass held at a time, without parameters
  and their gradients;
* time of one training step: the median of processor time, which other jobs disturb least.

All methods see the same batches for the same number of steps with the same schedule. Budgets: the parameters of CR-Net at
``--rank`` (a share of the width); CoLA, SLTrain and plain low rank get the ranks that meet them. LoRA (needs peft) and GaLore
keep the dense matrices, so nothing matches their parameters: they get CR-Net's rank. Learning rates were not tuned by
method, but for GaLore's, which is its paper's. CR-Net comes again with activation checkpointing and with its own
recomputation, for memory and time alone, as their losses are the same.

``--text`` is a file or folder; without it the sources of the standard library. ``--linear`` times single layers instead:
dense, two thin products, and CR-Net's layer, at widths 512, 2048 and 4096.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import weakref
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lightning_dopt.lowrank import CoLA, CRNet, Factored, LoRA, SLTrain, convert
from lightning_dopt.lowrank.cross_layer import CrossLinear, Frame, run
from lightning_dopt.optim import GaLore
from recipes.llm import Llama, TextFolder
from recipes.llm.model import warmup_cosine
from recipes.options import Options

METHODS: dict[str, Any] = {
    "dense": None,
    "CR-Net": CRNet(),
    "CR-Net, beta fixed": CRNet(learn_beta=False),
    "plain low rank": Factored(),
    "plain, first block dense": Factored(first_dense=True),
    "CoLA": CoLA(),
    "SLTrain": SLTrain(),
    "LoRA": LoRA(),
    "GaLore": "galore",
}
MEASURED_ONLY = {
    "CR-Net, checkpoint": CRNet(recompute="checkpoint"),
    "CR-Net, inverse": CRNet(recompute="inverse"),
    "CR-Net, forward": CRNet(recompute="forward"),
}


def make(method: Any, args: argparse.Namespace, seed: int) -> Llama:
    torch.manual_seed(seed)
    shape = {"n_layer": args.layers, "n_head": args.heads, "n_embd": args.width, "hidden": args.hidden}
    model = Llama(vocabulary=256, context=args.context, **shape)
    if method is None or method == "galore":
        return model
    if isinstance(method, (CRNet, LoRA)):
        convert(model, method, "layers", rank=args.rank)
    else:
        convert(model, method, "layers", budget=sum(p.numel() for p in make(CRNet(), args, seed).parameters()))
    return model


def optimizer_of(model: Llama, method: Any, args: argparse.Namespace) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    if method != "galore":
        return torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0)
    inner = {id(p) for block in model.layers for p in block.parameters()}
    groups = [{"params": [p for p in trained if id(p) in inner]}]
    groups.append({"params": [p for p in trained if id(p) not in inner], "rank": 10**9, "lr": args.lr})
    return GaLore(groups, lr=1e-2, rank=round(args.rank * args.width), every=200, scale=0.25)


def batches(data: Tensor, args: argparse.Namespace, seed: int) -> Callable[[], Tensor]:
    generator, offsets = torch.Generator().manual_seed(seed), torch.arange(args.context + 1)

    def draw() -> Tensor:
        starts = torch.randint(len(data) - args.context - 1, (args.batch,), generator=generator)
        return data[starts[:, None] + offsets].long()

    return draw


def train(
    method: Any, args: argparse.Namespace, seed: int, text: tuple[Tensor, Tensor], steps: int
) -> dict[str, float]:
    """Train one model; the validation loss and the median of the processor time of a step."""
    model = make(method, args, seed).to(args.device)
    optimizer = optimizer_of(model, method, args)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: warmup_cosine(t, args.warmup, args.steps))
    draw, times = batches(text[0], args, seed), []
    for _ in range(steps):
        start = time.process_time()
        loss = model._loss(draw().to(args.device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        times.append(time.process_time() - start)
    model.eval()
    held_out = batches(text[1], args, 0)  # the same for all
    with torch.no_grad():
        losses = [model._loss(held_out().to(args.device)).item() for _ in range(args.val_batches)]
    return {"loss": statistics.mean(losses), "seconds": statistics.median(times)}


def sizes(method: Any, args: argparse.Namespace, text: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Parameters, FLOPs per token, peak memory of activations."""
    model, batch = make(method, args, 0), batches(text[0], args, 0)()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(batch[:, :-1])
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "flops": counter.get_total_flops() / (args.batch * args.context),
        "peak": peak(model, batch),
    }


class Peak(TorchDispatchMode):
    """The most bytes that tensors made within the block held at one time, views and freed ones not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self._made(t.untyped_storage(), before)
        return out

    def _made(self, storage: torch.UntypedStorage, before: set[int]) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self.known or place in before:
            return
        self.known.add(place)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, place, size)

    def _freed(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.live -= size


def peak(model: Llama, batch: Tensor) -> int:
    """Bytes that a forward and backward pass takes at most, above parameters and gradients."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    with Peak() as memory:
        loss = model._loss(batch)
        loss.backward()
    return memory.peak


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    torch.set_num_threads(1)
    method = {**METHODS, **MEASURED_ONLY}[name]
    data = TextFolder(path=args.text, pattern=args.pattern, context=args.context, max_bytes=args.max_bytes)
    data.setup("fit")
    assert data._train is not None
    assert data._val is not None
    text = (data._train.text, data._val.text)
    row: dict[str, Any] = sizes(method, args, text)
    trained = name in METHODS and args.seeds > 0
    seeds, steps = (range(args.seeds), args.steps) if trained else (range(1), args.timed_steps)
    runs = [train(method, args, seed, text, steps) for seed in seeds]
    row["seconds"] = statistics.median(run["seconds"] for run in runs)
    row["losses"] = [run["loss"] for run in runs] if trained else []
    print(line(name, row), flush=True)
    return row


def compare(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All rows of the table."""
    names = [name for name in {**METHODS, **MEASURED_ONLY} if not args.only or name in args.only]
    if "LoRA" in names and find_spec("peft") is None:
        print("LoRA is left out: peft is not installed")
        names.remove("LoRA")
    with get_context("spawn").Pool(args.jobs) as pool:
        return dict(zip(names, pool.map(partial(measure, args=args), names, chunksize=1), strict=True))


HEAD = "| method | validation loss | parameters | trained | MFLOP per token | peak, MB | step, ms |\n|---|---|---|---|---|---|---|"


def line(name: str, row: dict[str, Any]) -> str:
    """A row of the table."""
    losses = row["losses"]
    spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
    loss = f"{statistics.mean(losses):.3f}{spread}" if losses else "-"
    counts = f"{row['parameters']:,} | {row['trained']:,} | {row['flops'] / 1e6:.2f}"
    return f"| {name} | {loss} | {counts} | {row['peak'] / 1e6:.1f} | {1e3 * row['seconds']:.0f} |"


# ---------------------------------------------------------------------- single layers


def linear_times(widths: list[int], share: float, repeats: int) -> None:
    """Print milliseconds of processor time, forward and forward with backward, on one thread."""
    torch.set_num_threads(1)
    print("| width | rank | tokens | dense | two thin products | CR-Net's layer |\n|---|---|---|---|---|---|")
    for d in widths:
        tokens, r = max(64, 2**20 // d), round(share * d)
        x, y = torch.randn(tokens, d, requires_grad=True), torch.randn(tokens, d, requires_grad=True)
        dense = nn.Linear(d, d, bias=False)
        cross = CrossLinear(dense, r, "p", 1.0, True, 1e-6)
        cases: dict[str, Callable[[], Tensor]] = {
            "dense": lambda dense=dense, x=x: dense(x),
            "thin": lambda c=cross, x=x: functional.linear(functional.linear(x, c.a), c.b),
            "cross": lambda c=cross, x=x, y=y: run(Frame({"p": y}), c, x),
        }
        cells = [f"{least(f, repeats):.2f} / {least(f, repeats, True):.2f}" for f in cases.values()]
        print(f"| {d} | {r} | {tokens} | {' | '.join(cells)} |", flush=True)


def least(function: Callable[[], Tensor], repeats: int, backward: bool = False) -> float:
    """The least processor time of several calls, in milliseconds."""
    times, grad = [], None
    for _ in range(repeats):
        start = time.process_time()
        with torch.set_grad_enabled(backward):
            out = function()
        if backward:
            grad = torch.ones_like(out) if grad is None else grad
            out.backward(grad)
        times.append(time.process_time() - start)
    return 1e3 * min(times)


def main() -> None:
    parser = Options(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default=None)
    parser.add_argument("--pattern", default="*.py", help="of files in a folder")
    parser.add_argument("--max-bytes", type=int, default=4_000_000)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3, help="0 trains nothing: memory and time alone")
    parser.add_argument("--timed-steps", type=int, default=20, help="steps of what is measured without training")
    parser.add_argument("--only", nargs="+", default=None, help="rows, by name")
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time, each on one thread")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=172)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--val-batches", type=int, default=64)
    parser.add_argument("--rank", type=float, default=0.25, help="share of the width")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--linear", action="store_true", help="time single layers instead")
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 2048, 4096], help="of --linear")
    parser.add_argument("--repeats", type=int, default=7, help="of --linear")
    args = parser.parse_args()
    if args.linear:
        linear_times(args.widths, args.rank, args.repeats)
        return
    unknown = sorted(set(args.only or ()) - {*METHODS, *MEASURED_ONLY})
    if unknown:
        parser.error(f"--only: no row {unknown[0]!r}; there are {', '.join({**METHODS, **MEASURED_ONLY})}")
    rows = compare(args)
    table = [HEAD, *(line(name, row) for name, row in rows.items())]
    print("\n" + "\n".join(table))
    uniform = math.log(256)
    assert all(loss < uniform for row in rows.values() for loss in row["losses"]), "a model has learnt nothing"
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
