"""Error memories: their invariants, their limiting cases, and that they converge where nothing else does."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor

from lightning_dopt.compress import (
    DGC,
    DIANA,
    EF21,
    Compressor,
    DeepSqueeze,
    Difference,
    EControl,
    ErrorFeedback,
    Identity,
    Int4,
    LowRank,
    Memory,
    MoniQua,
    RandK,
    Sign,
    TopK,
    as_compressor,
)

States = list[dict[str, Tensor]]
MEMORIES: list[Memory] = [
    ErrorFeedback(TopK(0.1)),
    ErrorFeedback(Sign(), decay=0.9),
    EF21(TopK(0.1)),
    EControl(Int4(), eta=0.1),
    DGC(TopK(0.1)),
    DIANA(RandK(0.25)),
    Difference(TopK(0.1), gamma=0.2),
    DeepSqueeze(TopK(0.1), eta=0.1),
    MoniQua(bits=8, theta=4.0),
]


def mix(memory: Memory, signals: list[Tensor], states: States, w: Tensor, seed: int = 0) -> list[Tensor]:
    """One step of all ranks as an engine would do it."""
    c, messages = memory.codec, []
    for i, (signal, state) in enumerate(zip(signals, states, strict=True)):
        scale = memory.scale(signal.shape)
        own = c.roundtrip(memory.load(signal, state), 100 * seed + i if c.private else seed).mul_(scale)
        memory.sent(own, state)
        messages.append(own)
    results = []
    for row, own, signal, state in zip(w.to(messages[0].dtype), messages, signals, states, strict=True):
        heard = torch.stack([memory.localise(m, signal) if memory.relative else m for m in messages])
        results.append(memory.received(torch.tensordot(row, heard, 1), own, signal, state))
    return results


def mean(n: int) -> Tensor:
    return torch.full((n, n), 1 / n, dtype=torch.float64)


def ring(n: int) -> Tensor:
    eye = torch.eye(n, dtype=torch.float64)
    return (eye + eye.roll(1, 0) + eye.roll(-1, 0)) / 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- all memories -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", MEMORIES, ids=repr)
def test_state_and_signal(memory: Memory) -> None:
    for dtype, kept in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        signal = normal(5, 8).to(dtype)
        before = signal.clone()
        state = memory.state(signal)
        assert set(state) == set(memory.keys)
        assert all(t.dtype == kept and t.shape == signal.shape and not t.any() for t in state.values())
        result = mix(memory, [signal], [state], mean(1))[0]
        assert torch.equal(signal, before)
        assert result.shape == signal.shape
        assert all(result.data_ptr() != t.data_ptr() for t in state.values())
        assert any(t.any() for t in state.values()) == bool(memory.keys)


@pytest.mark.parametrize("memory", MEMORIES, ids=repr)
def test_is_plain_data(memory: Memory) -> None:
    assert pickle.loads(pickle.dumps(memory)) == memory
    assert eval(repr(memory)) == memory
    assert set(vars(memory)) == set(memory.arguments())
    assert [other for other in MEMORIES if other == memory] == [memory]


def test_scale_tames_what_is_unbiased_only() -> None:
    assert ErrorFeedback(RandK(0.1)).scale((1000,)) == pytest.approx(0.1)
    assert EF21(RandK(0.1)).scale((10, 100)) == pytest.approx(0.1)
    assert ErrorFeedback(RandK(0.8)).scale((1000,)) == 1.0
    wide = Int4(block=2000, stochastic=True)
    assert ErrorFeedback(wide).scale((2000,)) == pytest.approx(1 / (1 + wide.variance((2000,))))
    for c in (TopK(0.1), Sign(), Identity(), LowRank(1), Int4(), Int4(stochastic=True)):
        assert ErrorFeedback(c).scale((2000,)) == 1.0


def test_as_compressor() -> None:
    memory = EF21(TopK(0.1))
    assert as_compressor(memory) == (TopK(0.1), memory)
    assert as_compressor(Sign()) == (Sign(), None)
    with pytest.raises(ValueError, match=r"^codec='topk': must be a compressor or a memory around one$"):
        as_compressor("topk")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "outer", [ErrorFeedback, EF21, Difference, lambda c: EControl(c, 0.1), lambda c: DeepSqueeze(c, 0.1)]
)
def test_memories_do_not_nest(outer: type[Memory]) -> None:
    with pytest.raises(ValueError, match=r"^\w+\(codec=EF21\(codec=Sign\(\)\)\): must be a compressor [^\n]*$"):
        outer(EF21(Sign()))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ErrorFeedback(Sign(), decay=0), r"ErrorFeedback\(decay=0\)"),
        (lambda: ErrorFeedback(Sign(), decay=1.1), r"ErrorFeedback\(decay=1.1\)"),
        (lambda: EControl(Sign(), eta=-0.1), r"EControl\(eta=-0.1\)"),
        (lambda: Difference(Sign(), gamma=0.0), r"Difference\(gamma=0.0\)"),
        (lambda: Difference(Sign(), gamma=1.5), r"Difference\(gamma=1.5\)"),
        (lambda: DeepSqueeze(Sign(), eta=0.0), r"DeepSqueeze\(eta=0.0\)"),
        (lambda: DeepSqueeze(Sign(), eta=1.01), r"DeepSqueeze\(eta=1.01\)"),
        (lambda: MoniQua(8, theta=0.0), r"MoniQua\(theta=0.0\)"),
        (lambda: MoniQua(8, theta=float("inf")), r"MoniQua\(theta=inf\)"),
        (lambda: MoniQua(8, theta=float("nan")), r"MoniQua\(theta=nan\)"),
    ],
)
def test_bad_arguments_are_named(make: type, text: str) -> None:
    with pytest.raises(ValueError, match=rf"^{text}: must be a number in [^\n]*$"):
        make()


@pytest.mark.parametrize(
    ("bits", "allowed"),
    [(0, "an integer of at least 1"), (17, "at most 16; beyond that [^\n]*"), (2.0, "an integer of at least 1")],
)
def test_bad_bits_are_named(bits: int, allowed: str) -> None:
    with pytest.raises(ValueError, match=rf"^MoniQua\(bits={bits}\): must be {allowed}$"):
        MoniQua(bits, 1.0)


# --- error feedback ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [TopK(0.05), Sign(block=64), RandK(0.1), Int4(stochastic=True)], ids=repr)
def test_error_feedback_telescopes(codec: Compressor) -> None:
    memory = ErrorFeedback(codec)
    states = [memory.state(torch.zeros(200)) for _ in range(2)]
    fed, got = torch.zeros(200, dtype=torch.float64), torch.zeros(200, dtype=torch.float64)
    for t in range(1000):
        signals = [normal(200, seed=2 * t + i).add(0.1).float() for i in range(2)]
        results = mix(memory, signals, states, mean(2), seed=t)
        fed += torch.stack(signals).double().mean(0)
        got += results[0]
    left = torch.stack([s["residual"] for s in states]).double().mean(0)
    assert float((got + left - fed).norm() / fed.norm()) < 1e-5
    assert float(left.norm() / fed.norm()) < 0.5


def test_error_feedback_by_hand() -> None:
    memory = ErrorFeedback(TopK(0.5), decay=0.5)
    states = [memory.state(torch.zeros(2))]
    got = [mix(memory, [torch.tensor([4.0, 3.0])], states, mean(1))[0].tolist() for _ in range(3)]
    # residuals 0, 3 / 4, 0 / 0, 3 after v = (4, 3), (4, 4.5), (6, 3)
    assert got == [[4.0, 0.0], [0.0, 4.5], [6.0, 0.0]]
    assert states[0]["residual"].tolist() == [0.0, 3.0]


# --- EF21 and EControl ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [EF21(TopK(0.1)), EControl(RandK(0.2), eta=0.05)], ids=repr)
def test_estimate_is_the_mean_of_the_estimates(memory: Memory) -> None:
    states = [memory.state(torch.zeros(50, dtype=torch.float64)) for _ in range(4)]
    for t in range(100):
        results = mix(memory, [normal(50, seed=4 * t + i) for i in range(4)], states, mean(4), seed=t)
        average = torch.stack([s["own"] for s in states]).mean(0)
        for result, state in zip(results, states, strict=True):
            torch.testing.assert_close(result, average, atol=1e-12, rtol=0)
            assert torch.equal(result, state["mean"])


def test_ef21_reaches_a_constant_signal() -> None:
    memory, signal = EF21(TopK(0.1)), normal(50).float()
    states = [memory.state(signal)]
    for _ in range(10):
        result = mix(memory, [signal], states, mean(1))[0]
    assert torch.equal(result, signal)


def test_econtrol_without_gain_is_ef21() -> None:
    plain, gained = EF21(TopK(0.1)), EControl(TopK(0.1), eta=0.0)
    a, b = ([m.state(torch.zeros(40)) for _ in range(3)] for m in (plain, gained))
    for t in range(50):
        signals = [normal(40, seed=3 * t + i).float() for i in range(3)]
        for x, y in zip(mix(plain, signals, a, mean(3)), mix(gained, signals, b, mean(3)), strict=True):
            assert torch.equal(x, y)


def test_econtrol_follows_its_recursion() -> None:
    memory, c = EControl(TopK(0.2), eta=0.3), TopK(0.2)
    states = [memory.state(torch.zeros(20, dtype=torch.float64))]
    e, h = torch.zeros(20, dtype=torch.float64), torch.zeros(20, dtype=torch.float64)
    for t in range(30):
        g = normal(20, seed=t)
        h = h + c.roundtrip(0.3 * e + g - h)
        e = e + g - h
        result = mix(memory, [g], states, mean(1))[0]
        torch.testing.assert_close(result, h, atol=1e-12, rtol=0)
        torch.testing.assert_close(states[0]["error"], e, atol=1e-12, rtol=0)


# --- convergence ------------------------------------------------------------------------------------------------------


def three_workers(memory: Memory | None, codec: Compressor, steps: int, lr: float = 0.05) -> float:
    """Compressed gradient descent on ``f_i(x) = <a_i, x>^2 + |x|^2 / 4``; the norm of x in the end."""
    a = torch.tensor([[-3.0, 2, 2], [2, -3, 2], [2, 2, -3]], dtype=torch.float64)
    x = torch.ones(3, dtype=torch.float64)
    states = [memory.state(x) for _ in a] if memory else []
    for t in range(steps):
        grads = [2 * (row @ x) * row + x / 2 for row in a]
        if memory:
            step = mix(memory, grads, states, mean(3), seed=t)[0]
        else:
            step = torch.stack([codec.roundtrip(g, t) for g in grads]).mean(0)
        x = x - lr * step
    return float(x.norm())


def test_without_memory_the_largest_coordinate_diverges() -> None:
    # The mean message is -11/6 of (1, 1, 1): every step multiplies x by 1 + 11 lr / 6.
    start = 3**0.5
    assert three_workers(None, TopK(0.3), 20) == pytest.approx(start * (1 + 11 * 0.05 / 6) ** 20, rel=1e-5)


@pytest.mark.parametrize(
    ("memory", "steps"),
    [
        (ErrorFeedback(TopK(0.3)), 600),
        (EF21(TopK(0.3)), 600),
        (EControl(TopK(0.3), eta=0.3), 600),
        (EControl(TopK(0.3), eta=0.1), 600),
    ],
    ids=repr,
)
def test_every_memory_converges_there(memory: Memory, steps: int) -> None:
    assert three_workers(memory, memory.codec, steps) < 1e-5


def test_too_large_a_gain_diverges() -> None:
    assert 1e3 < three_workers(EControl(TopK(0.3), eta=1.0), TopK(0.3), 150) < float("inf")


def test_only_shifts_are_exact_on_unequal_data() -> None:
    n, d, lr = 4, 10, 0.05
    h = [1 + 9 * torch.rand(d, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(n)]
    b = [10 * normal(d, seed=10 + i) for i in range(n)]
    best = sum(b) / sum(h)
    left = {}
    for memory in (ErrorFeedback(TopK(0.3)), EF21(TopK(0.3)), EControl(TopK(0.3), eta=0.05)):
        x = torch.zeros(d, dtype=torch.float64)
        states = [memory.state(x) for _ in range(n)]
        for _ in range(1000):
            x = x - lr * mix(memory, [hi * x - bi for hi, bi in zip(h, b, strict=True)], states, mean(n))[0]
        left[type(memory).__name__] = float((x - best).norm() / best.norm())
    assert left["ErrorFeedback"] > 1e-3
    assert left["EF21"] < 1e-8
    assert left["EControl"] < 1e-8


# --- difference coding ------------------------------------------------------------------------------------------------


def consensus(memory: Memory, rounds: int, n: int = 8, d: int = 40) -> tuple[float, float]:
    """Gossip of normal vectors on a ring: squared distance to the mean and drift of the mean, relative."""
    xs = list(normal(n, d, seed=1))
    start = torch.stack(xs).mean(0)
    scale = float((torch.stack(xs) - start).square().sum())
    states = [memory.state(x) for x in xs]
    for t in range(rounds):
        xs = mix(memory, xs, states, ring(n), seed=t)
        copies = torch.stack([s["own"] for s in states])
        torch.testing.assert_close(torch.stack([s["mixed"] for s in states]), ring(n) @ copies, atol=1e-9, rtol=1e-9)
    final = torch.stack(xs)
    distance = float((final - final.mean(0)).square().sum()) / scale
    return distance, float((final.mean(0) - start).norm() / start.norm())


def test_difference_of_everything_is_plain_gossip() -> None:
    memory, xs, w = Difference(Identity()), list(normal(6, 9)), ring(6)
    states = [memory.state(x) for x in xs]
    plain = torch.stack(xs)
    for _ in range(20):
        xs, plain = mix(memory, xs, states, w), w @ plain
        torch.testing.assert_close(torch.stack(xs), plain, atol=1e-13, rtol=0)


@pytest.mark.parametrize(("gamma", "low", "high"), [(0.05, 1e-3, 3e-2), (0.1, 1e-5, 1e-3), (0.2, 1e-10, 1e-6)])
def test_largest_tenth_reaches_consensus(gamma: float, low: float, high: float) -> None:
    distance, drift = consensus(Difference(TopK(0.1), gamma=gamma), 200)
    assert low < distance < high
    assert drift < 1e-12


def test_consensus_goes_on_and_too_large_a_step_does_not() -> None:
    assert consensus(Difference(TopK(0.1), gamma=0.2), 600)[0] < 1e-18
    assert consensus(Difference(TopK(0.1), gamma=0.4), 600)[0] > 1e-3


@pytest.mark.parametrize("codec", [Sign(), RandK(0.2), Int4(block=8, stochastic=True)], ids=repr)
def test_the_mean_is_preserved_whatever_the_compressor(codec: Compressor) -> None:
    distance, drift = consensus(Difference(codec, gamma=0.1), 150)
    assert distance < 0.05
    assert drift < 1e-12
