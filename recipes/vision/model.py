"""A classifier with any timm model inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy

from lightning_dopt._checks import check_choice, check_float, check_int

Option = int | float | bool | str | list[int]

# A ConvNeXt of 0.2 million parameters for pictures of 32 x 32 and more: layer norms only, so no buffers that replicas
# could disagree on.
_TINY: dict[str, Option] = {"depths": [1, 1, 1, 1], "dims": [16, 32, 64, 128], "patch_size": 2}


def build(model_name: str, num_classes: int, in_chans: int, pretrained: bool, options: dict[str, Option]) -> nn.Module:
    """The timm model of that name, or the built-in one for ``tiny``.

    Raises:
        ImportError: timm is not installed.
        ValueError: timm has no such model, or ``tiny`` is asked for with pretrained weights.
    """
    try:
        import timm
    except ImportError:
        raise ImportError("TimmClassifier needs timm: pip install 'lightning_dopt[recipes]'") from None
    if model_name == "tiny":
        if pretrained:
            raise ValueError("TimmClassifier(pretrained=True): there are no weights for model_name='tiny'")
        model_name, options = "convnext_atto", {**_TINY, **options}
    if not timm.is_model(model_name):
        close = timm.list_models(f"*{model_name.split('_')[0]}*")[:5]
        hint = f"; timm has {', '.join(close)}" if close else ", see timm.list_models()"
        raise ValueError(f"TimmClassifier(model_name={model_name!r}): no such timm model{hint}")
    create: Callable[..., nn.Module] = timm.create_model
    return create(model_name, pretrained=pretrained, num_classes=num_classes, in_chans=in_chans, **options)


class TimmClassifier(LightningModule):
    """Classifies images of shape (B, in_chans, H, W) with cross-entropy. A batch is (images, labels of shape (B,)).

    Logs ``train/loss`` every step and, over all workers, ``val/loss`` and ``val/acc`` (share of right answers).

    Args:
        model_name: any name of ``timm.list_models()``, or ``tiny`` for a ConvNeXt of 0.2 million parameters.
        num_classes: classes to tell apart.
        in_chans: channels of the images: 1 for digits and (Fashion-)MNIST, 3 for CIFAR-10.
        lr: learning rate, constant.
        weight_decay: decay of the matrices and kernels; vectors (norms, biases) have none.
        optimizer: ``adamw``, or ``sgd``.
        momentum: of ``sgd``; 0 where the plan has momentum of its own. ``adamw`` ignores it.
        pretrained: start from timm's weights, which timm downloads.
        model_args: further arguments of the timm model, such as ``{"drop_path_rate": 0.1}``.

    Raises:
        ImportError: timm is not installed.
        ValueError: an unknown model or an argument out of range.
    """

    def __init__(
        self,
        model_name: str = "tiny",
        num_classes: int = 10,
        in_chans: int = 1,
        lr: float = 2e-3,
        weight_decay: float = 0.05,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        momentum: float = 0.9,
        pretrained: bool = False,
        model_args: dict[str, Option] | None = None,
    ) -> None:
        super().__init__()
        check_int("TimmClassifier", "num_classes", num_classes, 2)
        check_int("TimmClassifier", "in_chans", in_chans, 1)
        check_float("TimmClassifier", "lr", lr, 0.0, open_low=True)
        check_float("TimmClassifier", "weight_decay", weight_decay, 0.0)
        check_choice("TimmClassifier", "optimizer", optimizer, ("adamw", "sgd"))
        check_float("TimmClassifier", "momentum", momentum, 0.0, 1.0, open_high=True)
        self.save_hyperparameters()
        self.lr, self.weight_decay, self.optimizer, self.momentum = lr, weight_decay, optimizer, momentum
        self.model = build(model_name, num_classes, in_chans, pretrained, model_args or {})
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Logits, shape (B, num_classes)."""
        logits: Tensor = self.model(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean loss of one batch."""
        loss = functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy over all batches and workers."""
        images, labels = batch
        logits = self(images)
        self.accuracy(logits, labels)
        self.log("val/loss", functional.cross_entropy(logits, labels), sync_dist=True, batch_size=len(labels))
        self.log("val/acc", self.accuracy, on_step=False, on_epoch=True, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer in two groups: kernels and matrices with decay, vectors without."""
        weights = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in weights if p.dim() >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in weights if p.dim() < 2], "weight_decay": 0.0},
        ]
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum)
        return torch.optim.AdamW(groups, lr=self.lr)
