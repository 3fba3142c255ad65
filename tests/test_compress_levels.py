"""Small floats, powers of two and random levels: by hand, and where the stated constants are attained."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_dopt.compress import E3M0, FP8, QSGD, Compressor, Int8, Natural, TernGrad
from lightning_dopt.compress import _wire as wire
from lightning_dopt.compress.quantize import Dither


def square(x: Tensor) -> float:
    return float(x.double().square().sum())


def mean_error(c: Compressor, x: Tensor, draws: int) -> float:
    return sum(square(c.roundtrip(x, seed) - x) for seed in range(draws)) / draws / square(x)


# --- eight bits with a mantissa ---------------------------------------------------------------------------------------


def test_fp8_by_hand() -> None:
    x = torch.tensor([448.0, -1.0, 1.0625, 2.0**-9, 2.0**-10, 896.0, 34.0])
    payload = FP8(block=5).encode(x)
    assert payload[:8].view(torch.float32).tolist() == [1.0, 2.0]
    # sign, 4 bits of exponent (bias 7), 3 of mantissa; ties go to even
    assert payload[8:].tolist() == [0b0_1111_110, 0b1_0111_000, 0b0_0111_000, 1, 0, 0b0_1111_110, 0b0_1011_000]
    assert FP8(block=5).roundtrip(x).tolist() == [448.0, -1.0, 1.0, 2.0**-9, 0.0, 896.0, 32.0]


@pytest.mark.parametrize(("format", "top"), [("e4m3", 448.0), ("e5m2", 57344.0)])
def test_fp8_power_scales_never_overflow(format: str, top: float) -> None:
    c = FP8(format, block=2, scale="power")  # type: ignore[arg-type]
    blocks = torch.tensor([[top, 1.0], [top * 1.01, 1.0], [top / 2, 1.0], [top * 8 / 7, 1.0], [2.0**-120, 0.0]])
    payload = c.encode(blocks)
    assert (payload[:4] - 127).tolist() == [0, 1, 255, 1]  # 255 is -1
    decoded = c.decode(payload, blocks.shape)
    assert torch.equal(decoded[:, 1], blocks[:, 1])
    torch.testing.assert_close(decoded[:, 0], blocks[:, 0], rtol=0.07 if format == "e4m3" else 0.13, atol=0)
    assert decoded[[0, 2, 3, 4], 0].tolist() == blocks[[0, 2, 3, 4], 0].tolist()


@pytest.mark.parametrize(("format", "relative", "tie"), [("e4m3", 1 / 17, 1 + 2.0**-4), ("e5m2", 1 / 9, 1 + 2.0**-3)])
def test_fp8_bound_is_nearly_attained(format: str, relative: float, tie: float) -> None:
    c = FP8(format, block=10**6)  # type: ignore[arg-type]
    top = torch.finfo(c._dtype).max
    x = torch.full((4000,), tie * 2.0 ** (math.frexp(top)[1] - 2))
    x[7] = top
    lost = square(c.roundtrip(x) - x) / square(x)
    assert lost == pytest.approx(relative**2, rel=1e-2)
    assert 1 - lost >= c.contraction(x.shape) - 1e-6
    assert c.contraction((256,)) == pytest.approx(1 - relative**2, abs=1e-6)


def test_fp8_power_scales_decode_the_largest_numbers() -> None:
    x = torch.tensor([3.1e38, -1e38, 0.0, 1e37])
    torch.testing.assert_close(FP8(scale="power").roundtrip(x), x, rtol=0.07, atol=0)


def test_fp8_sizes() -> None:
    assert FP8(block=100).payload_bytes((250,)) == 250 + 12
    assert FP8(block=100, scale="power").payload_bytes((250,)) == 250 + 3


@pytest.mark.parametrize(
    "c", [FP8(), FP8("e5m2"), FP8(scale="power"), E3M0(), Natural(), QSGD(7), TernGrad()], ids=repr
)
def test_not_a_number_does_not_vanish(c: Compressor) -> None:
    x = torch.ones(50)
    x[20] = math.nan
    assert not c.roundtrip(x)[20].isfinite()


def test_fp8_half_the_smallest_step_is_lost() -> None:
    x = torch.full((1001,), 2.0**-10 * 0.999)
    x[0] = 448.0
    c = FP8(block=1001)
    assert torch.equal(c.roundtrip(x)[1:], torch.zeros(1000))
    assert c.roundtrip(x)[0] == 448.0


# --- powers of two ----------------------------------------------------------------------------------------------------


def test_e3m0_by_hand() -> None:
    x = torch.tensor([64.0, -47.0, 49.0, 1.6, -0.6, 0.4, 0.0])
    payload = E3M0(block=7).encode(x)
    assert payload[:4].view(torch.float32).item() == 64.0
    assert payload[4:].tolist() == [0xF7, 0x0A, 0x07, 0x02]  # 7, -6, 7, 2 low; -1, 0, 0 high
    assert E3M0(block=7).roundtrip(x).tolist() == [64.0, -32.0, 64.0, 2.0, -1.0, 0.0, 0.0]


@pytest.mark.parametrize("n", [40, 5000])
def test_e3m0_bounds_are_attained(n: int) -> None:
    """Either a third of elements between the levels is lost, or all of tiny ones."""
    delta = E3M0(block=10**6).contraction((n + 1,))
    assert delta == pytest.approx(min(8 / 9, 2**14 / (2**14 + n)))
    x = torch.full((10**5,), 0.75 / 8)
    x[0] = 1.0
    assert square(E3M0(block=10**6).roundtrip(x) - x) == pytest.approx(square(x) / 9, rel=1e-2)
    tiny = torch.full((20_000,), 0.4999 / 64)
    tiny[0] = 1.0
    lost = square(E3M0(block=10**6).roundtrip(tiny) - tiny) / square(tiny)
    assert lost == pytest.approx(1 - E3M0(block=10**6).contraction(tiny.shape), rel=1e-3)


def test_e3m0_stochastic_bound_is_attained() -> None:
    c = E3M0(block=10**6, stochastic=True)
    omega = c.variance((8001,))
    assert omega * (1 + omega) == pytest.approx(8000 / (4 * 64**2))
    x = torch.full((8001,), 1 / (2 * (1 + omega)) / 64)
    x[3] = 1.0
    assert mean_error(c, x, 30) == pytest.approx(omega, rel=0.03)
    assert E3M0(stochastic=True).variance((100,)) == 1 / 8


def test_natural_by_hand() -> None:
    x = torch.tensor([1.0, -4.0, 0.0, 2.0**-10, 5.0])
    payload = Natural().encode(x, 0)
    assert payload[0].item() == 3  # 5 < 2^3, so the lowest power is 2^-123
    assert payload[1:5].view(torch.int8).tolist() == [124, -126, 0, 114]
    assert payload[5].item() in (126, 127)
    fives = torch.full((40_000,), 5.0)
    decoded = Natural().roundtrip(fives, 1)
    assert set(decoded.tolist()) == {4.0, 8.0}
    assert (decoded == 8.0).double().mean().item() == pytest.approx(0.25, abs=0.01)


def test_natural_variance_is_attained() -> None:
    x = torch.full((50_000,), 4.0 / 3.0)
    assert mean_error(Natural(), x, 4) == pytest.approx(1 / 8, rel=0.02)
    gauss = torch.randn(50_000, generator=torch.Generator().manual_seed(0))
    assert mean_error(Natural(), gauss, 4) == pytest.approx(0.081, abs=0.003)


@pytest.mark.parametrize("c", [Natural(), E3M0(block=2, stochastic=True)], ids=repr)
def test_powers_arrive_exactly(c: Compressor) -> None:
    x = torch.tensor([[2.0**e, -(2.0 ** (e - 5))] for e in range(-120, 128)])
    assert torch.equal(c.roundtrip(x, 3), x) if isinstance(c, E3M0) else torch.equal(c.roundtrip(x[-100:], 3), x[-100:])


def test_natural_refuses_a_damaged_head() -> None:
    payload = Natural().encode(torch.ones(9))
    payload[0] = 200
    with pytest.raises(ValueError, match=r"^Natural\(\): a message that begins with 200, .* damaged$"):
        Natural().decode(payload, (9,))


# --- random levels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("levels", "b"), [(1, 4096), (4, 4096), (1, 4), (7, 256)])
def test_qsgd_variance_is_attained_by_equal_elements(levels: int, b: int) -> None:
    c = QSGD(levels, block=b)
    assert c.variance((b,)) == pytest.approx(math.sqrt(b) / levels - 1)
    assert c.variance((b,)) <= min(b / levels**2, math.sqrt(b) / levels)
    assert mean_error(c, torch.full((b,), 0.3), 100) == pytest.approx(c.variance((b,)), rel=0.1)


def test_qsgd_variance_with_many_levels() -> None:
    c = QSGD(16, block=64)
    assert c.variance((64,)) == 64 / (4 * 256)
    # half a step everywhere is the worst, and the norm cannot be small then
    assert mean_error(c, torch.full((64,), 0.3) * (1 + torch.arange(64) % 2), 200) <= c.variance((64,))


@pytest.mark.parametrize(("levels", "observed"), [(1, 49.6), (4, 11.7), (16, 2.17)])
def test_qsgd_on_a_gaussian_vector(levels: int, observed: float) -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    assert mean_error(QSGD(levels, block=4096), x, 60) == pytest.approx(observed, rel=0.05)


def test_qsgd_codes_are_levels_of_the_norm() -> None:
    x = torch.tensor([3.0, 0.0, -4.0, 0.0])
    payload = QSGD(5, block=4).encode(x, 1)
    assert payload[:4].view(torch.float32).item() == 1.0
    assert torch.equal(QSGD(5, block=4).roundtrip(x, 1), x)


@pytest.mark.parametrize(("levels", "bits", "size"), [(1, 2, 26), (3, 3, 39), (7, 4, 50), (15, 5, 65), (127, 8, 100)])
def test_qsgd_sizes(levels: int, bits: int, size: int) -> None:
    assert QSGD(levels).bits == bits
    assert QSGD(levels, block=30).payload_bytes((100,)) == 16 + size


def test_terngrad_by_hand() -> None:
    x = torch.tensor([2.0, -2.0, 0.0, 2.0, -2.0, 2.0])
    payload = TernGrad(block=6).encode(x, 0)
    assert payload[:4].view(torch.float32).item() == 2.0
    # two bytes: digits 2, 1, 0 and 0, 2, 2 count 1, 3, 9
    assert payload[4:].tolist() == [2 + 3 * 1 + 9 * 0, 0 + 3 * 2 + 9 * 2]
    assert torch.equal(TernGrad(block=6).roundtrip(x, 0), x)
    assert TernGrad(block=50).payload_bytes((101,)) == 12 + 21


def test_terngrad_variance_is_exact() -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(3))
    omega = float(x.abs().max() * x.abs().sum()) / square(x) - 1
    assert mean_error(TernGrad(block=4096), x, 100) == pytest.approx(omega, rel=0.02)
    worst = torch.full((101,), 1 / (1 + math.sqrt(101)))
    worst[5] = 1.0
    assert TernGrad(block=101).variance((101,)) == pytest.approx((math.sqrt(101) - 1) / 2)
    assert mean_error(TernGrad(block=101), worst, 300) == pytest.approx((math.sqrt(101) - 1) / 2, rel=0.03)


def test_terngrad_clips_at_root_mean_squares() -> None:
    x = torch.ones(1000)
    x[0] = 100.0
    rms = math.sqrt((999 + 100**2) / 1000)
    c = TernGrad(block=1000, clip=2.5)
    assert c.encode(x)[:4].view(torch.float32).item() == pytest.approx(2.5 * rms)
    decoded = torch.stack([c.roundtrip(x, seed) for seed in range(300)]).mean(0)
    assert decoded[0].item() == pytest.approx(2.5 * rms)
    assert decoded[1:].mean().item() == pytest.approx(1.0, abs=0.02)
    assert c.contraction((1000,)) is c.variance((1000,)) is None
    equal = torch.full((9,), 0.4)
    assert torch.equal(TernGrad(block=9, clip=2.5).roundtrip(equal), equal)


def test_terngrad_refuses_impossible_digits() -> None:
    payload = TernGrad().encode(torch.ones(20))
    payload[-1] = 243
    with pytest.raises(ValueError, match=r"^TernGrad\(\): a byte of 243 .* damaged$"):
        TernGrad().decode(payload, (20,))


@pytest.mark.parametrize(
    "c", [FP8(block=96), FP8(block=96, scale="power"), E3M0(block=96), E3M0(block=96, stochastic=True)], ids=repr
)
def test_tiles_do_not_show(c: FP8 | E3M0, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0)) ** 3
    whole = c.encode(x, 1)
    monkeypatch.setattr(wire, "TILE", 400)
    tiled = c.encode(x, 1)
    decoded = c.decode(whole, x.shape)
    monkeypatch.undo()
    assert torch.equal(tiled, whole) or c.private
    assert torch.equal(decoded, c.decode(whole, x.shape))


def test_natural_is_the_same_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0)) ** 3
    whole = Natural().encode(x, 1)
    decoded = Natural().decode(whole, x.shape)
    monkeypatch.setattr(wire, "TILE", 400)
    assert torch.equal(Natural().decode(whole, x.shape), decoded)
    assert torch.equal(Natural().encode(x, 1)[:1], whole[:1])


@pytest.mark.parametrize(
    ("make", "option", "value"),
    [
        (FP8, "format", "e3m4"),
        (FP8, "scale", "mean"),
        (FP8, "block", 0),
        (E3M0, "block", 1.5),
        (E3M0, "stochastic", 1),
        (QSGD, "levels", 0),
        (QSGD, "levels", 128),
        (QSGD, "block", 0),
        (TernGrad, "block", 0),
        (TernGrad, "clip", -1.0),
    ],
)
def test_bad_arguments_are_named(make: type[Compressor], option: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{make.__name__}\({option}={value!r}\): must be [^\n]*$"):
        make(**{option: value})


# --- random numbers ---------------------------------------------------------------------------------------------------


def test_dithers_are_the_middles_of_equal_parts() -> None:
    dither = Dither(5, torch.device("cpu"))
    numbers = [dither.next(n).clone() for n in (4096, 4096, 100)]
    for part in numbers:
        assert bool((part.int() % 2 == 1).all())
    assert [len(part) for part in numbers] == [4096, 4096, 100]
    turned = (numbers[1].int() - numbers[0].int()) % 2**16
    assert turned.unique().numel() == 1
    assert int(turned[0]) != 0
    assert not torch.equal(numbers[1][:100], numbers[2])


def test_a_later_call_for_more_draws_anew() -> None:
    dither = Dither(5, torch.device("cpu"))
    few, many = dither.next(10).clone(), dither.next(1000).clone()
    assert few.numel() == 10
    assert many.numel() == 1000
    assert (few.int() - many[:10].int()).unique().numel() > 5


@pytest.mark.parametrize(
    "c", [QSGD(2, block=16), TernGrad(16), Natural(), Int8(16, stochastic=True), E3M0(16, stochastic=True)], ids=repr
)
def test_errors_of_different_tiles_are_uncorrelated(monkeypatch: pytest.MonkeyPatch, c: Compressor) -> None:
    """Tiles share random numbers up to a turn; the errors of 12 equal tiles must still average out."""
    monkeypatch.setattr(wire, "TILE", 16)
    tile = torch.randn(16, generator=torch.Generator().manual_seed(1)) + 0.3
    x = tile.repeat(12)
    errors = torch.stack([c.roundtrip(x, seed).sub_(x) for seed in range(200)]).double()
    single = errors.square().sum(1).mean()
    # One number per tile, as correlated tiles make it large: 12 times the variance of one, not 12^2 times.
    ones = errors.view(200, 12, 16).sum(1).square().sum(1).mean()
    assert float(ones / single) == pytest.approx(1.0, abs=0.2)
    assert float(errors.mean(0).abs().max() / errors.square().mean().sqrt()) < 6 / math.sqrt(200)


@pytest.mark.parametrize("fraction", [2.0**-5, 0.3, 0.5, 1 - 2.0**-10])
def test_rounding_is_unbiased_to_2_to_the_minus_16(fraction: float) -> None:
    """Over all 2^15 numbers, each once."""
    dither = Dither(0, torch.device("cpu"))
    dither._base = torch.arange(-(2**15) + 1, 2**15, 2).to(torch.int16)
    values = torch.full((2**15,), 3.0 + fraction)
    dither.add_to(values)
    assert values.round_().double().mean().item() == pytest.approx(3.0 + fraction, abs=2.0**-16)
    dither._base = torch.arange(-(2**15) + 1, 2**15, 2).to(torch.int16)
    mantissas = torch.full((2**15,), 1.0 + fraction).view(torch.int32)
    powers = (dither.carry(mantissas) & 0x7F800000).view(torch.float32)
    assert powers.double().mean().item() == pytest.approx(1.0 + fraction, abs=2.0**-16)


def test_qsgd_norms_beyond_the_squares_of_float32() -> None:
    for scale in (1e-30, 1e-18, 1.0, 1e25, 1e37):
        x = torch.tensor([3.0, -4.0, 0.0, 0.0]) * scale
        decoded = QSGD(5, block=4).roundtrip(x, 1)
        torch.testing.assert_close(decoded, x, rtol=1e-5, atol=0.0)
