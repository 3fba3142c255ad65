"""The loader both data modules use: samples live in memory and are fetched a whole batch at a time."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler


def as_fetched(batch: Any) -> Any:
    """The collate function of data sets whose ``__getitems__`` returns a batch, not a list of samples."""
    return batch


def memory_loader(
    data: Dataset, batch_size: int, num_workers: int, sampler: Sampler[int] | None = None
) -> DataLoader[Any]:
    """A loader of ready batches: for training with ``sampler``, for validation in order without one.

    Training drops an incomplete last batch, unless it is the only one, so that all steps are equally noisy.
    """
    return DataLoader(
        data,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=sampler is not None and len(sampler) >= batch_size,  # type: ignore[arg-type]
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        collate_fn=as_fetched,
    )
