"""FedCE: weights by how unlike the others each client's changes are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from problems import mosaic_simulation, p2, sgd
from test_local_updates import close, path
from torch import Tensor

from lightning_dopt import Int8, Plan, Ring, Sync, plans
from lightning_dopt.combine import Contribution
from lightning_dopt.combine.contribution import cosines
from lightning_dopt.comm import lockstep


def random(count: int, d: int = 12) -> list[Tensor]:
    return list(torch.randn(count, d, generator=torch.Generator().manual_seed(2), dtype=torch.float64))


def test_cosines_with_the_weighted_sum_of_the_others() -> None:
    messages, weights = random(4), torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)
    for i, found in enumerate(cosines(messages, weights)):
        rest = sum(weights[j] * messages[j] for j in range(4) if j != i)
        close(found, torch.nn.functional.cosine_similarity(messages[i], rest, dim=0))
    assert cosines([torch.zeros(3), torch.ones(3)], weights[:2]).tolist() == [0.0, 0.0]


def test_equal_clients_weigh_alike_and_one_that_turns_round_weighs_more() -> None:
    rule, x = Contribution(), random(1)[0]
    even = torch.full((4,), 0.25, dtype=torch.float64)
    for messages, expected in (([x] * 4, even), ([x, x, x, -x], None)):
        state = rule.state(x, None, 4, 0)  # type: ignore[arg-type]
        close(rule.weights(state), even)
        state["cosines"] += cosines(messages, rule.weights(state))
        state["rounds"] += 1
        weights = rule.weights(state)
        assert float(weights.sum()) == pytest.approx(1.0, abs=1e-15)
        if expected is not None:
            close(weights, expected)
        else:
            assert float(weights[3]) > 0.9  # the others are all but floored: their cosines are 1
            assert float(weights[:3].min()) >= 0.9e-3


def test_it_is_the_loop_of_the_paper() -> None:
    """Six rounds by hand: cosines with the sum of the others, their running mean, weights for the next round."""
    problem, h, rate = p2(), 3, 0.1
    live = path(problem, plans.fedce(h, 0.05), 6 * h, rate)
    anchor, weights, total = torch.zeros(5, dtype=torch.float64), torch.full((8,), 0.125, dtype=torch.float64), 0.0
    for k in range(6):
        x = anchor.expand(8, 5).clone()
        for _ in range(h):
            x = x - rate * torch.stack([problem.gradient(i, x[i]) for i in range(8)])
        changes = anchor - x
        mean = weights @ changes
        others = mean - weights[:, None] * changes
        total = total + torch.nn.functional.cosine_similarity(changes, others)
        anchor = anchor - mean
        apart = 1.0 - total / (k + 1)
        weights = (apart / apart.sum()).clamp(min=0.05)
        weights = weights / weights.sum()
        close(live[(k + 1) * h], anchor.expand(8, 5), 1e-10)
    assert float(weights.max()) > 1.5 * float(weights.min())


def test_all_ranks_stay_equal_send_to_all_and_resume() -> None:
    plan = plans.fedce(2)
    whole, first, again = (mosaic_simulation(plan, 4, sgd(0.05)) for _ in range(3))
    whole.run(9)
    assert all(torch.equal(row, rows[0]) for rows in [whole.run(1).stacked("scale")] for row in rows)
    elements = sum(t.numel() for t in whole.replicas[0].values())
    assert whole.bytes == [5 * 3 * 4 * elements] * 4
    first.run(5)
    lockstep([engine.land() for engine in first.engines])
    for k in range(4):
        again.engines[k].load_state_dict(copy.deepcopy(first.engines[k].state_dict()))
        for key, tensor in again.replicas[k].items():
            tensor.data.copy_(first.replicas[k][key].data)
    again.run(5)
    assert all(torch.equal(again.stacked(key), whole.stacked(key)) for key in whole.replicas[0])


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: Contribution(1.0), r"^Contribution\(floor=1.0\): must be a number in \[0, 1\)$"),
        (lambda: plans.fedce(floor=-0.1), r"^fedce\(floor=-0.1\): must be a number in \[0, 1\)$"),
        (lambda: Sync(combine=Contribution()), r"^Sync\(signal='value'.*compares exact changes"),
        (
            lambda: Sync(signal="delta", codec=Int8(), combine=Contribution()),
            r"compares exact changes, use signal='delta' and",
        ),
        (
            lambda: Plan([Sync(signal="delta", peers=Ring(), combine=Contribution())]).check(6),
            r"every rank must hear all",
        ),
    ],
)
def test_bad_options_are_refused_in_one_line(make: Any, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        make()
