"""CR-Net's recipes: published sizes on the meta device, the LLaMA-style model, files of tokens."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn

from lightning_dopt.callbacks import LowRank
from lightning_dopt.cli import DoptCLI
from lightning_dopt.lowrank import CoLA, CRNet, convert
from recipes.llm import Llama, TokenFiles

ROOT = Path(__file__).resolve().parents[1]
SIZES = {  # width, width of the SwiGLU layer, blocks, CoLA's rank
    "60m": (512, 1376, 8, 128),
    "130m": (768, 2048, 12, 256),
    "350m": (1024, 2736, 24, 256),
    "1b": (2048, 5461, 24, 512),
    "7b": (4096, 11008, 32, 1024),
}
VOCABULARY = 32000


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch):
    """The objects of ``dopt fit -c``, made on the meta device."""
    monkeypatch.setattr("sys.argv", ["dopt"])
    monkeypatch.syspath_prepend(str(ROOT))

    def parse(name: str, *options: str) -> DoptCLI:
        file = ROOT / "recipes" / "llm" / f"crnet_{name}.yaml"
        here = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.logger=false", *options]
        with torch.device("meta"):
            return DoptCLI(
                LightningModule,
                LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                run=False,
                args=["-c", str(file), *here],
            )

    return parse


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name: str, parsed) -> None:
    h, f, blocks, cola = SIZES[name]
    rest = 2 * VOCABULARY * h + blocks * 2 * h + h  # embedding, head, norms
    command = parsed(name)
    model, (callback,) = command.model, [c for c in command.trainer.callbacks if isinstance(c, LowRank)]
    assert model.embedding.weight.is_meta
    assert size(model) == rest + blocks * (4 * h * h + 3 * h * f)
    callback._convert(model)
    r = callback.rank
    assert size(model) == rest + 4 * h * h + 3 * h * f + (blocks - 1) * (r * (11 * h + 3 * f) + 7)
    allowed = rest + blocks * cola * (11 * h + 3 * f)
    if name == "7b":
        assert r == 512
    else:  # at most as many as CoLA has, to a multiple of 32
        assert size(model) <= allowed < size(model) + 32 * (blocks - 1) * (11 * h + 3 * f)
    config = yaml.safe_load((ROOT / "recipes" / "llm" / f"crnet_{name}.yaml").read_text())
    trainer, batch = config["trainer"], config["data"]["init_args"]["batch_size"]
    assert trainer["devices"] * trainer["accumulate_grad_batches"] * batch == 512
    assert config["model"]["init_args"]["warmup_steps"] == trainer["max_steps"] // 10


def test_the_published_numbers() -> None:
    """Of 1B: 1339 million, CoLA 609, CR-Net 583."""
    with torch.device("meta"):
        make = [Llama(n_layer=24, n_head=32, n_embd=2048, hidden=5461) for _ in range(3)]
    dense, cola, crnet = make
    convert(cola, CoLA(), "layers", rank=512)
    convert(crnet, CRNet(), "layers", rank=448)
    assert [round(size(m) / 1e6, 1) for m in (dense, cola, crnet)] == [1339.1, 609.3, 582.4]


def test_a_budget_finds_the_published_rank() -> None:
    with torch.device("meta"):
        model = Llama(n_layer=24, n_head=32, n_embd=2048, hidden=5461)
    convert(model, "crnet", "layers", budget=583_000_000)
    assert model.layers[1].block.q.rank == 448


def llama(**options) -> Llama:
    torch.manual_seed(0)
    return Llama(**{"vocabulary": 50, "n_layer": 2, "n_head": 2, "n_embd": 16, "hidden": 40, "context": 12, **options})


def test_no_position_of_a_llama_sees_the_future() -> None:
    model, tokens = llama().eval(), torch.randint(0, 50, (1, 12))
    changed = tokens.clone()
    changed[0, 8] = (changed[0, 8] + 1) % 50
    difference = (model(tokens) - model(changed)).abs().amax(-1)[0]
    assert difference[:8].max() == 0
    assert difference[8:].min() > 1e-7
    assert abs(model._loss(torch.randint(0, 50, (4, 13))).item() - math.log(50)) < 0.05


def test_bad_options_of_a_llama() -> None:
    with pytest.raises(ValueError, match=r"^Llama\(hidden=0\): must be an integer of at least 1"):
        llama(hidden=0)
    with pytest.raises(ValueError, match=r"^Llama\(n_head=3\): n_embd=16 must be a multiple of 2 \* n_head$"):
        llama(n_head=3)
    with pytest.raises(ValueError, match=r"^Llama\(lr=0\)"):
        llama(lr=0)


def test_files_of_tokens(tmp_path: Path) -> None:
    tokens = torch.arange(100, dtype=torch.int16) * 300
    (tmp_path / "train.bin").write_bytes(tokens.numpy().tobytes())
    (tmp_path / "val.bin").write_bytes(tokens[:30].numpy().tobytes())
    data = TokenFiles(str(tmp_path / "train.bin"), str(tmp_path / "val.bin"), context=8, batch_size=2)
    data.setup("fit")
    rows = torch.cat(list(data.val_dataloader()))
    assert sorted(rows[:, 0].tolist()) == [0, 2400, 4800]
    assert torch.equal(rows[:, 1:] - rows[:, :-1], torch.full((3, 8), 300, dtype=torch.int16))
    data.trainer = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 2, "rank": 1})
    batches = list(data.train_dataloader())
    assert all(batch.shape == (2, 9) for batch in batches)
    assert len(batches) == 3  # 12 windows, of which this worker has 6


def test_files_that_are_not_there_or_too_short(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^TokenFiles\(train='nowhere'\): no such file$"):
        TokenFiles("nowhere").setup("fit")
    (tmp_path / "short").write_bytes(b"12345678")
    with pytest.raises(ValueError, match=r"short'\): holds 4 tokens, needs 257$"):
        TokenFiles(str(tmp_path / "short")).setup("fit")
