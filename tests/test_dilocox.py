"""DiLoCoX: thin factors of few bits, ranks that follow what is sent, rounds that follow the ranks."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from problems import SHAPES, mosaic_simulation, sgd
from torch import Tensor

from lightning_dopt import (
    ByBytes,
    ErrorFeedback,
    Every,
    Identity,
    Int4,
    Int8,
    LowRank,
    OneRound,
    Plan,
    Simulation,
    Sync,
    TopK,
    outer,
    plans,
)
from lightning_dopt.compress import Factors, KeepEnergy
from lightning_dopt.compress.allocation import Allocation
from lightning_dopt.compress.lowrank import orthonormal
from lightning_dopt.exchange import Channel


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------- factors


@pytest.mark.parametrize("packing", [Int4(), Int8(), Int4(block=8)], ids=repr)
@pytest.mark.parametrize("rank", [1, 3, 20])
def test_the_error_is_what_the_subspace_misses_and_what_packing_the_second_factor_loses(
    packing: Any, rank: int
) -> None:
    c = Factors(LowRank(rank, 0.01), packing)
    x = gaussian(24, 4, seed=1) @ gaussian(4, 30, seed=2) + 0.1 * gaussian(24, 30)
    got = c.roundtrip(x, 5)
    u = torch.linalg.svd(got).U[:, : min(rank, 24)].double()  # the span that receivers know
    missed = (x - u @ (u.T @ x.double())).square().sum()
    kept = u.T @ x.double()
    lost = (kept - u.T @ got.double()).square().sum()
    error = (x - got).double().square().sum()
    assert float(error) == pytest.approx(float(missed + lost), rel=1e-4)
    assert error < x.double().square().sum()


def test_exact_factors_are_the_best_approximation_and_power_iterations_find_it() -> None:
    x = gaussian(40, 6, seed=1) @ gaussian(6, 50, seed=2) + 0.3 * gaussian(40, 50)
    s = torch.linalg.svdvals(x)
    best = float(s[6:].square().sum())
    errors = [float(Factors(LowRank(6, 1.0), Identity(), k).squared_error(x, 3)) for k in (0, 1, 4)]
    assert errors[0] > 1.05 * best
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] == pytest.approx(best, rel=0.02)


def test_bytes_are_those_of_two_packed_factors() -> None:
    c = Factors(LowRank(8), Int4())
    assert c.payload_bytes((512, 256)) == 4 + (512 * 8 // 2 + 4 * 32) + (256 * 8 // 2 + 4 * 16)
    assert c.payload_bytes((512,)) == 4 * 512
    assert LowRank(8).payload_bytes((512, 256)) / c.payload_bytes((512, 256)) > 7


def test_the_second_factor_is_taken_after_the_first_was_packed() -> None:
    """What packing makes of the first factor alone would lose more: its columns are no longer orthonormal."""
    x = gaussian(30, 2, seed=1) @ gaussian(2, 40, seed=2)
    c = Factors(LowRank(2, 1.0), Int4())
    p = c.codec.decode(c.encode(x, 0)[4 : 4 + c.codec.payload_bytes((60,))], (60,)).view(2, 30).T
    span = orthonormal(p)
    error, plain = (float((x - q @ (q.T @ x)).norm() / x.norm()) for q in (span, p))
    assert error < 0.15
    assert error < plain
    largest = x.abs().amax()
    second = c.codec.roundtrip((x.T @ span / largest).T.reshape(-1)).view(2, 40)
    torch.testing.assert_close(c.roundtrip(x), largest * span @ second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Factors(TopK(0.1), Int4()), r"^Factors\(lowrank=TopK\(ratio=0.1\)\): must be a LowRank\(...\)$"),  # type: ignore[arg-type]
        (
            lambda: Factors(LowRank(2), LowRank(2)),
            r"^Factors\(codec=LowRank\(rank=2\)\): must be a compressor of vectors",
        ),
        (lambda: Factors(LowRank(2), Int4(), -1), r"^Factors\(iterations=-1\): must be an integer of at least 0$"),
        (lambda: KeepEnergy(LowRank(4), 1.0), r"^KeepEnergy\(share=1.0\): must be a number in \(0, 1\)$"),
        (lambda: ByBytes(5, 6), r"^ByBytes\(n=5, least=6\): the shortest round cannot be longer than the first$"),
        (lambda: plans.dilocox(rank=0), r"^dilocox\(rank=0\): must be an integer of at least 1$"),
        (lambda: plans.dilocox(keep=0.0), r"^dilocox\(keep=0.0\): must be a number in \(0, 1\)$"),
        (lambda: plans.dilocox(5, least=6), r"^dilocox\(least=6, sync_every=5\): the first round is the longest$"),
        (lambda: plans.dilocox(outer_lr=0.0), r"^dilocox\(outer_lr=0.0\): must be a number in \(0, inf\)$"),
    ],
)
def test_bad_options_are_refused_in_one_line(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------------- ranks


def test_each_matrix_gets_the_smallest_rank_that_keeps_the_share() -> None:
    """By the singular values themselves, for choices of every rank and exact factors."""
    ranks = range(1, 13)
    budget = KeepEnergy(LowRank(12, 0.01), 0.9, [LowRank(r, 0.01) for r in ranks])
    tensors = [gaussian(40, r, seed=r) @ gaussian(r, 30, seed=9 + r) + 0.02 * gaussian(40, 30) for r in (1, 4, 9)]
    found = Allocation(budget, [t.shape for t in tensors])
    found.update(found.measure([torch.cat([t.reshape(-1) for t in tensors])], 0))
    for t, choice in zip(tensors, found.choice, strict=True):
        energy = torch.linalg.svdvals(t).square().cumsum(0)
        expected = int((energy > 0.9 * energy[-1]).nonzero()[0]) + 1
        assert found.options[choice] == LowRank(expected, 0.01)


def test_ranks_never_rise_and_stay_where_no_choice_is_enough() -> None:
    budget = KeepEnergy(LowRank(8, 0.01), 0.9, [LowRank(r, 0.01) for r in (1, 2, 4, 8)])
    found = Allocation(budget, [(30, 30)])
    picked = []
    for rank in (30, 4, 2, 8, 1):  # full rank first: eight columns do not hold nine tenths
        x = gaussian(30, rank, seed=rank) @ gaussian(rank, 30, seed=50 + rank)
        found.update(found.measure([x.reshape(-1)], 0))
        picked.append(found.options[found.choice[0]].rank)  # type: ignore[attr-defined]
    assert picked[0] == 8
    assert picked == sorted(picked, reverse=True)
    assert picked[1] <= 4
    assert picked[-1] == 1
    found.update(found.measure([torch.zeros(900)], 0))
    assert found.options[found.choice[0]].rank == 1  # type: ignore[attr-defined]


# ---------------------------------------------------------------------- the plan


def full(late: bool) -> Plan:
    """Factors that lose nothing: all ranks, no bits saved."""
    wire = ErrorFeedback(Factors(LowRank(16, 0.01), Identity()))
    step = outer.SGD(0.5, 0.3, nesterov=True)
    return Plan([Sync(Every(3), signal="delta", codec=wire, outer=step, **({"apply": OneRound()} if late else {}))])


def test_full_rank_without_packing_is_diloco_and_a_round_late_the_delayed_update() -> None:
    for late, other in ((False, plans.diloco(3, 0.5, 0.3)), (True, plans.delayed_diloco(3, 0.5, 0.3))):
        a, b = (mosaic_simulation(p, 4, sgd(0.05)).run(14).finish() for p in (full(late), other))
        for name in SHAPES:
            torch.testing.assert_close(a.stacked(name), b.stacked(name), rtol=1e-4, atol=1e-5)
    assert plans.dilocox(3, 4, keep=None, outer_lr=0.5, outer_momentum=0.3, codec=Int8()) == Plan(
        [
            Sync(
                Every(3),
                signal="delta",
                codec=ErrorFeedback(Factors(LowRank(4, 1.0), Int8())),
                outer=outer.SGD(0.5, 0.3, nesterov=True),
                apply=OneRound(),
            )
        ]
    )


def test_what_was_sent_and_the_residuals_are_all_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sum over rounds of what arrived plus the residuals left is the sum of the changes, whatever rank and bits."""
    changes: list[Tensor] = []
    launch = Channel.launch

    def noted(self: Channel, message: Tensor, *args: Any) -> Any:
        changes.append(message.double())
        return launch(self, message, *args)

    monkeypatch.setattr(Channel, "launch", noted)
    n, steps = 3, 24
    plan = plans.dilocox(3, 2, keep=0.5, window=2, outer_lr=0.9, outer_momentum=0.0)
    simulation = mosaic_simulation(plan, n, sgd(0.01))
    lanes = [engine.runners[0].lanes[0] for engine in simulation.engines]
    assert lanes[0].anchor is not None
    start = lanes[0].anchor.clone()
    simulation.run(steps).finish()
    arrived = start - lanes[0].anchor  # the anchor moved by all of them, once
    residual = torch.stack([lane.channel.memory_state["residual"] for lane in lanes]).mean(0)
    assert float(residual.norm()) > 0.01
    assert len(changes) == n * steps // 3
    torch.testing.assert_close((arrived / 0.9 + residual).double(), torch.stack(changes).sum(0) / n, rtol=0, atol=1e-4)


def shrinking(least: int) -> Simulation:
    """Changes of rank one: the first window shows it, later messages are smaller."""
    u, v = gaussian(32, 1, seed=1), gaussian(1, 24, seed=2)

    def backward(rank: int, parameters: dict[str, Tensor], step: int) -> None:
        parameters["m"].grad = (1.0 + rank) * u @ v

    plan = plans.dilocox(12, 8, window=2, least=least, outer_lr=0.5)
    return Simulation(plan, 2, lambda rank: {"m": torch.zeros(32, 24)}, backward, sgd(0.01))


def test_rounds_get_shorter_as_messages_do() -> None:
    simulation = shrinking(least=1)
    runner = simulation.engines[0].runners[0]
    first, sent = runner.message_bytes, []
    for _ in range(60):
        before = runner.rounds
        simulation.run(1)
        if runner.rounds > before:
            sent.append(simulation.engines[0].step)
    small = runner.message_bytes
    assert small < first / 3
    length = -(-12 * small // first)
    assert sent[:3] == [12, 24, 36]  # what the second round showed is known when it has landed, in the third
    assert {b - a for a, b in pairwise(sent[3:])} == {length}
    assert sent[3] - sent[2] == length
    held = shrinking(least=5).run(60)
    assert held.engines[0].runners[0].rounds == 3 + (60 - 36) // 5


def test_it_trains_as_well_as_exact_messages_and_sends_a_fraction() -> None:
    """A problem with matrices and unlike data: error feedback ends near the optimum that exact messages reach."""
    target = gaussian(48, 6, seed=3) @ gaussian(6, 40, seed=4) / 3

    def backward(rank: int, parameters: dict[str, Tensor], step: int) -> None:
        parameters["m"].grad = parameters["m"].detach() - target - 0.3 * gaussian(48, 40, seed=100 + rank)

    def run(plan: Plan) -> tuple[float, int]:
        s = Simulation(plan, 4, lambda rank: {"m": torch.zeros(48, 40)}, backward, sgd(0.05)).run(800).finish()
        best = target + 0.3 * torch.stack([gaussian(48, 40, seed=100 + k) for k in range(4)]).mean(0)
        return float((s.stacked("m").mean(0) - best).norm() / best.norm()), max(s.bytes)

    (exact, all_bytes), (packed, few) = run(plans.delayed_diloco(10, 0.4, 0.5)), run(plans.dilocox(10, 6, 0.7, 5))
    assert exact < 1e-3
    assert packed < 0.1
    assert few < all_bytes / 4
