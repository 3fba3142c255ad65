"""Local updates behind slow links: loss, bytes, step time and time to a loss, beside DDP, its hooks and torchft's DiLoCo.

``python -m benchmarks.local_updates --link-tool PROGRAM`` starts ``--workers`` processes that train the byte GPT, in two parts:

1. *What is learnt.* Every arm trains from the same weights on the same data, each rank on its own share, and measures the
   validation loss as it goes. The learning rate of the inner optimizer is one for all; arms with an outer optimizer take
   the rate of ``--outer-lr`` with which they end best on the first seed, the other seeds use that.
2. *How long a step takes.* The same arms take a few rounds without a limit and behind each link of ``--links`` (Mbit/s,
   ``--ms`` one way). Rounds are timed as a whole, after one that is not counted.

``none`` does not communicate: the speed that all others are compared with. ``PROGRAM`` takes ``-n N --mbit R --ms L --
COMMAND`` and starts each rank behind a link of that speed. Every arm is timed in processes of its own; one whose processes
fail is left out of the table and said. ``--plot FILE`` draws loss against time.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

import lightning_dopt as dopt
from benchmarks import torchft_diloco, two_parts
from benchmarks.end_to_end import FP16DDP, CountingTimer, Losses, steps_to
from lightning_dopt import plans
from lightning_dopt.compress import E3M0
from recipes.llm import ByteGPT, TextFolder

POINTS = 10
TORCHFT = "torchft DiLoCo"


class PowerSGDDDP(L.pytorch.strategies.DDPStrategy):
    """DDP with torch's PowerSGD hook, which Lightning registers on GPUs only.

    All gradients are one bucket: the hook starts its further all-reduces when an earlier one ends, so with several buckets their
    order differs between ranks, and gloo aborts.
    """

    def __init__(self) -> None:
        super().__init__(bucket_cap_mb=1000)

    def configure_ddp(self) -> None:
        super().configure_ddp()
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=2)
        self.model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)  # type: ignore[union-attr, operator]


def arms(args: argparse.Namespace) -> dict[str, Callable[[float], Any]]:
    """Strategies by name, given the outer learning rate."""
    every, tau, n = args.sync_every, args.overlap or args.sync_every - 1, args.workers
    momentum, four = args.momentum, dopt.ErrorFeedback(E3M0())

    def plan(made: dopt.Plan) -> Any:
        return dopt.ReplicaStrategy(plan=made)

    return {
        "none": lambda lr: dopt.ReplicaStrategy(),
        "DDP": lambda lr: L.pytorch.strategies.DDPStrategy(),
        "DDP fp16": lambda lr: FP16DDP(),
        "DDP PowerSGD 4": lambda lr: PowerSGDDDP(),
        "DiLoCo": lambda lr: plan(plans.diloco(every, lr, momentum)),
        "DiLoCo int8": lambda lr: plan(plans.diloco(every, lr, momentum, codec=dopt.ErrorFeedback(dopt.Int8()))),
        "Streaming E3M0": lambda lr: plan(
            plans.streaming_diloco(
                every, args.fragments, tau, args.alpha, lr, momentum, "balanced", four,
                transport="two_phase" if n > 2 else "auto",
            )
        ),
        "Eager E3M0": lambda lr: plan(plans.eager_diloco(every, lr, momentum, codec=four)),
        "Delayed E3M0": lambda lr: plan(plans.delayed_diloco(every, lr, momentum, codec=four)),
    }  # fmt: skip


def has_outer(arm: str) -> bool:
    return arm.endswith(("DiLoCo", "int8", "E3M0")) and arm != TORCHFT


def model_of(args: argparse.Namespace) -> ByteGPT:
    heads = max(1, args.width // 36)
    return ByteGPT(
        n_layer=args.layers, n_head=heads, n_embd=args.width, context=64, lr=args.lr, warmup_steps=args.steps // 10
    )


def fit(arm: str, args: argparse.Namespace, outer_lr: float, seed: int, steps: int, measure: bool) -> dict[str, Any]:
    """One training under Lightning."""
    L.seed_everything(seed, verbose=False)
    world, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    timer, losses, s = CountingTimer(os.environ.get("SLOWNET_IF")), Losses(), arms(args)[arm](outer_lr)
    validation = {"val_check_interval": steps // POINTS, "check_val_every_n_epoch": None} if measure else {}
    trainer = L.Trainer(
        accelerator="cpu", devices=local, num_nodes=world // local, strategy=s, max_steps=steps, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        limit_val_batches=None if measure else 0, callbacks=[timer, losses], **validation,
    )  # fmt: skip
    data = TextFolder(path=args.data, context=64, batch_size=8, max_bytes=4_000_000, val_fraction=0.006)
    trainer.fit(model_of(args), datamodule=data)
    if measure:
        return {"losses": losses.found}
    timed = args.rounds * args.sync_every
    if arm.startswith("DDP"):  # all steps are alike, and slow
        timed = steps // 2
    found = {"seconds": statistics.mean(timer.steps[-timed:]), "counted": statistics.mean(timer.sent[-timed:])}
    if not arm.startswith("DDP"):
        entries = s.world.ledger.entries.items()
        found["stall"] = {label: entry.stall_s for label, entry in entries if label != "consensus"}
        found["bytes"] = s.world.ledger.bytes / steps
    return found


def fit_torchft(args: argparse.Namespace, steps: int) -> dict[str, Any]:
    """The same model in torchft's DiLoCo."""
    torch.manual_seed(0)
    model = model_of(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)

    def batches() -> Iterator[Tensor]:
        while True:
            yield torch.randint(0, 256, (8, 65))

    def loss(net: nn.Module, batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(net(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    seconds = torchft_diloco.train(model, optimizer, batches(), loss, steps, args.sync_every)
    return {"seconds": statistics.mean(seconds[-args.rounds * args.sync_every :])}


def worker(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    environment = {k: os.environ[k] for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    results: dict[str, Any] = {}
    for arm in args.arms:
        os.environ.update(environment)  # Lightning removes these after a fit
        if args.part == "time":
            steps = 6 if arm.startswith("DDP") else (1 + args.rounds) * args.sync_every
            if arm == TORCHFT:
                results[arm] = fit_torchft(args, steps)
            else:
                results[arm] = fit(arm, args, args.outer_lr[0], 0, steps, False)
            said = f"{1e3 * results[arm]['seconds']:.0f} ms per step"
        else:
            results[arm] = learn(arm, args, environment)
            said = f"{results[arm]['losses'][-1][1]:.4f} (outer lr {results[arm]['outer_lr']})"
        if environment["RANK"] == "0":
            print(f"  {arm:<16}{said}", flush=True)
    if environment["RANK"] == "0":
        Path(args.json).write_text(json.dumps(results))


def learn(arm: str, args: argparse.Namespace, environment: dict[str, str]) -> dict[str, Any]:
    """Losses by step: mean, and last ones of all seeds, at the best outer learning rate."""

    def run(rate: float, seed: int) -> list[tuple[int, float]]:
        os.environ.update(environment)
        return fit(arm, args, rate, seed, args.steps, True)["losses"]  # type: ignore[no-any-return]

    rates = args.outer_lr if has_outer(arm) else args.outer_lr[:1]
    first = {rate: run(rate, 0) for rate in rates}
    best = min(first, key=lambda rate: first[rate][-1][1])
    runs = [first[best], *(run(best, seed) for seed in range(1, args.seeds))]
    mean = [(points[0][0], statistics.mean(loss for _, loss in points)) for points in zip(*runs, strict=True)]
    return {
        "losses": mean,
        "ends": [r[-1][1] for r in runs],
        "outer_lr": best if has_outer(arm) else None,
        "by_outer_lr": {str(rate): r[-1][1] for rate, r in first.items()},
    }


def report(learnt: dict[str, Any], times: dict[str, dict[str, Any]]) -> str:
    """One line per arm; time is compared with that of training without communication over the same link."""
    lines, goal = [], None
    if learnt:
        reference = learnt["DDP"]["losses"]
        goal = reference[3 * len(reference) // 4 - 1][1]
    head = f"{'arm':<16}{'val loss':>9}{'spread':>8}{'outer lr':>9}{'bytes/step':>12}"
    for link in times:
        head += f" | {link + ': ms':>16}{'of none':>8}" + (f"{'to ' + format(goal, '.3f'):>10}" if goal else "")
    lines.append(head)
    for arm in dict.fromkeys([*learnt, *(a for t in times.values() for a in t)]):
        found = learnt.get(arm)
        line = f"{arm:<16}"
        if found:
            spread = max(found["ends"]) - min(found["ends"])
            line += f"{statistics.mean(found['ends']):>9.3f}{spread:>8.3f}{found['outer_lr'] or '':>9}"
        else:
            line += " " * 26
        sent = [t[arm]["counted"] for t in times.values() if t.get(arm, {}).get("counted")]
        line += f"{sent[-1]:>12,.0f}" if sent else " " * 12
        steps = steps_to(found["losses"], goal) if found and goal else None
        for timed in times.values():
            if arm not in timed:
                continue
            seconds = timed[arm]["seconds"]
            line += f" | {1e3 * seconds:>16.0f}{seconds / timed['none']['seconds']:>8.2f}"
            if goal:
                line += f"{f'{steps * seconds:.0f} s' if steps is not None else '':>10}"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--workers", type=int, default=4)
    p.add_argument("--sync-every", type=int, default=8, help="steps per round (H)")
    p.add_argument("--overlap", type=int, default=0, help="steps for a message of the streaming arm; 0: a whole round")
    p.add_argument("--fragments", type=int, default=2)
    p.add_argument("--alpha", type=float, default=0.5, help="share of the live weights that stays, streaming arm")
    p.add_argument("--momentum", type=float, default=0.9, help="of the outer optimizers")
    p.add_argument("--outer-lr", nargs="+", type=float, default=[0.2, 0.4, 0.7])
    p.add_argument("--arms", nargs="+", help="default: all, and torchft's DiLoCo (timed only) if it is installed")
    p.add_argument("--steps", type=int, default=300)
    p.add_argument("--seeds", type=int, default=2)
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--width", type=int, default=144, help="144 with 4 layers: 1.03 million parameters")
    p.add_argument("--rounds", type=int, default=3, help="rounds that are timed")
    two_parts.add_options(p)
    args = p.parse_args()
    known = [*arms(args), TORCHFT]
    if args.arms is None:
        args.arms = [*arms(args), *([TORCHFT] if torchft_diloco.installed() else [])]
    unknown = sorted(set(args.arms) - set(known))
    if unknown:
        p.error(f"--arms {unknown[0]!r}: must be of {', '.join(known)}")
    if args.part:
        worker(args)
    elif not {"none", "DDP"} <= set(args.arms):
        p.error("--arms must contain none and DDP")
    elif args.steps % POINTS:
        p.error(f"--steps {args.steps}: must be a multiple of {POINTS}")
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    """Both parts, the table and the picture."""
    names = ["workers", "sync_every", "overlap", "fragments", "alpha", "momentum"]
    names += ["steps", "seeds", "lr", "layers", "width", "rounds"]
    options = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in names]
    options += ["--outer-lr", *map(str, args.outer_lr)]
    learning = [[arm for arm in args.arms if arm not in ("none", TORCHFT)]]

    def curve(arm: str, found: two_parts.Results, timed: two_parts.Results) -> list[float]:
        return [step * timed[arm]["seconds"] for step, _ in found["losses"]]

    two_parts.compare(args, "benchmarks.local_updates", args.workers, options, learning, report, curve)


if __name__ == "__main__":
    main()
