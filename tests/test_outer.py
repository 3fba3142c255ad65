"""The contract of outer optimizers, which every one of them runs through."""

from __future__ import annotations

import functools
import io

import pytest
import torch
from torch import Tensor

from lightning_dopt import outer
from lightning_dopt.outer import Outer

OUTERS: list[Outer] = [
    outer.SGD(),
    outer.SGD(lr=0.5, momentum=0.8),
    outer.Nesterov(),
    outer.HeavyBall(lr=0.6, momentum=0.4),
    outer.GossipMomentum(),
    outer.LateMomentum(0.5, 0.3, 0.2, 1.5),
    outer.LateMomentum(0.5, 0.3, gap_aware=True),
    outer.Adam(),
    outer.FromOptimizer(functools.partial(torch.optim.Adagrad, lr=0.1)),
]
each = pytest.mark.parametrize("part", OUTERS, ids=repr)


def anchors(seed: int = 0) -> list[Tensor]:
    flat = torch.randn(10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [flat[:6].view(2, 3), flat[6:]]


def drive(part: Outer, tensors: list[Tensor], steps: int) -> torch.optim.Optimizer:
    optimizer = part.build(tensors)
    for k in range(steps):
        for t in tensors:
            t.grad = torch.cos(t + k)
        optimizer.step()
    return optimizer


@each
def test_it_moves_the_anchors_in_place_and_down(part: Outer) -> None:
    tensors = anchors()
    before = [t.clone() for t in tensors]
    optimizer = part.build(tensors)
    for t in tensors:
        t.grad = torch.ones_like(t)
    optimizer.step()
    assert all((t < b).all() for t, b in zip(tensors, before, strict=True))


@each
def test_zero_gradients_at_the_start_move_nothing(part: Outer) -> None:
    tensors = anchors()
    before = [t.clone() for t in tensors]
    optimizer = part.build(tensors)
    for t in tensors:
        t.grad = torch.zeros_like(t)
    optimizer.step()
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


@each
def test_its_state_survives_a_checkpoint(part: Outer) -> None:
    """Three steps, save with plain values only, restore elsewhere, two more: equal to five steps."""
    whole = anchors()
    drive(part, whole, 5)
    first = anchors()
    optimizer = drive(part, first, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second = [t.clone() for t in first]
    restored = part.build(second)
    restored.load_state_dict(torch.load(file, weights_only=True))
    for k in (3, 4):
        for t in second:
            t.grad = torch.cos(t + k)
        restored.step()
    assert all(torch.equal(a, b) for a, b in zip(second, whole, strict=True))


@each
def test_equal_arguments_make_equal_parts(part: Outer) -> None:
    rebuilt = type(part)(**part.arguments())  # type: ignore[arg-type]
    assert rebuilt == part
    assert hash(rebuilt) == hash(part)


def test_closed_forms() -> None:
    """One step on anchor 1 with gradients 0.5, 0.25: averaging, heavy ball and Nesterov by hand."""

    def run(part: Outer) -> float:
        a = torch.ones(1, dtype=torch.float64)
        optimizer = part.build([a])
        for g in (0.5, 0.25):
            a.grad = torch.full_like(a, g)
            optimizer.step()
        return float(a)

    assert run(outer.SGD()) == 1 - 0.5 - 0.25
    assert run(outer.HeavyBall(lr=1.0, momentum=0.5)) == 1 - 0.5 - (0.5 * 0.5 + 0.25)
    b1, b2 = 0.5, 0.9 * 0.5 + 0.25
    assert run(outer.Nesterov(0.7, 0.9)) == pytest.approx(
        1 - 0.7 * (0.5 + 0.9 * b1) - 0.7 * (0.25 + 0.9 * b2), abs=1e-15
    )


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: outer.SGD(lr=0.0), r"^SGD\(lr=0.0\): must be a number in \(0, inf\)$"),
        (lambda: outer.SGD(nesterov=True), r"^SGD\(nesterov=True\): needs a momentum in \(0, 1\), got momentum=0$"),
        (lambda: outer.Nesterov(momentum=1.0), r"^Nesterov\(momentum=1.0\): must be a number in \(0, 1\)$"),
        (lambda: outer.Adam(beta2=1.5), r"^Adam\(beta2=1.5\): must be a number in \[0, 1\)$"),
    ],
)
def test_bad_values_are_refused_in_one_line(make: object, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        make()  # type: ignore[operator]
