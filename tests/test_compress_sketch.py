"""Linear messages: the sketch of a sum is the sum of the sketches, and the variance is the stated one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_dopt.compress import Compressor, CountSketch, RandK, RandomProjection, sketch

LINEAR = [CountSketch(0.1), CountSketch(0.3), RandomProjection(0.1), RandomProjection(0.3)]


def gauss(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def square(x: Tensor) -> float:
    return float(x.double().square().sum())


@pytest.mark.parametrize("c", LINEAR, ids=repr)
@pytest.mark.parametrize("d", [1, 50, 4096, 5000])
def test_messages_add_up(c: Compressor, d: int) -> None:
    x, y = gauss(d), gauss(d, seed=1)
    both = c.encode(x, 3).view(torch.float32) + c.encode(y, 3).view(torch.float32)
    torch.testing.assert_close(both, c.encode(x + y, 3).view(torch.float32))
    decoded = c.decode(both.view(torch.uint8), (d,), seed=3)
    torch.testing.assert_close(decoded, c.roundtrip(x, 3) + c.roundtrip(y, 3), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("c", LINEAR, ids=repr)
def test_rounds_keep_double_precision(c: Compressor) -> None:
    x = gauss(300).double()
    rounds = c.rounds(x, {}, 4, 1)
    part = next(rounds)
    assert part.dtype == torch.float64
    assert part.numel() * 4 == c.payload_bytes((300,))
    with pytest.raises(StopIteration) as stop:
        rounds.send(part)
    own, mean = stop.value.value
    torch.testing.assert_close(own, mean, atol=1e-13, rtol=0)
    torch.testing.assert_close(own.float(), c.roundtrip(x.float(), 4))


def test_countsketch_by_hand() -> None:
    x = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    s = sketch.random_signs(5, 9).float()
    c = CountSketch(0.4)
    buckets = torch.stack([x[0] * s[0] + x[2] * s[2] + x[4] * s[4], x[1] * s[1] + x[3] * s[3]])
    assert torch.equal(c.encode(x, 9).view(torch.float32), buckets / 4)  # three elements to a bucket, so 4
    assert torch.equal(c.roundtrip(x, 9), s * buckets[torch.tensor([0, 1, 0, 1, 0])])


def test_signs_are_fair_and_independent() -> None:
    signs = torch.stack([sketch.random_signs(1000, seed) for seed in range(400)]).double()
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert signs.mean(0).abs().max() < 5 / math.sqrt(400)
    assert (signs[:, 1:] * signs[:, :-1]).mean(0).abs().max() < 5 / math.sqrt(400)
    assert (signs[1:] * signs[:-1]).mean(1).abs().max() < 5 / math.sqrt(1000)


@pytest.mark.parametrize(("d", "ratio", "omega"), [(1000, 0.1, 9.0), (1001, 0.1, 10.0), (7, 1.0, 0.0), (8, 0.5, 1.0)])
def test_countsketch_variance(d: int, ratio: float, omega: float) -> None:
    c = CountSketch(ratio)
    assert c.variance((d,)) == omega
    one = torch.zeros(d)
    one[-1] = 2.0  # the last row of buckets meets all the others
    assert square(c.roundtrip(one, 5) - one) == omega * 4.0
    if d == 1000:
        x = gauss(d)
        errors = [square(c.roundtrip(x, seed) - x) for seed in range(200)]
        assert sum(errors) / 200 == pytest.approx(omega * square(x), rel=0.05)


@pytest.mark.parametrize(
    ("d", "padded"), [(1, 1), (3, 4), (4096, 4096), (4097, 4097), (4099, 4100), (9000, 9000 - 808 + 1024)]
)
def test_projection_pads_the_last_chunk(d: int, padded: int) -> None:
    assert RandomProjection(0.5).padded((d,)) == padded
    x = gauss(d)
    exact = RandomProjection(1.0)
    assert exact.payload_bytes((d,)) == 4 * padded
    torch.testing.assert_close(exact.roundtrip(x, 2), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("n", [1, 2, 8, 32, 4096])
def test_rotation_is_orthonormal(n: int) -> None:
    x = gauss(3, n).double()
    y = x.clone()
    sketch._rotate(y, 1.0)
    torch.testing.assert_close(y.square().sum(1), x.square().sum(1))
    first = torch.zeros(1, n, dtype=torch.float64)
    first[0, 0] = 1.0
    sketch._rotate(first, 1.0)
    torch.testing.assert_close(first, torch.full_like(first, 1 / math.sqrt(n)))
    sketch._rotate(y, 1.0)
    torch.testing.assert_close(y, x)


def test_projection_error_hardly_varies() -> None:
    """One large element: nearly all messages of RandK miss it, those of the projection all lose the same share."""
    x = torch.zeros(4096)
    x[77] = 1.0
    c = RandomProjection(1 / 8)
    errors = torch.tensor([square(c.roundtrip(x, seed) - x) for seed in range(20)])
    assert errors.tolist() == pytest.approx([7.0] * 20, rel=1e-4)
    plain = torch.tensor([square(RandK(1 / 8).roundtrip(x, seed) - x) for seed in range(20)])
    assert set(plain.tolist()) == {1.0, 49.0}


def test_projection_variance_is_attained() -> None:
    x, c = gauss(1024), RandomProjection(0.2)
    assert c.variance((1024,)) == 1024 / 205 - 1
    errors = [square(c.roundtrip(x, seed) - x) for seed in range(300)]
    assert sum(errors) / 300 == pytest.approx(c.variance((1024,)) * square(x), rel=0.05)


@pytest.mark.parametrize("cls", [CountSketch, RandomProjection])
@pytest.mark.parametrize("ratio", [0.0, 1.5, "a"])
def test_bad_arguments_are_named(cls: type[CountSketch] | type[RandomProjection], ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"^{cls.__name__}\(ratio={ratio!r}\): must be a number in \(0, 1\]$"):
        cls(ratio)
