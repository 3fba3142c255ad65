"""Small image data sets as uint8 tensors, from local files."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}


class Images(NamedTuple):
    """Pictures of shape (n, channels, height, width), uint8, and their classes of shape (n,), int64."""

    pictures: Tensor
    labels: Tensor


def digits() -> tuple[Images, Images]:
    """Scikit-learn's 1,797 digits of 8 x 8; every fifth is for validation.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError("ImageData(dataset='digits') needs scikit-learn: pip install scikit-learn") from None
    bunch = load_digits()
    pictures = (torch.from_numpy(bunch.images) * (255 / 16)).round().to(torch.uint8)[:, None]
    held = torch.arange(len(pictures)) % 5 == 4
    labels = torch.from_numpy(bunch.target).long()
    return Images(pictures[~held], labels[~held]), Images(pictures[held], labels[held])


def find(dataset: str, root: Path) -> list[Path] | None:
    """The local files of a data set, or ``None``: [images, labels, val images, val labels], [images, labels] or [file].

    Looks into every folder of ``root`` whose name starts with the data set's, into torchvision's own folders and into
    ``root`` itself; ``.gz`` may be missing from the names.
    """
    own = sorted(p for p in root.glob(f"{dataset}*") if p.is_dir())
    for folder in [*own, root / _TORCHVISION[dataset] / "raw", root]:
        if dataset == "cifar10":
            archives = sorted(folder.glob("cifar10*.npz"))
            batches = folder / "cifar-10-batches-py"
            if archives or batches.is_dir():
                return archives[:1] or [batches]
            continue
        for names in (
            ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"],
            ["images-idx3-ubyte", "labels-idx1-ubyte"],
        ):
            there = [[p for p in (folder / f"{name}.gz", folder / name) if p.is_file()] for name in names]
            if all(there):
                return [found[0] for found in there]
    return None


def load(dataset: str, files: list[Path]) -> tuple[Images, Images]:
    """Training and validation pictures from what :func:`find` found; without test files the last sixth is held out.

    Raises:
        ValueError: a file that is not what its name says.
    """
    if dataset == "cifar10":
        return _cifar_archive(files[0]) if files[0].suffix == ".npz" else _cifar_batches(files[0].parent)
    parts = [read_idx(file) for file in files]
    train = Images(parts[0][:, None], parts[1].long())
    if len(parts) == 4:
        return train, Images(parts[2][:, None], parts[3].long())
    cut = len(train.labels) - len(train.labels) // 6
    return Images(train.pictures[:cut], train.labels[:cut]), Images(train.pictures[cut:], train.labels[cut:])


def download(dataset: str, root: Path) -> None:
    """Let torchvision put the data set under ``root``.

    Raises:
        ImportError: torchvision is not installed.
    """
    try:
        from torchvision import datasets
    except ImportError:
        raise ImportError("ImageData(download=True) needs torchvision: pip install torchvision") from None
    getattr(datasets, _TORCHVISION[dataset])(str(root), download=True)


def read_idx(file: Path) -> Tensor:
    """An IDX file of unsigned bytes, compressed or not.

    Format: two zero bytes, 0x08, the number of dimensions, each dimension as a big-endian 32-bit integer, the bytes.

    Raises:
        ValueError: the header or the size is wrong.
    """
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
        content = bytearray(stream.read())
    if content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{file}: not an IDX file of unsigned bytes")
    shape = struct.unpack_from(f">{content[3]}I", content, 4)
    data = torch.frombuffer(content, dtype=torch.uint8)[4 + 4 * len(shape) :]
    if data.numel() != torch.Size(shape).numel():
        raise ValueError(f"{file}: holds {data.numel()} bytes, its header says {tuple(shape)}")
    return data.view(shape)


def _cifar_archive(file: Path) -> tuple[Images, Images]:
    import numpy as np

    with np.load(file) as arrays:
        parts = [
            Images(
                torch.from_numpy(arrays[f"{part}_images"]).permute(0, 3, 1, 2).contiguous(),
                torch.from_numpy(arrays[f"{part}_labels"]).long(),
            )
            for part in ("train", "test")
        ]
    return parts[0], parts[1]


def _cifar_batches(root: Path) -> tuple[Images, Images]:
    from torchvision.datasets import CIFAR10

    parts = [CIFAR10(str(root), train=train) for train in (True, False)]
    train, test = (
        Images(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in parts
    )
    return train, test
