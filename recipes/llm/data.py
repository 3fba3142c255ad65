"""Text as bytes: every file of a folder, one file, or the Python standard library's own sources."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_dopt._checks import check_choice, check_float, check_int
from lightning_dopt.data import worker_sampler
from recipes.loading import memory_loader

_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def text_files(path: str | None, pattern: str) -> list[Path]:
    """The files :class:`TextFolder` reads, sorted by path.

    Raises:
        FileNotFoundError: there are none.
    """
    if path is None:
        return sorted(_standard_library(Path(sysconfig.get_paths()["stdlib"])))
    root = Path(path).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"TextFolder(path={path!r}): no such file or folder")
    found = [root] if root.is_file() else sorted(p for p in root.rglob(pattern) if p.is_file())
    if not found:
        raise FileNotFoundError(f"TextFolder(pattern={pattern!r}): no file in {path!r} matches")
    return found


def _standard_library(folder: Path) -> Iterator[Path]:
    """Python sources below a folder, without entering the folders of installed packages and of tests."""
    for entry in folder.iterdir():
        if entry.is_dir() and entry.name not in _SKIPPED:
            yield from _standard_library(entry)
        elif entry.suffix == ".py":
            yield entry


class ByteWindows(Dataset[Tensor]):
    """Windows of ``context + 1`` bytes, one every ``context`` bytes: each byte but the first is predicted once.

    Args:
        text: uint8, shape (n,).
        context: bytes of input per window.
        mixed: number the windows in a fixed random order, so that the first few are a fair sample of the text.
    """

    def __init__(self, text: Tensor, context: int, mixed: bool = False) -> None:
        self.text, self.context = text, context
        count = max(0, (len(text) - 1) // context)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0)) if mixed else torch.arange(count)
        self._starts, self._offsets = order * context, torch.arange(context + 1)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Tensor:
        return self.text[self._starts[index] + self._offsets]

    def __getitems__(self, indices: list[int]) -> Tensor:
        """One batch, shape (len(indices), context + 1), in a single gather."""
        return self.text[self._starts[torch.tensor(indices)][:, None] + self._offsets]


class TextFolder(LightningDataModule):
    """Windows of bytes from the files of a folder, read once, in sorted order, so that all workers hold the same text.

    The last ``val_fraction`` of *every file* is held out, so that validation covers the same kinds of text as training;
    of a single file that is its tail. Each worker trains on its own windows; validation windows are shared out by
    Lightning's ordinary ``DistributedSampler``. Batches are uint8 of shape (batch_size, context + 1).

    Args:
        path: a folder, or one file; ``None`` takes the Python standard library of this interpreter (some 12 MB of
            ``.py`` sources, without tests and installed packages).
        pattern: which files of a folder, at any depth.
        context: bytes of input per sample.
        batch_size: samples per worker and step.
        val_fraction: share of every file that is held out.
        max_bytes: read the files in sorted order until so many bytes are there; ``None`` reads all.
        seed: seed of the partition and of the shuffles.
        num_workers: loader processes; the text is in memory, so 0 is usually fastest.
        partition: ``iid`` deals windows to the workers at random, ``contiguous`` gives each a stretch of the text.

    Raises:
        FileNotFoundError: no such path, or no file of the folder matches.
        ValueError: an argument out of range, or, in ``setup``, too little text for one window of each kind.
    """

    def __init__(
        self,
        path: str | None = None,
        pattern: str = "*.py",
        context: int = 128,
        batch_size: int = 8,
        val_fraction: float = 0.05,
        max_bytes: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
        partition: Literal["iid", "contiguous"] = "iid",
    ) -> None:
        super().__init__()
        least = {"context": 1, "batch_size": 1, "seed": 0, "num_workers": 0}
        given = {"context": context, "batch_size": batch_size, "seed": seed, "num_workers": num_workers}
        for name, value in given.items():
            check_int("TextFolder", name, value, least[name])
        check_float("TextFolder", "val_fraction", val_fraction, 0.0, 1.0, open_low=True, open_high=True)
        if max_bytes is not None:
            check_int("TextFolder", "max_bytes", max_bytes, 1)
        check_choice("TextFolder", "partition", partition, ("iid", "contiguous"))
        self.path, self.pattern, self.context, self.batch_size = path, pattern, context, batch_size
        self.val_fraction, self.max_bytes, self.seed = val_fraction, max_bytes, seed
        self.num_workers, self.partition = num_workers, partition
        self._train: ByteWindows | None = None
        self._val: ByteWindows | None = None
        self.files = text_files(path, pattern)  # a wrong path ends here, before processes start

    def setup(self, stage: str) -> None:
        """Read the text, unless it is there.

        Raises:
            ValueError: too little text for one window of each kind.
        """
        if self._train is not None:
            return
        heads, tails = bytearray(), bytearray()
        for file in self.files:
            text = file.read_bytes()
            if self.max_bytes is not None:
                text = text[: self.max_bytes - len(heads) - len(tails)]
            cut = len(text) - round(len(text) * self.val_fraction)
            heads += text[:cut]
            tails += text[cut:]
            if self.max_bytes is not None and len(heads) + len(tails) >= self.max_bytes:
                break
        least = self.context + 1
        if len(heads) < least or len(tails) < least:
            raise ValueError(
                f"TextFolder(context={self.context}): needs {least} bytes each for training and validation, "
                f"found {len(heads)} and {len(tails)}"
            )
        self._train = ByteWindows(torch.frombuffer(heads, dtype=torch.uint8), self.context)
        self._val = ByteWindows(torch.frombuffer(tails, dtype=torch.uint8), self.context, mixed=True)

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Shuffled windows of this worker's part (:func:`recipes.loading.memory_loader`)."""
        assert self._train is not None
        sampler = worker_sampler(len(self._train), self.trainer, self.partition, seed=self.seed)
        return memory_loader(self._train, self.batch_size, self.num_workers, sampler)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """All validation windows, in one fixed random order: with ``limit_val_batches`` still a sample of all files."""
        assert self._val is not None
        return memory_loader(self._val, self.batch_size, self.num_workers)
