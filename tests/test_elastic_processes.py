"""Elastic runs over torchft with real processes: the plan itself, kill -9, leaving and joining."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from trainer_tools import Regressor, adam, flat, on_ranks, quiet, regression, trainer

from lightning_dopt import ElasticStrategy, Int8, ReplicaStrategy, plans
from lightning_dopt.workers import Lighthouse, Workers

pytestmark = pytest.mark.trainer
pytest.importorskip("torchft")
CONTEXT = multiprocessing.get_context("fork")
ROOT = Path(__file__).parent.parent


def watch_over(file: Path) -> None:
    """A lighthouse, until this process is ended."""
    with Lighthouse("127.0.0.1:0", 1, 20.0, 1.0, "localhost") as lighthouse:
        file.with_suffix(".tmp").write_text(lighthouse.address)
        os.replace(file.with_suffix(".tmp"), file)
        time.sleep(300)


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    process = CONTEXT.Process(target=watch_over, args=(tmp_path / "lighthouse",), daemon=True)
    process.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "lighthouse").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    yield (tmp_path / "lighthouse").read_text()
    process.kill()
    process.join()


class Note(Callback):
    """Writes a line of what a worker sees after each step; sleeps a little."""

    def __init__(self, file: Path, nap: Callable[[int], float] = lambda step: 0.0) -> None:
        self.file, self.nap = file, nap

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        with self.file.open("a") as file:
            print(json.dumps({"start": trainer.global_step}), file=file)
        if trainer.global_step:
            (self.file.parent / "again").touch()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        rounds = trainer.strategy.rounds
        anchor = torch.cat([lane.anchor for lane in rounds.engine._anchored()])
        line = {
            "step": trainer.global_step,
            "members": rounds.world.size,
            "lost": rounds.lost,
            "loss": float(outputs["loss"]),
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "anchor": anchor.double().square().sum().item(),
            "time": time.time(),
        }
        with self.file.open("a") as file:
            print(json.dumps(line), file=file)
        time.sleep(self.nap(trainer.global_step))


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def work(
    folder: Path, address: str, worker: int, workers: int, plan: Any, steps: int, nap: Any, **options: Any
) -> None:
    """One worker in this process; its final weights and log lie in ``folder``."""
    os.environ["DOPT_HOST"] = "localhost"
    quiet()
    torch.manual_seed(worker)
    module = Regressor(optimizer=adam, decay=0.99, seed=worker)  # all begin with the weights of one
    strategy = ElasticStrategy(plan, workers, worker, address, **options)
    t = trainer(strategy, 1, max_steps=steps, callbacks=[Note(folder / f"{worker}.log", nap)])
    t.fit(module, regression(64, shuffle=True))
    torch.save(flat(module), folder / f"{worker}.pt")


def save_and_resume(folder: Path, address: str, worker: int, first: int, steps: int) -> None:
    """One worker that validates and checkpoints, or goes on from the last checkpoint."""
    os.environ["DOPT_HOST"] = "localhost"
    quiet()
    module = Regressor(seed=worker)  # SGD: no state that would be a worker's own
    points = ModelCheckpoint(folder, filename="last", every_n_train_steps=5, enable_version_counter=False)
    t = trainer(
        ElasticStrategy(plans.diloco(5), 2, worker, address),
        1,
        max_steps=steps,
        callbacks=[points, Note(folder / f"{first}-{worker}.log")],
        val_check_interval=5,
        check_val_every_n_epoch=None,
    )
    t.fit(module, regression(64, shuffle=True), regression(16, seed=3), ckpt_path="last" if first else None)
    torch.save((flat(module), float(t.callback_metrics["val_loss"])), folder / f"{first}-{worker}.pt")


def begin(*args: Any, **options: Any) -> Any:
    process = CONTEXT.Process(target=options.pop("job", work), args=args, kwargs=options, daemon=True)
    process.start()
    return process


def end(processes: list[Any]) -> None:
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


def nothing(step: int) -> float:
    return 0.0


@pytest.mark.parametrize("name", ["int8", "streaming"])
def test_while_nobody_dies_it_is_the_plan_itself(name: str, tmp_path: Path, address: str) -> None:
    plan = plans.diloco(4, codec=Int8()) if name == "int8" else plans.streaming_diloco(6, fragments=2, overlap=2)
    end([begin(tmp_path, address, j, 2, plan, 26, nothing) for j in range(2)])

    def job(rank: int) -> torch.Tensor:
        t = trainer(ReplicaStrategy(plan=plan), max_steps=26)
        t.fit(Regressor(optimizer=adam, decay=0.99, seed=0), regression(64, shuffle=True))
        for runner in t.strategy.engine.runners:
            for lane in runner.lanes:
                lane.lane.live.copy_(lane.anchor)
        return flat(t.lightning_module)

    expected, _ = on_ranks(job)
    for j in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{j}.pt"), expected, rtol=0, atol=1e-6)


def test_a_run_whose_workers_are_all_gone_goes_on_from_the_last_checkpoint(tmp_path: Path, address: str) -> None:
    (tmp_path / "whole").mkdir()
    for folder, first, steps in ((tmp_path / "whole", 0, 40), (tmp_path, 0, 20), (tmp_path, 1, 40)):
        end([begin(folder, address, j, first, steps, job=save_and_resume) for j in range(2)])
    whole, again = (torch.load(f) for f in (tmp_path / "whole" / "0-0.pt", tmp_path / "1-0.pt"))
    assert torch.equal(whole[0], again[0])
    assert whole[1] == again[1]
    assert read(tmp_path / "1-1.log")[0]["start"] == 20
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)  # an ordinary one, of the anchors
    weights = torch.cat([w.double().reshape(-1) for w in checkpoint["state_dict"].values()])
    assert torch.equal(weights, again[0])


def test_a_worker_leaves_and_another_joins(tmp_path: Path, address: str) -> None:
    """Worker 1 of 3 leaves by SIGTERM; later one with its number joins, with nothing but the command."""
    plan = plans.diloco(5)

    def nap(step: int) -> float:
        return 0.0 if (tmp_path / "again").exists() else 0.03

    processes = [begin(tmp_path, address, j, 3, plan, 400, nap) for j in range(3)]
    log = tmp_path / "0.log"
    _until(lambda: log.exists() and any(line.get("step", 0) >= 12 for line in read(log)))
    processes[1].terminate()
    processes[1].join(20)
    _until(lambda: read(log)[-1].get("members") == 2)
    (tmp_path / "1.log").rename(tmp_path / "left.log")
    processes[1] = begin(tmp_path, address, 1, 3, plan, 400, nap, joiner_optimizer="fresh")
    end(processes)
    logs = [read(tmp_path / f"{j}.log") for j in range(3)]
    assert [lines[0]["start"] for lines in logs][::2] == [0, 0]
    joined = logs[1][0]["start"]
    assert joined > 12
    assert joined % 5 == 0
    for lines in (logs[0], logs[2]):
        assert [line["step"] for line in lines[1:]] == list(range(1, 401))  # no step twice, none left out
        assert lines[-1]["lost"] == 0
    for ours, theirs in zip(logs[1][1:], logs[0][joined + 1 :], strict=True):
        assert [ours[k] for k in ("step", "lr", "anchor")] == [theirs[k] for k in ("step", "lr", "anchor")]
    weights = [torch.load(tmp_path / f"{j}.pt") for j in range(3)]
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


SCRIPT = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {root!r}]
from test_elastic_processes import *
from lightning_dopt.elastic import ElasticEngine
folder, worker = Path(sys.argv[1]), int(os.environ["DOPT_WORKER"])
first = not (folder / "killed").exists()
send = ElasticEngine.send
def dies(self):
    if self.step == 20:
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    send(self)
if worker == 2 and first:
    ElasticEngine.send = dies
work(folder, None, worker, 4, plans.diloco(10), 600, lambda step: 0.0 if (folder / "again").exists() else 0.1)
"""


def test_kill_9_costs_at_most_one_round_and_nobody_is_needed(tmp_path: Path, address: str) -> None:
    """Worker 2 of 4 is killed while the others are in a round with it; they go on, and it comes back by itself."""
    (tmp_path / "train.py").write_text(SCRIPT.format(tests=str(ROOT / "tests"), root=str(ROOT)))
    said: list[str] = []
    workers = Workers([sys.executable, str(tmp_path / "train.py"), str(tmp_path)], range(4), 4, address, "localhost", 3)
    workers.say = said.append
    assert workers.run() == 0
    assert said == ["worker 2 ended by SIGKILL, is started again (1 of 3)"]
    logs = [read(tmp_path / f"{j}.log") for j in range(4)]
    for j in (0, 1, 3):
        assert [line["step"] for line in logs[j][1:]] == list(range(1, 601))  # training never stopped or went back
        assert {line["lost"] for line in logs[j] if "lost" in line} == {0, 1}  # the round it died in
        assert {line["members"] for line in logs[j] if "members" in line} == {3, 4}
        steps = {line["step"]: line for line in logs[j] if "step" in line}
        assert steps[20]["anchor"] == steps[19]["anchor"] != steps[30]["anchor"]  # and one round only
    starts = [line["start"] for line in logs[2] if "start" in line]
    assert len(starts) == 2
    assert starts[1] >= 30
    assert starts[1] % 10 == 0
    weights = [torch.load(tmp_path / f"{j}.pt") for j in range(4)]
    assert all(torch.equal(weights[0], other) for other in weights)


def _until(condition: Callable[[], bool], timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
