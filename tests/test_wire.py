"""The ledger against what leaves the network interface. Needs root, Linux and the link emulator beside the project."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SLOWNET = Path(os.environ.get("DOPT_SLOWNET", ROOT.parent / "shared" / "tools" / "slownet"))
FRAMES = 1.10  # at most 66 bytes of headers on 1448 of payload, and acknowledgements of what comes in
CONTROL = 10_000  # the barriers around the measurement
HANDSHAKE = 1_500  # gloo's own packets, per message and rank: 4.9 kB were seen in an all-reduce of 4 kB over 4

pytestmark = pytest.mark.skipif(
    not SLOWNET.exists() or os.geteuid() != 0 or shutil.which("tc") is None,
    reason="needs the link emulator (DOPT_SLOWNET), root and iproute2",
)


@pytest.mark.parametrize("n", [2, 4])
def test_ledger_equals_the_interface_counters(n: int) -> None:
    command = [sys.executable, str(SLOWNET), "-n", str(n), "--mbit", "0", "--no-verify", "--timeout", "100", "--"]
    done = subprocess.run(
        [*command, sys.executable, str(ROOT / "tests" / "wire_worker.py")],
        capture_output=True,
        text=True,
        timeout=115,
        check=False,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line[line.index("{") :]) for line in done.stdout.splitlines() if '"counted"' in line]
    assert sorted(r["rank"] for r in rows) == list(range(n))
    for row in rows:
        for name, (ledger, messages, interface) in row["counted"].items():
            assert ledger > 0
            most = ledger * FRAMES + messages * n * HANDSHAKE + CONTROL
            assert ledger <= interface <= most, (n, row["rank"], name, ledger, messages, interface)
