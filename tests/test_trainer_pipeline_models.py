"""Untouched modules around published models train in stages as on one process."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dopt import PipelineStrategy
from tests.trainer_tools import on_ranks, quiet

pytestmark = pytest.mark.trainer


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "llama":
        import transformers

        config = transformers.LlamaConfig(
            vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
            tie_word_embeddings=True,
        )  # fmt: skip
        model: nn.Module = transformers.LlamaForCausalLM(config)
        return model
    import timm

    if kind == "vit":
        small = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2}
        return timm.create_model("vit_tiny_patch16_224", num_classes=10, **small)
    return timm.create_model("resnet10t", num_classes=10)


class Wrapped(LightningModule):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.model, self.kind = network(kind).double(), kind

    def on_train_epoch_start(self) -> None:
        for module in self.model.modules():  # statistics of micro-batches are others than those of the batch
            if isinstance(module, nn.BatchNorm2d):
                module.eval()

    def _loss(self, batch: Any) -> Tensor:
        x, y = batch
        output = self.model(x)
        return nn.functional.cross_entropy(output.logits.flatten(0, 1) if self.kind == "llama" else output, y.flatten())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self._loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(kind: str) -> DataLoader[Any]:
    g = torch.Generator().manual_seed(1)
    words = torch.randint(20, (16, 7), generator=g)
    images = torch.randn(16, 3, 32, 32, generator=g, dtype=torch.float64)
    tensors = (words[:, :-1], words[:, 1:]) if kind == "llama" else (images, torch.randint(10, (16,), generator=g))
    return DataLoader(TensorDataset(*tensors), batch_size=8)


def fit(kind: str, strategy: Any, devices: int) -> tuple[float, dict[str, Tensor]]:
    module = Wrapped(kind)
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, data(kind), data(kind))
    return float(trainer.callback_metrics["val"]), {k: p.detach().clone() for k, p in module.named_parameters()}


def job(kinds: list[tuple[str, Any]], rank: int) -> list[tuple[float, dict[str, Tensor]]]:
    quiet()
    return [fit(kind, PipelineStrategy(schedule=schedule, num_microbatches=4), 2) for kind, schedule in kinds]


def test_published_models_train_in_stages() -> None:
    """A vision transformer, a residual network and a decoder with tied weights, with a schedule of torch's engine each."""
    pytest.importorskip("timm")
    quiet()
    kinds = [("vit", "1f1b"), ("resnet", "interleaved")]
    try:
        import transformers  # noqa: F401

        kinds.append(("llama", "gpipe"))
    except ImportError:
        pass
    for (kind, _), (error, parameters) in zip(kinds, on_ranks(partial(job, kinds), 2)[0], strict=True):
        expected, reference = fit(kind, "auto", 1)
        assert error == pytest.approx(expected, abs=1e-10)
        for name, p in reference.items():
            torch.testing.assert_close(parameters[name], p, atol=1e-10, rtol=1e-10)
