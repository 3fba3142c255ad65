"""The data modules of the recipes: text as bytes, and four image sets."""

from __future__ import annotations

import gzip
import os
import re
import struct
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the recipes are not installed with the package

from recipes.llm import TextFolder  # noqa: E402
from recipes.llm.data import ByteWindows  # noqa: E402
from recipes.vision import ImageData  # noqa: E402
from recipes.vision.data import PictureSet, moments  # noqa: E402
from recipes.vision.files import read_idx  # noqa: E402

SHARED = Path(os.environ.get("DOPT_SHARED", Path(__file__).resolve().parents[2] / "shared" / "data"))


def shared(name):
    """A folder of local data sets, or a skip: they are no part of the repository."""
    if not (SHARED / name).is_dir():
        pytest.skip(f"no local data set {name}; set DOPT_SHARED to the folder that holds it")
    return SHARED


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_bytes(bytes(range(100, 120)))
    (tmp_path / "deep" / "a.txt").write_bytes(bytes(range(20)))
    (tmp_path / "c.md").write_bytes(b"not a text file" * 9)
    return tmp_path


# --- text ---


def test_windows_predict_every_byte_but_the_first_once():
    windows = ByteWindows(torch.arange(11, dtype=torch.uint8), 3)
    assert [windows[i].tolist() for i in range(len(windows))] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert windows.__getitems__([2, 0]).tolist() == [[6, 7, 8, 9], [0, 1, 2, 3]]
    assert len(ByteWindows(torch.arange(3, dtype=torch.uint8), 3)) == 0


def test_mixed_windows_are_the_same_windows_in_a_fixed_order():
    text = torch.arange(201, dtype=torch.uint8)
    starts = [ByteWindows(text, 2, mixed=True)[i][0].item() for i in range(100)]
    assert sorted(starts) == list(range(0, 200, 2))
    assert starts == [ByteWindows(text, 2, mixed=True)[i][0].item() for i in range(100)]
    assert min(starts[:20]) < 50  # the first fifth comes from all over the text
    assert max(starts[:20]) > 150


def test_the_tail_of_every_file_is_held_out(folder):
    data = TextFolder(str(folder), "*.txt", context=2, batch_size=50, val_fraction=0.25)
    data.setup("fit")
    assert data._train.text.tolist() == [*range(100, 115), *range(15)]
    assert data._val.text.tolist() == [*range(115, 120), *range(15, 20)]
    (batch,) = data.val_dataloader()
    assert sorted(batch.tolist()) == [[16, 17, 18], [115, 116, 117], [117, 118, 119], [119, 15, 16]]


def test_max_bytes_reads_the_first_files_only(folder):
    data = TextFolder(str(folder), "*.txt", context=1, val_fraction=0.5, max_bytes=24)
    data.setup("fit")
    assert data._train.text.tolist() == [*range(100, 110), 0, 1]
    assert data._val.text.tolist() == [*range(110, 120), 2, 3]


def test_the_standard_library_is_the_default_without_its_tests():
    files = TextFolder().files
    assert files == sorted(files)
    assert any(file.name == "argparse.py" for file in files)
    assert not any({"site-packages", "test", "tests"} & set(file.parts[-3:-1]) for file in files)
    assert 4e6 < sum(file.stat().st_size for file in files) < 4e7


def test_a_training_batch_and_its_size(folder):
    data = TextFolder(str(folder / "b.txt"), context=4, batch_size=2, val_fraction=0.3)
    data.setup("fit")
    batches = list(data.train_dataloader())  # 14 bytes, three windows: one whole batch
    assert [(b.dtype, tuple(b.shape)) for b in batches] == [(torch.uint8, (2, 5))]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"path": "/no/such"}, FileNotFoundError, "TextFolder(path='/no/such'): no such file or folder"),
        ({"pattern": "*.rs"}, FileNotFoundError, "TextFolder(pattern='*.rs'): no file in"),
        ({"val_fraction": 1.0}, ValueError, "TextFolder(val_fraction=1.0): must be a number in (0, 1)"),
        ({"context": 0}, ValueError, "TextFolder(context=0): must be an integer of at least 1"),
        ({"partition": "dirichlet"}, ValueError, "must be one of 'iid', 'contiguous'"),
    ],
)
def test_text_mistakes_are_named_before_training(folder, arguments, error, message):
    with pytest.raises(error, match=re.escape(message)) as raised:
        TextFolder(**{"path": str(folder), **arguments})
    assert "\n" not in str(raised.value)


def test_too_little_text_is_named(folder):
    with pytest.raises(ValueError, match=re.escape("needs 17 bytes each for training and validation, found 38 and 2")):
        TextFolder(str(folder), "*.txt", context=16).setup("fit")


def test_tiny_shakespeare():
    data = TextFolder(str(shared("tinyshakespeare") / "tinyshakespeare" / "input.txt"), val_fraction=0.1)
    data.setup("fit")
    assert (len(data._train.text), len(data._val.text)) == (1_003_855, 111_539)
    assert bytes(data._train.text[:14].tolist()) == b"First Citizen:"


# --- images ---


def test_digits():
    data = ImageData(image_size=8, batch_size=16)
    data.setup("fit")
    assert (len(data._train), len(data._val)) == (1438, 359)
    images, labels = next(iter(data.train_dataloader()))
    assert (tuple(images.shape), images.dtype, labels.dtype) == ((16, 1, 8, 8), torch.float32, torch.int64)
    everything = data._train.__getitems__(list(range(1438)))[0]
    assert abs(everything.mean()) < 1e-5
    assert abs(everything.std() - 1) < 1e-3
    assert torch.equal(data._train[7][0], everything[7])


def test_resized_pictures_keep_their_mean():
    small, large = ImageData(image_size=8), ImageData(image_size=32)
    for data in (small, large):
        data.setup("fit")
    assert tuple(large._val.pictures.shape) == (359, 1, 32, 32)
    means = [data._val.pictures.float().mean() for data in (small, large)]
    assert abs(means[0] - means[1]) < 3.0  # of 255


def test_moments_per_channel():
    pictures = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    mean, std = moments(pictures)
    pixels = pictures.transpose(0, 1).flatten(1).double() / 255
    assert torch.allclose(mean.double(), pixels.mean(1))
    assert torch.allclose(std.double(), pixels.std(1, correction=0))


def write_idx(file, shape, data):
    content = b"\x00\x00\x08" + bytes([len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + bytes(data)
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)


def test_idx_files_in_torchvisions_folder(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 4), ("t10k", 2)):
        write_idx(raw / f"{part}-images-idx3-ubyte", (n, 2, 2), range(4 * n))
        write_idx(raw / f"{part}-labels-idx1-ubyte.gz", (n,), range(n))
    data = ImageData("mnist", str(tmp_path), image_size=2)
    data.setup("fit")
    assert data._train.pictures.tolist()[1] == [[[4, 5], [6, 7]]]
    assert (data._train.targets.tolist(), data._val.targets.tolist()) == ([0, 1, 2, 3], [0, 1])


def test_broken_idx_files_are_named(tmp_path):
    write_idx(tmp_path / "short.gz", (3, 2), range(5))
    with pytest.raises(ValueError, match=re.escape("short.gz: holds 5 bytes, its header says (3, 2)")):
        read_idx(tmp_path / "short.gz")
    (tmp_path / "other").write_bytes(b"text")
    with pytest.raises(ValueError, match="not an IDX file"):
        read_idx(tmp_path / "other")


@pytest.mark.parametrize("dataset", ["mnist", "fashion_mnist", "cifar10"])
def test_missing_files_are_named_with_the_way_out(tmp_path, dataset):
    message = f"ImageData(root={str(tmp_path)!r}): no {dataset} files there; name their folder or set download=True"
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        ImageData(dataset, str(tmp_path))
    ImageData(dataset, str(tmp_path), download=True)  # nothing is fetched before training


def test_image_arguments():
    with pytest.raises(ValueError, match=re.escape("ImageData(dataset='svhn'): must be one of 'digits', 'mnist'")):
        ImageData("svhn")
    with pytest.raises(ValueError, match=re.escape("ImageData(partition='contiguous'): must be one of 'iid'")):
        ImageData(partition="contiguous")
    with pytest.raises(ValueError, match=re.escape("ImageData(alpha=0.0): must be a number in (0, inf)")):
        ImageData(alpha=0.0)


@pytest.mark.parametrize(
    ("dataset", "name", "channels", "sizes"),
    [
        ("fashion_mnist", "fashion_mnist_3600", 1, (3000, 600)),
        ("cifar10", "cifar10_12k", 3, (10_000, 2000)),
    ],
)
def test_local_image_sets(dataset, name, channels, sizes):
    data = ImageData(dataset, str(shared(name)), image_size=28 if channels == 1 else 32)
    data.setup("fit")
    assert (len(data._train), len(data._val)) == sizes
    assert data._train[0][0].shape[0] == data.in_chans == channels
    assert torch.bincount(data._train.targets, minlength=10).min() > sizes[0] * 0.08


def test_local_mnist_is_found():
    data = ImageData("mnist", str(shared("mnist")))
    assert [file.name[:5] for file in data._find()] == ["train", "train", "t10k-", "t10k-"]


# --- both, on two processes ---


class Recorder(LightningModule):
    """Keeps the training batches of every rank, and the number of validation samples."""

    def __init__(self, folder):
        super().__init__()
        self.folder, self.weight = folder, torch.nn.Parameter(torch.zeros(()))
        self.seen, self.validated = [], 0

    def training_step(self, batch, _):
        self.seen.append(batch if isinstance(batch, torch.Tensor) else batch[0])
        return self.weight.square()

    def validation_step(self, batch, _):
        self.validated += len(batch if isinstance(batch, torch.Tensor) else batch[0])

    def on_train_end(self):
        torch.save((len(self.seen), torch.cat(self.seen), self.validated), self.folder / f"{self.global_rank}.pt")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trained_on(data, folder):
    trainer = Trainer(
        devices=2,
        accelerator="cpu",
        strategy="ddp_fork",
        max_epochs=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Recorder(folder), data)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.trainer
@pytest.mark.parametrize("partition", ["iid", "contiguous"])
def test_text_of_two_workers_is_disjoint(tmp_path, partition):
    # window k of a text without repetitions: two bytes that spell 2 k, so that batches tell which windows they are
    text = torch.stack([torch.tensor([k // 256, k % 256]) for k in range(2000)]).flatten()
    (tmp_path / "text").write_bytes(bytes(text.tolist()))
    data = TextFolder(str(tmp_path / "text"), context=2, batch_size=5, val_fraction=0.1, partition=partition)
    (steps, first, val), (other_steps, second, other_val) = trained_on(data, tmp_path)
    assert (steps, other_steps) == (180, 180)  # 1,799 windows: 900 for each worker, the last wrapped around
    assert val == other_val == 100  # 199 windows, one of them twice
    mine, yours = ({int(w[0]) * 256 + int(w[1]) for w in windows} for windows in (first, second))
    assert not mine & yours
    assert mine | yours == set(range(1799))
    if partition == "contiguous":
        assert max(mine) < min(yours)


@pytest.mark.trainer
@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_images_of_two_workers_are_disjoint(tmp_path, partition):
    pictures = torch.arange(200, dtype=torch.uint8).view(200, 1, 1, 1)
    plain = PictureSet(pictures, torch.arange(200) % 10, torch.zeros(1), torch.full((1,), 1 / 255))
    data = ImageData(partition=partition, alpha=0.1, batch_size=10, seed=2)
    data._train = data._val = plain  # as after setup, with pictures that are their own numbers
    (steps, first, val), (other_steps, second, other_val) = trained_on(data, tmp_path)
    assert steps == other_steps == 10
    assert val == other_val == 100
    mine, yours = ({int(i) for i in images.flatten().round()} for images in (first, second))
    assert not mine & yours
    if partition == "iid":
        assert mine | yours == set(range(200))
    else:  # whole classes are with one worker
        classes = [{i % 10 for i in own} for own in (mine, yours)]
        assert len(classes[0] & classes[1]) < 10
