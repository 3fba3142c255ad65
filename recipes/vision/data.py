"""Four small image data sets, in memory, with a part of their own for every worker."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from lightning_dopt._checks import check_choice, check_float, check_int
from lightning_dopt.data import worker_sampler
from recipes.loading import memory_loader
from recipes.vision import files
from recipes.vision.files import Images

Batch = tuple[Tensor, Tensor]
_NAMES = ("digits", "mnist", "fashion_mnist", "cifar10")


def moments(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the pixels in [0, 1] per channel, float32, by counting values."""
    counts = torch.stack([torch.bincount(p.flatten(), minlength=256) for p in pictures.unbind(1)]).double()
    values, share = torch.arange(256) / 255, counts / counts.sum(1, keepdim=True)
    mean = (share * values).sum(1)
    std = (share * (values - mean[:, None]) ** 2).sum(1).sqrt()
    return mean.float(), std.float()


class PictureSet(Dataset[Batch]):
    """Pictures kept as bytes and normalized as they are fetched, a whole batch at a time.

    Args:
        pictures: uint8, shape (n, channels, height, width).
        targets: class of every picture, shape (n,).
        mean: per channel, of pixels in [0, 1].
        std: per channel, of pixels in [0, 1].
    """

    def __init__(self, pictures: Tensor, targets: Tensor, mean: Tensor, std: Tensor) -> None:
        self.pictures, self.targets = pictures, targets
        self._scale, self._shift = (1 / (255 * std))[:, None, None], (-mean / std)[:, None, None]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Batch:
        return self.pictures[index] * self._scale + self._shift, self.targets[index]

    def __getitems__(self, indices: list[int]) -> Batch:
        """One batch: float32 of shape (len(indices), channels, height, width), and labels."""
        chosen = torch.tensor(indices)
        return self.pictures[chosen] * self._scale + self._shift, self.targets[chosen]


class ImageData(LightningDataModule):
    """Images in memory, normalized per channel by the training set; a batch is (float images, int64 labels).

    Each worker trains on its own part; validation is shared out by Lightning's ordinary ``DistributedSampler``.

    Args:
        dataset: ``digits`` comes with scikit-learn (1,797 pictures of 8 x 8, every fifth for validation); ``mnist`` and
            ``fashion_mnist`` are IDX files, ``cifar10`` an ``.npz`` archive or torchvision's folder, under ``root``.
        root: folder with the files, or with folders that are named as the data sets are.
        download: let torchvision download what ``root`` lacks.
        batch_size: samples per worker and step.
        image_size: height and width the pictures are resized to (bilinear); most timm models need 32 or more.
        partition: ``iid``, or ``dirichlet`` for skewed mixes of classes.
        alpha: concentration of ``dirichlet``: 0.1 is severe, 100 nearly even. ``iid`` ignores it.
        seed: seed of the partition and of the shuffles.
        num_workers: loader processes; the pictures are in memory, so 0 is usually fastest.

    Raises:
        FileNotFoundError: the files are not there and ``download`` is off.
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        dataset: Literal["digits", "mnist", "fashion_mnist", "cifar10"] = "digits",
        root: str = "data",
        download: bool = False,
        batch_size: int = 32,
        image_size: int = 32,
        partition: Literal["iid", "dirichlet"] = "iid",
        alpha: float = 0.5,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        check_choice("ImageData", "dataset", dataset, _NAMES)
        check_choice("ImageData", "partition", partition, ("iid", "dirichlet"))
        check_float("ImageData", "alpha", alpha, 0.0, open_low=True, open_high=True)
        check_int("ImageData", "batch_size", batch_size, 1)
        check_int("ImageData", "image_size", image_size, 1)
        check_int("ImageData", "seed", seed, 0)
        check_int("ImageData", "num_workers", num_workers, 0)
        self.dataset, self.root, self.download, self.batch_size = dataset, root, download, batch_size
        self.image_size, self.partition, self.alpha, self.seed = image_size, partition, alpha, seed
        self.num_workers = num_workers
        self._train: PictureSet | None = None
        self._val: PictureSet | None = None
        if not download:
            self._find()  # a missing file ends here, before processes start

    @property
    def in_chans(self) -> int:
        """Channels of the pictures: 3 for CIFAR-10, else 1."""
        return 3 if self.dataset == "cifar10" else 1

    def prepare_data(self) -> None:
        """Download what is missing, if allowed."""
        if self.download and self.dataset != "digits" and files.find(self.dataset, self._folder) is None:
            files.download(self.dataset, self._folder)

    def setup(self, stage: str) -> None:
        """Load, resize and measure the pictures, unless they are there."""
        if self._train is not None:
            return
        found = self._find()
        train, val = files.digits() if found is None else files.load(self.dataset, found)
        train, val = self._resize(train), self._resize(val)
        mean, std = moments(train.pictures)
        self._train = PictureSet(*train, mean, std)
        self._val = PictureSet(*val, mean, std)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled batches of this worker's part (:func:`recipes.loading.memory_loader`)."""
        assert self._train is not None
        sampler = worker_sampler(
            len(self._train), self.trainer, self.partition, self.alpha, self.seed, self._train.targets
        )
        return memory_loader(self._train, self.batch_size, self.num_workers, sampler)

    def val_dataloader(self) -> DataLoader[Batch]:
        """All validation pictures in order."""
        assert self._val is not None
        return memory_loader(self._val, self.batch_size, self.num_workers)

    @property
    def _folder(self) -> Path:
        return Path(self.root).expanduser()

    def _find(self) -> list[Path] | None:
        if self.dataset == "digits":
            return None
        found = files.find(self.dataset, self._folder)
        if found is None:
            raise FileNotFoundError(
                f"ImageData(root={self.root!r}): no {self.dataset} files there; name their folder or set download=True"
            )
        return found

    def _resize(self, images: Images) -> Images:
        """Pictures of ``image_size``, a thousand at a time so that the floats stay few."""
        size = (self.image_size, self.image_size)
        if images.pictures.shape[-2:] == size:
            return images
        chunks = [
            functional.interpolate(chunk.float(), size, mode="bilinear", antialias=True).round().to(torch.uint8)
            for chunk in torch.split(images.pictures, 1000)
        ]
        return Images(torch.cat(chunks), images.labels)
