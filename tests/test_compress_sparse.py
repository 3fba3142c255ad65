"""Sparse messages: which elements are sent, where they stand in the message, and damaged ones."""

from __future__ import annotations

import pytest
import torch

from lightning_dopt.compress import TopK, _codes, sparse


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
