"""The README's examples run as they stand. Needs nothing but an installed package and README.md beside this folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def run(command: list[str], cwd: Path) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RANK", "LOCAL_RANK", "WORLD_SIZE")}
    done = subprocess.run(
        command, cwd=cwd, env=dict(env, OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_readme_has_the_blocks_tested_here() -> None:
    assert len(blocks("python")) == 3
    assert len(blocks("yaml")) == 1


@pytest.mark.parametrize("index", range(3))
def test_python_block_runs_as_a_script(index: int, tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(blocks("python")[index])
    out = run([sys.executable, str(script)], tmp_path)
    if index == 0:
        # BoringModel has 66 parameters: codes and one scale, to one other rank, in two rounds.
        assert "bytes sent by this rank: 140" in out


def test_yaml_block_trains(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(blocks("yaml")[0])
    dopt = Path(sys.executable).parent / "dopt"
    run([str(dopt), "fit", "-c", "config.yaml"], tmp_path)


def test_commands_of_the_readme_exist() -> None:
    """Every ``dopt`` sub-command and option shown is one the command line knows."""
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("dopt ")]
    commands = [re.split(r"\s+#", line)[0].split()[1:] for line in lines]
    assert {c[0] for c in commands} == {"fit", "list", "describe", "topology", "simulate"}
    dopt = Path(sys.executable).parent / "dopt"
    for command in commands:
        if command[0] in ("describe", "topology", "simulate"):
            done = subprocess.run([str(dopt), *command], capture_output=True, text=True, timeout=60, check=False)
            assert done.returncode == 0, done.stderr
