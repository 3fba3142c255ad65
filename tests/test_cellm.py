"""CELLM: dense training of adapters between sparse downloads and sparse uploads."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from problems import p2
from test_local_updates import close, path
from torch import Tensor

from lightning_dopt import ErrorFeedback, Int8, LowRank, Plan, Simulation, Sync, TopK, plans
from lightning_dopt.adaptive import FedAdam
from lightning_dopt.comm import lockstep
from lightning_dopt.local import Download
from lightning_dopt.outer import SGD


def largest(x: Tensor, count: int) -> Tensor:
    kept = torch.zeros_like(x)
    places = x.abs().topk(count).indices
    kept[places] = x[places]
    return kept


def test_dense_both_ways_it_is_fedavg_and_fedadam() -> None:
    problem = p2()
    for outer, other in ((SGD(1.0), plans.fedavg(4)), (FedAdam(0.2), plans.fedadam(4, 0.2))):
        dense = plans.cellm("*", 4, 1.0, 1.0, outer)
        assert not dense.corrections[:-1]
        close(path(problem, dense, 24, 0.1), path(problem, other, 24, 0.1))


@pytest.mark.filterwarnings("ignore:Sync")
@pytest.mark.parametrize("feedback", [False, True])
def test_it_is_the_loop_of_the_paper(feedback: bool) -> None:
    """Start from the two largest of five entries, train all, send the three largest changes since that start."""
    problem, rate, h = p2(), 0.1, 3
    plan = plans.cellm("*", h, 0.6, 0.4, SGD(0.8), feedback)
    live = path(problem, plan, 15, rate)
    server, start = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    residual = torch.zeros(8, 5, dtype=torch.float64)
    for k in range(5):
        x = start.expand(8, 5).clone()
        for _ in range(h):
            x = x - rate * torch.stack([problem.gradient(i, x[i]) for i in range(8)])
        wanted = start - x + (residual if feedback else 0.0)
        sent = torch.stack([largest(row, 3) for row in wanted])
        residual = wanted - sent
        server = server - 0.8 * sent.mean(0)
        start = largest(server, 2)
        close(live[(k + 1) * h], start.expand(8, 5), 1e-6)  # values travel in single precision


ADAPTED = {"base.weight": (6, 5), "lora_A": (2, 5), "lora_B": (6, 2), "head": (3,)}


def adapted(plan: Plan, n: int = 4) -> Simulation:
    def start(rank: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(1)
        return {name: torch.randn(shape, generator=g) for name, shape in ADAPTED.items()}

    def backward(rank: int, parameters: dict[str, Tensor], step: int) -> None:
        for name, p in parameters.items():
            if name != "base.weight":
                wave = torch.arange(p.numel()).view(p.shape).float()
                p.grad = p.detach() - torch.cos(wave + rank) * (rank + 1)

    return Simulation(plan, n, start, backward, lambda ps: torch.optim.SGD(ps, lr=0.1))


def test_the_frozen_base_stays_bit_for_bit_and_only_adapters_are_sent() -> None:
    sim = adapted(plans.cellm(sync_every=3, outer=SGD(1.0)))
    before = sim.replicas[0]["base.weight"].detach().clone()
    sim.run(12)
    for replica in sim.replicas:
        assert torch.equal(replica["base.weight"], before)
    assert not torch.equal(sim.replicas[0]["head"], sim.replicas[1]["head"])
    message = TopK(0.25).payload_bytes((2 * 5 + 6 * 2,))
    assert sim.bytes == [4 * 3 * message] * 4
    for name in ("lora_A", "lora_B"):
        assert all(torch.equal(r[name], sim.replicas[0][name]) for r in sim.replicas)
    entries = torch.cat([sim.replicas[0][name].detach().reshape(-1) for name in ("lora_A", "lora_B")])
    assert int((entries != 0).sum()) == 6  # a quarter of 22, rounded up


@pytest.mark.parametrize("codec", [TopK(0.3), Int8(stochastic=True)], ids=repr)
def test_a_run_resumed_between_rounds_is_the_same(codec: Any) -> None:
    plan = Plan([Sync(plans.cellm(sync_every=3).syncs[0].when, signal="delta", outer=SGD(0.7))], [Download(codec)])
    for stop in (4, 6):
        whole, first, again = (adapted(plan) for _ in range(3))
        whole.run(12)
        first.run(stop)
        lockstep([engine.land() for engine in first.engines])
        for k in range(4):
            again.engines[k].load_state_dict(copy.deepcopy(first.engines[k].state_dict()))
            for key, tensor in again.replicas[k].items():
                tensor.data.copy_(first.replicas[k][key].data)
        again.run(12 - stop)
        assert all(torch.equal(again.stacked(key), whole.stacked(key)) for key in ADAPTED)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: plans.cellm(up=0.0), r"^cellm\(up=0.0\): must be a number in \(0, 1\]$"),
        (lambda: plans.cellm(down=1.5), r"^cellm\(down=1.5\): must be a number in \(0, 1\]$"),
        (lambda: plans.cellm(fraction=0.0), r"^cellm\(fraction=0.0\): must be a number in \(0, 1\]$"),
        (lambda: plans.cellm(sync_every=0), r"^cellm\(sync_every=0\): must be an integer of at least 1$"),
        (
            lambda: Download(LowRank(2)),
            r"^Download\(codec=LowRank\(rank=2\)\): must be a compressor of one long vector",
        ),
        (lambda: Download(ErrorFeedback(TopK(0.1))), r"^Download\(codec=ErrorFeedback"),  # type: ignore[arg-type]
        (
            lambda: Plan([Sync()], [Download(TopK(0.1))]),
            r"^Download: needs one sync of the parameters with signal='delta'",
        ),
    ],
)
def test_bad_options_are_refused_in_one_line(make: Any, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        make()
