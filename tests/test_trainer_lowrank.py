"""The callback LowRank under a Trainer: one process, except where plans send something."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader
from trainer_tools import flat, on_ranks

import lightning_dopt as dopt
from lightning_dopt.callbacks import LowRank
from lightning_dopt.lowrank import CRNet, ReLoRA, convert
from recipes.llm import ByteGPT

pytestmark = pytest.mark.trainer
TEXT = torch.tensor(list(b"abcdefgh" * 8), dtype=torch.uint8).unfold(0, 17, 1)


def gpt(**options) -> ByteGPT:
    torch.manual_seed(0)
    return ByteGPT(**{"n_layer": 3, "n_head": 2, "n_embd": 32, "context": 16, "warmup_steps": 2, "lr": 1e-2, **options})


def loader() -> DataLoader:
    return DataLoader(TEXT, batch_size=4)


def fit(module: ByteGPT, *callbacks: Any, steps: int = 4, path: Any = None, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    saving = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        limit_train_batches=3,
        callbacks=list(callbacks),
        enable_checkpointing=saving,
        log_every_n_steps=1,
        **quiet,
        **options,
    )
    trainer.fit(module, loader(), ckpt_path=path)
    return trainer


def alone(*arguments: Any) -> Any:
    return on_ranks(*arguments, n=1)[0]


def test_trains_saves_resumes_and_loads(tmp_path: Path) -> None:
    def job(rank: int) -> None:
        lowrank = LowRank(rank=6, method=CRNet(recompute="inverse", segment=2), blocks="blocks")
        saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        module = gpt(max_steps=6)
        trainer = fit(module, lowrank, saver, steps=6)
        assert trainer.callback_metrics["train/loss"] < 5.0
        assert 0.5 < trainer.callback_metrics["lowrank/min_beta"] <= trainer.callback_metrics["lowrank/max_beta"] < 1.5
        assert {id(p) for p in module.parameters()} == {
            id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]
        }
        torch.manual_seed(0)
        by_hand = convert(gpt(), lowrank.method, "blocks", rank=6)
        assert list(by_hand.state_dict()) == list(module.state_dict())
        assert "configure_model" not in vars(module)
        pickle.dumps(lowrank)

        again, same = gpt(max_steps=6), LowRank(rank=6, method=lowrank.method, blocks="blocks")
        fit(again, same, path=tmp_path / "step=3.ckpt", steps=6)
        if not lightning.__version__.startswith("2.4"):  # which does not resume exactly, with any module
            assert torch.equal(flat(again), flat(module))

        loaded = LowRank.load(gpt(), tmp_path / "step=6.ckpt")
        assert torch.equal(flat(loaded), flat(module))
        tokens = TEXT[:2, 1:].long()
        assert torch.equal(loaded.eval()(tokens), module.eval()(tokens))

        class Mine(ByteGPT):
            def configure_model(self) -> None:
                if not hasattr(self, "converted"):
                    self.converted = convert(self, "crnet", "blocks", rank=6) is self

        mine = Mine.load_from_checkpoint(tmp_path / "step=6.ckpt")
        assert torch.equal(flat(mine), flat(module))
        trainer.validate(module, loader(), verbose=False)  # converted once
        assert len(module.blocks) == 3

    alone(job)


def test_refusals_when_training_starts() -> None:
    def job(rank: int) -> None:
        module = gpt()
        fit(module, LowRank(rank=6, blocks="blocks"), steps=1)
        with pytest.raises(ValueError, match=r"^LowRank: the module was converted before, with \{'method'"):
            fit(module, LowRank(rank=5, blocks="blocks"), steps=1)
        with pytest.raises(ValueError, match=r"^convert\(blocks='model.layers'\): ByteGPT has no such module"):
            fit(gpt(), LowRank(rank=6), steps=1)
        stale = gpt()
        optimizer = torch.optim.SGD(stale.parameters(), lr=0.1)
        stale.configure_optimizers = lambda: optimizer  # type: ignore[method-assign]
        with pytest.raises(
            ValueError, match=r"^LowRank: SGD holds parameters that were replaced; make it in configure"
        ):
            fit(stale, LowRank(rank=6, blocks="blocks"), steps=1)
        with pytest.raises(
            ValueError, match=r"^LowRank\(method=ReLoRA\(...\)\): needs a plan that sends gradients only"
        ):
            fit(gpt(), LowRank(rank=6, method="relora", blocks="blocks"), steps=1, strategy=dopt.LocalSGDStrategy())

    alone(job)


def test_relora_restarts() -> None:
    pytest.importorskip("peft")

    def job(rank: int) -> list[float]:
        module, found = gpt(max_steps=6), []
        callback = LowRank(rank=3, method=ReLoRA(every=2), blocks="blocks")
        end = callback.on_train_batch_end

        def seen(*args: Any) -> None:
            end(*args)
            found.append(float(module.blocks[1].up.lora_B["default"].weight.abs().max()))

        callback.on_train_batch_end = seen  # type: ignore[method-assign]
        fit(module, callback, steps=6)
        return found

    found = alone(job)
    assert [x == 0 for x in found] == [False, True] * 3


@pytest.mark.parametrize("strategy", ["diloco", "gossip"])
def test_messages_shrink_with_the_model(strategy: str) -> None:
    def job(rank: int) -> tuple[Tensor, float, int]:
        make = {
            "diloco": lambda: dopt.DiLoCoStrategy(sync_every=2, codec=dopt.Int8()),
            "gossip": lambda: dopt.GossipStrategy(dopt.Ring(), codec=dopt.Int8()),
        }
        module = gpt(max_steps=4)
        callbacks = [LowRank(rank=3, blocks="blocks")]
        trainer = fit(module, *callbacks, strategy=make[strategy](), devices=2)
        return flat(module), float(trainer.callback_metrics["comm/bytes"]), sum(p.numel() for p in module.parameters())

    (a, sent, count), (b, _, _) = on_ranks(job)
    assert torch.equal(a, b)  # the mean of both, at the end
    rounds = {"diloco": 2, "gossip": 4}[strategy]
    assert count < sent / rounds < 1.1 * count + 300  # a byte per element, and scales
    assert sent / rounds < 0.6 * sum(p.numel() for p in gpt().parameters())  # even though half are embeddings
