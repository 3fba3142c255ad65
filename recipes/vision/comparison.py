"""Several plans, one after the other, in one set of processes: a small model, its two accuracies, and their history."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional

from lightning_dopt import Plan, ReplicaStrategy
from recipes.processes import on_ranks
from recipes.vision.data import ImageData

POINTS = 12  # measurements per training
TESTED = 2000  # pictures per measurement, at most


@dataclass(frozen=True)
class Method:
    """A plan, and the inner optimizer it goes with."""

    name: str
    plan: Plan
    lr: float
    momentum: float = 0.0


@dataclass
class Outcome:
    """Measurements of one training, in the order of its steps."""

    name: str
    steps: list[int] = field(default_factory=list)
    local: list[float] = field(default_factory=list)
    """Accuracy of the workers' own models, the mean over workers."""
    merged: list[float] = field(default_factory=list)
    """Accuracy of the mean of all models."""
    loss: list[float] = field(default_factory=list)
    """Loss of the mean of all models on the test pictures."""
    distance: list[float] = field(default_factory=list)
    """Root of the mean squared distance of the models to their mean."""
    bytes: list[int] = field(default_factory=list)
    """Sent so far by the busiest worker."""
    seconds: float = 0.0


class SmallNet(LightningModule):
    """Two convolutions and a linear layer, trained with SGD; without buffers that replicas could disagree on.

    Measures two models in one validation, which must see the consensus model: that one, and each worker's own.

    Args:
        in_chans: channels of the pictures.
        image_size: their height and width.
        lr: learning rate, constant.
        momentum: of SGD.
    """

    def __init__(self, in_chans: int, image_size: int, lr: float, momentum: float = 0.0) -> None:
        super().__init__()
        self.lr, self.momentum = lr, momentum
        stride = 1 if image_size < 16 else 2
        left = ((image_size + stride - 1) // stride + 1) // 2
        self.net = nn.Sequential(
            nn.Conv2d(in_chans, 16, 3, stride, 1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * left * left, 10),
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean loss of one batch."""
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log both accuracies, the loss of the consensus model, and bytes."""
        strategy = self.trainer.strategy
        assert isinstance(strategy, ReplicaStrategy)
        assert strategy.consensus is not None
        assert strategy.world is not None
        images, labels = batch
        merged = self.net(images)
        with strategy.consensus.own():
            own = self.net(images)
        count = len(labels)
        self.log("val/merged", _accuracy(merged, labels), batch_size=count)
        self.log("val/loss", functional.cross_entropy(merged, labels), batch_size=count)
        self.log("val/local", _accuracy(own, labels), batch_size=count, sync_dist=True)
        sent = torch.tensor(float(strategy.world.ledger.bytes), dtype=torch.float64)
        self.log("sent", sent, batch_size=1, sync_dist=True, reduce_fx="max")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(self.parameters(), self.lr, self.momentum)


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(-1) == labels).float().mean()


class History(Callback):
    """Keeps what every validation found, and tells it on rank 0.

    Args:
        name: of the method.
        tell: called with the outcome so far.
    """

    def __init__(self, name: str, tell: Callable[[Outcome], None]) -> None:
        self.outcome, self.tell = Outcome(name), tell

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the metrics over."""
        found = {name: float(value) for name, value in trainer.callback_metrics.items()}
        o = self.outcome
        o.steps.append(trainer.global_step)
        o.local.append(found["val/local"])
        o.merged.append(found["val/merged"])
        o.loss.append(found["val/loss"])
        o.distance.append(found["consensus/distance"])
        o.bytes.append(int(found["sent"]))
        if trainer.is_global_zero:
            self.tell(o)


def train(
    method: Method, data: ImageData, workers: int, steps: int, tell: Callable[[Outcome], None] = lambda _: None
) -> Outcome:
    """Train with one method, as one of ``workers`` processes that stand as if a launcher had started them."""
    began = time.monotonic()
    seed_everything(data.seed, verbose=False)
    history = History(method.name, tell)
    trainer = Trainer(
        accelerator="cpu",
        devices=workers,
        strategy=ReplicaStrategy(plan=method.plan),
        max_steps=steps,
        val_check_interval=_interval(steps),
        check_val_every_n_epoch=None,
        limit_val_batches=max(1, TESTED // data.batch_size),
        use_distributed_sampler=False,  # every worker measures its own model on all test pictures
        num_sanity_val_steps=0,
        callbacks=[history],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(SmallNet(data.in_chans, data.image_size, method.lr, method.momentum), datamodule=data)
    history.outcome.seconds = time.monotonic() - began
    return history.outcome


def _interval(steps: int) -> int:
    """The smallest divisor of ``steps`` that gives at most :data:`POINTS` measurements, so that the last is at the end."""
    return next(d for d in range(1, steps + 1) if steps % d == 0 and steps <= d * POINTS)


# ---------------------------------------------------------------------- all methods


def compare(methods: Sequence[Method], data: ImageData, workers: int, steps: int) -> list[Outcome]:
    """Train with every method in turn on ``workers`` processes of this machine.

    Raises:
        SystemExit: a process failed; it has printed why.
    """
    return on_ranks(partial(_all, methods, data, workers, steps), workers)[0]


def _all(methods: Sequence[Method], data: ImageData, workers: int, steps: int, rank: int) -> list[Outcome]:
    """What each of the processes does."""
    outcomes = []
    for k, method in enumerate(methods):
        tell = _progress(f"{k + 1:>2}/{len(methods)} {method.name:<18}", steps)
        outcomes.append(train(method, data, workers, steps, tell))
        if rank == 0:
            print(f"{outcomes[-1].seconds:>8.1f} s", file=sys.stderr, flush=True)
    return outcomes


def _progress(head: str, steps: int) -> Callable[[Outcome], None]:
    """One line that is written anew on a terminal, and once at the end elsewhere."""

    def tell(o: Outcome) -> None:
        live, last = sys.stderr.isatty(), o.steps[-1] >= steps
        if live or last:
            text = f"{head} step {o.steps[-1]:>5}/{steps}  local {o.local[-1]:.3f}  merged {o.merged[-1]:.3f}"
            print(f"\r{text}" if live else text, end="", file=sys.stderr, flush=True)

    return tell
