"""The gossip recipes: single merging shows its ordering, heterogeneous workers train with every method, plans in YAML."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recipes import merging

# ---------------------------------------------------------------------- a single merging


@pytest.fixture(scope="module")
def curves() -> dict[str, merging.Curve]:
    data = merging.Digits(workers=8, alpha=0.1, seeds=4)
    plans = merging.schedules(160, opportunity=8, p=0.3)
    return {name: merging.train(name, plan, data, 160, 80) for name, plan in plans.items()}


def test_rare_gossip_keeps_models_mergeable(curves: dict[str, merging.Curve]) -> None:
    alone, sparse = curves["no communication"], curves["sparse pairs"]
    assert sparse.merged[-1].mean() > alone.merged[-1].mean() + 0.1
    assert sparse.merged[-1].mean() > sparse.local[-1].mean() + 0.2  # poor on their own, good together


def test_late_communication_is_worth_more_than_early(curves: dict[str, merging.Curve]) -> None:
    late, early = curves["late window"], curves["early window"]
    assert late.bytes == early.bytes  # the same budget
    assert late.merged[-1].mean() > early.merged[-1].mean() > curves["sparse pairs"].merged[-1].mean()
    assert curves["every step"].merged[-1].mean() > late.merged[-1].mean() + 0.1


def test_averages_in_every_step_leave_nothing_to_merge(curves: dict[str, merging.Curve]) -> None:
    assert torch.equal(curves["every step"].merged[-1], curves["every step"].local[-1])
    elements = 64 * 64 + 64 + 64 * 10 + 10
    assert curves["every step"].bytes == 160 * 2 * 7 * elements * 4 // 8


def test_schedules_see_the_same_batches() -> None:
    data = merging.Digits(workers=2, seeds=1)
    plan = merging.schedules(20)["no communication"]
    first, again = (merging.train("", plan, data, 20, 20).local[-1] for _ in range(2))
    assert torch.equal(first, again)


def test_merging_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merging.main(["--steps=20", "--workers=2", "--seeds=1", "--every=10", f"--out={tmp_path}"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:6]] == list(merging.schedules(20))
    assert (tmp_path / "merging.png").stat().st_size > 10_000


@pytest.mark.parametrize("option", ["--steps=10", "--workers=1", "--seeds=0", "--every=7", "--alpha=0", "--alpha=nan"])
def test_merging_refuses_in_one_line(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        merging.parse([option])
    assert option.split("=")[0] in capsys.readouterr().err.splitlines()[-1]
