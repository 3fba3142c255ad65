"""What budgets per tensor save on real gradients: a byte-level transformer, bytes and errors against uniform settings.

``python -m benchmarks.budgets`` trains the model of ``recipes/llm`` on the Python standard library with two simulated
workers, once for each codec, and prints bytes per message, the error (what error feedback keeps back, summed over the
tensors as norms and as squares, in the mean over workers and all steps after the first choice) and the loss on text of
other files. Deterministic; takes about a minute per line on one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call

import lightning_dopt as dopt
from lightning_dopt.compress import QSGD, ByteBudget, Compressor, DenseBelow, LGreCo
from lightning_dopt.compress.allocation import Allocation
from recipes.llm.data import TextFolder
from recipes.llm.model import ByteGPT

WORKERS, BATCH, CONTEXT = 2, 8, 64


class Text:
    """Batches that are a function of worker and step."""

    def __init__(self) -> None:
        data = TextFolder(max_bytes=2_000_000, context=CONTEXT)
        data.setup("fit")
        assert data._train is not None
        assert data._val is not None
        self.train, self.val = data._train, data._val

    def batch(self, rank: int, step: int) -> Tensor:
        """Windows of one step, shape (BATCH, CONTEXT + 1)."""
        g = torch.Generator().manual_seed(1000 * step + rank)
        return self.train.__getitems__(torch.randint(len(self.train), (BATCH,), generator=g).tolist()).long()

    def held_out(self) -> Tensor:
        """The first 256 windows for validation."""
        return self.val.__getitems__(list(range(256))).long()


def loss(model: ByteGPT, weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Mean loss in nats per byte."""
    logits = functional_call(model, weights, (tokens[:, :-1],))
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def train(text: Text, codec: Compressor, steps: int, every: int) -> tuple[float, float, float, float]:
    """Bytes of a message, sum of norms and sum of squares of the errors, and loss on held-out text."""
    torch.manual_seed(0)
    model = ByteGPT(n_layer=4, n_head=4, n_embd=128, context=CONTEXT)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}

    def backward(rank: int, weights: dict[str, Tensor], step: int) -> None:
        grads = torch.autograd.grad(loss(model, weights, text.batch(rank, step)), list(weights.values()))
        for p, g in zip(weights.values(), grads, strict=True):
            p.grad = g

    plan = dopt.Plan([dopt.Sync(what=dopt.Gradients(bucket_mb=0), codec=dopt.ErrorFeedback(codec))])
    run = dopt.Simulation(
        plan, WORKERS, lambda rank: start, backward, lambda ps: torch.optim.AdamW(ps, lr=1e-3, betas=(0.9, 0.95))
    )
    channels = [engine.gradients[0][0].runner.lanes[0].channel for engine in run.engines]
    nbytes, norms, squares, count = 0.0, 0.0, 0.0, 0
    for step in range(steps):
        length = channels[0].message_bytes
        run.run(1)
        if step < every:
            continue
        count += 1
        nbytes += length
        for channel in channels:
            each = [float(v.square().sum()) for v in channel.lane.views(channel.memory_state["residual"])]
            norms += sum(e**0.5 for e in each) / WORKERS
            squares += sum(each) / WORKERS
    with torch.no_grad():
        final = float(loss(model, run.replicas[0], text.held_out()))
    return nbytes / count, norms / count, squares / count, final


def settings(name: str, every: int) -> dict[str, Compressor]:
    """The uniform setting, and budgets that it is compared with."""
    codec: Compressor = {
        "low_rank": dopt.LowRank(4),
        "top_k": DenseBelow(dopt.TopK(0.01), 1000),
        "qsgd": DenseBelow(QSGD(7), 1000),
    }[name]
    uniform = LGreCo(codec, [codec], every=10**9)  # each tensor by itself, all alike
    shapes = [p.shape for p in ByteGPT(n_layer=4, n_head=4, n_embd=128, context=CONTEXT).parameters()]
    nbytes = int(Allocation(uniform, shapes).sizes.sum())
    lines: dict[str, Compressor] = {f"{codec!r} of each tensor": uniform}
    if name != "low_rank":
        lines[f"{codec!r} of all as one vector"] = codec
    lines["LGreCo, l2"] = LGreCo(codec, every=every)
    lines["LGreCo, l2sq"] = LGreCo(codec, every=every, metric="l2sq")
    lines["ByteBudget of as many bytes"] = ByteBudget(codec, nbytes, every=every)
    return lines


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--codec", choices=["low_rank", "top_k", "qsgd"], default="low_rank")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=50)
    options = parser.parse_args()
    torch.set_num_threads(1)
    text = Text()
    print(f"{Path(__file__).name} --codec {options.codec} --steps {options.steps} --every {options.every}")
    print(f"{'':<70}{'bytes':>10}{'norms':>9}{'squares':>10}{'loss':>8}")
    for name, codec in settings(options.codec, options.every).items():
        nbytes, norms, squares, final = train(text, codec, options.steps, options.every)
        print(f"{name:<70}{nbytes:>10,.0f}{norms:>9.4f}{squares:>10.5f}{final:>8.4f}", flush=True)


if __name__ == "__main__":
    main()
