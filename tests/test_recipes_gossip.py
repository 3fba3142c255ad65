"""The gossip recipes: single merging shows its ordering, heterogeneous workers train with every method, plans in YAML."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import jsonargparse
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule

from benchmarks import gossip_scaling
from lightning_dopt import Plan, Ring, cli, plans
from recipes import merging
from recipes.processes import on_ranks
from recipes.vision import comparison, heterogeneity

ROOT = Path(__file__).resolve().parent.parent

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
    (said,) = capsys.readouterr().err.splitlines()
    assert option.split("=")[0] in said


# ---------------------------------------------------------------------- unlike data

SMALL = (1 * 16 * 9 + 16) + (16 * 32 * 9 + 32) + (32 * 4 * 4 * 10 + 10)  # parameters of SmallNet for digits


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, comparison.Outcome], Path]:
    out = tmp_path_factory.mktemp("heterogeneity")
    chosen = "centralized,dsgd,relay_sgd,tracking_int8"
    found = heterogeneity.main(["--workers=4", "--steps=6", f"--methods={chosen}", "--seed=1", f"--out={out}"])
    return {o.name: o for o in found}, out


@pytest.mark.trainer
def test_methods_share_processes(outcomes: tuple[dict[str, comparison.Outcome], Path]) -> None:
    found, out = outcomes
    assert list(found) == ["centralized", "dsgd", "relay_sgd", "tracking_int8"]
    assert all(o.steps == list(range(1, 7)) for o in found.values())
    assert [row["name"] for row in json.loads((out / "results.json").read_text())] == list(found)
    assert (out / "accuracy.png").stat().st_size > 10_000


@pytest.mark.trainer
def test_both_models_are_measured(outcomes: tuple[dict[str, comparison.Outcome], Path]) -> None:
    found, _ = outcomes
    assert found["centralized"].local == pytest.approx(found["centralized"].merged, abs=1e-6)
    assert found["centralized"].distance[-1] < 1e-5
    assert found["dsgd"].distance[-1] > 0.01
    assert found["dsgd"].local[-1] != pytest.approx(found["dsgd"].merged[-1], abs=1e-3)
    assert found["centralized"].loss[-1] < found["centralized"].loss[0] - 0.05


@pytest.mark.trainer
def test_bytes_are_those_of_the_busiest_worker(outcomes: tuple[dict[str, comparison.Outcome], Path]) -> None:
    found, _ = outcomes
    assert found["centralized"].bytes == [k * 2 * 3 * SMALL * 4 // 4 for k in range(1, 7)]
    assert found["dsgd"].bytes == [k * 2 * SMALL * 4 for k in range(1, 7)]  # two neighbours
    assert found["relay_sgd"].bytes[-1] >= 6 * 2 * SMALL * 4  # two neighbours, in the middle of the tree
    assert 4 * SMALL < found["tracking_int8"].bytes[0] < 4.5 * SMALL  # two messages to each, one byte per weight


def test_small_net_fits_all_pictures() -> None:
    for channels, size in ((1, 8), (1, 28), (3, 32), (1, 15), (1, 17)):
        module = comparison.SmallNet(channels, size, lr=0.1)
        assert module.net(torch.zeros(2, channels, size, size)).shape == (2, 10)


def test_the_last_measurement_is_at_the_end() -> None:
    for steps in (1, 7, 12, 13, 600, 1000):
        interval = comparison._interval(steps)
        assert steps % interval == 0
        assert steps // interval <= comparison.POINTS


@pytest.mark.parametrize(
    "option",
    ["--steps=0", "--workers=1", "--alpha=0", "--methods=dsgd,sgd", "--methods=,", "--data=/nowhere", "--batch-size=0"],
)
def test_heterogeneity_refuses_in_one_line(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        heterogeneity.parse([option])
    (said,) = capsys.readouterr().err.splitlines()
    assert option.split("=")[0].strip("-").replace("-", "_") in said.replace("-", "_")


def _fails(rank: int) -> int:
    if rank == 1:
        raise RuntimeError("rank 1 gives up")
    return rank


def test_a_failed_process_ends_all(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        on_ranks(_fails, 3)
    assert "rank 1 gives up" in capfd.readouterr().err


# ---------------------------------------------------------------------- scaling


@pytest.fixture(scope="module")
def scaling(tmp_path_factory: pytest.TempPathFactory) -> list[gossip_scaling.Row]:
    return gossip_scaling.main(["--ranks", "4", "5", "--elements", "1000", "--steps", "2", "--rounds", "1"])


def test_messages_are_counted(scaling: list[gossip_scaling.Row]) -> None:
    counted = {(r.arm, r.n): (r.messages, r.bytes) for r in scaling}
    for n in (4, 5):
        assert counted["one-peer exponential", n] == (1.0, 4000.0)
        assert counted["ring", n] == (2.0, 8000.0)
        assert counted["complete (all-reduce)", n] == (2 * (n - 1), -(-2 * (n - 1) * 4000 // n))


def test_what_grows_is_refused(scaling: list[gossip_scaling.Row]) -> None:
    gossip_scaling.check(scaling)
    grown = [r for r in scaling if r.arm == "complete (all-reduce)"]
    with pytest.raises(SystemExit, match="one-peer gossip is not one message"):
        gossip_scaling.check([gossip_scaling.Row("one-peer exponential", *list(vars(r).values())[1:]) for r in grown])


def test_link_times(scaling: list[gossip_scaling.Row]) -> None:
    times = {(r.arm, r.n): r.link_ms for r in scaling}
    for n in (4, 5):
        assert times["one-peer exponential", n] == pytest.approx(1.0 + 4000 * 8 / 100e3)
        assert times["complete (all-reduce)", n] == pytest.approx(2 * (n - 1) * (1.0 + 4000 / n * 8 / 100e3))


# ---------------------------------------------------------------------- a plan by the name of its function


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", jsonargparse.__version__)[:2])


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, str], Plan]:
    """The plan of the local tracking recipe with another function and options in its place, as ``dopt fit`` reads it."""
    if _version() < (4, 41):
        pytest.skip("older jsonargparse takes classes only")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["dopt"])

    def read(name: str, option: str) -> Plan:
        text = Path("recipes/llm/gossip_local_tracking.yaml").read_text()
        assert text.count("plans.k_gt") == text.count("sync_every: 4") == 1
        changed = tmp_path / "changed.yaml"
        changed.write_text(text.replace("plans.k_gt", f"plans.{name}").replace("sync_every: 4", option))
        command = cli.DoptCLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            run=False,
            args=["-c", str(changed), "--trainer.logger=false"],
        )
        return command.trainer.strategy.plan

    return read


@pytest.mark.trainer
@pytest.mark.filterwarnings("ignore")
def test_yaml_names_a_plan(configured: Callable[[str, str], Plan]) -> None:
    assert configured("k_gt", "sync_every: 4") == plans.k_gt(Ring(), sync_every=4)
    assert configured("qg_dsgdm", "mu: 0.8") == plans.qg_dsgdm(Ring(), mu=0.8)


@pytest.mark.trainer
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "option", "said"),
    [("qg_dsgdm", "mu: 2.0", "mu"), ("qg_dsgdm", "beta: 0.9", "beta"), ("dsgdqg", "mu: 0.9", "dsgdqg")],
)
def test_yaml_refuses_in_one_line(configured: Callable[[str, str], Plan], name: str, option: str, said: str) -> None:
    with pytest.raises(cli.BadInputError, match=said) as refused:
        configured(name, option)
    assert "\n" not in str(refused.value)
