"""DiPaCo: paths through shared modules, each a DiLoCo of those that hold it, and data by route."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from problems import mosaic_simulation, sgd
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from trainer_tools import on_ranks, trainer

from lightning_dopt import Plan, ReplicaStrategy, Simulation, Sync, plans
from lightning_dopt.combine import Rescaled
from lightning_dopt.data import PartitionedDataModule, kmeans_routes, routed
from lightning_dopt.topology import Complete, Groups

SQUARE = [[0, 0], [0, 1], [1, 0], [1, 1]]
LEVELS = ["low.*", "high.*"]


def target(rank: int, name: str) -> Tensor:
    return torch.cos(torch.arange(3.0, dtype=torch.float64) + 2.0 * rank + len(name)) * (rank + 1)


def layered(plan: Plan, n: int = 4, lr: float = 0.2) -> Simulation:
    """``|x - target|^2 / 2`` on every rank, in two levels and a part of one's own."""
    names = ("low.w", "high.w", "own")

    def backward(rank: int, parameters: dict[str, Tensor], step: int) -> None:
        for name, p in parameters.items():
            p.grad = p.detach() - target(rank, name)

    return Simulation(plan, n, lambda rank: {k: torch.zeros(3, dtype=torch.float64) for k in names}, backward, sgd(lr))


@pytest.mark.parametrize("counts", [None, [1, 3, 2, 2]])
def test_every_module_ends_in_the_optimum_of_the_paths_through_it(counts: list[int] | None) -> None:
    plan = plans.dipaco(SQUARE, LEVELS, 4, 0.7, 0.3, counts)
    sim = layered(plan).run(400)
    weights = torch.tensor(counts or [1, 1, 1, 1], dtype=torch.float64)
    for level, name in enumerate(("low.w", "high.w")):
        for module in (0, 1):
            ranks = [r for r in range(4) if SQUARE[r][level] == module]
            shares = weights[ranks] / weights[ranks].sum()
            best = sum(s * target(r, name) for s, r in zip(shares, ranks, strict=True))
            for r in ranks:
                torch.testing.assert_close(sim.replicas[r][name].detach(), best, rtol=0, atol=1e-10)
    for r in range(4):
        torch.testing.assert_close(sim.replicas[r]["own"].detach(), target(r, "own"), rtol=0, atol=1e-10)


def test_one_module_per_level_is_diloco() -> None:
    """All share all: as many replicas as ranks. One rank: one replica. A module of one rank alone sends nothing."""
    shared = mosaic_simulation(plans.dipaco([[0, 0]] * 4, ["head.*", "[!h]*"], 3), 4, sgd(0.05)).run(14)
    diloco = mosaic_simulation(plans.diloco(3), 4, sgd(0.05)).run(14)
    for name in diloco.replicas[0]:
        torch.testing.assert_close(shared.stacked(name), diloco.stacked(name))
    assert shared.bytes == diloco.bytes
    one, single = (layered(p, 1).run(30) for p in (plans.dipaco([[0, 0]], LEVELS, 3), plans.diloco(3)))
    for name in ("low.w", "high.w"):
        torch.testing.assert_close(one.stacked(name), single.stacked(name))
    alone = layered(plans.dipaco([[0, 0], [0, 1], [0, 2], [0, 3]], LEVELS, 3)).run(12)
    assert {k: e.bytes for k, e in alone.worlds[0].ledger.entries.items() if e.bytes}.keys() == {"parameters[low.*]"}


def test_bytes_are_those_of_the_partners_of_each_module() -> None:
    sim = layered(plans.dipaco(SQUARE, LEVELS, 5)).run(20)
    assert sim.bytes == [4 * (3 + 3) * 8] * 4
    shapes = plans.dipaco([[0, 0], [0, 1], [0, 0], [1, 1]], LEVELS, 5)
    assert [s.peers for s in shapes] == [Groups([[0, 1, 2], [3]]), Groups([[0, 2], [1, 3]])]
    assert plans.dipaco([[0], [0]], ["*"]).syncs[0].peers == Complete()


def test_means_of_many_keep_the_length_of_one_if_they_are_unlike() -> None:
    """By hand: the mean of ``m`` changes times ``sqrt(m)``, in groups of three and one."""
    plan = plans.dipaco([[0], [0], [0], [1]], ["*"], 1, 0.1, 0.0, rescale=True)
    sim = layered(plan, lr=0.5).run(1)
    changes = torch.stack([-0.5 * target(r, "low.w") for r in range(4)])
    expected = torch.cat([(-0.1 * 3**0.5 * changes[:3].mean(0)).expand(3, 3), -0.1 * changes[3:]])
    torch.testing.assert_close(sim.stacked("low.w"), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"rescales changes, use signal='delta'$"):
        Sync(combine=Rescaled())
    everybody = Plan([Sync(signal="delta", combine=Rescaled(1.0))])  # summed on the way
    total = layered(everybody, lr=0.5).run(1).stacked("low.w")
    torch.testing.assert_close(total[0], -changes.sum(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: plans.dipaco([[0]], LEVELS), r"^dipaco\(paths=.*every path needs one alternative for each level$"),
        (lambda: plans.dipaco([], LEVELS), r"^dipaco\(paths=\[\], "),
        (lambda: plans.dipaco([[0, -1]], LEVELS), r"^dipaco\(paths=-1\): must be an integer of at least 0$"),
        (
            lambda: plans.dipaco(SQUARE, LEVELS, counts=[1]),
            r"^dipaco\(counts=\[1\]\): must have one number for each of 4",
        ),
        (lambda: plans.dipaco(SQUARE, LEVELS).check(5), r"^Groups\(members=.*5"),
        (lambda: Groups([[0, 1]], [1]), r"^Groups\(counts=\[1\]\): must have one number for each of 2 ranks$"),
        (lambda: routed([0, 1, 2], 4), r"^routed\(parts=4\): must be at most the number of samples, 3$"),
        (lambda: routed([0, 1, 2, 2], 4), r"^routed\(parts=4\): must be a multiple of the 3 routes"),
        (lambda: routed([0, 0, 0, 1, 1, 0], 4), None),
        (lambda: routed([0, 0, 0, 1], 4), r"^routed\(parts=4\): worker 3 gets no sample, route 1 has too few$"),
        (lambda: routed(torch.zeros(3), 1), r"^routed\(routes=<torch.float32, shape \(3,\)>\): must be one integer"),
        (lambda: kmeans_routes(torch.zeros(2, 3), 3), r"^kmeans_routes\(routes=3\): needs at least as many rows"),
    ],
)
def test_bad_options_are_refused_in_one_line(make: Any, line: str | None) -> None:
    if line is None:
        make()
        return
    with pytest.raises(ValueError, match=line):
        make()


# ---------------------------------------------------------------------- routes


def test_parts_follow_their_routes() -> None:
    routes = torch.tensor([0, 1, 1, 0, 1, 0, 1, 1])
    two, four = routed(routes, 2), routed(routes, 4)
    assert [p.tolist() for p in two] == [[0, 3, 5], [1, 2, 4, 6, 7]]
    assert sorted(torch.cat(four).tolist()) == list(range(8))
    assert all(routes[part].unique().tolist() == [w % 2] for w, part in enumerate(four))


def clusters(each: int = 40) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    kinds = torch.arange(4).repeat_interleave(each)[torch.randperm(4 * each, generator=g)]
    corners = torch.tensor([[-4.0, -4.0], [-4.0, 4.0], [4.0, -4.0], [4.0, 4.0]])
    return corners[kinds] + 0.3 * torch.randn(4 * each, 2, generator=g), kinds


def test_clusters_are_found_whatever_the_seed() -> None:
    x, kinds = clusters()
    for seed in range(5):
        found = kmeans_routes(x, 4, seed)
        assert len({(int(a), int(b)) for a, b in zip(found, kinds, strict=True)}) == 4
    assert kmeans_routes(torch.ones(5, 2), 3).unique().tolist() == [0]


class Paths(LightningModule):
    """Two levels whose outputs are added, each one of two linear maps."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
        for p in self.parameters():
            nn.init.constant_(p, 0.1)
        self.seen: list[Tensor] = []

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return ((self.low(x) + self.high(x)).squeeze(1) - y).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(batch[0])
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.005)


class Clustered(LightningDataModule):
    """Linear targets that differ from cluster to cluster; the route of a sample is its cluster."""

    def train_dataloader(self) -> Any:
        x, kinds = clusters()
        slopes = torch.tensor([[1.0, 2.0], [1.0, -1.0], [-1.0, 2.0], [-1.0, -1.0]])
        dataset = TensorDataset(x, (slopes[kinds] * x).sum(1))
        dataset.routes = kinds  # type: ignore[attr-defined]
        return DataLoader(dataset, batch_size=8, shuffle=True)


def test_two_by_two_paths_under_a_trainer_learn_their_routes() -> None:
    """Four processes: modules agree where they are shared, samples stay on their path, and paths learn their clusters."""

    def job(rank: int) -> Any:
        module = Paths()
        plan = plans.dipaco(SQUARE, LEVELS, 10, 0.7, 0.5)
        strategy = ReplicaStrategy(plan=plan, evaluate="local", buffers="local")
        data = PartitionedDataModule(Clustered(), partition="routed", labels="routes")
        trainer(strategy, 4, max_steps=80, max_epochs=-1).fit(module, data)
        x, y = Clustered().train_dataloader().dataset.tensors
        mine = clusters()[1] == rank
        losses = [float(m.loss((x[mine], y[mine]))) for m in (Paths(), module)]
        return {k: p.detach() for k, p in module.named_parameters()}, torch.cat(module.seen), losses

    answers = on_ranks(job, 4)
    weights = [a[0] for a in answers]
    for name in weights[0]:
        level = 0 if name.startswith("low") else 1
        for i in range(4):
            for j in range(4):
                assert torch.equal(weights[i][name], weights[j][name]) == (SQUARE[i][level] == SQUARE[j][level]), name
    for rank, (_, seen, (start, end)) in enumerate(answers):
        signs = torch.tensor([[-1, -1], [-1, 1], [1, -1], [1, 1]][rank])
        assert bool((seen.sign() == signs).all())
        assert end < 0.1 * start
