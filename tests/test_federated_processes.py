"""Sampled clients and their corrections on real processes: the same numbers as in simulation."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from problems import mosaic_run, mosaic_simulation
from test_federated import COMPOSED

SGD = partial(torch.optim.SGD, lr=0.05)


@pytest.mark.parametrize("name", ["sampled, packed, yogi", "scaffold mean", "scafcom and yogi", "fedspeed", "proxskip"])
def test_real_processes_agree_with_the_simulation(ranks: Any, name: str) -> None:
    sim = mosaic_simulation(COMPOSED[name], 3, SGD).run(7).finish()  # type: ignore[arg-type]
    for rank, (weights, ledger, _) in enumerate(ranks(mosaic_run, 3, COMPOSED[name], 7, SGD, None)):
        for key, value in weights.items():
            torch.testing.assert_close(value, sim.replicas[rank][key].detach(), rtol=2e-5, atol=2e-5)
        mine = sim.worlds[rank].ledger.state_dict()
        assert {label: entry["bytes"] for label, entry in ledger.items()} == {
            label: entry["bytes"] for label, entry in mine.items()
        }
