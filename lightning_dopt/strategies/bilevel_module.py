"""BilevelModule: a LightningModule with two losses and two sets of parameters."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer


class BilevelModule(LightningModule):
    """Minimises :meth:`upper_loss` over the upper parameters, at the lower ones that minimise :meth:`lower_loss`.

    Derive from it (an existing module: ``class Mine(BilevelModule, Existing)``) and give the two losses and
    :meth:`upper_parameters`; all other trainable parameters are lower ones. Train it with ``strategy="dsoba"`` or ``"sparkle"``,
    on one device, too. The training step is made here: derivatives, the auxiliary variable and the order of updates are the
    strategy's, and so is the communication. Both losses are logged, as ``lower_loss`` and ``upper_loss``.

    A training batch is a mapping with the keys ``"lower"`` and ``"upper"``: let ``train_dataloader`` return two loaders,
    ``{"lower": ..., "upper": ...}``, the shorter of which starts again until the longer one ends; or override
    :meth:`level_batches`. A loss may be evaluated several times per step: what it logs counts once, and buffers such as running
    statistics move once. Dropout draws the same numbers each time.
    """

    lower_lr: float = 0.1
    """Learning rate of the default optimizer of the lower level."""

    upper_lr: float = 0.1
    """Learning rate of the default optimizer of the upper level."""

    @property
    def automatic_optimization(self) -> bool:
        """Off: the strategy drives the optimizers."""
        return False

    @automatic_optimization.setter
    def automatic_optimization(self, value: bool) -> None:
        if value:
            raise ValueError(f"{type(self).__name__}(automatic_optimization=True): the strategy drives the optimizers")

    @abstractmethod
    def upper_loss(self, batch: Any) -> Tensor:
        """``F(x, y)`` on the upper batch of one worker: what the upper parameters shall make small, one number."""

    @abstractmethod
    def lower_loss(self, batch: Any) -> Tensor:
        """``G(x, y)`` on the lower batch of one worker: what lower parameters minimise, one number; may depend on ``x``."""

    @abstractmethod
    def upper_parameters(self) -> Iterable[nn.Parameter]:
        """``x``."""

    def lower_parameters(self) -> Iterable[nn.Parameter]:
        """``y``: by default all trainable parameters that are not upper ones."""
        upper = {id(p) for p in self.upper_parameters()}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in upper]

    def level_batches(self, batch: Any) -> tuple[Any, Any]:
        """The lower and the upper part of a training batch.

        Raises:
            ValueError: it is no mapping with ``"lower"`` and ``"upper"``.
        """
        if not isinstance(batch, Mapping) or not {"lower", "upper"} <= set(batch):
            got = f"a mapping with {sorted(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(
                f"{type(self).__name__}: a batch must have 'lower' and 'upper', got {got}; return both loaders from "
                "train_dataloader, or override level_batches"
            )
        return batch["lower"], batch["upper"]

    def configure_optimizers(self) -> Any:
        """Two optimizers, the lower one first: plain SGD with :attr:`lower_lr` and :attr:`upper_lr`.

        Override it for others. Schedulers are stepped after every step.
        """
        optimizers: list[Optimizer] = [
            torch.optim.SGD(list(self.lower_parameters()), lr=self.lower_lr),
            torch.optim.SGD(list(self.upper_parameters()), lr=self.upper_lr),
        ]
        return optimizers

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One step of all three variables.

        Raises:
            ValueError: the strategy knows nothing of levels.
        """
        step = getattr(self.trainer.strategy, "bilevel_step", None)
        if step is None:
            raise ValueError(
                f"{type(self).__name__}: has two levels, which {type(self.trainer.strategy).__name__} cannot train; use "
                "strategy='dsoba' or 'sparkle', on one device, too"
            )
        lower, upper = step(*self.level_batches(batch))
        self.log("lower_loss", lower, prog_bar=True)
        self.log("upper_loss", upper, prog_bar=True)
