"""A run that is killed goes on from its last whole round, bit for bit; with other numbers of workers from the mean."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from trainer_tools import Regressor, adam, flat, on_ranks, regression, trainer

from lightning_dopt import Delay, Every, Int8, Plan, ReplicaStrategy, Ring, Sync, outer, plans
from lightning_dopt.callbacks import RestartPoints
from lightning_dopt.strategies import start
from lightning_dopt.topology import Lazy

pytestmark = pytest.mark.trainer


def noisy_net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1))


class Kill(Callback):
    """``kill -9`` of this very process after a step, once all have written what they are to write."""

    def __init__(self, rank: int, step: int, file: Path, round_step: int) -> None:
        self.rank, self.step, self.file, self.round_step = rank, step, file, round_step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            deadline = time.monotonic() + 10
            while not list(Path(f"{self.file}.replicas").glob(f"step={self.round_step}-*")) or not self.file.exists():
                assert time.monotonic() < deadline
                time.sleep(0.02)
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)


class Begin(Callback):
    """The step that training begins with."""

    step = -1

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.step = trainer.global_step


def run(folder: Path, plan: Plan, kill: int | None = None, round_step: int = 0, every: int = 1) -> Any:
    def job(rank: int) -> tuple[torch.Tensor, int]:
        torch.manual_seed(rank)
        module, begin = Regressor(noisy_net, adam), Begin()
        callbacks: list[Any] = [RestartPoints(str(folder), every), begin]
        if kill is not None:
            callbacks.append(Kill(1, kill, folder / "last.ckpt", round_step))
        t = trainer(ReplicaStrategy(plan=plan), max_steps=12, callbacks=callbacks, enable_checkpointing=True)
        t.fit(module, regression(48, shuffle=True), ckpt_path="last")
        return flat(module), begin.step

    return job


PLANS = {
    "diloco": (plans.diloco(3, codec=Int8()), 8, 6),
    "streaming": (Plan([Sync(when=Every(4), signal="delta", outer=outer.SGD(0.7, 0.5), apply=Delay(2))]), 11, 10),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_killed_run_goes_on_from_the_last_round(name: str, tmp_path: Path) -> None:
    plan, kill, last = PLANS[name]
    whole = on_ranks(run(tmp_path / "whole", plan))
    with pytest.raises(AssertionError, match=r"SyncError|no answer"):
        on_ranks(run(tmp_path / "killed", plan, kill, last), timeout=30)
    again = on_ranks(run(tmp_path / "killed", plan))
    assert [begin for _, begin in whole] == [0, 0]
    assert [begin for _, begin in again] == [last, last]  # nothing but the round in work was lost
    for (weights, _), (resumed, _) in zip(whole, again, strict=True):
        assert torch.equal(weights, resumed)


def test_other_numbers_of_workers_start_from_the_mean(tmp_path: Path) -> None:
    plan = plans.gossip(Lazy(Ring()))  # replicas differ, so that the mean is no replica
    on_ranks(run(tmp_path, plan, every=12))
    files = [torch.load(f, weights_only=False) for f in sorted(tmp_path.glob("last.ckpt.replicas/*/*.ckpt"))]
    assert [f["global_step"] for f in files] == [12, 12]
    a, b = (f["state_dict"] for f in files)
    assert not torch.equal(a["net.0.weight"], b["net.0.weight"])

    def job(rank: int) -> dict[str, torch.Tensor]:
        module = Regressor(noisy_net, adam)
        options: dict[str, Any] = {"callbacks": [RestartPoints(str(tmp_path))], "enable_checkpointing": True}
        with pytest.warns(UserWarning, match="written by 2 workers, this run has 1"):
            trainer(ReplicaStrategy(plan=plan), 1, max_steps=12, **options).fit(module, regression(), ckpt_path="last")
        return module.state_dict()

    (alone,) = on_ranks(job, 1)
    for name in ("net.0.weight", "net.1.running_mean"):
        torch.testing.assert_close(alone[name], (a[name] + b[name]) / 2)
    mean = alone["net.1.running_mean"]
    second = sum(s["net.1.running_var"] + s["net.1.running_mean"] ** 2 for s in (a, b)) / 2
    torch.testing.assert_close(alone["net.1.running_var"], second - mean**2)  # type: ignore[operator]
    assert alone["net.1.num_batches_tracked"] == a["net.1.num_batches_tracked"]


SCRIPT = """
import os, sys, time
sys.path[:0] = [{tests!r}, os.path.dirname({tests!r})]
from test_restart_points import *
folder, restarts = Path(sys.argv[1]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
job = run(folder, plans.diloco(3), *((8, 6) if restarts == 0 else ()))
torch.save(job(int(os.environ["RANK"])), folder / f"{{os.environ['RANK']}}.pt")
"""


def test_torchrun_starts_a_killed_run_again(tmp_path: Path) -> None:
    """Without a person: worker 1 of 2 is killed in the third round, and all go on from the end of the second."""
    whole = on_ranks(run(tmp_path / "whole", plans.diloco(3)))
    (tmp_path / "train.py").write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1", "--standalone"]
    done = subprocess.run(
        [*command, "train.py", str(tmp_path)],
        cwd=tmp_path,
        env=os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank, (weights, _) in enumerate(whole):
        again, begin = torch.load(tmp_path / f"{rank}.pt")
        assert begin == 6
        assert torch.equal(weights, again)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RestartPoints(""), "dirpath=''"),
        (lambda: RestartPoints("x", 0), "every_n_rounds=0"),
    ],
)
def test_bad_options(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"RestartPoints\\({message}"):
        make()


def test_plans_without_rounds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="has no rounds before its end"):
        on_ranks(run(tmp_path, plans.lo_fi()), 1)


def test_warns_of_addresses_that_outlive_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.warns(UserWarning, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        start.warn_of_stale_addresses()
