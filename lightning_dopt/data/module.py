"""Per-worker data as an option: partitions by rank of the attached Trainer, for any LightningDataModule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities.data import _update_dataloader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
)

from lightning_dopt._checks import check_choice, check_float, check_int
from lightning_dopt.data.partition import contiguous, dirichlet, iid, routed
from lightning_dopt.data.sampler import Length, PartitionSampler, common_length

Partition = Literal["iid", "dirichlet", "contiguous", "routed"]

# Hooks that Lightning treats by whether a data module overrides them; taken over only from a `data` that does.
_FORWARDED = (
    "teardown",
    "val_dataloader",
    "test_dataloader",
    "predict_dataloader",
    "state_dict",
    "load_state_dict",
    "transfer_batch_to_device",
    "on_before_batch_transfer",
    "on_after_batch_transfer",
    "on_exception",
)


def worker_of(trainer: Trainer | None) -> tuple[int, int]:
    """``(worker, workers)`` of this process: its rank and the world size, or what the strategy says shards the data.

    Strategies whose ranks share samples (the stages of one pipeline) say so in ``distributed_sampler_kwargs``. Without
    a Trainer, or on a single device, the answer is ``(0, 1)``.
    """
    told = trainer.distributed_sampler_kwargs if trainer is not None else None
    return (int(told["rank"]), int(told["num_replicas"])) if told is not None else (0, 1)


def worker_sampler(
    n_samples: int,
    trainer: Trainer | None,
    partition: Partition = "iid",
    alpha: float = 0.5,
    seed: int = 0,
    labels: Tensor | Sequence[int] | None = None,
    shuffle: bool = True,
    length: Length = "mean",
) -> PartitionSampler:
    """The sampler of this worker's part: no two workers share a sample, and all samplers have one length.

    Use it in ``train_dataloader`` of your own data module, as ``DataLoader(..., sampler=worker_sampler(...))``; it
    works with the default arguments of the ``Trainer``. Every worker cuts the whole data set by itself, so all of them
    must hold the same samples in the same order.

    Args:
        n_samples: samples of the whole training set.
        trainer: the attached Trainer; gives worker and number of workers (:func:`worker_of`).
        partition: how the data set is cut, a function of :mod:`lightning_dopt.data.partition`.
        alpha: concentration of ``dirichlet``; the other partitions ignore it.
        seed: seed of the cut and of the shuffles.
        labels: class of every sample, needed by ``dirichlet``; route of every sample, needed by ``routed``.
        shuffle: whether each pass over the part is permuted.
        length: samples per worker and epoch (:func:`lightning_dopt.data.sampler.common_length`).

    Raises:
        ValueError: a bad argument, fewer samples than workers, or ``dirichlet`` or ``routed`` without one label per sample.
    """
    worker, workers = worker_of(trainer)
    check_choice("worker_sampler", "partition", partition, get_args(Partition))
    if partition in ("dirichlet", "routed"):
        if labels is None or len(labels) != n_samples:
            raise ValueError(
                f"worker_sampler(partition={partition!r}): needs labels, one for each of {n_samples} samples"
            )
        parts = dirichlet(labels, workers, alpha, seed) if partition == "dirichlet" else routed(labels, workers)
    else:
        parts = iid(n_samples, workers, seed) if partition == "iid" else contiguous(n_samples, workers)
    # Workers shuffle differently: parts of one size would otherwise be visited in the same order of positions.
    return PartitionSampler(parts[worker], seed * workers + worker, shuffle, common_length(parts, length))


class PartitionedDataModule(LightningDataModule):
    """Gives every worker its own fixed part of the training set of any other data module.

    The training ``DataLoader`` of ``data`` is made again with a :class:`PartitionSampler` and is otherwise unchanged;
    it shuffles if it shuffled before. Everything else (validation, test, transfers, state) is ``data``'s own, so
    validation is sharded by Lightning's ordinary ``DistributedSampler``.

    Args:
        data: the data module to partition. All workers must build the same training set in the same order.
        partition: ``iid``, ``dirichlet`` (skewed label mixes), ``contiguous`` (stretches in the set's own order) or ``routed``
            (by a route that every sample has, see :func:`lightning_dopt.data.partition.routed`).
        alpha: concentration of ``dirichlet``: 0.1 is severe, 100 nearly even. The other partitions ignore it.
        seed: seed of the cut and of the shuffles.
        length: samples per worker and epoch: the ``mean`` size of the parts, the ``shortest`` or the ``longest``.
        labels: name of the attribute of the training set that holds the labels, for ``dirichlet``, or the routes, for
            ``routed``; ``None`` looks for
            ``targets`` and ``labels``, and for the second tensor of a ``TensorDataset``.

    Raises:
        ValueError: a bad argument. When the loader is made: a training loader that is not one map-style ``DataLoader``
            with an ordinary sampler, or labels that cannot be found.
    """

    def __init__(
        self,
        data: LightningDataModule,
        partition: Partition = "iid",
        alpha: float = 0.5,
        seed: int = 0,
        length: Length = "mean",
        labels: str | None = None,
    ) -> None:
        super().__init__()
        check_choice("PartitionedDataModule", "partition", partition, get_args(Partition))
        check_float("PartitionedDataModule", "alpha", alpha, 0.0, open_low=True, open_high=True)
        check_int("PartitionedDataModule", "seed", seed, 0)
        check_choice("PartitionedDataModule", "length", length, ("mean", "shortest", "longest"))
        self.data, self.partition, self.alpha, self.seed = data, partition, alpha, seed
        self.length, self.labels = length, labels
        for option in ("prepare_data_per_node", "allow_zero_length_dataloader_with_multiple_devices"):
            setattr(self, option, getattr(data, option))
        self.allow_zero_length_dataloader_with_multiple_devices = (
            data.allow_zero_length_dataloader_with_multiple_devices
        )
        for hook in _FORWARDED:
            if is_overridden(hook, data, LightningDataModule):
                setattr(self, hook, getattr(data, hook))

    def prepare_data(self) -> None:
        """What ``data`` does once per node."""
        self.data.trainer = self.trainer
        self.data.prepare_data()

    def setup(self, stage: str) -> None:
        """What ``data`` does on every worker."""
        self.data.trainer = self.trainer
        self.data.setup(stage)

    def train_dataloader(self) -> DataLoader:
        """``data``'s training loader over this worker's part."""
        loader = self.data.train_dataloader()
        shuffle = _shuffles(loader)
        wanted = labels_of(loader.dataset, self.labels) if self.partition in ("dirichlet", "routed") else None
        size = len(loader.dataset)
        sampler = worker_sampler(
            size, self.trainer, self.partition, self.alpha, self.seed, wanted, shuffle, self.length
        )
        return _update_dataloader(loader, sampler)


def labels_of(dataset: Dataset, name: str | None = None) -> Tensor:
    """The label of every sample of a data set, without reading the samples; follows ``Subset`` and ``ConcatDataset``.

    Args:
        dataset: a map-style data set.
        name: the attribute that holds the labels; ``None`` looks for ``targets``, ``labels`` and ``tensors[1]``.

    Raises:
        ValueError: there are none to be found.
    """
    if name is None or not hasattr(dataset, name):
        if isinstance(dataset, Subset):
            return labels_of(dataset.dataset, name)[torch.as_tensor(dataset.indices)]
        if isinstance(dataset, ConcatDataset):
            return torch.cat([labels_of(part, name) for part in dataset.datasets])
        if name is None and isinstance(dataset, TensorDataset) and len(dataset.tensors) > 1:
            return dataset.tensors[1]
    for candidate in ("targets", "labels") if name is None else (name,):
        if hasattr(dataset, candidate):
            return torch.as_tensor(getattr(dataset, candidate))
    shown = "targets or labels" if name is None else name
    raise ValueError(
        f"PartitionedDataModule(labels={name!r}): {type(dataset).__name__} has no attribute {shown}; "
        "name the one that holds the label of every sample"
    )


def _shuffles(loader: object) -> bool:
    """Whether a loader shuffles, by its sampler; refuses what a partition would silently replace."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        what = type(loader.dataset).__name__ if isinstance(loader, DataLoader) else type(loader).__name__
        raise ValueError(f"PartitionedDataModule: train_dataloader must return one map-style DataLoader, not {what}")
    sampler = loader.sampler
    if isinstance(sampler, DistributedSampler):
        return bool(sampler.shuffle)
    if isinstance(sampler, SequentialSampler):
        return False
    size = len(loader.dataset)  # type: ignore[arg-type]
    if isinstance(sampler, RandomSampler) and not sampler.replacement and len(sampler) == size:
        return True
    raise ValueError(
        f"PartitionedDataModule: the training loader has a {type(sampler).__name__} of its own, which the partition "
        "would replace; use shuffle=True or shuffle=False"
    )
