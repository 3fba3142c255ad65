"""``python -m recipes.demo``: one small language model, trained twice on two processes, with DiLoCo and with DDP.

Both runs see the same batches in the same order from the same start; what differs is what the two processes tell each
other. Ends with a table, some generated text and a picture under ``runs/demo``.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("runs") / "demo"
WORKERS = 2
SLOW_LINK = (20.0, 25.0)  # Mbit/s and ms, for the forecast of the time elsewhere
PROMPT = b"def "
LENGTH = ["--trainer.max_steps=390", "--trainer.val_check_interval=130"]  # 13 rounds; both trainings in 3 to 4 minutes


@dataclass
class Run:
    """One training and what came of it."""

    name: str
    steps: int = 0
    wall_seconds: float = 0.0
    val_loss: float = float("nan")
    bytes_per_worker: int = 0
    slow_link_seconds: float = 0.0
    train: list[tuple[int, float]] = field(default_factory=list)
    """(optimizer steps done, training loss)"""
    val: list[tuple[int, float]] = field(default_factory=list)
    """(optimizer steps done, validation loss)"""
    sent: dict[int, int] = field(default_factory=dict)
    """Payload bytes sent by a worker, by optimizer steps done, where they were logged."""

    @property
    def folder(self) -> Path:
        """Where Lightning logs and saves."""
        return OUT / self.name

    def checkpoint(self) -> Path:
        """The last checkpoint.

        Raises:
            FileNotFoundError: the run saved none.
        """
        found = sorted(self.folder.rglob("*.ckpt"), key=lambda p: p.stat().st_mtime)
        found = [p for p in found if not p.parent.parent.name.endswith(".replicas")]
        if not found:
            raise FileNotFoundError(f"no checkpoint in {self.folder}")
        return found[-1]


def train(name: str, extra: list[str]) -> Run:
    """Train ``recipes/llm/NAME.yaml`` in a process of its own and read what it logged.

    Raises:
        SystemExit: the training failed, with its status.
    """
    run = Run(name)
    shutil.rmtree(run.folder, ignore_errors=True)
    command = [sys.executable, "-m", "lightning_dopt.cli", "fit", "-c", f"recipes/llm/{name}.yaml"]
    command += [f"--trainer.logger.init_args.save_dir={OUT}", f"--trainer.logger.init_args.name={name}"]
    command += [*LENGTH, *extra]
    print(f"\n$ dopt {' '.join(command[3:])}", flush=True)
    environment = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **os.environ}
    began = time.monotonic()
    status = _finish(subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True))
    run.wall_seconds = time.monotonic() - began
    if status:
        raise SystemExit(status)
    _read(run, next((ROOT / run.folder).rglob("metrics.csv")))
    return run


def _finish(process: subprocess.Popen[bytes]) -> int:
    """Wait; Ctrl-C ends the whole group of processes, first politely."""
    try:
        return process.wait()
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(20)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            os.killpg(process.pid, signal.SIGKILL)
        raise


def _read(run: Run, file: Path) -> None:
    with file.open() as stream:
        for row in csv.DictReader(stream):
            done = int(row["step"]) + 1
            run.steps = max(run.steps, done)
            if row.get("train/loss"):
                run.train.append((done, float(row["train/loss"])))
            if row.get("val/loss"):
                run.val.append((done, float(row["val/loss"])))
            if row.get("comm/bytes"):
                run.sent[done] = int(float(row["comm/bytes"]))
    run.val_loss = run.val[-1][1]


def count_bytes(diloco: Run, ddp: Run) -> None:
    """Bytes of both runs, and how long they would have taken over a slow link.

    DiLoCo's are counted where they are sent. DDP does not count: its bytes are those of a ring all-reduce of all
    gradients in every step.
    """
    import yaml
    from jsonargparse import ArgumentParser

    from lightning_dopt import Link, Plan, Sync
    from lightning_dopt.forecast import forecast
    from lightning_dopt.show import shapes_of
    from lightning_dopt.strategies import ReplicaStrategy
    from recipes.llm import ByteGPT

    shapes, buffers = shapes_of(ByteGPT.load_from_checkpoint(ddp.checkpoint(), map_location="cpu"))
    parser = ArgumentParser()
    parser.add_subclass_arguments(ReplicaStrategy, "strategy")
    config = yaml.safe_load(next(diloco.folder.rglob("config.yaml")).read_text())
    plan = parser.instantiate_classes(parser.parse_object({"strategy": config["trainer"]["strategy"]})).strategy.plan
    link = Link(*SLOW_LINK)
    for run, of in ((diloco, plan), (ddp, Plan([Sync(what="gradients")]))):
        told = forecast(of, WORKERS, shapes, run.steps, link, run.wall_seconds / run.steps, buffers)
        run.slow_link_seconds = told.seconds
        if run is ddp:
            run.bytes_per_worker = told.bytes[0]
            run.sent = {done: told.bytes[0] * done // run.steps for done, _ in (*run.train, *run.val)}
    diloco.bytes_per_worker = max(diloco.sent.values())


def table(diloco: Run, ddp: Run) -> str:
    """The comparison."""
    mbit, ms = SLOW_LINK
    rows = [
        ("", "DiLoCo + Int8", "DDP"),
        ("validation loss (nats per byte)", f"{diloco.val_loss:.3f}", f"{ddp.val_loss:.3f}"),
        ("bytes sent per worker", f"{diloco.bytes_per_worker / 1e6:.1f} MB", f"{ddp.bytes_per_worker / 1e6:.1f} MB *"),
        ("wall time here", f"{diloco.wall_seconds:.0f} s", f"{ddp.wall_seconds:.0f} s"),
        (f"over {mbit:g} Mbit/s, {ms:g} ms (forecast)", _duration(diloco), _duration(ddp)),
    ]
    lines = [f"{a:<36}{b:>16}{c:>16}" for a, b, c in rows]
    ratio = ddp.bytes_per_worker / diloco.bytes_per_worker
    lines += [
        f"\nDiLoCo sent {ratio:.0f} times fewer bytes in the same {diloco.steps} steps.",
        "* by the formula of a ring all-reduce: 2 (n-1)/n of the gradients' bytes in every step",
    ]
    return "\n".join(lines)


def _duration(run: Run) -> str:
    return f"{run.slow_link_seconds / 60:.1f} min"


def sample(run: Run, length: int = 400) -> str:
    """Text generated by a run's last checkpoint."""
    from recipes.llm import ByteGPT

    model = ByteGPT.load_from_checkpoint(run.checkpoint(), map_location="cpu")
    return model.generate(PROMPT, length, temperature=0.6).decode(errors="replace")


def plot(runs: list[Run], path: Path) -> Path:
    """Draw training and validation loss against bytes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for run, color in zip(runs, ("#1b6ca8", "#c1442e"), strict=True):
        axes.plot(*_against_bytes(run, run.train), color=color, alpha=0.35, label=f"{run.name}, training")
        axes.plot(*_against_bytes(run, run.val), "o-", color=color, label=f"{run.name}, validation")
    axes.set_xscale("log")
    axes.set_xlabel("bytes sent per worker")
    axes.set_ylabel("loss (nats per byte)")
    axes.set_title(f"The same {runs[0].steps} steps on {WORKERS} processes")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=150)
    return path


def _against_bytes(run: Run, points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Bytes sent so far and losses; what came before the first message has no place on a logarithmic axis."""
    known = sorted(run.sent.items())
    pairs = [(max((b for at, b in known if at <= done), default=0), loss) for done, loss in points]
    return [b for b, _ in pairs if b], [loss for b, loss in pairs if b]


def main(extra: list[str]) -> None:
    """Train twice, compare, and save what was found; options are handed on to both trainings."""
    os.chdir(ROOT)
    OUT.mkdir(parents=True, exist_ok=True)
    print(f"Training a byte-level GPT on the Python standard library, {WORKERS} processes, twice: DiLoCo, then DDP.")
    diloco, ddp = train("diloco", extra), train("ddp", extra)
    count_bytes(diloco, ddp)
    print(f"\n{table(diloco, ddp)}")
    print(f"\nThe DiLoCo model writes:\n{'-' * 60}\n{sample(diloco)}\n{'-' * 60}")
    (OUT / "results.json").write_text(json.dumps([asdict(run) for run in (diloco, ddp)], indent=1) + "\n")
    try:
        print(f"\nLoss against bytes: {plot([diloco, ddp], OUT / 'loss_against_bytes.png')}")
    except ImportError:
        print("\nNo picture: pip install 'lightning_dopt[report]'")
    print(f"Numbers: {OUT / 'results.json'}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        raise SystemExit(130) from None
