"""LowRank: turns the module of a training into one of low rank, before its optimizers are made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_dopt import lowrank
from lightning_dopt.lowrank.cross_layer import CrossLinear
from lightning_dopt.lowrank.method import Method
from lightning_dopt.lowrank.ranks import Rank
from lightning_dopt.lowrank.registry import METHODS
from lightning_dopt.strategies.replica import ReplicaStrategy

_MARK = "_low_rank"


class LowRank(Callback):
    """Converts the module right after its ``configure_model``, so before weights are restored and optimizers are made.

    Works for fit, validate, test and predict, with resumed runs and under every strategy that trains whole models; a
    module is converted once. Checkpoints are ordinary ones, with the converted module's weights; ``load`` makes a module for
    them outside of a Trainer. With CR-Net the smallest and the largest ``|c(beta)|`` are logged as ``lowrank/min_beta`` and
    ``lowrank/max_beta``; with ReLoRA the restarts happen here.

    Args:
        rank: See :func:`lightning_dopt.lowrank.convert`, as for all arguments.
        method: See there.
        blocks: See there; the name of the stack in the LightningModule.
        targets: See there.
        budget: See there.
        profile: See there.

    Raises:
        ValueError: what ``convert`` refuses; a module that was converted otherwise before; ReLoRA with a plan that sends
            parameters, as what it folds into the weights is not sent; when training starts, an optimizer that was made before
            the conversion.
    """

    def __init__(
        self,
        rank: Rank = None,
        method: Method | str = "crnet",
        blocks: str = "model.layers",
        targets: list[str] | None = None,
        budget: int | float | None = None,
        profile: Literal["uniform", "middle"] = "uniform",
    ) -> None:
        self.rank, self.method, self.blocks, self.targets = rank, lowrank.method(method), blocks, targets
        self.budget, self.profile = budget, profile
        self._restarted = 0

    def _options(self) -> dict[str, Any]:
        names = ("rank", "blocks", "targets", "budget", "profile")
        method = {"name": type(self.method).__name__, "arguments": self.method.arguments()}
        return {"method": method, **{name: getattr(self, name) for name in names}}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Arrange for the conversion."""
        plan = trainer.strategy.plan if isinstance(trainer.strategy, ReplicaStrategy) else ()
        if isinstance(self.method, lowrank.ReLoRA) and any(sync.what.slot != "gradients" for sync in plan):
            raise ValueError(
                "LowRank(method=ReLoRA(...)): needs a plan that sends gradients only, such as compressed_ddp()"
            )
        configure = pl_module.configure_model

        def configure_model() -> None:  # no functools.wraps: Lightning would look through it and call nothing
            del pl_module.configure_model  # once; a closure on a module could not be pickled
            configure()
            self._convert(pl_module)

        pl_module.configure_model = configure_model  # type: ignore[method-assign]

    def _convert(self, module: nn.Module) -> None:
        before = getattr(module, _MARK, None)
        if before is None:
            lowrank.convert(module, self.method, self.blocks, self.targets, self.rank, self.budget, self.profile)
            setattr(module, _MARK, self._options())
        elif before != self._options():
            raise ValueError(f"LowRank: the module was converted before, with {before}")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse optimizers that hold tensors the module no longer has."""
        here = {id(p) for p in pl_module.parameters()}
        for optimizer in trainer.optimizers:
            if any(id(p) not in here for group in optimizer.param_groups for p in group["params"]):
                raise ValueError(
                    f"LowRank: {type(optimizer).__name__} holds parameters that were replaced; make it in configure_optimizers"
                )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log ``beta``; restart ReLoRA."""
        step = trainer.global_step
        if (
            isinstance(self.method, lowrank.ReLoRA)
            and step
            and step % self.method.every == 0
            and step != self._restarted
        ):
            lowrank.restart(pl_module, trainer.optimizers, self.method.keep)
            self._restarted = step
        often = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if step % often == 0 and isinstance(self.method, lowrank.CRNet):
            betas = [m.coefficient().detach().abs() for m in pl_module.modules() if isinstance(m, CrossLinear)]
            if betas:
                least, most = torch.cat(betas).aminmax()
                pl_module.log_dict({"lowrank/min_beta": least, "lowrank/max_beta": most})

    def state_dict(self) -> dict[str, Any]:
        """The options, as plain data, from which ``load`` converts a module."""
        return {"options": self._options(), "restarted": self._restarted}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See ``Callback``."""
        self._restarted = state_dict["restarted"]

    @staticmethod
    def load(module: LightningModule, path: str | Path) -> LightningModule:
        """Convert a fresh module as the one of a checkpoint was, and load its weights.

        Args:
            module: Made with the same arguments.
            path: A checkpoint of a Trainer with this callback.

        Returns:
            The module.

        Raises:
            ValueError: the checkpoint has no state of this callback.
        """
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        states = checkpoint.get("callbacks", {})
        found = [state for key, state in states.items() if key.startswith("LowRank")]
        if not found:
            raise ValueError(
                f"LowRank.load(path={str(path)!r}): was written without this callback, it has {list(states)}"
            )
        options: Mapping[str, Any] = found[0]["options"]
        kinds = {kind.__name__: kind for kind in METHODS.values()}
        method = kinds[options["method"]["name"]](**options["method"]["arguments"])
        module.configure_model()
        callback = LowRank(**{**options, "method": method})
        callback._convert(module)
        module.load_state_dict(checkpoint["state_dict"])
        return module
