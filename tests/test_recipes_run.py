"""Every YAML file under recipes/ parses as it is and trains a few steps on a small setting."""

from __future__ import annotations

import math
from pathlib import Path

import jsonargparse
import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lightning_dopt import cli

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
PUBLISHED = ("60m", "130m", "350m", "1b", "7b")  # too large for this; test_recipes_lowrank.py parses them
TRAINED = [p for p in RECIPES if p.stem.rpartition("_")[2] not in PUBLISHED]
SMALL = {
    "llm": [
        "--model.init_args.n_layer=1",
        "--model.init_args.n_embd=32",
        "--model.init_args.context=16",
        "--data.init_args.context=16",
        "--data.init_args.max_bytes=60000",
    ],
    "bilevel": [],
    "vision": ["--model.init_args.model_args={depths: [1, 1, 1, 1], dims: [8, 8, 8, 8]}"],
}


class Command(cli.DoptCLI):
    """The command line of ``dopt fit`` that stops before it trains."""

    @classmethod
    def of(cls, recipe: Path, *options: str) -> Command:
        return cls(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            run=False,
            args=["-c", str(recipe), *options],
        )


@pytest.fixture(autouse=True)
def _in_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["dopt"])


def options(recipe: Path) -> list[str]:
    """Four steps on a small setting, forked processes, and a sync at least every other step."""
    strategy = yaml.safe_load(recipe.read_text())["trainer"]["strategy"]
    chosen = ["--trainer.strategy=ddp_fork"] if isinstance(strategy, str) else []
    if not chosen:
        chosen.append("--trainer.strategy.init_args.start_method=fork")
        if "sync_every" in strategy.get("init_args", {}):
            chosen.append("--trainer.strategy.init_args.sync_every=2")
        plan = strategy.get("init_args", {}).get("plan", {}).get("init_args", {})
        if "sync_every" in plan:
            chosen.append("--trainer.strategy.init_args.plan.init_args.sync_every=2")
        if "overlap" in plan:
            chosen.append("--trainer.strategy.init_args.plan.init_args.overlap=1")
    return [
        *chosen,
        *SMALL[recipe.parent.name],
        *(["--model.init_args.n_layer=2"] if recipe.stem.startswith("crnet") else []),  # the first block stays dense
        "--trainer.max_steps=4",
        "--trainer.val_check_interval=4",
        "--trainer.limit_val_batches=2",
        "--trainer.num_sanity_val_steps=0",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.enable_checkpointing=false",
        "--trainer.logger=false",
    ]


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def test_there_are_recipes() -> None:
    assert {p.relative_to(ROOT / "recipes").as_posix() for p in RECIPES} >= {"llm/diloco.yaml", "vision/lo_fi.yaml"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_says_what_it_does(recipe: Path) -> None:
    text = recipe.read_text()
    name = recipe.relative_to(ROOT).as_posix()
    head = "".join(line for line in text.splitlines() if line.startswith("#"))
    config = yaml.safe_load(text)
    assert f"dopt fit -c {name}" in head
    assert all(word in head for word in (f"{config['trainer']['devices']} processes", "min", "val/"))
    assert config["trainer"]["logger"]["init_args"]["name"] == f"{recipe.parent.name}_{recipe.stem}"


@pytest.mark.trainer
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recipe", TRAINED, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_trains(recipe: Path) -> None:
    if "lightning_dopt.plans." in recipe.read_text() and _version(jsonargparse.__version__) < (4, 41):
        pytest.skip("older jsonargparse takes classes only")
    command = Command.of(recipe, *options(recipe))
    trainer: Trainer = command.trainer
    before = torch.cat([p.detach().flatten().clone() for p in command.model.parameters()])
    trainer.fit(command.model, command.datamodule)  # the launcher brings rank 0's weights and metrics back
    metrics = trainer.callback_metrics
    assert trainer.state.finished
    assert not torch.equal(before, torch.cat([p.detach().flatten() for p in command.model.parameters()]))
    assert math.isfinite(float(metrics["val/loss"]))
    strategy = type(trainer.strategy).__name__
    if strategy not in ("DDPStrategy", "LoFiStrategy"):
        assert float(metrics["comm/bytes"]) > 0
    if strategy == "LoFiStrategy":
        assert float(metrics["comm/bytes"]) == 0
