"""DES-LOC's claim: half of Local Adam's bytes at the same loss, and states that workers who join do not upset.

``python -m benchmarks.desloc`` trains a small byte-level transformer on the Python standard library with four simulated workers
under AdamW; half-way four more join, with the mean model and, where states are averaged, their means. Arms:

* ``every step``: gradients averaged in every step (data parallel Adam);
* ``Local Adam``: parameters and both moments averaged every ``K`` steps;
* ``DES-LOC``: parameters every ``K``, first moments every ``3 K``, second ones every ``6 K``;
* ``local states``: parameters every ``K``, moments never;
* ``reset states``: the same, and moments start at zero in every round.

Printed are the bytes that a worker sends per step, the held-out loss of the mean model before the join, just after it and at the
end, each with its standard deviation over seeds. ``--plot FILE`` draws the losses. Deterministic on one machine.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.budgets import Text, loss
from lightning_dopt import Every, Plan, Simulation, Sync, plans
from lightning_dopt.local import Restart
from recipes.llm.model import ByteGPT

N = 4
MOMENTS = ("exp_avg", "exp_avg_sq")


def arms(every: int) -> dict[str, Plan]:
    """The plans; see above."""
    return {
        "every step": Plan([Sync(what="gradients")]),
        "Local Adam": plans.desloc(every, dict.fromkeys(MOMENTS, every)),
        "DES-LOC": plans.desloc(every),
        "local states": Plan([Sync(Every(every))]),
        "reset states": Plan([Sync(Every(every))], [Restart()]),
    }


@dataclass
class Curve:
    """Held-out loss of the mean model by step, and what a worker sent per step before the join."""

    losses: dict[int, float] = field(default_factory=dict)
    bytes_per_step: float = 0.0


def train(text: Text, plan: Plan, args: argparse.Namespace, seed: int) -> Curve:
    """Half of the steps with four workers, half with eight."""
    torch.manual_seed(seed)
    model = ByteGPT(n_layer=2, n_head=2, n_embd=args.width, context=64)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    half, curve, held_out = args.steps // 2, Curve(), text.held_out()

    def simulation(n: int, weights: dict[str, Tensor], before: int) -> Simulation:
        def backward(rank: int, mine: dict[str, Tensor], step: int) -> None:
            batch = text.batch(rank + 8 * seed, before + step)
            gradients = torch.autograd.grad(loss(model, mine, batch), list(mine.values()))
            for p, g in zip(mine.values(), gradients, strict=True):
                p.grad = g

        return Simulation(
            plan, n, lambda rank: {k: t.clone() for k, t in weights.items()}, backward,
            lambda parameters: torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.95)),
        )  # fmt: skip

    def mean(run: Simulation) -> dict[str, Tensor]:
        return {name: run.stacked(name).mean(0) for name in start}

    def measure(run: Simulation, before: int, steps: int) -> None:
        for _ in range(steps // args.every):
            run.run(args.every)
            step = before + run.engines[0].step
            if step % (6 * args.every) == 0 or step == half + args.every:
                with torch.no_grad():
                    curve.losses[step] = float(loss(model, mean(run), held_out))

    first = simulation(N, start, 0)
    measure(first, 0, half)
    curve.bytes_per_step = max(first.bytes) / half
    second = simulation(2 * N, mean(first), half)
    _hand_over(first, second, plan)
    measure(second, half, args.steps - half)
    return curve


def _hand_over(first: Simulation, second: Simulation, plan: Plan) -> None:
    """Those who stay keep their moments; those who join get the mean of those that the plan averages, and zeros of others."""
    averaged = {sync.what.key for sync in plan if sync.what.slot == "optimizer"}  # type: ignore[attr-defined]
    if any(sync.what.slot == "gradients" for sync in plan):
        averaged = set(MOMENTS)  # they are equal on all ranks
    old = [optimizer.state_dict() for optimizer in first.optimizers]
    for rank, optimizer in enumerate(second.optimizers):
        state = copy.deepcopy(old[rank % N])
        for number, values in state["state"].items() if rank >= N else ():
            for key in MOMENTS:
                every = torch.stack([o["state"][number][key] for o in old])
                values[key] = every.mean(0) if key in averaged else torch.zeros_like(every[0])
        optimizer.load_state_dict(state)


def plot(curves: dict[str, list[Curve]], half: int, path: str) -> None:
    """Mean loss by step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(7, 4.2))
    for name, found in curves.items():
        steps = list(found[0].losses)
        panel.plot(steps, [statistics.mean(c.losses[s] for c in found) for s in steps], label=name)
    panel.axvline(half, color="grey", lw=0.8)
    panel.set(xlabel="steps; four more workers join at the line", ylabel="held-out loss (nats per byte)")
    panel.grid(alpha=0.3)
    panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=576)
    parser.add_argument("--every", type=int, default=8, help="steps between averages of the parameters (K)")
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--plot", default="", metavar="FILE")
    args = parser.parse_args()
    if args.steps % (12 * args.every):
        parser.error(f"--steps {args.steps}: must be a multiple of {12 * args.every}, twelve times --every")
    torch.set_num_threads(1)
    text, half = Text(), args.steps // 2
    places = [half, half + args.every, args.steps]
    print(f"{'arm':<14}{'bytes/step':>12}" + "".join(f"{f'loss at {p}':>20}" for p in places))
    curves: dict[str, list[Curve]] = {}
    for name, plan in arms(args.every).items():
        curves[name] = found = [train(text, plan, args, seed) for seed in range(args.seeds)]
        line = f"{name:<14}{found[0].bytes_per_step:>12,.0f}"
        for place in places:
            values = [curve.losses[place] for curve in found]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            line += f"{f'{statistics.mean(values):.4f} +- {spread:.4f}':>20}"
        print(line, flush=True)
    if args.plot:
        plot(curves, half, args.plot)


if __name__ == "__main__":
    main()
