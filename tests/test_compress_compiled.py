"""Compiled loops write the same bytes and decode the same bits as the tiles, and say so when they cannot be made."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dopt.compress import E3M0, FP8, QSGD, Compressor, Int4, Int8, Natural, Sign, TernGrad
from lightning_dopt.compress import _fused as fused

COMPRESSORS: list[Compressor] = [
    Int8(64),
    Int8(64, stochastic=True),
    Int4(64),
    Int4(64, stochastic=True),
    FP8(block=64),
    FP8("e5m2", block=64),
    FP8(block=64, scale="power"),
    E3M0(64),
    E3M0(64, stochastic=True),
    Natural(),
    QSGD(7, 64),
    QSGD(1, 64),
    TernGrad(64),
    TernGrad(64, clip=2.0),
    Sign(64),
]


def signals(d: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(d)
    x = torch.randn(d, generator=g)
    wide = x * 2.0 ** torch.randint(-60, 60, (d,), generator=g)
    return {
        "gauss": x,
        "wide": wide,
        "zeros between": x * (torch.rand(d, generator=g) < 0.1),
        "tiny": x * 1e-39,
        "huge": x.clamp(-3, 3) * 1e38,
        "ties": (x * 8).round() / 8,
    }


def same(c: Compressor, x: Tensor, seed: int, on: Callable[[], None], off: Callable[[], None]) -> None:
    """The same message and the same sum, with and without compiled loops."""
    off()
    message, start = c.encode(x, seed), torch.linspace(-1.0, 1.0, x.numel())
    there = start.clone()
    c.decode_add(message, there, -0.3, seed)
    on()
    assert torch.equal(c.encode(x, seed), message)
    c.decode_add(message, start, -0.3, seed)
    assert torch.equal(start, there)


@pytest.fixture
def switches(monkeypatch: pytest.MonkeyPatch) -> tuple[Callable[[], None], Callable[[], None]]:
    monkeypatch.setitem(fused._state, "broken", False)
    monkeypatch.setattr(fused, "_compiled", {})
    return (lambda: monkeypatch.setenv("DOPT_COMPILE", "1")), (
        lambda: monkeypatch.delenv("DOPT_COMPILE", raising=False)
    )


@pytest.mark.parametrize("c", COMPRESSORS, ids=repr)
def test_the_expressions_say_what_the_tiles_do(c: Compressor, switches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler: whole tiles, a shorter one and a block that is not full."""
    used: list[str] = []

    def plain(loop: Callable[..., None], *arguments: Tensor) -> None:
        used.append(loop.__name__)
        loop(*arguments)

    monkeypatch.setattr(fused, "run", plain)
    for name, x in signals(3 * (1 << 18) + 70_001).items():
        same(c, x, 5, *switches)
        assert used, name
    assert not isinstance(c, Natural) or set(used) == {"naturals", "add_powers"}


@pytest.mark.filterwarnings("error:DOPT_COMPILE")
def test_compiled_loops_give_the_same_bits(switches: Any) -> None:
    for c in (Int8(64), Int8(64, stochastic=True), FP8(block=64), E3M0(64, stochastic=True), Natural(), QSGD(7, 64)):
        for d in (2 * (1 << 18) + 64, 3 * (1 << 18) + 11):
            same(c, signals(d)["wide"], 2, *switches)
    names = {loop.__name__ for loop in fused._compiled}
    assert names == {"peaks", "rounded", "dithered", "cast", "dithered_powers", "naturals"} | {
        "add_codes",
        "add_powers",
        "add_e3m0",
        "add_e4m3",
    }


def test_a_failing_compiler_is_said_once(switches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(loop: object, **options: object) -> Callable[..., None]:
        def call(*arguments: Tensor) -> None:
            raise RuntimeError("\nno C++ compiler here\nand more")

        return call

    monkeypatch.setattr(torch, "compile", fails)
    x = torch.randn(1 << 17)
    message = Int8(64).encode(x)
    switches[0]()
    with pytest.warns(UserWarning, match=r"^DOPT_COMPILE=1: compressors run uncompiled, .*: no C\+\+ compiler here$"):
        assert torch.equal(Int8(64).encode(x), message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(Int8(64).encode(x), message)


def test_the_variable_is_0_or_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOPT_COMPILE", "yes")
    with pytest.raises(ValueError, match=r"^DOPT_COMPILE=yes: must be 0 or 1$"):
        Int8().encode(torch.randn(1 << 17))
