"""PipelineStrategy: an untouched module in stages trains as it does in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from trainer_tools import on_ranks, trainer

from lightning_dopt import PipelineStrategy

pytestmark = pytest.mark.trainer


def data(samples: int = 22, seed: int = 0, dtype: torch.dtype = torch.float64) -> DataLoader:
    """Batches of 5, 5, 5, 5 and 2 with inputs and classes."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 4, generator=g, dtype=dtype)
    return DataLoader(TensorDataset(x, torch.randint(3, (samples,), generator=g)), batch_size=5)


class Classifier(LightningModule):
    """Logs its loss by steps, an accuracy by epochs, both in validation; its test step calls the network twice."""

    def __init__(self, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.model = nn.Sequential(
                nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)
            ).to(dtype)
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.model(x * 0.5)
        loss = nn.functional.cross_entropy(logits, y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"right": (logits.argmax(1) == y).double().mean()}, on_epoch=True, batch_size=len(y))
        self.log("most", logits.max(), reduce_fx="max", on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self.model(x * 0.5), y), sync_dist=True)
        self.log("val_count", torch.tensor(float(len(y))), reduce_fx="sum", sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_change", (self.model(batch[0]) - self.model(-batch[0])).square().mean(), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(batch[0])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.parameters() if p.dim() == 2]
        vectors = [p for p in self.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=0.05, betas=(0.5, 0.9))
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def whole(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


OPTIONS: dict[str, Any] = {"max_epochs": 2, "accumulate_grad_batches": 2, "gradient_clip_val": 0.05}


def plain(module: Classifier, **options: Any) -> Trainer:
    fitter = trainer("auto", 1, use_distributed_sampler=False, **(OPTIONS | options))
    fitter.fit(module, data(), data(8, 5))
    return fitter


def staged(module: Any, strategy: PipelineStrategy, path: Any = None, **options: Any) -> Trainer:
    fitter = trainer(strategy, 2, use_distributed_sampler=False, **(OPTIONS | options))
    fitter.fit(module, data(), data(8, 5), ckpt_path=path)
    return fitter


class Placeholders(Callback):
    """How many values are in memory while training."""

    def __init__(self) -> None:
        self.elements = self.states = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.elements = sum(p.untyped_storage().size() // p.element_size() for p in pl_module.parameters())
        state = trainer.optimizers[0].state
        self.states = sum(
            t.numel() for entry in state.values() for t in entry.values() if isinstance(t, Tensor) and t.dim()
        )


@pytest.mark.filterwarnings("ignore")
def test_equals_one_process(tmp_path: Path) -> None:
    """Weights, losses and logged values in double precision, with accumulation, clipping, a scheduler and a short batch."""

    def job(rank: int) -> Any:
        results = {}
        for name in ("1f1b", "bitpipe"):
            module, count = Classifier(), Placeholders()
            strategy = PipelineStrategy(schedule=name, num_microbatches=4 if name == "1f1b" else 2)
            saver = ModelCheckpoint(tmp_path / name, "{epoch}-{val_loss:.6f}", monitor="val_loss", save_top_k=2)
            stop = EarlyStopping("val_loss", patience=5)
            fitter = staged(module, strategy, callbacks=[count, saver, stop])
            assert strategy.pipeline is not None
            results[name] = {
                "weights": whole(module),
                "losses": module.losses,
                "metrics": dict(fitter.callback_metrics),
                "memory": (count.elements, count.states),
                "best": saver.best_model_path,
                "test": trainer_of(strategy).test(module, data(8, 5), verbose=False)[0],
                "predictions": torch.cat(fitter.predict(module, data(8, 5))),
            }
        return results

    def trainer_of(strategy: PipelineStrategy) -> Trainer:
        return strategy._trainer

    answers = on_ranks(job, 2)
    module = Classifier()
    fitter = plain(module)
    elements = sum(p.numel() for p in module.parameters())
    for name in ("1f1b", "bitpipe"):
        zero, one = answers[0][name], answers[1][name]
        for result in (zero, one):
            for key, value in module.state_dict().items():
                torch.testing.assert_close(result["weights"][key], value, atol=1e-10, rtol=1e-10)
            assert result["losses"] == pytest.approx(module.losses, abs=1e-10)
            for key in ("loss_step", "loss_epoch", "right_epoch", "most_epoch", "val_loss", "val_count"):
                expected = float(fitter.callback_metrics[key])
                assert float(result["metrics"][key]) == pytest.approx(expected, abs=1e-10), key
            x = torch.cat([b[0] for b in data(8, 5)])
            torch.testing.assert_close(result["predictions"], module.model(x), atol=1e-10, rtol=1e-10)
        assert zero["best"] == one["best"]
        assert zero["test"] == one["test"]
    held = [answers[rank]["1f1b"]["memory"] for rank in range(2)]
    assert sum(states for _, states in held) == 2 * elements, "two states of Adam for each weight, on one rank"
    for held_elements, states in held:
        assert states // 2 <= held_elements < elements, "only one's own stage is in memory"
    best = torch.load(answers[0]["1f1b"]["best"], weights_only=False)
    again = Classifier()
    again.load_state_dict(best["state_dict"])
    assert len(best["optimizer_states"][0]["state"]) == len(list(again.parameters()))
    fitter = trainer("auto", 1, use_distributed_sampler=False, **(OPTIONS | {"max_epochs": 3}))
    fitter.fit(again, data(), data(8, 5), ckpt_path=answers[0]["1f1b"]["best"])
    longer = Classifier()
    plain(longer, max_epochs=3)
    for key, value in longer.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, atol=1e-10, rtol=1e-10)
