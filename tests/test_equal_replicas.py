"""Replicas that must be equal: compared every few steps, and all ranks say which one is not."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import momentum_sgd, mosaic, mosaic_backward
from torch import Tensor

from lightning_dopt import ErrorFeedback, Every, Plan, Ring, Simulation, Sync, TopK, plans
from lightning_dopt.forecast import forecast

COMPARED = plans.compressed_ddp(ErrorFeedback(TopK(0.1))).guarded(False, "auto", compare_every=3)
LINE = "step 6: the parameters of rank(s) {} are not those of rank {}, although this plan keeps replicas equal"


def run(plan: Plan, wrong: dict[int, float], n: int = 4, steps: int = 9) -> Simulation:
    """At step 4 these ranks move one of their weights by so much."""

    def backward(rank: int, parameters: dict[str, Tensor], step: int) -> None:
        mosaic_backward(rank, parameters, step)
        if step == 4 and rank in wrong:
            with torch.no_grad():
                parameters["body.a.weight"][2, 1] += wrong[rank]

    return Simulation(plan, n, mosaic, backward, momentum_sgd).run(steps)


@pytest.mark.parametrize(
    ("wrong", "others", "usual"),
    [({2: 1e-6}, "2", 0), ({0: 1e-6}, "0", 1), ({1: 1.0, 3: -1.0}, "1, 3", 0), ({2: 1.0, 3: 1.0}, "2, 3", 0)],
)
def test_the_ranks_that_differ_are_named(wrong: dict[int, float], others: str, usual: int) -> None:
    with pytest.raises(RuntimeError, match="^" + re.escape(LINE.format(others, usual))) as caught:
        run(COMPARED, wrong)
    assert "\n" not in str(caught.value)


def test_equal_replicas_train_on_as_without_it() -> None:
    compared, plain = run(COMPARED, {}), run(COMPARED.guarded(False, "auto", 0), {})
    assert all(
        torch.equal(a[name], b[name]) for a, b in zip(compared.replicas, plain.replicas, strict=True) for name in a
    )
    run(COMPARED.guarded(False, "auto", 0), {2: 1.0})  # nobody looks


def test_it_is_overhead_of_the_ledger_and_forecast() -> None:
    shapes = {name: tuple(p.shape) for name, p in mosaic(0).items()}
    compared, plain = (forecast(p, 4, shapes, 9) for p in (COMPARED, COMPARED.guarded(False, "auto", 0)))
    assert compared.bytes == plain.bytes
    extra = [a.overhead - b.overhead for a, b in zip(compared.ledgers, plain.ledgers, strict=True)]
    assert extra == [3 * 96] * 4  # three all-reduces of 4 x 16 bytes, 2 (n - 1) / n of it each
    assert [w.ledger.overhead for w in run(COMPARED, {}).worlds] == [e.overhead for e in compared.ledgers]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Plan([Sync(when=Every(4))], compare_every=5),
        lambda: plans.gossip(Ring()).guarded(compare_every=5),
        lambda: plans.gradient_tracking(Ring()).guarded(compare_every=5),
        lambda: plans.diloco(5).guarded(compare_every=5),
        lambda: Plan(compare_every=1),
    ],
)
def test_replicas_that_may_differ_are_not_compared(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"^Plan\(compare_every=\d\): replicas of this plan may differ; [^\n]*$"):
        make()


def test_it_stays_with_other_guards() -> None:
    assert COMPARED.guarded().compare_every == 3
    with pytest.raises(ValueError, match=r"^Plan\(compare_every=-1\): must be an integer of at least 0$"):
        Plan(compare_every=-1)
