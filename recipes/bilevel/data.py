"""Pictures for two levels: training samples of which some labels are wrong, held-out ones for the upper level, a test set."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_dopt._checks import check_choice, check_float, check_int
from lightning_dopt.data import worker_sampler
from recipes.loading import memory_loader
from recipes.vision import files

Batch = tuple[Tensor, Tensor, Tensor]


class Rows(Dataset[Batch]):
    """Flat pictures, labels and each sample's own number, fetched a batch at a time.

    Args:
        pictures: float, shape (n, pixels).
        labels: int64, shape (n,).
    """

    def __init__(self, pictures: Tensor, labels: Tensor) -> None:
        self.pictures, self.labels = pictures, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        return self.pictures[index], self.labels[index], torch.tensor(index)

    def __getitems__(self, indices: list[int]) -> Batch:
        """One batch."""
        chosen = torch.tensor(indices)
        return self.pictures[chosen], self.labels[chosen], chosen


class TwoLevelData(LightningDataModule):
    """Batches ``{"lower": ..., "upper": ...}`` of (pictures of shape (B, pixels), labels, numbers of the samples).

    Validation runs over the test set (first loader) and over all held-out samples (second loader).

    Args:
        dataset: ``digits`` comes with scikit-learn (8 x 8); ``mnist`` and ``fashion_mnist`` are IDX files under ``root``.
        root: folder with the files, or with folders that are named as the data sets are.
        samples: training pictures to use, the first of the file; 0 for all.
        held_out: share of them for the upper level.
        corruption: share of the other's labels that are replaced by another class.
        batch_size: samples per worker, level and step.
        partition: ``iid``, or ``dirichlet`` for skewed mixes of classes, at both levels.
        alpha: concentration of ``dirichlet``: 0.1 is severe, 100 nearly even. ``iid`` ignores it.
        seed: seed of corruption, partition and shuffles.

    Raises:
        FileNotFoundError: the files are not there.
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        dataset: Literal["digits", "mnist", "fashion_mnist"] = "digits",
        root: str = "data",
        samples: int = 0,
        held_out: float = 0.2,
        corruption: float = 0.0,
        batch_size: int = 32,
        partition: Literal["iid", "dirichlet"] = "dirichlet",
        alpha: float = 0.3,
        seed: int = 0,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_choice(name, "dataset", dataset, ("digits", "mnist", "fashion_mnist"))
        check_int(name, "samples", samples, 0)
        check_float(name, "held_out", held_out, 0.0, 1.0, open_low=True, open_high=True)
        check_float(name, "corruption", corruption, 0.0, 1.0, open_high=True)
        check_int(name, "batch_size", batch_size, 1)
        check_choice(name, "partition", partition, ("iid", "dirichlet"))
        check_float(name, "alpha", alpha, 0.0, open_low=True, open_high=True)
        check_int(name, "seed", seed, 0)
        self.dataset, self.root, self.samples, self.held_out = dataset, root, samples, held_out
        self.corruption, self.batch_size, self.alpha, self.seed = corruption, batch_size, alpha, seed
        self.partition: Literal["iid", "dirichlet"] = partition
        self._sets: dict[str, Rows] = {}
        self._wrong = torch.zeros(0, dtype=torch.bool)
        if dataset != "digits":
            self._find()  # a missing file ends here, before processes start

    def setup(self, stage: str) -> None:
        """Load, split and corrupt, unless it is done."""
        if self._sets:
            return
        train, test = files.digits() if self.dataset == "digits" else files.load(self.dataset, self._find())
        keep = slice(0, self.samples or None)
        pictures, labels = _flat(train.pictures[keep]), train.labels[keep]
        g = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(labels), generator=g)
        cut = round(self.held_out * len(labels))
        upper, lower = order[:cut], order[cut:]
        self._wrong = torch.rand(len(lower), generator=g) < self.corruption
        shift = torch.randint(1, 10, (len(lower),), generator=g)
        noisy = torch.where(self._wrong, (labels[lower] + shift) % 10, labels[lower])
        mean = pictures.mean()
        std = pictures.std() * (pictures.shape[1] / 64) ** 0.5  # so that one learning rate suits all sizes
        self._sets = {
            "lower": Rows((pictures[lower] - mean) / std, noisy),
            "upper": Rows((pictures[upper] - mean) / std, labels[upper]),
            "test": Rows((_flat(test.pictures) - mean) / std, test.labels),
        }

    @property
    def pixels(self) -> int:
        """Per picture."""
        return self._sets["test"].pictures.shape[1]

    @property
    def wrong(self) -> Tensor:
        """Which labels of the lower level were replaced, by number of the sample."""
        return self._wrong

    def train_dataloader(self) -> dict[str, DataLoader[Any]]:
        """This worker's part of both levels, shuffled."""
        loaders = {}
        for k, level in enumerate(("lower", "upper")):
            rows = self._sets[level]
            sampler = worker_sampler(len(rows), self.trainer, self.partition, self.alpha, self.seed + k, rows.labels)
            loaders[level] = memory_loader(rows, self.batch_size, 0, sampler)
        return loaders

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """The test set and the held-out samples, in order."""
        return [memory_loader(self._sets[level], 256, 0) for level in ("test", "upper")]

    def _find(self) -> list[Path]:
        found = files.find(self.dataset, Path(self.root).expanduser())
        if found is None:
            raise FileNotFoundError(
                f"TwoLevelData(root={self.root!r}): no {self.dataset} files there; name their folder"
            )
        return found


def _flat(pictures: Tensor) -> Tensor:
    return pictures.flatten(1).float() / 255
