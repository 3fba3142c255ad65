"""The federated recipe: clients share rounds, bytes are what they must be, bad options are one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_dopt import Int8
from recipes.vision import comparison, federated, heterogeneity

SIZE = (1 * 16 * 9 + 16) + (16 * 32 * 9 + 32) + (32 * 4 * 4 * 10 + 10)  # parameters of SmallNet for digits
CHOSEN = ("fedavg_all", "fedavg_int8", "scaffold")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, comparison.Outcome]:
    out = tmp_path_factory.mktemp("federated")
    given, _, data = heterogeneity.parse(
        ["--workers=4", "--steps=20", f"--methods={','.join(CHOSEN)}", f"--out={out}"], federated.methods(), "federated"
    )
    found = heterogeneity.run(given, [federated.methods()[name] for name in CHOSEN], data)
    assert Path(out, "results.json").exists()
    return {o.name: o for o in found}


def test_everybody_has_the_common_weights_after_a_round(outcomes: dict[str, comparison.Outcome]) -> None:
    for o in outcomes.values():
        assert o.steps[-1] == 20
        assert o.distance[-1] == pytest.approx(0.0, abs=1e-6)
        assert o.local[-1] == o.merged[-1]


def test_bytes_of_two_rounds(outcomes: dict[str, comparison.Outcome]) -> None:
    assert outcomes["fedavg_all"].bytes[-1] == 2 * 2 * 3 * SIZE * 4 // 4  # two all-reduces
    drawn = Int8().payload_bytes((SIZE,)) * 3  # to three others, by the two of four that a round draws
    assert outcomes["fedavg_int8"].bytes[-1] in (drawn, 2 * drawn)  # the busiest was drawn once or twice


@pytest.mark.parametrize("option", ["--methods=fedsgd", "--workers=1", "--steps=0", "--data=/nowhere"])
def test_bad_options_are_one_line(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        heterogeneity.parse([option], federated.methods(), "federated")
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("python -m recipes.vision.federated: ")
    assert option.split("=")[0] in said
