"""A linear classifier whose training is itself trained: by weights of samples, or by a decay for every weight."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy

from lightning_dopt import BilevelModule
from lightning_dopt._checks import check_float, check_int
from recipes.bilevel.data import Batch, TwoLevelData


class Classifier(BilevelModule):
    """What both tasks share. The classifier is the lower level, and the upper loss is its loss on held-out samples.

    Logs ``lower_loss`` and ``upper_loss`` every step and, over all workers, ``val/acc`` and ``val/loss`` on the test set and
    ``val/upper_loss`` on all held-out samples.

    Args:
        lower_lr: learning rate of the classifier, and of the auxiliary variable.
        upper_lr: learning rate of the upper level; 0 trains the classifier alone.
        pixels: per picture: 64 for digits, 784 for (Fashion-)MNIST.
    """

    def __init__(self, lower_lr: float, upper_lr: float, pixels: int) -> None:
        super().__init__()
        name = type(self).__name__
        self.net = nn.Linear(check_int(name, "pixels", pixels, 1), 10)
        nn.init.zeros_(self.net.weight)
        nn.init.zeros_(self.net.bias)
        self.lower_lr = check_float(name, "lower_lr", lower_lr, 0.0, open_low=True, open_high=True)
        self.upper_lr = check_float(name, "upper_lr", upper_lr, 0.0, open_high=True)
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def setup(self, stage: str) -> None:
        """Compare the sizes of the model with those of the data.

        Raises:
            ValueError: they differ.
        """
        name, pixels = type(self).__name__, self.net.in_features
        if self.data.pixels != pixels:
            raise ValueError(f"{name}(pixels={pixels}): must be {self.data.pixels}, as the pictures have")

    @property
    def data(self) -> TwoLevelData:
        """The data module.

        Raises:
            ValueError: it is another one.
        """
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, TwoLevelData):
            raise ValueError(f"{type(self).__name__}: needs recipes.bilevel.TwoLevelData as data module")
        return data

    def upper_loss(self, batch: Batch) -> Tensor:
        """Mean loss on held-out samples."""
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log what the consensus model gives."""
        pictures, labels, _ = batch
        logits = self.net(pictures)
        options: dict[str, Any] = {"sync_dist": True, "batch_size": len(labels), "add_dataloader_idx": False}
        loss = functional.cross_entropy(logits, labels)
        if dataloader_idx == 1:
            self.log("val/upper_loss", loss, **options)
            return
        self.accuracy(logits, labels)
        self.log("val/loss", loss, **options)
        self.log("val/acc", self.accuracy, on_step=False, on_epoch=True, prog_bar=True, add_dataloader_idx=False)


class HyperCleaning(Classifier):
    """Data hyper-cleaning: every training sample has a weight ``sigmoid(x_e)``, chosen to classify held-out samples well.

    ``G = mean_e sigmoid(x_e) CE(y; e) + decay |y|^2``, ``F = mean CE(y)`` on held-out samples with right labels. Also logs
    ``val/auc``: the chance that a random right label has a larger weight than a random wrong one.

    Args:
        lower_lr: learning rate of the classifier.
        upper_lr: learning rate of the logits; large, as each sees one over the batch of its sample's loss. 0: no cleaning.
        decay: weight decay of the classifier, which makes the lower problem strongly convex.
        pixels: per picture: 64 for digits, 784 for (Fashion-)MNIST.
        samples: of the lower level; 1007 are those of digits with ``held_out`` 0.3.
    """

    def __init__(
        self,
        lower_lr: float = 0.3,
        upper_lr: float = 100.0,
        decay: float = 0.002,
        pixels: int = 64,
        samples: int = 1007,
    ) -> None:
        super().__init__(lower_lr, upper_lr, pixels)
        self.decay = check_float("HyperCleaning", "decay", decay, 0.0)
        self.logits = nn.Parameter(torch.zeros(check_int("HyperCleaning", "samples", samples, 1)))

    def setup(self, stage: str) -> None:
        """See :meth:`Classifier.setup`; there must be a logit for every sample, too."""
        super().setup(stage)
        found = len(self.data.wrong)
        if found != len(self.logits):
            raise ValueError(f"HyperCleaning(samples={len(self.logits)}): must be {found}, as the lower level has")

    def upper_parameters(self) -> Iterable[nn.Parameter]:
        """The logits."""
        return [self.logits]

    def lower_loss(self, batch: Batch) -> Tensor:
        """Weighted mean loss."""
        pictures, labels, numbers = batch
        each = functional.cross_entropy(self.net(pictures), labels, reduction="none")
        penalty = sum(p.square().sum() for p in self.net.parameters())
        return (self.logits[numbers].sigmoid() * each).mean() + self.decay * penalty

    def on_validation_epoch_end(self) -> None:
        """How well weights tell wrong labels."""
        wrong = self.data.wrong.to(self.logits.device)
        if wrong.any():
            self.log("val/auc", area(self.logits.detach(), wrong), sync_dist=True)


class DecayTuning(Classifier):
    """Hyper-parameter tuning: every weight has a decay ``exp(x)`` of its own, chosen by held-out samples.

    ``G = mean CE(y) + sum exp(x) y^2``, ``F = mean CE(y)`` on held-out samples.

    Args:
        lower_lr: learning rate of the classifier.
        upper_lr: learning rate of the logarithms of the decays. 0: decays stay as they start.
        start: decay that all weights start with.
        pixels: per picture: 64 for digits, 784 for (Fashion-)MNIST.
    """

    def __init__(self, lower_lr: float = 0.3, upper_lr: float = 30.0, start: float = 0.005, pixels: int = 64) -> None:
        super().__init__(lower_lr, upper_lr, pixels)
        logarithm = torch.tensor(check_float("DecayTuning", "start", start, 0.0, open_low=True)).log()
        self.log_decay = nn.ParameterList(
            [nn.Parameter(logarithm.expand(p.shape).clone()) for p in self.net.parameters()]
        )

    def upper_parameters(self) -> Iterable[nn.Parameter]:
        """The logarithms of all decays."""
        return self.log_decay.parameters()

    def lower_loss(self, batch: Batch) -> Tensor:
        """Mean loss with decay."""
        pairs = zip(self.log_decay, self.net.parameters(), strict=True)
        penalty = sum((x.exp() * p.square()).sum() for x, p in pairs)
        return functional.cross_entropy(self.net(batch[0]), batch[1]) + penalty


def area(scores: Tensor, wrong: Tensor) -> Tensor:
    """Area under the ROC curve: the share of pairs (right, wrong) in which the right one scores higher; ties count half."""
    order = scores.double()
    right, bad = order[~wrong], order[wrong].sort().values
    below = torch.searchsorted(bad, right, side="left") + torch.searchsorted(bad, right, side="right")
    return below.double().mean() / (2 * len(bad))
