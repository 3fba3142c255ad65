"""The min-max recipe: its two games, and a few steps of every method on two processes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from recipes.minmax.__main__ import main, methods
from recipes.minmax.games import Bilinear, Pictures, frechet


def test_the_operator_of_the_bilinear_game_vanishes_at_the_point_distances_are_to() -> None:
    game = Bilinear(0.1, 3)
    for _ in range(400):  # descent-ascent on the mean, by hand
        game.zero_grad()
        (sum(game.training_step([torch.tensor([i])], 0) for i in range(3)) / 3).backward()
        with torch.no_grad():
            game.x -= 0.05 * game.x.grad
            game.y += 0.05 * game.y.grad
    assert game.distance() < 1e-6
    assert float(torch.cat([game.x.grad, game.y.grad]).norm()) < 1e-4
    with torch.no_grad():
        game.x.zero_()
        game.y.zero_()
    assert game.distance() == pytest.approx(1.0)


def test_frechet_distance_of_equal_shifted_and_stretched_sets() -> None:
    a = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    assert frechet(a, a) < 1e-9
    assert frechet(a, a + 2) == pytest.approx(24, rel=1e-5)
    assert frechet(a, 3 * a - 2 * a.mean(0)) == pytest.approx(4 * float(torch.cov(a.T).trace()), rel=1e-4)
    assert frechet(a * math.nan, a) == math.inf


def test_the_gan_is_a_game_between_its_parts() -> None:
    """The critic can raise the value, the generator lower it; the penalty is the critic's alone."""
    game = Pictures(0.1)
    batch = next(iter(game.batches(0, 2, 1)))
    game.training_step(batch, 0).backward()
    before = float(game.training_step(batch, 0).detach())
    for module, sign in ((game.critic, 1), (game.generator, -1)):
        with torch.no_grad():
            for p in module.parameters():
                p += sign * 0.01 * p.grad
        after = float(game.training_step(batch, 0).detach())
        assert sign * (after - before) > 0
        before = after


@pytest.mark.trainer
@pytest.mark.filterwarnings("ignore")
def test_every_method_runs_and_is_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = main(["--games", "bilinear", "--steps", "12", "--workers", "2", "--out", str(tmp_path)])
    names = list(methods("y"))
    assert [o.method for o in outcomes] == names
    assert all(o.steps == list(range(1, 13)) and o.distance[-1] < 1.0 for o in outcomes)
    sent = {o.method: o.bytes[-1] for o in outcomes}
    assert sent["descent-ascent"] == 12 * 8 * 100  # float64
    assert sent["extragradient"] == 2 * sent["descent-ascent"]
    assert sent["descent-ascent TopK"] == 12 * 10 * 5
    assert sent["masha TopK"] > sent["descent-ascent TopK"]
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    assert [row["method"] for row in json.loads((tmp_path / "results.json").read_text())] == names


@pytest.mark.parametrize(
    ("options", "text"),
    [(["--games", "chess"], "--games chess"), (["--workers", "1"], "2 to 64"), (["--steps", "0"], "at least 1")],
)
def test_bad_options_end_it_in_one_line(options: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(options)
    told = capsys.readouterr().err
    assert text in told
    assert told.count("\n") == 1
