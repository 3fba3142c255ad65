"""The command line: what it prints, what it refuses, and that it builds what the YAML says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule

from lightning_dopt import (
    After,
    CompressedDDPStrategy,
    Delay,
    Difference,
    DiLoCoStrategy,
    ErrorFeedback,
    Every,
    GossipStrategy,
    Gradients,
    Int4,
    Int8,
    Lerp,
    Link,
    LowRank,
    Nesterov,
    OneRound,
    Parameters,
    Plan,
    ReplicaStrategy,
    Ring,
    Sync,
    TopK,
    cli,
    plans,
    show,
)
from lightning_dopt.forecast import forecast, square_layers
from lightning_dopt.outer import FromOptimizer

ROOT = Path(__file__).resolve().parent.parent
TASK = (
    "--model=lightning.pytorch.demos.boring_classes.BoringModel "
    "--data=lightning.pytorch.demos.boring_classes.BoringDataModule "
    "--trainer.accelerator=cpu --trainer.logger=false --trainer.enable_checkpointing=false "
)


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", ["dopt"])
    monkeypatch.setattr("sys.path", [str(ROOT), *sys.path])
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def dopt(capsys: pytest.CaptureFixture[str]):
    """Run a command line, return what it printed."""

    def call(line: str) -> str:
        cli.main(shlex.split(line))
        return capsys.readouterr().out

    return call


# ---------------------------------------------------------------------- our own commands


def test_list_holds_every_method_and_part(dopt) -> None:
    text = dopt("list")
    for name in plans.__all__:
        assert re.search(rf"^  {name}\*? ", text, re.M)
    for members in show.parts().values():
        for name, cls in members.items():
            assert re.search(rf"^  {name} +{cls.__name__} ", text, re.M)
    assert "  diloco*" in text
    assert "https://arxiv.org/abs/2311.08105" in text
    assert len(re.findall("arxiv.org", text)) >= len(plans.__all__)
    assert ":class:" not in text
    assert "``" not in text


def test_describe_agrees_with_the_forecast(dopt) -> None:
    text = dopt("describe diloco --sync_every 50 --codec int8 -n 4 --parameters 1e6")
    told = forecast(plans.diloco(50, codec=Int8()), 4, square_layers(1_000_000))
    assert re.search(r"sync_every +50 +500 +Optimizer steps per round", text)
    assert re.search(r"codec +Int8\(\) +None ", text)
    assert "  when      Every(n=50)\n" in text
    assert f"parameters                20{told.sync_bytes('parameters') / 20 / 1e6:>11.4g} MB" in text
    assert f"at most {told.peak_step_bytes / 1e6:.4g} MB in one step" in text
    assert re.search(r"anchors +4 MB\n  outer optimizer +4 MB", text)


def test_describe_builds_nested_codecs_and_topologies(dopt) -> None:
    line = "describe gossip --topology ring --topology.hops 2 --codec=difference --codec.codec top_k"
    text = dopt(f"{line} --codec.codec.ratio 0.01 --codec.gamma=0.2 -n 6")
    assert "  codec     Difference(codec=TopK(ratio=0.01), gamma=0.2)\n" in text
    assert "  peers     Ring(hops=2)\n" in text
    assert "no options" in dopt("describe lo_fi")


def test_describe_measures_a_model(dopt) -> None:
    text = dopt("describe local_sgd --sync_every 10 --model torch.nn.BatchNorm1d --model.num_features 1000 -n 2")
    assert "2,000 parameters in 2 tensors (8 kB), 2 workers, 1000 steps" in text
    assert re.search(r"parameters +100 +8 kB +800 B", text)
    assert re.search(r"buffers +100 +8 kB +800 B", text)  # mean and variance are averaged, the counter is not


def test_simulate_compares_with_every_step(dopt) -> None:
    text = dopt("simulate diloco -n 8 --mbit 20 --ms 25 --parameters 10e6 --steps 1000 --step-seconds 0.1")
    every = 2 * 7 * (0.025 + 40e6 / 8 * 8e-6 / 20)  # seconds of one all-reduce
    assert re.search(r"bytes per worker +140 MB +70 GB", text)
    assert re.search(rf"time +{(100 + 2 * every) / 60:.4g} min +{(100 + 1000 * every) / 3600:.4g} h", text)
    assert f"500 times fewer bytes, {(100 + 1000 * every) / (100 + 2 * every):.4g} times as fast" in text


def test_topology_says_what_summary_says(dopt, tmp_path: Path) -> None:
    text = dopt("topology one_peer_exponential -n 16")
    assert "exact after 4 rounds" in text
    assert "at most 1 heard" in text
    assert re.search(r"spectral gap +1\n", text)
    text = dopt("topology ring -n 8 --hops 1 --plot ring.svg")
    gap = 1 - (1 + 2 * torch.cos(torch.tensor(torch.pi / 4, dtype=torch.float64)).item()) / 3
    assert re.search(rf"spectral gap +{gap:.6g}\n", text)
    assert "never exact" in text
    assert (tmp_path / "ring.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize("command", ["describe", "simulate", "topology"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = "ring" if command == "topology" else "diloco"
    for line in ("--help", f"{command} --help", f"{command} {name} --help"):
        status = 0
        try:
            cli.main(shlex.split(line))
        except SystemExit as end:
            status = end.code
        assert status == 0
    assert ("hops" if name == "ring" else "sync_every") in capsys.readouterr().out


# ---------------------------------------------------------------------- refusals


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "dopt: a command is needed: one of fit, validate, test, predict, list, describe, simulate, topology"),
        ("fitt", "dopt: unknown command 'fitt': one of fit, "),
        ("describe", "dopt describe: name one of compressed_ddp, l_greco, diloco, "),
        ("describe dilco", "dopt describe: unknown method 'dilco': must be one of compressed_ddp, l_greco, diloco, "),
        ("describe diloco --sync_evry 3", "unrecognized arguments: --sync_evry 3"),
        ("describe diloco --sync_every 0", "diloco(sync_every=0): must be an integer of at least 1"),
        ("describe diloco --sync_every x", "plan.sync_every: Expected a <class 'int'>. Got value: x"),
        ("describe diloco --codec int9", "codec=int9: must be one of identity, bf16, "),
        ("describe diloco --codec top_k", "the following arguments are required: ratio"),
        ("describe gossip --topology hypercube -n 6", "Hypercube(n=6): the number of workers must be a power of two"),
        ("describe diloco -n 0", "forecast(n=0): must be an integer of at least 1"),
        ("describe diloco --parameters 1.5", "--parameters"),
        ("describe diloco --model no.Model", "model: Problem with given class_path 'no.Model': No module named 'no'"),
        ("describe diloco --model torch.nn.Identity --parameters 3", "give either --parameters or --model"),
        ("simulate diloco --mbit -1", "Link(mbit=-1.0): must be a number in [0, inf)"),
        ("topology rung -n 3", "unknown topology 'rung': must be one of complete, ring, "),
        ("topology ring", "the following arguments are required: n"),
        ("topology hypercube -n 6", "Hypercube(n=6): the number of workers must be a power of two"),
        ("topology ring -n 4 --plot a.gif", "draw(path='a.gif'): the file name must end in .png or .svg"),
        ("list x", "unrecognized arguments: x"),
        ("fit", "required"),
        ("fit -c none.yaml", "File does not exist"),
        (f"fit {TASK} --trainer.strategy=dilco", "unknown strategy 'dilco': one of local_sgd, diloco, "),
        (f"fit {TASK} --trainer.strategy=lightning_dopt.DiLoCoStrategy --trainer.max_stps=3", "max_stps"),
        (
            f"fit {TASK} --trainer.strategy.class_path=lightning_dopt.DiLoCoStrategy --trainer.strategy.sync_evry=3",
            "trainer.strategy: Problem with given class_path 'lightning_dopt.DiLoCoStrategy': Option 'sync_evry' is",
        ),
        (
            f"fit {TASK} --trainer.strategy.class_path=lightning_dopt.DiLoCoStrategy --trainer.strategy.sync_every=0",
            "diloco(sync_every=0): must be an integer of at least 1",
        ),
        (
            f"fit {TASK} --trainer.devices=3 --trainer.strategy.class_path=lightning_dopt.GossipStrategy "
            "--trainer.strategy.topology=lightning_dopt.Hypercube",
            "Hypercube(n=3): the number of workers must be a power of two",
        ),
        (f"fit {TASK} --trainer.strategy=diloco --ckpt_path=none.ckpt", "--ckpt_path=none.ckpt: no such file"),
    ],
)
def test_bad_input_ends_with_one_line(line: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(shlex.split(line))
    out, err = capfd.readouterr()
    assert end.value.code == 2
    told = [text for text in err.splitlines() if text.startswith("dopt")]
    assert len(told) == 1
    assert message in told[0]
    assert err.endswith(told[0] + "\n")
    assert "Traceback" not in err + out


# ---------------------------------------------------------------------- YAML


def strategy_of(text: str, folder: Path) -> ReplicaStrategy:
    (folder / "c.yaml").write_text(f"trainer:\n  devices: 2\n  strategy: {text}\n")
    command = cli.DoptCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        run=False,
        args=["-c", str(folder / "c.yaml"), *shlex.split(TASK)],
    )
    strategy = command.trainer.strategy
    assert isinstance(strategy, ReplicaStrategy)
    return strategy


def part(name: str, **arguments: object) -> str:
    """A class path with arguments, as YAML on one line."""
    path = name if "." in name else f"lightning_dopt.{name}"
    values = ", ".join(f"{key}: {value}" for key, value in arguments.items())
    return f"{{class_path: {path}, init_args: {{{values}}}}}" if values else f"{{class_path: {path}}}"


TOP = part("TopK", ratio=0.1)
FOUR = [
    part("Sync", what="gradients"),
    part("Sync", what=part("Parameters", match="'*weight'"), apply=part("OneRound", inflight="own_share")),
    part("Sync", when=part("After", start=5, when=part("Every", n=2)), outer=part("Nesterov", lr=0.3, momentum=0.5)),
    part("Sync", when=part("Every", n=4), apply=part("Delay", steps=3, merge=part("Lerp", alpha=0.2))),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("text", "cls", "plan"),
    [
        ("diloco", DiLoCoStrategy, plans.diloco()),
        (
            part("DiLoCoStrategy", sync_every=7, codec=part("Int4"), topology=part("Complete")),
            DiLoCoStrategy,
            plans.diloco(7, codec=Int4()),
        ),
        (
            part(
                "GossipStrategy", topology=part("Ring", hops=2), codec=part("Difference", codec=part("TopK", ratio=0.1))
            ),
            GossipStrategy,
            plans.gossip(Ring(2), Difference(TopK(0.1))),
        ),
        (
            part("CompressedDDPStrategy", codec=part("ErrorFeedback", codec=part("LowRank", rank=2), decay=0.9)),
            CompressedDDPStrategy,
            plans.compressed_ddp(ErrorFeedback(LowRank(2), 0.9)),
        ),
        (
            part("ReplicaStrategy", plan=part("plans.diloco", sync_every=9).replace("plans", "lightning_dopt.plans")),
            ReplicaStrategy,
            plans.diloco(9),
        ),
        (
            part(
                "ReplicaStrategy",
                plan=part("Plan", syncs=f"[{part('Sync', when=part('Every', n=50), codec=part('Int8'))}]", seed=3),
            ),
            ReplicaStrategy,
            Plan([Sync(when=Every(50), codec=Int8())], seed=3),
        ),
        (
            part(
                "ReplicaStrategy",
                plan=part(
                    "Plan",
                    syncs=f"[{', '.join(FOUR)}]",
                ),
            ),
            ReplicaStrategy,
            Plan(
                [
                    Sync(what=Gradients()),
                    Sync(what=Parameters("*weight"), apply=OneRound("own_share")),
                    Sync(when=After(5, Every(2)), outer=Nesterov(0.3, 0.5)),
                    Sync(when=Every(4), apply=Delay(3, Lerp(0.2))),
                ]
            ),
        ),
    ],
)
def test_yaml_builds_the_plan(text: str, cls: type[ReplicaStrategy], plan: Plan, tmp_path: Path) -> None:
    strategy = strategy_of(text, tmp_path)
    assert type(strategy) is cls
    assert strategy.plan == plan


@pytest.mark.filterwarnings("ignore")
def test_yaml_takes_torch_optimizers_and_links(tmp_path: Path) -> None:
    sync = part("Sync", outer=part("torch.optim.Adagrad", lr=0.25))
    text = part(
        "ReplicaStrategy", plan=part("Plan", syncs=f"[{sync}]"), link=part("Link", mbit=20, ms=25), timeout="'0:00:20'"
    )
    strategy = strategy_of(text, tmp_path)
    outer = strategy.plan.syncs[0].outer
    assert isinstance(outer, FromOptimizer)
    optimizer = outer.build([torch.zeros(2, requires_grad=True)])
    assert isinstance(optimizer, torch.optim.Adagrad)
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert strategy.link == Link(20, 25)
    assert strategy.timeout.total_seconds() == 20
    assert " at 0x" not in repr(strategy.plan)  # checkpoints compare plans by their text
    assert "lr=0.25" in repr(strategy.plan)


def test_optimizers_print_without_addresses() -> None:
    assert repr(FromOptimizer(partial(torch.optim.SGD, lr=0.1))) == "FromOptimizer(optimizer=partial(SGD, lr=0.1))"


@pytest.mark.trainer
@pytest.mark.slow
def test_fit_on_two_processes(tmp_path: Path) -> None:
    """The launcher runs the same script again for rank 1, which must find the class paths of the current directory."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text(
        "from lightning.pytorch.demos.boring_classes import BoringModel\n\n\n"
        "class Mine(BoringModel):\n"
        "    def on_train_end(self):\n"
        "        open(f'rank{self.global_rank}', 'w').write(str(self.layer.weight.double().sum().item()))\n"
    )
    script = Path(sys.executable).parent / "dopt"
    options = TASK.replace("lightning.pytorch.demos.boring_classes.BoringModel", "mine.Mine").split()
    short = ["--trainer.max_steps=4", "--trainer.limit_val_batches=1", "--trainer.devices=2"]
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "PYTHONPATH")}
    done = subprocess.run(
        [str(script), "fit", *options, *short, "--trainer.strategy=diloco", "--trainer.enable_progress_bar=false"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "rank0").exists()
    assert (tmp_path / "rank1").exists()
