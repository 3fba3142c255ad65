"""Data of each worker: partitions, a sampler of one length on all workers, and both for any data module."""

from lightning_dopt.data.module import PartitionedDataModule, labels_of, worker_of, worker_sampler
from lightning_dopt.data.partition import contiguous, dirichlet, iid
from lightning_dopt.data.sampler import PartitionSampler, common_length

__all__ = [
    "PartitionSampler",
    "PartitionedDataModule",
    "common_length",
    "contiguous",
    "dirichlet",
    "iid",
    "labels_of",
    "worker_of",
    "worker_sampler",
]
