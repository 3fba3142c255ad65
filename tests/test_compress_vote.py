"""The majority vote: by hand, as signSGD, and against a rank that lies."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_dopt import Int8, Plan, Simulation, Sync
from lightning_dopt.combine.vote import MajorityVote
from lightning_dopt.compress import EF21, Codec, Identity, Sign


def voted(rows: list[list[float]], weights: list[float] | None = None) -> list[float]:
    def message(row: list[float]) -> Callable[[Tensor, float], None]:
        def decode(out: Tensor, weight: float) -> None:
            out.add_(torch.tensor(row), alpha=weight)

        return decode

    n = len(rows)
    out = torch.zeros(len(rows[0]))
    MajorityVote()(list(zip(weights or [1 / n] * n, map(message, rows), strict=True)), out)
    return out.tolist()


def test_by_hand() -> None:
    assert voted([[1.0, -100.0, 0.0], [0.1, 3.0, 0.0], [-50.0, 2.0, -1e-9]]) == [1.0, 1.0, -1.0]
    assert voted([[1.0, 2.0], [-7.0, 0.0]]) == [0.0, 1.0]
    assert voted([[1.0], [-1.0], [-1.0]], [0.6, 0.2, 0.2]) == [1.0]


@pytest.mark.parametrize("n", [2, 4, 6, 10, 14, 30])
def test_ties_do_not_move(n: int) -> None:
    assert voted([[1.0, -1.0]] * (n // 2) + [[-2.0, 3.0]] * (n // 2)) == [0.0, 0.0]
    assert voted([[1.0]] * (n // 2 + 1) + [[-2.0]] * (n // 2 - 1)) == [1.0]


@pytest.mark.parametrize("codec", [Identity(), Sign(block=10**6), Int8()], ids=repr)
def test_training_goes_by_signs(codec: Codec) -> None:
    gradients = torch.tensor([[5.0, -0.1, 1.0], [-0.1, -3.0, 1.0], [0.2, 0.1, -9.0]]).double()

    def set_gradient(rank: int, replica: dict[str, Tensor], step: int) -> None:
        replica["x"].grad = gradients[rank].clone()

    plan = Plan([Sync(what="gradients", codec=codec, combine=MajorityVote())])
    start = torch.zeros(3).double()
    ends = Simulation(plan, 3, lambda i: {"x": start}, set_gradient, lambda ps: torch.optim.SGD(ps, lr=0.5)).run(4)
    torch.testing.assert_close(ends.stacked(), torch.tensor([[-2.0, 2.0, -2.0]] * 3).double())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^Sync\(.*combine=MajorityVote\(\)\): this memory needs a weighted sum$"):
        Sync(what="gradients", codec=EF21(Int8()), combine=MajorityVote())
    with pytest.raises(ValueError, match=r"^Sync\(.*combine=MajorityVote\(\)\): votes are signs alone, use .*$"):
        Sync(combine=MajorityVote())
