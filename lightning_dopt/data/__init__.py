"""Data of each worker: partitions, a sampler of one length on all workers, and both for any data module."""

from lightning_dopt.data.module import PartitionedDataModule, labels_of, worker_of, worker_sampler
from lightning_dopt.data.partition import contiguous, dirichlet, iid, routed
from lightning_dopt.data.routing import kmeans_routes
from lightning_dopt.data.sampler import PartitionSampler, common_length

__all__ = [
    "PartitionSampler",
    "PartitionedDataModule",
    "common_length",
    "contiguous",
    "dirichlet",
    "iid",
    "kmeans_routes",
    "labels_of",
    "routed",
    "worker_of",
    "worker_sampler",
]
