"""Sparse messages: which elements are sent, where they stand in the message, and damaged ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_dopt.compress import (
    BF16,
    QSGD,
    BlockTopK,
    Compose,
    Compressor,
    DCTTopK,
    ErrorFeedback,
    FedZip,
    Identity,
    Int8,
    RandK,
    Sign,
    Threshold,
    TopK,
    _codes,
    fedzip,
    sparse,
)


def gauss(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def square(x: Tensor) -> float:
    return float(x.double().square().sum())


@pytest.mark.parametrize("bits", [8, 12, 16, 24, 32])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 500])
def test_positions_return(bits: int, count: int) -> None:
    index = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(bits))
    packed = _codes.pack_positions(index, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == _codes.position_bytes(count, bits) == -(-count * bits // 8)
    assert torch.equal(_codes.unpack_positions(packed, count, bits), index)


def test_fewest_bits_for_positions() -> None:
    assert [_codes.position_bits(n) for n in (1, 256, 257, 4096, 4097, 65536, 65537)] == [8, 8, 12, 12, 16, 16, 24]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 7, 8, 11, 20])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 1001])
def test_codes_return(bits: int, count: int) -> None:
    codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(bits))
    packed = _codes.pack_codes(codes, bits)
    assert len(packed) == _codes.code_bytes(count, bits)
    assert torch.equal(_codes.unpack_codes(packed, count, bits).long(), codes)


@pytest.mark.parametrize("count", [1, 4, 5, 6, 1003])
def test_trits_return(count: int) -> None:
    digits = torch.randint(0, 3, (count,), generator=torch.Generator().manual_seed(count))
    packed = _codes.pack_trits(digits)
    assert len(packed) == -(-count // 5)
    assert torch.equal(_codes.unpack_trits(TopK(0.5), packed, count).long(), digits)


def test_a_damaged_position_is_noticed() -> None:
    payload = TopK(0.1).encode(torch.arange(300.0))
    payload[-1] = 255
    with pytest.raises(
        ValueError, match=r"^TopK\(ratio=0.1\): a message with position 65\d+ of 300 elements; damaged$"
    ):
        TopK(0.1).decode(payload, (300,))


@pytest.mark.parametrize("place", [0, 5, 70_001, 99_999])
def test_not_a_number_is_sent(place: int) -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    x[place] = float("nan")
    index = sparse.largest(x, 1000)
    assert place in index.tolist()
    assert len(index.unique()) == 1000


@pytest.mark.parametrize("d", [100_000, 100_001, 300_007])
@pytest.mark.parametrize("rare", [True, False])
def test_at_least_finds_all(d: int, rare: bool) -> None:
    x = torch.randn(d, generator=torch.Generator().manual_seed(d))
    assert torch.equal(sparse.at_least(x, 2.0, rare).sort().values, (x.abs() >= 2.0).nonzero().view(-1))


# --- blocks -----------------------------------------------------------------------------------------------------------


def test_block_topk_by_hand() -> None:
    x = torch.tensor([1.0, -5.0, 2.0, 0.1, 0.25, -0.2, 7.0, 8.0])
    c = BlockTopK(1 / 3, block=3)
    assert c.roundtrip(x).tolist() == [0.0, -5.0, 0.0, 0.0, 0.25, 0.0, 0.0, 8.0]
    payload = c.encode(x)
    assert payload[:12].view(torch.float32).tolist() == [-5.0, 0.25, 8.0]
    assert payload[12:].tolist() == [1, 1, 1]
    assert c.contraction((8,)) == 1 / 3
    assert c.contraction((6,)) == 1 / 3
    assert BlockTopK(0.5, block=3).contraction((7,)) == 2 / 3  # of the block with one element all is sent


@pytest.mark.parametrize(("block", "bits"), [(256, 8), (4096, 12), (65536, 16)])
def test_block_positions_take_the_announced_bits(block: int, bits: int) -> None:
    c = BlockTopK(1 / block, block)
    assert c.payload_bytes((6 * block,)) == 24 + 6 * bits // 8
    x = torch.zeros(6 * block)
    x[block - 1 :: block] = torch.arange(1.0, 7.0)
    assert torch.equal(c.roundtrip(x), x)


def test_block_topk_keeps_the_energy_of_a_gaussian_vector() -> None:
    x = gauss(40 * 4096)
    c = BlockTopK(0.01)
    assert c.kept(x.shape) == 40 * 41
    assert 1 - square(c.roundtrip(x) - x) / square(x) == pytest.approx(0.085, abs=0.003)


def test_block_positions_stay_inside_their_block() -> None:
    c = BlockTopK(0.1, block=30)
    payload = c.encode(gauss(100))
    assert c.kept((100,)) == 10
    for place, below in ((40, 30), (49, 10)):
        damaged = payload.clone()
        damaged[place] = below
        with pytest.raises(ValueError, match=rf"a message with position {below} of {below} elements; damaged$"):
            c.decode(damaged, (100,))


# --- threshold --------------------------------------------------------------------------------------------------------


def test_threshold_by_hand() -> None:
    x = torch.tensor([0.5, -2.0, 0.99, 1.0, 0.0, 3.0])
    c = Threshold(1.0, capacity=0.5)
    payload = c.encode(x)
    assert len(payload) == c.payload_bytes((6,)) == 4 + 3 * 5
    assert payload[:4].view(torch.int32).item() == 3
    assert c.roundtrip(x).tolist() == [0.0, -2.0, 0.0, 1.0, 0.0, 3.0]
    assert Threshold(0.1, capacity=0.5).roundtrip(x).tolist() == [0.0, -2.0, 0.0, 1.0, 0.0, 3.0]
    assert Threshold(2.5, capacity=0.5).roundtrip(x).tolist() == [0.0, 0.0, 0.0, 0.0, 0.0, 3.0]
    assert Threshold(2.5, capacity=0.5).encode(x)[4:].tolist() == [0, 0, 64, 64, *[0] * 8, 5, 0, 0]
    assert c.contraction((6,)) is c.variance((6,)) is None


def test_threshold_error_is_bounded_while_there_is_room() -> None:
    x = gauss(100_000)
    c = Threshold(2.0, capacity=0.1)
    decoded = c.roundtrip(x)
    assert torch.equal(decoded, torch.where(x.abs() >= 2.0, x, 0.0))
    assert square(decoded - x) < 100_000 * 4.0


@pytest.mark.parametrize("count", [4, -1, 2**31 - 1])
def test_threshold_refuses_an_impossible_count(count: int) -> None:
    c = Threshold(1.0, capacity=0.5)
    payload = c.encode(torch.ones(6))
    payload[:4].view(torch.int32)[0] = count
    with pytest.raises(ValueError, match=rf"a message of {count} elements with room for 3; damaged$"):
        c.decode(payload, (6,))


# --- cosine transform -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "grid"),
    [
        ((128, 64), (2, 1, 64, 64)),
        ((65, 10), (2, 1, 33, 10)),
        ((67, 131), (2, 3, 34, 44)),
        ((7, 3, 30), (1, 2, 7, 45)),
        ((200,), (1, 4, 1, 50)),
        ((), (1, 1, 1, 1)),
    ],
)
def test_dct_chunks(shape: tuple[int, ...], grid: tuple[int, ...]) -> None:
    assert DCTTopK(0.1).grid(shape) == grid
    rows, columns, h, w = grid
    assert DCTTopK(0.1).payload_bytes(shape) == BlockTopK(0.1, h * w).payload_bytes((rows * columns * h * w,))
    x = gauss(*shape)
    torch.testing.assert_close(DCTTopK(1.0).roundtrip(x), x, atol=3e-6, rtol=0)


def test_dct_sends_a_wave_in_one_number() -> None:
    i, j = torch.arange(64.0)[:, None], torch.arange(32.0)
    x = torch.cos(math.pi / 64 * (i + 0.5) * 5) * torch.cos(math.pi / 32 * (j + 0.5) * 3)
    c = DCTTopK(1 / 2048)
    payload = c.encode(x)
    assert len(payload) == 4 + 2
    assert _codes.unpack_positions(payload[4:], 1, 12).item() == 5 * 32 + 3
    # the wave has the energy of 64 * 32 / 4 elements; values are divided by 16 and 16 (8 > sqrt(32) once more doubled)
    assert payload[:4].view(torch.float32).item() * 256 == pytest.approx(math.sqrt(512), rel=1e-5)
    torch.testing.assert_close(c.roundtrip(x), x, atol=1e-5, rtol=0)


def test_dct_keeps_the_largest_coefficients() -> None:
    x = gauss(40, 24)
    i, j = torch.arange(40.0).double(), torch.arange(24.0).double()
    rows = torch.cos(math.pi / 40 * i[:, None] * (i + 0.5)) * math.sqrt(2 / 40)
    columns = torch.cos(math.pi / 24 * j[:, None] * (j + 0.5)) * math.sqrt(2 / 24)
    rows[0] /= math.sqrt(2)
    columns[0] /= math.sqrt(2)
    z = rows @ x.double() @ columns.T
    assert square(z) == pytest.approx(square(x))
    kept = z.abs() >= z.abs().flatten().topk(96).values.min()
    expected = rows.T @ (z * kept) @ columns
    torch.testing.assert_close(DCTTopK(0.1).roundtrip(x).double(), expected, atol=1e-5, rtol=0)


# --- two in a row -----------------------------------------------------------------------------------------------------


def test_composition_packs_the_values_further() -> None:
    x = gauss(1000)
    c = Compose(TopK(0.1), Int8(block=50))
    assert c.payload_bytes((1000,)) == 2 * 100 + 100 + 2 * 4
    chosen, decoded = TopK(0.1).roundtrip(x), c.roundtrip(x)
    assert torch.equal(decoded != 0, chosen != 0)
    error = (decoded - chosen)[chosen != 0].abs().max()
    assert 0 < error <= chosen.abs().max() / 254 * 1.0001


def test_composition_with_identity_is_the_first() -> None:
    for first in (TopK(0.1), BlockTopK(0.2, 64), Threshold(1.0, 0.2), DCTTopK(0.1)):
        x = gauss(30, 20)
        c = Compose(first, Identity())
        assert torch.equal(c.roundtrip(x), first.roundtrip(x))
        assert c.payload_bytes(x.shape) == first.payload_bytes(x.shape)
        assert c.contraction(x.shape) == first.contraction(x.shape)
        assert c.layerwise == first.layerwise


def test_composition_constants_multiply() -> None:
    assert Compose(TopK(0.1), Sign(block=25)).contraction((1000,)) == pytest.approx(0.1 / 25)
    assert Compose(TopK(0.1), QSGD(1, block=100)).contraction((1000,)) == pytest.approx(0.1 / 10)
    assert Compose(Threshold(1.0, 0.1), Int8()).contraction((1000,)) is None
    assert Compose(TopK(0.5), Compose(TopK(0.5), BF16())).payload_bytes((1000,)) == 2 * 500 + 2 * 250 + 2 * 250


def test_composition_scales_what_would_expand() -> None:
    """The mean is the values over ``1 + omega``, where the values alone would be added to by noise."""
    x = torch.ones(100)
    c = Compose(TopK(1.0), QSGD(1, block=100))
    decoded = torch.stack([c.roundtrip(x, seed) for seed in range(500)]).double()
    assert decoded.mean().item() == pytest.approx(1 / 10, rel=0.05)
    error = float((decoded - 1).square().sum(1).mean())
    assert error == pytest.approx((1 - 1 / 10) * 100, rel=0.02)


def test_composition_inside_a_memory_telescopes() -> None:
    memory = ErrorFeedback(Compose(BlockTopK(0.1, 64), Int8()))
    state = memory.state(torch.zeros(300))
    sent, given = torch.zeros(300), torch.zeros(300)
    for t in range(100):
        g = gauss(300, seed=t)
        value = memory.load(g, state)
        own = memory.codec.roundtrip(value, t)
        memory.sent(own, state)
        sent, given = sent + own, given + g
    torch.testing.assert_close(sent + state["residual"], given, atol=1e-4, rtol=1e-4)


# --- FedZip -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "d"), [(1, 1), (1, 1000), (10, 10), (10, 1000), (37, 1001), (999, 1000), (100, 12_800)])
def test_ascending_positions_return(k: int, d: int) -> None:
    index = torch.randperm(d, generator=torch.Generator().manual_seed(k))[:k].sort().values
    for positions in (index, torch.arange(k), torch.arange(d - k, d)):
        packed = fedzip.pack_ascending(positions, d)
        assert len(packed) == fedzip.ascending_bytes(k, d)
        assert torch.equal(fedzip.unpack_ascending(FedZip(0.1), packed, k, d), positions)


def test_positions_take_little_more_than_their_entropy() -> None:
    d, k = 1_000_000, 10_000
    assert 8 * fedzip.ascending_bytes(k, d) / k == pytest.approx(6 + 1 + 100 / 64, abs=0.01)
    assert FedZip(0.01).payload_bytes((d,)) == 12 + 7500 + 3204 + 2000
    assert 4 * d / FedZip(0.01).payload_bytes((d,)) == pytest.approx(314.6, abs=0.1)


def test_fedzip_by_hand() -> None:
    x = torch.tensor([0.0, 5.0, -2.0, 0.1, 4.0, 1.0, -2.2, 0.2, 1.2, 0.0])
    assert FedZip(0.6).roundtrip(x).tolist() == pytest.approx([0.0, 4.5, -2.1, 0.0, 4.5, 1.1, -2.1, 0.0, 1.1, 0.0])


@pytest.mark.parametrize("clusters", [2, 3, 4, 5, 8, 16])
def test_fedzip_decodes_to_the_clusters(clusters: int) -> None:
    x = gauss(20_000)
    c = FedZip(0.05, clusters)
    decoded = c.roundtrip(x)
    assert torch.equal(decoded.nonzero(), TopK(0.05).roundtrip(x).nonzero())
    kept = x[decoded != 0]
    assert len(decoded.unique()) == clusters + 1
    nearest = (kept[:, None] - decoded.unique()[decoded.unique() != 0]).abs().min(1).values
    torch.testing.assert_close((decoded - x).abs()[decoded != 0], nearest)


def test_more_clusters_lose_less() -> None:
    x = gauss(20_000) ** 3
    lost = [square(FedZip(0.05, n).roundtrip(x) - TopK(0.05).roundtrip(x)) for n in (2, 3, 5, 9, 17)]
    assert lost == sorted(lost, reverse=True)
    assert lost[-1] < lost[0] / 20


def test_clusters_lose_no_more_than_two_means() -> None:
    for seed in range(20):
        v = gauss(300, seed=seed) ** 5
        means = fedzip.cluster_means(v, 3)
        lost = float((v[:, None] - means).double().square().min(1).values.sum())
        assert lost <= square(v) - float(v.abs().double().sum()) ** 2 / 300


def test_clusters_move_to_where_values_are() -> None:
    assert fedzip.cluster_means(torch.tensor([10.0, -1.0, 1.0, 11.0]), 2).tolist() == [0.0, 10.5]


def test_equal_values_make_one_cluster() -> None:
    assert fedzip.cluster_means(torch.full((9,), 3.0), 3).tolist() == [3.0, 3.0, 3.0]
    assert FedZip(1.0).roundtrip(torch.full((9,), 3.0)).tolist() == [3.0] * 9


def test_fedzip_refuses_damaged_messages() -> None:
    c, x = FedZip(0.1, clusters=5), gauss(1000)
    payload = c.encode(x)
    low = _codes.code_bytes(100, 3)
    fewer = payload.clone()
    fewer[20 + low + int(payload[20 + low :].ne(0).nonzero()[0])] = 0
    with pytest.raises(ValueError, match=r"a message with \d+ positions instead of 100; damaged$"):
        c.decode(fewer, (1000,))
    numbers = payload.clone()
    numbers[-39:] = 255
    with pytest.raises(ValueError, match=r"a message with position 7 of 5 elements; damaged$"):
        c.decode(numbers, (1000,))


@pytest.mark.parametrize(
    ("make", "options", "complaint"),
    [
        (BlockTopK, {"ratio": 0.0}, r"BlockTopK\(ratio=0.0\): must be a number in \(0, 1\]"),
        (BlockTopK, {"ratio": 0.1, "block": 65537}, r"BlockTopK\(block=65537\): must be at most 65536, so .*"),
        (BlockTopK, {"ratio": 0.1, "block": 0}, r"BlockTopK\(block=0\): must be .*"),
        (Threshold, {"threshold": 0.0, "capacity": 0.1}, r"Threshold\(threshold=0.0\): must be .*"),
        (Threshold, {"threshold": math.inf, "capacity": 0.1}, r"Threshold\(threshold=inf\): must be .*"),
        (Threshold, {"threshold": 1.0, "capacity": 2}, r"Threshold\(capacity=2\): must be .*"),
        (DCTTopK, {"ratio": 0.1, "chunk": 257}, r"DCTTopK\(chunk=257\): must be at most 256.*"),
        (DCTTopK, {"ratio": 1.1}, r"DCTTopK\(ratio=1.1\): must be .*"),
        (FedZip, {"ratio": 0.1, "clusters": 1}, r"FedZip\(clusters=1\): must be .*"),
        (FedZip, {"ratio": 0.1, "clusters": 300}, r"FedZip\(clusters=300\): must be at most 256"),
        (FedZip, {"ratio": -1}, r"FedZip\(ratio=-1\): must be .*"),
        (
            Compose,
            {"first": Int8(), "second": Int8()},
            r"Compose\(first=Int8\(\)\): must be a compressor that sends .*",
        ),
        (Compose, {"first": RandK(0.1), "second": Int8()}, r"Compose\(first=RandK\(ratio=0.1\)\): must be .*"),
        (Compose, {"first": FedZip(0.1), "second": Int8()}, r"Compose\(first=FedZip\(ratio=0.1\)\): must be .*"),
        (Compose, {"first": 3, "second": Int8()}, r"Compose\(first=3\): must be .*"),
        (
            Compose,
            {"first": TopK(0.1), "second": ErrorFeedback(Int8())},
            r"Compose\(second=ErrorFeedback\(codec=Int8\(\)\)\): must be a compressor \(memories, .*",
        ),
    ],
)
def test_bad_arguments_are_named(make: type[Compressor], options: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=rf"^{complaint}$"):
        make(**options)
