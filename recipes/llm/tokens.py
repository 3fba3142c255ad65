"""Text that was turned into tokens before: two files of 16-bit numbers, mapped into memory."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dopt._checks import check_int
from lightning_dopt.data import worker_sampler
from recipes.llm.data import ByteWindows
from recipes.loading import memory_loader


class TokenFiles(LightningDataModule):
    """Windows of tokens from files that hold nothing but numbers below 32768, two bytes each, little-endian.

    Any tokenizer makes them: ``numpy.array(ids, dtype="int16").tofile("train.bin")``. Files are mapped, not read. Each
    worker trains on its own windows, in random order; validation windows are shared out by Lightning.

    Args:
        train: file of training tokens.
        val: file of validation tokens.
        context: tokens of input per sample.
        batch_size: samples per worker and step.
        seed: of the partition and the shuffles.
        num_workers: loader processes.

    Raises:
        FileNotFoundError: in ``setup``, no such file.
        ValueError: an argument out of range, or, in ``setup``, a file too short for one window.
    """

    def __init__(
        self,
        train: str = "data/train.bin",
        val: str = "data/val.bin",
        context: int = 256,
        batch_size: int = 64,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        check_int("TokenFiles", "context", context, 1)
        check_int("TokenFiles", "batch_size", batch_size, 1)
        check_int("TokenFiles", "seed", seed, 0)
        check_int("TokenFiles", "num_workers", num_workers, 0)
        self.train, self.val, self.context, self.batch_size = train, val, context, batch_size
        self.seed, self.num_workers = seed, num_workers
        self._train: ByteWindows | None = None
        self._val: ByteWindows | None = None

    def setup(self, stage: str) -> None:
        """Map the files, unless that is done.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file too short for one window.
        """
        if self._train is None:
            self._train = ByteWindows(self._mapped("train", self.train), self.context)
            self._val = ByteWindows(self._mapped("val", self.val), self.context, mixed=True)

    def _mapped(self, option: str, path: str) -> Tensor:
        if not Path(path).is_file():
            raise FileNotFoundError(f"TokenFiles({option}={path!r}): no such file")
        count = Path(path).stat().st_size // 2
        if count <= self.context:
            raise ValueError(f"TokenFiles({option}={path!r}): holds {count} tokens, needs {self.context + 1}")
        return torch.from_file(path, size=count, dtype=torch.int16)

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Shuffled windows of this worker's part."""
        assert self._train is not None
        sampler = worker_sampler(len(self._train), self.trainer, "iid", seed=self.seed)
        return memory_loader(self._train, self.batch_size, self.num_workers, sampler)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """All validation windows, in one fixed random order."""
        assert self._val is not None
        return memory_loader(self._val, self.batch_size, self.num_workers)
