"""Partitions, the sampler over them, and both under a Trainer with its default arguments."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset, WeightedRandomSampler

from lightning_dopt.data import (
    PartitionedDataModule,
    PartitionSampler,
    common_length,
    contiguous,
    dirichlet,
    iid,
    labels_of,
    worker_of,
    worker_sampler,
)

LABELS = torch.arange(1000) % 10


def assert_partition(parts, n):
    joined = torch.cat(parts)
    assert joined.sort().values.tolist() == list(range(n))  # disjoint and covering
    assert all(len(part) > 0 and part.dtype == torch.int64 for part in parts)


@pytest.mark.parametrize("parts", [1, 3, 7, 1000])
def test_every_partition_is_disjoint_covering_and_non_empty(parts):
    for cut in (iid(1000, parts, 5), contiguous(1000, parts), dirichlet(LABELS, parts, 0.3, 5)):
        assert len(cut) == parts
        assert_partition(cut, 1000)


def test_iid_and_contiguous_sizes_differ_by_at_most_one():
    for cut in (iid(11, 4, 0), contiguous(11, 4)):
        assert sorted(len(part) for part in cut) == [2, 3, 3, 3]
    assert [part.tolist() for part in contiguous(5, 2)] == [[0, 1, 2], [3, 4]]


def test_seeds_decide_and_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    for cut in (lambda seed: iid(1000, 4, seed), lambda seed: dirichlet(LABELS, 4, 0.5, seed)):
        assert all(torch.equal(a, b) for a, b in zip(cut(1), cut(1), strict=True))
        assert not all(a.tolist() == b.tolist() for a, b in zip(cut(1), cut(2), strict=True))
    assert torch.equal(before, torch.get_rng_state())


def test_large_alpha_gives_even_mixes_and_small_alpha_one_owner_per_class():
    even = dirichlet(LABELS, 4, 1e6, 0)
    for part in even:
        assert torch.bincount(LABELS[part], minlength=10).sub(25).abs().max() <= 1
    skewed = dirichlet(LABELS, 4, 1e-4, 0)
    owners = [sum(bool((LABELS[part] == c).any()) for part in skewed) for c in range(10)]
    assert sum(owners) <= 10 + 3  # ten classes with one owner each, and at most one gift per empty worker


def test_dirichlet_shares_have_the_variance_of_the_distribution():
    # one class, two workers: the share is Beta(a, a), with variance 1 / (4 (2 a + 1)) = 1 / 8
    labels = torch.zeros(400, dtype=torch.int64)
    share = torch.tensor([len(dirichlet(labels, 2, 0.5, seed)[0]) / 400 for seed in range(400)])
    assert abs(share.mean() - 0.5) < 0.06
    assert abs(share.var() - 1 / 8) < 0.012


def test_no_worker_is_empty_however_small_alpha_is():
    assert_partition(dirichlet(torch.zeros(16, dtype=torch.int64), 16, 1e-9, 0), 16)
    assert_partition(dirichlet([7, -3, 7, 7], 3, 0.01, 1), 4)  # any integers, a plain list


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: iid(3, 4, 0), "iid(parts=4): must be at most the number of samples, 3"),
        (lambda: contiguous(3, 0), "contiguous(parts=0): must be an integer of at least 1"),
        (lambda: dirichlet(LABELS, 2, 0.0, 0), "dirichlet(alpha=0.0): must be a number in (0, inf)"),
        (lambda: dirichlet(torch.rand(4), 2, 1.0, 0), "must be one integer per sample"),
        (lambda: PartitionSampler([]), "must be a non-empty list"),
        (lambda: PartitionSampler([1], length=0), "PartitionSampler(length=0): must be an integer of at least 1"),
        (lambda: worker_sampler(4, None, "dirichlet"), "needs labels, one for each of 4 samples"),
        (lambda: worker_sampler(4, None, "even"), "must be one of 'iid', 'dirichlet', 'contiguous'"),
    ],
)
def test_bad_arguments_are_named_in_one_line(call, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        call()
    assert "\n" not in str(error.value)


def test_common_length():
    parts = [torch.arange(2), torch.arange(9)]
    assert [common_length(parts, how) for how in ("mean", "shortest", "longest")] == [6, 2, 9]


def epochs(sampler, n):
    out = []
    for epoch in range(n):
        sampler.set_epoch(epoch)
        out.append(list(sampler))
        assert len(out[-1]) == len(sampler)
    return out


def test_sampler_is_a_function_of_seed_and_epoch():
    first, second = epochs(PartitionSampler(range(50, 70), seed=3), 2)
    assert sorted(first) == sorted(second) == list(range(50, 70))
    assert first != second
    resumed = PartitionSampler(range(50, 70), seed=3)
    resumed.set_epoch(1)
    assert list(resumed) == second == list(resumed)
    assert epochs(PartitionSampler(range(50, 70), seed=4), 1) != [first]


@pytest.mark.parametrize("length", [1, 3, 7, 10, 13, 40])
def test_truncated_or_wrapped_every_sample_is_seen_equally_often(length):
    seen = Counter(i for epoch in epochs(PartitionSampler(range(10), seed=1, length=length), 20) for i in epoch)
    assert sum(seen.values()) == 20 * length
    assert max(seen.values()) - min(seen[i] for i in range(10)) <= 1


def test_without_shuffle_passes_follow_the_indices():
    assert epochs(PartitionSampler([4, 2, 9], shuffle=False, length=2), 3) == [[4, 2], [9, 4], [2, 9]]


def test_workers_without_a_trainer_own_everything():
    assert worker_of(None) == (0, 1)
    assert sorted(worker_sampler(9, None)) == list(range(9))


def test_labels_are_found_without_reading_samples():
    data = TensorDataset(torch.zeros(6, 2), torch.tensor([5, 4, 3, 2, 1, 0]))
    nested = ConcatDataset([Subset(data, [0, 5]), data])
    assert labels_of(nested).tolist() == [5, 0, 5, 4, 3, 2, 1, 0]
    data.kinds = [1, 1, 1, 2, 2, 2]
    assert labels_of(Subset(data, [0, 5]), "kinds").tolist() == [1, 2]
    with pytest.raises(ValueError, match="TensorDataset has no attribute colour"):
        labels_of(data, "colour")


class Plain(LightningDataModule):
    """A data module that knows nothing of partitions: 25 training samples, 8 validation samples."""

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.arange(25), torch.arange(25) % 3), batch_size=3, shuffle=True)

    def val_dataloader(self):
        return DataLoader(TensorDataset(torch.arange(100, 108), torch.zeros(8)), batch_size=2)


class TrainOnly(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.arange(6)), batch_size=3)


class Recorder(LightningModule):
    """Writes down which samples this rank saw, one file per rank and kind of batch."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder, self.weight = folder, torch.nn.Parameter(torch.zeros(()))

    def note(self, kind, batch):
        with open(self.folder / f"{kind}{self.global_rank}", "a") as file:
            file.write(" ".join(map(str, batch[0].tolist())) + "\n")

    def training_step(self, batch, _):
        self.note("train", batch)
        return self.weight.square()

    def validation_step(self, batch, _):
        self.note("val", batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "accelerator": "cpu",
}


def read(path):
    return [[int(i) for i in line.split()] for line in path.read_text().splitlines()]


@pytest.mark.trainer
@pytest.mark.parametrize("injection", [True, False])
@pytest.mark.parametrize("partition", ["iid", "dirichlet", "contiguous"])
def test_ranks_train_on_disjoint_samples_with_equal_lengths(tmp_path, partition, injection):
    data = PartitionedDataModule(Plain(), partition, alpha=0.2, seed=1)
    trainer = Trainer(devices=2, strategy="ddp_fork", max_epochs=4, use_distributed_sampler=injection, **QUIET)
    trainer.fit(Recorder(tmp_path), data)
    batches = [read(tmp_path / f"train{rank}") for rank in range(2)]
    assert [len(b) for b in batches] == [4 * 5, 4 * 5]  # ceil(25 / 2) = 13 samples in 5 batches per epoch
    seen = [{i for batch in b for i in batch} for b in batches]
    parts = {
        "iid": iid(25, 2, 1),
        "dirichlet": dirichlet(torch.arange(25) % 3, 2, 0.2, 1),
        "contiguous": contiguous(25, 2),
    }[partition]
    assert seen == [set(part.tolist()) for part in parts]  # four epochs reach every sample of the part
    assert batches[0][:5] != batches[0][5:10]  # a fresh order each epoch
    if injection:
        val = [{i for batch in read(tmp_path / f"val{rank}") for i in batch} for rank in range(2)]
        assert [len(v) for v in val] == [4, 4]
        assert not val[0] & val[1]


def test_wrapper_keeps_the_loader_and_the_hooks_of_the_module(tmp_path):
    data = PartitionedDataModule(TrainOnly(), "iid")
    loader = data.train_dataloader()
    assert isinstance(loader.sampler, PartitionSampler)
    assert (loader.batch_size, loader.sampler.shuffle) == (3, False)
    trainer = Trainer(devices=1, max_epochs=1, **QUIET)
    trainer.fit(Recorder(tmp_path), data)  # the module has no validation loader, and none is asked for
    assert read(tmp_path / "train0") == [[0, 1, 2], [3, 4, 5]]
    assert data.data.trainer is trainer
    assert PartitionedDataModule(Plain()).val_dataloader().batch_size == 2


def test_wrapper_refuses_what_it_would_silently_replace():
    class Weighted(LightningDataModule):
        def train_dataloader(self):
            return DataLoader(TensorDataset(torch.arange(3)), sampler=WeightedRandomSampler([1.0, 1.0, 1.0], 3))

    class Two(LightningDataModule):
        def train_dataloader(self):
            return [DataLoader(TensorDataset(torch.arange(3)))]

    with pytest.raises(ValueError, match="has a WeightedRandomSampler of its own"):
        PartitionedDataModule(Weighted()).train_dataloader()
    with pytest.raises(ValueError, match="must return one map-style DataLoader, not list"):
        PartitionedDataModule(Two()).train_dataloader()
    with pytest.raises(ValueError, match=re.escape("PartitionedDataModule(alpha=-1): must be a number in (0, inf)")):
        PartitionedDataModule(Plain(), alpha=-1)
