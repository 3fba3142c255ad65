"""The orthogonal layer under the Trainer, for a few steps on two processes."""

from __future__ import annotations

import pytest
import torch

from recipes.orthogonal import compare, distance, main


def test_distance_is_zero_for_rotations_only() -> None:
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    assert distance(turn) < 1e-6
    assert distance(2 * turn) == pytest.approx(3 * 2**0.5, rel=1e-6)


def test_every_rank_stays_orthogonal_while_the_mean_and_free_ranks_do_not() -> None:
    outcomes = compare(steps=6, workers=2)
    held, free = outcomes["orthogonal"], outcomes["free"]
    assert held.rank_distance < 5e-5
    assert held.final_distance < 5e-5
    assert free.rank_distance > 1e-2
    assert free.final_distance == free.mean_distance > 1e-2
    assert held.accuracy > 0.1  # more than guessing


def test_bad_options_end_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--steps", "some"])
    assert "invalid int value: 'some'" in capsys.readouterr().err
