"""All ways to start processes end with the same consensus model on every rank."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from broken import Processes, free_port, no_environment, torchrun_environment
from lightning.pytorch.trainer.connectors import accelerator_connector
from torch import Tensor
from torch.utils.data import DistributedSampler

pytestmark = pytest.mark.trainer

SCRIPT = """
import os
import sys

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_dopt import DiLoCoStrategy


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return (self.layer(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Write(Callback):
    def __init__(self, out):
        self.out = out

    def on_train_epoch_end(self, trainer, module):
        torch.save(module.layer.weight.detach().clone(), f"{self.out}/replica{trainer.global_rank}.pt")

    def on_fit_end(self, trainer, module):
        torch.save(module.layer.weight.detach(), f"{self.out}/rank{trainer.global_rank}.pt")


def main(out, start_method, devices, nodes, strategy=None):
    g = torch.Generator().manual_seed(1)
    data = DataLoader(TensorDataset(torch.randn(40, 4, generator=g), torch.randn(40, 1, generator=g)), batch_size=4)
    trainer = Trainer(
        accelerator="cpu", devices=devices, num_nodes=nodes, max_epochs=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, callbacks=[Write(out)],
        strategy=strategy or DiLoCoStrategy(2, start_method=start_method),
    )
    model = Model()
    trainer.fit(model, data)
    torch.save(model.layer.weight.detach(), f"{out}/main{os.environ.get('LOCAL_RANK', 0)}.pt")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("launch") / "train.py"
    path.write_text(SCRIPT)
    return path


def weights(folder: Path) -> Tensor:
    """The consensus, after checking that both ranks hold it and that replicas had been apart before."""
    one, two = (torch.load(folder / f"rank{r}.pt") for r in range(2))
    assert torch.equal(one, two)
    apart = (torch.load(folder / "replica0.pt") - torch.load(folder / "replica1.pt")).abs().max()
    assert apart > 1e-3  # the fit ends between two rounds, or this test would not see a missing final average
    return one


def forked(script: Path, folder: Path, n: int, environment: Callable[..., dict[str, str]], *args: Any) -> Tensor:
    """``main(folder, *args)`` of the script in ``n`` processes with these environments."""
    folder.mkdir(exist_ok=True)

    def job(rank: int) -> None:
        torch.cuda._is_in_bad_fork = bool  # type: ignore[assignment]  # Lightning may fork this fork
        spec = importlib.util.spec_from_file_location("train", script)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["train"] = module
        spec.loader.exec_module(module)
        module.main(str(folder), *args)

    with Processes(job, n, environment=environment) as processes:
        for rank, ended in processes.join(40).items():
            assert ended.code == 0, f"rank {rank}: {ended.text}"
    return weights(folder)


@pytest.fixture(scope="module")
def expected(script: Path, tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """With processes forked by Lightning."""
    folder = tmp_path_factory.mktemp("fork")
    result = forked(script, folder, 1, no_environment, "fork", 2, 1)
    assert torch.equal(torch.load(folder / "main0.pt"), result)  # the main process gets the consensus model
    return result


def test_the_result_is_right(expected: Tensor) -> None:
    """Against the same run written out: five steps of two ranks, rounds of two, the last one cut short."""
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(40, 4, generator=g), torch.randn(40, 1, generator=g)
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 1)
    anchor = torch.cat([layer.weight.detach()[0], layer.bias.detach()])
    ones = torch.cat([x, torch.ones(40, 1)], 1)
    orders = [list(DistributedSampler(range(40), 2, rank)) for rank in range(2)]  # type: ignore[arg-type]
    local, speed = [anchor.clone(), anchor.clone()], torch.zeros(5)
    for step in range(5):
        for rank in range(2):
            rows = orders[rank][4 * step : 4 * step + 4]
            a, b = ones[rows], y[rows, 0]
            local[rank] = local[rank] - 0.1 * 2 / 4 * (a.T @ (a @ local[rank] - b))
        if step in (1, 3):
            change = anchor - (local[0] + local[1]) / 2
            speed = 0.9 * speed + change
            anchor = anchor - 0.7 * (change + 0.9 * speed)
            local = [anchor.clone(), anchor.clone()]
    torch.testing.assert_close(expected[0], ((local[0] + local[1]) / 2)[:4], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------- environments, in forked processes


def nodes(rank: int, n: int, port: int) -> dict[str, str]:
    """Lightning's own for several nodes, here with one process each."""
    return {"NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def slurm(rank: int, n: int, port: int) -> dict[str, str]:
    """What srun sets, with two nodes of one task each."""
    return {
        "SLURM_JOB_NAME": "train",
        "SLURM_JOB_ID": "4711",
        "SLURM_NTASKS": str(n),
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": str(n),
        "SLURM_PROCID": str(rank),
        "SLURM_NODEID": str(rank),
        "SLURM_LOCALID": "0",
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


@pytest.mark.parametrize(
    ("environment", "devices", "n_nodes"), [(torchrun_environment, 2, 1), (nodes, 1, 2), (slurm, 1, 2)]
)
def test_environments(
    script: Path, expected: Tensor, tmp_path: Path, environment: Any, devices: int, n_nodes: int
) -> None:
    assert torch.equal(forked(script, tmp_path, 2, environment, "popen", devices, n_nodes), expected)


def test_notebook(script: Path, expected: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forked processes work, and starting the script again is refused with a way out."""
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    monkeypatch.setattr(accelerator_connector, "_IS_INTERACTIVE", True)
    by_name = forked(script, tmp_path / "name", 1, no_environment, "", 2, 1, "diloco_notebook")
    assert not torch.equal(by_name, expected)  # its default of 500 steps
    assert torch.equal(forked(script, tmp_path / "fork", 1, no_environment, "fork", 2, 1), expected)
    with pytest.raises(
        AssertionError, match=r"ValueError: DiLoCoStrategy\(start_method='popen'\): a notebook cannot be"
    ):
        forked(script, tmp_path / "popen", 1, no_environment, "popen", 2, 1)


# ---------------------------------------------------------------------- commands, in fresh interpreters

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


@pytest.fixture(scope="module")
def runs(script: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """All commands at once: on a slow machine most of their time is importing."""
    port = str(free_port())
    meet = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=static", f"--master_port={port}"]
    commands: dict[str, list[tuple[list[str], list[str]]]] = {
        "popen": [([sys.executable], ["popen", "2", "1"])],
        "spawn": [([sys.executable], ["spawn", "2", "1"])],
        "torchrun": [([*TORCHRUN, "--standalone", "--nproc_per_node=2"], ["popen", "2", "1"])],
        "torchrun, two nodes": [([*TORCHRUN, *meet, f"--node_rank={i}"], ["popen", "1", "2"]) for i in range(2)],
    }
    clean = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")}
    started: dict[str, Any] = {}
    try:
        for name, several in commands.items():
            folder = tmp_path_factory.mktemp(name.replace(" ", ""))
            processes = []
            for i, (before, after) in enumerate(several):
                log = open(folder / f"log{i}", "w")  # noqa: SIM115
                command = [*before, str(script), str(folder), *after]
                processes.append(
                    subprocess.Popen(command, stdout=log, stderr=log, env=clean, start_new_session=True, cwd=folder)
                )
            started[name] = (folder, processes)
        yield started
    finally:
        for _, processes in started.values():
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


@pytest.mark.slow
@pytest.mark.timeout(330)  # ten interpreters that import Lightning, on machines that may be busy
@pytest.mark.parametrize("name", ["popen", "spawn", "torchrun", "torchrun, two nodes"])
def test_commands(runs: dict[str, Any], expected: Tensor, name: str) -> None:
    folder, processes = runs[name]
    codes = [process.wait(300) for process in processes]
    assert codes == [0] * len(codes), "\n".join((folder / f"log{i}").read_text() for i in range(len(codes)))
    assert torch.equal(weights(folder), expected)
    ranks = {"popen": 2, "spawn": 1, "torchrun": 2, "torchrun, two nodes": 1}[
        name
    ]  # processes that run the whole script
    for rank in range(ranks):
        assert torch.equal(torch.load(folder / f"main{rank}.pt"), expected)
