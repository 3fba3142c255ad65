"""One contract for all compressors, then what only some of them promise."""

from __future__ import annotations

import math
import pickle
from collections.abc import Generator
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dopt.compress import (
    BF16,
    E3M0,
    FP8,
    FP16,
    QSGD,
    BlockTopK,
    ByteBudget,
    Compose,
    Compressor,
    CountSketch,
    DCTTopK,
    DenseBelow,
    ErrorFeedback,
    Factors,
    FedZip,
    Identity,
    Int4,
    Int8,
    KeepEnergy,
    LGreCo,
    LowRank,
    Natural,
    RandK,
    RandomProjection,
    RandomShift,
    Sign,
    TernGrad,
    Threshold,
    TopK,
    by_name,
    names,
    sparse,
)
from lightning_dopt.compress import _wire as wire

COMPRESSORS: list[Compressor] = [
    Identity(),
    BF16(),
    FP16(),
    Int8(),
    Int8(block=64, stochastic=True),
    Int4(),
    Int4(block=31, stochastic=True),
    Int4(block=1024, stochastic=True),
    FP8(),
    FP8("e5m2", block=33),
    FP8(scale="power"),
    FP8("e5m2", block=100, scale="power"),
    E3M0(),
    E3M0(block=5000),
    E3M0(block=100, stochastic=True),
    Natural(),
    QSGD(1),
    QSGD(3, block=64),
    QSGD(7, block=10),
    QSGD(127),
    TernGrad(),
    TernGrad(block=5, clip=2.5),
    RandomShift(),
    RandomShift(4, block=31),
    Sign(),
    Sign(block=100),
    TopK(0.1),
    TopK(0.013),
    BlockTopK(0.1),
    BlockTopK(0.3, block=100),
    BlockTopK(0.01, block=256),
    Threshold(1.0, capacity=0.2),
    Threshold(1e-9, capacity=0.01),
    Compose(TopK(0.1), Int8()),
    Compose(BlockTopK(0.2, block=64), Int4(stochastic=True)),
    Compose(TopK(0.5), QSGD(1)),
    Compose(DCTTopK(0.1), BF16()),
    Compose(Compose(TopK(0.5), TopK(0.5)), RandK(0.3)),
    DCTTopK(0.1),
    DCTTopK(0.3, chunk=7),
    FedZip(0.1),
    FedZip(0.3, clusters=7),
    RandK(0.3),
    RandK(0.9),
    CountSketch(0.3),
    CountSketch(0.8),
    RandomProjection(0.3),
    RandomProjection(0.9),
    LowRank(2),
    Factors(LowRank(2), Int4()),
    Factors(LowRank(3, 1.0), Int8(stochastic=True), 0),
    DenseBelow(TopK(0.1), size=300, vectors=False),
    DenseBelow(Int8(stochastic=True), size=300),
    DenseBelow(LowRank(2), size=300),
    LGreCo(BlockTopK(0.1)),
    ByteBudget(Int4(stochastic=True), 1000),
    KeepEnergy(BlockTopK(0.1)),
]
SEEDED = ("RandK", "CountSketch", "RandomProjection", "RandomShift")  # the receivers need the seed
SHAPES = [(1,), (7,), (255,), (256,), (257,), (4097,), (16, 24), (40, 3, 13), ()]
KINDS = ["gauss", "heavy", "one", "constant", "zero"]


def each(*, unbiased: bool = False) -> Any:
    chosen = [c for c in COMPRESSORS if not unbiased or c.variance((9,)) is not None]
    return pytest.mark.parametrize("c", chosen, ids=repr)


def seeded(c: Compressor) -> bool:
    return any(name in repr(c) for name in SEEDED)


def random(c: Compressor) -> bool:
    return c.private or seeded(c) or "LowRank" in repr(c)


def sample(kind: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g)
    if kind == "heavy":
        return x / torch.rand(shape, generator=g).add(1e-3) ** 2
    if kind == "one":
        x = torch.zeros(shape)
        x.view(-1)[x.numel() // 2] = -3.0
        return x
    return {"gauss": x, "constant": torch.full(shape, -0.7), "zero": torch.zeros(shape)}[kind]


def square(x: Tensor) -> float:
    return float(x.double().square().sum())


def drive(generators: list[Generator[Tensor, Tensor, Any]]) -> tuple[list[Any], list[int]]:
    """Run the rounds of several ranks in step, summing in place as an all-reduce does; results and elements summed."""
    parts, sizes = [next(g) for g in generators], []
    while True:
        sizes.append(parts[0].numel())
        total = torch.stack(parts).sum(0)
        results = []
        for i, g in enumerate(generators):
            try:
                parts[i] = g.send(parts[i].copy_(total))
            except StopIteration as stop:
                results.append(stop.value)
        if results:
            return results, sizes


# --- the contract -----------------------------------------------------------------------------------------------------


@each()
def test_message_has_the_announced_length(c: Compressor) -> None:
    for shape in SHAPES:
        payload = c.encode(sample("gauss", shape), seed=3)
        assert payload.dtype == torch.uint8
        assert payload.dim() == 1
        assert len(payload) == c.payload_bytes(shape)


@each()
@pytest.mark.parametrize("kind", KINDS)
def test_contraction(c: Compressor, kind: str) -> None:
    for shape in SHAPES:
        x, delta = sample(kind, shape), c.contraction(shape)
        x = x.clamp(-6e4, 6e4) if isinstance(c, FP16) else x
        if delta is None:
            continue
        draws = 40 if random(c) else 1
        errors = torch.tensor([square(c.roundtrip(x, seed) - x) for seed in range(draws)], dtype=torch.float64)
        slack = 4 * float(errors.std() / math.sqrt(draws)) if draws > 1 else 0.0
        assert float(errors.mean()) <= (1 - delta) * square(x) * (1 + 1e-5) + slack + 1e-10 * square(x), shape


@each(unbiased=True)
@pytest.mark.parametrize("kind", KINDS)
def test_unbiased_with_the_stated_variance(c: Compressor, kind: str) -> None:
    for shape in [(1,), (7,), (257,), (4097,)]:
        x, omega, draws = sample(kind, shape).double(), c.variance(shape), 200
        assert omega is not None
        decoded = torch.stack([c.roundtrip(x, seed) for seed in range(draws)])
        assert square(decoded.mean(0) - x) <= (16 * omega / draws + 1e-9) * square(x), shape
        errors = (decoded - x).square().flatten(1).sum(1)
        assert float(errors.mean()) <= (omega + 1e-9) * square(x) + 4 * float(errors.std()) / math.sqrt(draws), shape


@each()
def test_zero_stays_zero(c: Compressor) -> None:
    for shape in SHAPES:
        assert torch.equal(c.roundtrip(torch.zeros(shape), 1), torch.zeros(shape))


@each()
@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-38, 1e38])
def test_extreme_values_stay_finite(c: Compressor, size: float) -> None:
    for shape in SHAPES:
        x = sample("gauss", shape).clamp(-2, 2) * size
        # d / k times a large number leaves float32, so the unbiased ones are decoded with a weight below one.
        weight = 0.25 if seeded(c) else 1.0
        out = torch.zeros(shape)
        c.decode_add(c.encode(x), out, weight)
        assert out.isfinite().all()
        if size >= 1e-38 and c.contraction(shape) is not None and c.variance(shape) is None:
            assert square(out / size - x / size) <= square(x / size) * (1 + 1e-5)


@each()
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)], ids=str)
def test_empty(c: Compressor, shape: tuple[int, ...]) -> None:
    x = torch.empty(shape)
    payload = c.encode(x)
    assert len(payload) == c.payload_bytes(shape) == 0
    assert c.decode(payload, shape).shape == x.shape
    assert 0.0 <= (c.contraction(shape) or 0.0) <= 1.0
    assert (c.variance(shape) or 0.0) == 0.0


@each()
def test_same_seed_same_bytes_and_no_global_random_numbers(c: Compressor) -> None:
    x = sample("gauss", (40, 3, 13))
    before = torch.random.get_rng_state()
    first, again, other = c.encode(x, 5), c.encode(x, 5), c.encode(x, 6)
    decoded = c.decode(first, x.shape, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first, again)
    assert torch.equal(decoded, c.roundtrip(x, 5))
    assert torch.equal(first, other) != random(c)


@each()
def test_private_compressors_decode_without_the_seed(c: Compressor) -> None:
    x = sample("gauss", (500,))
    assert c.private == ("stochastic=True" in repr(c) or isinstance(c, (Natural, QSGD, TernGrad)) or "QSGD" in repr(c))
    if not seeded(c):
        assert torch.equal(c.decode(c.encode(x, 5), x.shape, seed=9), c.roundtrip(x, 5))


@each()
def test_strided_wide_half_and_tracking_input(c: Compressor) -> None:
    x = sample("gauss", (16, 24))
    strided = x.T.contiguous().T
    assert not strided.is_contiguous()
    payload = c.encode(x, 2)
    assert torch.equal(c.encode(strided, 2), payload)
    assert torch.equal(c.encode(x.double(), 2), payload)
    assert torch.equal(c.encode(x.clone().requires_grad_(), 2), payload)
    assert torch.equal(c.encode(x.half(), 2), c.encode(x.half().float(), 2))
    wide = c.roundtrip(x.double(), 2)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), c.roundtrip(x, 2))


@each()
def test_decode_adds_with_a_weight_to_any_layout(c: Compressor) -> None:
    x, base = sample("gauss", (16, 24)), sample("gauss", (16, 24), 1)
    payload, decoded = c.encode(x, 2), c.roundtrip(x, 2)
    expected = base + 0.5 * decoded
    for out in (base.clone(), base.T.contiguous().T, base.double(), base.clone().requires_grad_()):
        c.decode_add(payload, out, 0.5, 2)
        torch.testing.assert_close(out.detach().float(), expected)
    odd = torch.cat([payload.new_zeros(1), payload])[1:]  # a slice of a larger message, at an unaligned address
    assert torch.equal(c.decode(odd, x.shape, seed=2), decoded)


@each()
def test_wrong_length_is_refused(c: Compressor) -> None:
    with pytest.raises(ValueError, match=r"a message of \d+ bytes, but shape \(16, 24\) takes \d+"):
        c.decode(c.encode(torch.ones(16, 24))[:-1], (16, 24))


@each()
def test_input_is_not_modified(c: Compressor) -> None:
    x = sample("gauss", (257,))
    kept = x.clone()
    c.encode(x, 1)
    c.roundtrip(x, 1).add_(1.0)
    assert torch.equal(x, kept)


@each()
def test_is_plain_data(c: Compressor) -> None:
    assert pickle.loads(pickle.dumps(c)) == c
    assert eval(repr(c)) == c
    assert hash(eval(repr(c))) == hash(c)
    assert [other for other in COMPRESSORS if other == c] == [c]


@each()
@pytest.mark.parametrize("shape", [(257,), (16, 24)], ids=str)
def test_rounds_give_the_mean_of_all_contributions(c: Compressor, shape: tuple[int, ...]) -> None:
    xs = [sample("gauss", shape, seed) for seed in range(3)]
    if not c.linear:
        with pytest.raises(NotImplementedError, match="cannot be summed"):
            next(c.rounds(xs[0], {}, 0, 3))
        return
    kept = [x.clone() for x in xs]
    results, _ = drive([c.rounds(x, {}, 7, 3) for x in xs])
    owns, means = [own for own, _ in results], [mean for _, mean in results]
    torch.testing.assert_close(means[0], torch.stack(owns).mean(0))
    for x, before, own, mean in zip(xs, kept, owns, means, strict=True):
        assert torch.equal(mean, means[0])
        assert torch.equal(x, before)
        assert own.shape == mean.shape == x.shape
        assert own.data_ptr() != x.data_ptr()
        if "LowRank" not in repr(c):
            torch.testing.assert_close(own, c.roundtrip(x, 7))


# --- dense ------------------------------------------------------------------------------------------------------------


def test_identity_is_exact() -> None:
    x = sample("gauss", (33,))
    assert torch.equal(Identity().decode(Identity().encode(x), x.shape), x)
    assert Identity().encode(x).data_ptr() == x.data_ptr()
    wide = x.double() / 3
    assert torch.equal(Identity().roundtrip(wide), wide)
    ((own, mean), _), sizes = drive([Identity().rounds(w, {}, 0, 2) for w in (wide, 3 * wide)])
    assert torch.equal(own, wide)
    assert torch.equal(mean, 2 * wide)
    assert sizes == [33]


def test_casts_round_to_nearest_and_saturate() -> None:
    x = torch.tensor([1.0 + 2.0**-9, -1e5, 3.4e38, 6e-8])
    assert FP16().roundtrip(x).tolist() == [1.0 + 2.0**-9, -65504.0, 65504.0, 2.0**-24]
    assert BF16().roundtrip(x[:1]).item() == 1.0
    assert BF16().roundtrip(x)[2].item() == torch.finfo(torch.bfloat16).max


# --- integers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("c", "levels"), [(Int8(block=200), 127), (Int4(block=200), 7)], ids=repr)
def test_rounding_bound_is_attained(c: Compressor, levels: int) -> None:
    x = torch.full((200,), 0.4999)  # in units of the step: all but one element are lost
    x[3] = levels
    assert square(c.roundtrip(x) - x) == pytest.approx((1 - c.contraction((200,))) * square(x), rel=1e-3)
    assert c.contraction((200,)) == pytest.approx(4 * levels**2 / (4 * levels**2 + 199))


@pytest.mark.parametrize(("cls", "levels"), [(Int8, 127), (Int4, 7)])
def test_stochastic_bound_is_attained(cls: type[Int8] | type[Int4], levels: int) -> None:
    c = cls(block=2000, stochastic=True)
    omega = c.variance((2000,))
    assert omega is not None
    assert omega * (1 + omega) == pytest.approx(1999 / (4 * levels**2))
    x = torch.full((2000,), 1 / (2 * (1 + omega)))
    x[3] = levels
    errors = [square(c.roundtrip(x, seed) - x) for seed in range(50)]
    assert sum(errors) / 50 == pytest.approx(omega * square(x), rel=0.02)


def test_int8_by_hand() -> None:
    x = torch.tensor([127.0, -3.4, 0.6, 254.0, -1.1])
    payload = Int8(block=3).encode(x)
    assert payload[:8].view(torch.float32).tolist() == [1.0, 2.0]
    assert payload[8:].view(torch.int8).tolist() == [127, -3, 1, 127, -1]


@pytest.mark.parametrize("c", [Int8(), Int4(), Int8(stochastic=True)], ids=repr)
def test_steps_are_normal_numbers(c: Compressor) -> None:
    x = torch.tensor([2.0**-124, 0.0, -(2.0**-126)])
    assert torch.equal(c.roundtrip(x), x)
    assert c.encode(torch.zeros(3))[:4].view(torch.float32).item() == 2.0**-126


def test_int4_by_hand() -> None:
    x = torch.tensor([7.0, -3.4, 0.6, 14.0, -14.0])
    payload = Int4(block=3).encode(x)
    assert payload[:8].view(torch.float32).tolist() == [1.0, 2.0]
    # first half 7, -3, 1 in the low nibbles, second half 7, -7 in the high ones
    assert payload[8:].tolist() == [0x77, 0x9D, 0x01]
    assert Int4(block=3).roundtrip(x).tolist() == [7.0, -3.0, 1.0, 14.0, -14.0]


@pytest.mark.parametrize("d", [1, 2, 7, 8, 9, 64, 1001])
def test_packing_round_trips(d: int) -> None:
    g = torch.Generator().manual_seed(d)
    codes = torch.randint(-8, 8, (d,), generator=g, dtype=torch.int8)
    assert torch.equal(wire.unpack_nibbles(wire.pack_nibbles(codes), d), codes)
    bits = torch.rand(d, generator=g) < 0.5
    packed = wire.pack_bits(bits)
    assert len(packed) == -(-d // 8)
    assert torch.equal(wire.unpack_signs(packed, d) > 0, bits)


@pytest.mark.parametrize(
    "c", [Int8(block=96), Int8(block=96, stochastic=True), Int4(block=10**9), Sign(block=96)], ids=repr
)
def test_tiles_do_not_show(c: Compressor, monkeypatch: pytest.MonkeyPatch) -> None:
    x = sample("heavy", (5000,))
    whole = c.encode(x, 1)
    monkeypatch.setattr(wire, "TILE", 400)
    tiled = c.encode(x, 1)
    assert torch.equal(tiled[: 4 * wire.block_count(x.shape, c.block)], whole[: 4 * wire.block_count(x.shape, c.block)])
    if not c.private:
        assert torch.equal(tiled, whole)
    monkeypatch.setattr(wire, "TILE", 100)
    decoded = c.decode(whole, x.shape)
    monkeypatch.undo()
    assert torch.equal(decoded, c.decode(whole, x.shape))


# --- signs ------------------------------------------------------------------------------------------------------------


def test_sign_by_hand() -> None:
    x = torch.tensor([1.0, -3.0, 0.0, 4.0, -0.0, -1.0, 2.0, 2.0, -6.0])
    payload = Sign(block=8).encode(x)
    assert payload[:8].view(torch.float32).tolist() == [13 / 8, 6.0]
    assert payload[8:].tolist() == [0b11011101, 0]
    assert Sign(block=8).roundtrip(x).tolist() == [s * 1.625 for s in (1, -1, 1, 1, 1, -1, 1, 1)] + [-6.0]


def test_sign_keeps_the_energy_of_a_gaussian_vector() -> None:
    x = sample("gauss", (100_000,))
    assert square(Sign().roundtrip(x) - x) / square(x) == pytest.approx(1 - 2 / math.pi, abs=0.01)


# --- sparse -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "d", "k"), [(0.1, 30, 3), (0.1, 25, 3), (0.1, 24, 2), (0.001, 10, 1), (1.0, 9, 9), (0.5, 0, 0)]
)
def test_number_kept(ratio: float, d: int, k: int) -> None:
    assert TopK(ratio).kept((d,)) == RandK(ratio).kept((d,)) == k


def test_topk_by_hand() -> None:
    x = torch.tensor([[1.0, -5.0, 2.0], [0.5, 4.0, -3.0]])
    assert TopK(0.5).roundtrip(x).tolist() == [[0.0, -5.0, 0.0], [0.0, 4.0, -3.0]]


@pytest.mark.parametrize(
    ("d", "width"), [(1, 1), (256, 1), (257, 2), (65536, 2), (65537, 3), (2**24, 3), (2**24 + 1, 4), (2**32, 4)]
)
def test_positions_take_the_fewest_bytes(d: int, width: int) -> None:
    assert TopK(1 / d).payload_bytes((d,)) == 4 + width
    if d <= 65537:
        x = torch.zeros(d)
        x[-1] = 2.0
        assert torch.equal(TopK(1 / d).roundtrip(x), x)


def _patterns() -> dict[str, Tensor]:
    d = 80_000
    x = torch.randn(d, generator=torch.Generator().manual_seed(0))
    step = d // sparse._SAMPLE
    seen, unseen, few = x.clone(), x.clone(), torch.zeros(d)
    seen[::step] *= 100.0
    unseen[1::step] *= 100.0
    few[123:130] = x[123:130]
    return {"gauss": x, "seen": seen, "unseen": unseen, "few": few, "constant": torch.ones(d), "heavy": x**5}


@pytest.mark.parametrize("name", list(_patterns()))
@pytest.mark.parametrize("k", [1, 80, 800, 8000, 40_000, 80_000])
def test_largest_is_exact_whatever_the_sample_shows(name: str, k: int) -> None:
    x = _patterns()[name]
    index = sparse.largest(x, k)
    assert len(index.unique()) == k
    expected = x.abs().topk(k).values
    assert torch.equal(x[index].abs().sort(descending=True).values, expected)


@pytest.mark.parametrize(("d", "k"), [(10, 3), (12, 4), (7, 7), (97, 1), (31, 17)])
def test_comb_takes_every_position_equally_often(d: int, k: int) -> None:
    combs = [sparse.comb(d, k, phase) for phase in range(d)]
    assert all(len(c.unique()) == k for c in combs)
    assert torch.cat(combs).bincount(minlength=d).tolist() == [k] * d


def test_randk_phases_are_spread() -> None:
    starts = torch.stack([RandK(0.01).positions((1000,), seed)[0] for seed in range(2000)])
    assert starts.min() == 0
    assert starts.max() == 99
    assert starts.double().mean().item() == pytest.approx(49.5, abs=3.0)


def test_randk_error_is_omega_on_average() -> None:
    x, c = sample("heavy", (30,)), RandK(0.2)
    errors = [square(c.roundtrip(x, seed) - x) for seed in range(3000)]
    assert sum(errors) / 3000 == pytest.approx(4.0 * square(x), rel=0.1)


def test_everything_kept_is_exact() -> None:
    x = sample("heavy", (257,))
    assert torch.equal(TopK(1.0).roundtrip(x), x)
    assert torch.equal(RandK(1.0).roundtrip(x), x)


# --- low rank ---------------------------------------------------------------------------------------------------------


def test_lowrank_full_rank_is_exact() -> None:
    x = sample("gauss", (6, 2, 5))
    c = LowRank(6, min_ratio=0.1)
    assert c.factors(x.shape) == (6, 10, 6)
    torch.testing.assert_close(c.roundtrip(x), x)
    (result,), _ = drive([c.rounds(x.double(), {}, 1, 1)])
    torch.testing.assert_close(result[0], x.double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("shape", "matrix"),
    [
        ((40, 3, 13), (40, 39, 2)),
        ((16, 24), (16, 24, 2)),
        ((8, 8), None),
        ((9, 8), (9, 8, 2)),
        ((9, 7), None),
        ((640,), None),
    ],
)
def test_lowrank_sends_whole_what_does_not_pay(shape: tuple[int, ...], matrix: tuple[int, int, int] | None) -> None:
    c = LowRank(2)
    assert c.factors(shape) == matrix
    expected = math.prod(shape) if matrix is None else matrix[2] * (matrix[0] + matrix[1])
    assert c.payload_bytes(shape) == 4 * expected
    x = sample("gauss", shape)
    assert torch.equal(c.roundtrip(x), x) == (matrix is None)


def test_lowrank_message_is_an_orthogonal_projection() -> None:
    x = sample("gauss", (30, 20))
    values = LowRank(3).encode(x, 4).view(torch.float32)
    p, q = values[:90].view(30, 3), values[90:].view(20, 3)
    scale = x.abs().max()
    torch.testing.assert_close(p.T @ p, scale * torch.eye(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(q, x.T @ p / scale)


def test_lowrank_captures_the_share_of_a_flat_spectrum() -> None:
    x = torch.linalg.qr(sample("gauss", (40, 20))).Q
    c = LowRank(4, min_ratio=1.0)
    errors = [square(c.roundtrip(x, seed) - x) for seed in range(20)]
    assert errors == pytest.approx([16.0] * 20, rel=1e-4)
    assert c.contraction((40, 20)) == 4 / 20


def test_lowrank_warm_start_finds_the_best_approximation() -> None:
    xs = [sample("gauss", (30, 20), seed).double() for seed in range(3)]
    mean = torch.stack(xs).mean(0)
    u, s, v = torch.linalg.svd(mean, full_matrices=False)
    s = 3.0 * 0.7 ** torch.arange(20, dtype=torch.float64)
    xs = [x - mean + u @ s.diag() @ v for x in xs]
    states: list[dict[str, Tensor]] = [{} for _ in xs]
    for t in range(60):
        results, sizes = drive([LowRank(3).rounds(x, st, t, 3) for x, st in zip(xs, states, strict=True)])
        assert sizes == [90, 60]
    best = u[:, :3] @ s[:3].diag() @ v[:3]
    for (own, got), x, state in zip(results, xs, states, strict=True):
        torch.testing.assert_close(got, best, atol=1e-7, rtol=0)
        assert float((own * (x - own)).sum()) == pytest.approx(0.0, abs=1e-9)
        assert torch.equal(state["q"], states[0]["q"])
        assert state["q"].shape == (20, 3)


@pytest.mark.parametrize("first", ["zero", "one"])
def test_lowrank_warm_start_regains_lost_directions(first: str) -> None:
    state: dict[str, Tensor] = {}
    drive([LowRank(3).rounds(sample(first, (30, 20)).double(), state, 0, 1)])
    x = sample("gauss", (30, 20)).double()
    for t in range(400):
        ((own, _),), _ = drive([LowRank(3).rounds(x, state, t, 1)])
    best = torch.linalg.svdvals(x)[3:].square().sum().item()
    assert square(x - own) == pytest.approx(best, rel=1e-3)


def test_lowrank_sends_a_whole_model_in_two_sums() -> None:
    c = LowRank(2)
    shapes = [(30, 20), (7,), (30, 20), (5, 3), (16, 4, 6)]
    xs = [[sample("gauss", s, 10 * rank + i).double() for i, s in enumerate(shapes)] for rank in range(3)]
    kept = [[x.clone() for x in row] for row in xs]
    states: list[list[dict[str, Tensor]]] = [[{} for _ in row] for row in xs]
    for t in range(2):
        results, sizes = drive([c.rounds_many([c] * 5, row, st, t, 3) for row, st in zip(xs, states, strict=True)])
        assert sizes == [2 * (30 + 30 + 16) + 7 + 15, 2 * (20 + 20 + 24)]
    for i, shape in enumerate(shapes):
        owns, means = [own[i] for own, _ in results], [mean[i] for _, mean in results]
        torch.testing.assert_close(means[0], torch.stack(owns).mean(0))
        for row, before, own, mean in zip(xs, kept, owns, means, strict=True):
            assert own.shape == shape
            assert torch.equal(mean, means[0])
            assert torch.equal(row[i], before[i])
            assert float((own * (row[i] - own)).sum()) == pytest.approx(0.0, abs=1e-9)
            assert torch.linalg.matrix_rank(own.reshape(len(own), -1)).item() == min(2, len(own)) or i in (1, 3)
    assert [tuple(q.shape) for state in states[0] for q in state.values()] == [(20, 2), (20, 2), (24, 2)]


def test_lowrank_tensors_of_a_message_do_not_mix() -> None:
    xs = [sample("gauss", (30, 20)).double(), sample("gauss", (9,)).double()]
    ((owns, _),), sizes = drive([LowRank.rounds_many([LowRank(2)] * 2, xs, [{}, {}], 3, 1)])
    ((own, _),), _ = drive([LowRank(2).rounds(xs[0], {}, 3, 1)])
    assert torch.equal(owns[0], own)
    assert torch.equal(owns[1], xs[1])
    assert sizes == [69, 40]
    _, sizes = drive([LowRank.rounds_many([LowRank(2)], xs[1:], [{}], 3, 1)])
    assert sizes == [9]


def test_lowrank_residuals_telescope_on_the_mean() -> None:
    memory = ErrorFeedback(LowRank(1))
    x0 = torch.zeros(12, 10, dtype=torch.float64)
    states = [memory.state(x0) for _ in range(3)]
    warm: list[dict[str, Tensor]] = [{} for _ in range(3)]
    signals, results = x0.clone(), x0.clone()
    for t in range(50):
        gs = [sample("gauss", (12, 10), 3 * t + i).double() + i for i in range(3)]
        vs = [memory.load(g, st) for g, st in zip(gs, states, strict=True)]
        norms = [square(v) for v in vs]
        done, _ = drive([memory.codec.rounds(v, w, t, 3) for v, w in zip(vs, warm, strict=True)])
        for (own, _), st, norm in zip(done, states, norms, strict=True):
            memory.sent(own, st)
            assert square(st["residual"]) <= norm * (1 + 1e-12)
        signals += torch.stack(gs).mean(0)
        results += done[0][1]
    left = torch.stack([st["residual"] for st in states]).mean(0)
    torch.testing.assert_close(results + left, signals)


# --- names and arguments ----------------------------------------------------------------------------------------------


def test_by_name() -> None:
    assert by_name("top_k", ratio=0.1) == by_name("TopK", ratio=0.1) == TopK(0.1)
    assert by_name("error_feedback", codec=Sign()) == ErrorFeedback(Sign())
    assert [by_name(name) for name in ("identity", "bf16", "int8", "sign")] == [Identity(), BF16(), Int8(), Sign()]
    with pytest.raises(ValueError, match=r"by_name\(name='gzip'\): must be one of .*top_k") as caught:
        by_name("gzip")
    assert all(name in str(caught.value) for name in names())
    with pytest.raises(TypeError, match="rato"):
        by_name("top_k", rato=0.1)


@pytest.mark.parametrize(
    ("make", "option", "value"),
    [
        (TopK, "ratio", 0.0),
        (TopK, "ratio", 1.5),
        (RandK, "ratio", float("nan")),
        (RandK, "ratio", "a"),
        (Int8, "block", 0),
        (Int4, "block", 1.5),
        (Int8, "stochastic", 1),
        (Sign, "block", -1),
        (LowRank, "rank", 0),
    ],
)
def test_bad_arguments_are_named(make: type[Compressor], option: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{make.__name__}\({option}={value!r}\): must be [^\n]*$"):
        make(**{option: value})
    with pytest.raises(ValueError, match=r"^LowRank\(min_ratio=0\): must be a number in \(0, inf\)$"):
        LowRank(1, min_ratio=0)
