"""A benchmark's module on several processes, behind links of a given speed if a program for that is at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def run_ranks(
    module: str, options: list[str], workers: int, link_tool: str = "", mbit: float = 0.0, ms: float = 0.0
) -> dict[str, Any] | None:
    """What rank 0 of ``python -m module *options --json FILE`` wrote to ``FILE``; ``None``, and a line, if it failed.

    Args:
        module: The module, which finds its rank in the environment as under torchrun.
        options: Of its command line.
        workers: Number of processes.
        link_tool: A program that takes ``-n N --mbit R --ms L -- COMMAND`` and starts each rank behind a link of that speed;
            without one, torchrun starts them.
        mbit: Speed of each link in Mbit/s; 0 for no limit.
        ms: Latency of each link, one way.
    """
    start = ["-m", "torch.distributed.run", f"--nproc_per_node={workers}", "--standalone"]
    if link_tool:
        tool = [link_tool, "-n", str(workers), "--mbit", f"{mbit:g}", "--no-verify", "--show", "first"]
        tool += ["--ms", f"{ms:g}"] if mbit and ms else []
        start = [*tool, "--timeout", "900", "--", sys.executable]
    else:
        start = [sys.executable, *start]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "found.json")
        command = [*start, "-m", module, *options, f"--json={out}"]
        ended = subprocess.run(command, env=dict(os.environ, OMP_NUM_THREADS="1"), check=False)
        if not out.exists():
            print(f"  failed with status {ended.returncode}", flush=True)
            return None
        found: dict[str, Any] = json.loads(out.read_text())
        return found
