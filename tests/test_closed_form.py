"""Closed formulas of bytes and time against the forecast, for the DiLoCo family at 8 to 1024 workers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lightning_dopt import Gradients, Link, Plan, Sync, Tree, plans
from lightning_dopt.cli import BadInputError, run, spread
from lightning_dopt.closed_form import closed_form
from lightning_dopt.compress import E3M0
from lightning_dopt.forecast import forecast

SHAPES = {f"h.{k}.weight": (64, 64) for k in range(6)}
D = 6 * 64 * 64
LINK = Link(mbit=4.0, ms=2.0)
FAMILY: dict[str, Callable[[], Plan]] = {
    "ddp": lambda: Plan([Sync(what=Gradients(bucket_mb=0))]),
    "local_sgd": lambda: plans.local_sgd(10),
    "diloco": lambda: plans.diloco(20),
    "streaming": lambda: plans.streaming_diloco(20, 2, 5),
    "eager": lambda: plans.eager_diloco(20, outer_momentum=0.0),
    "co2": lambda: plans.co2(20),
    "noloco": lambda: plans.noloco(20),
    "noloco later": lambda: plans.noloco(20, overlap=3),
    "desloc": lambda: plans.desloc(10),
    "qsr": lambda: plans.qsr(base=10, steps=600),
    "savic": lambda: plans.savic(10),
}


@pytest.mark.parametrize("n", [8, 64])
@pytest.mark.parametrize("name", FAMILY)
def test_the_forecast_comes_to_the_formula(name: str, n: int) -> None:
    """Over 600 steps, all but the rounds that fragments' offsets cost and the last messages, which nothing hides."""
    plan = FAMILY[name]()
    formula, told = closed_form(plan, n, SHAPES, LINK, 0.05), forecast(plan, n, SHAPES, 600, LINK, 0.05)
    assert formula is not None
    assert told.bytes_per_step == pytest.approx(formula.bytes_per_step, rel=0.03)
    longest = LINK.all_reduce(4 * D, n)
    assert told.seconds / 600 == pytest.approx(formula.seconds_per_step, rel=0.03, abs=longest / 600)


def test_formulas_of_the_table() -> None:
    """``r B / H``, ``B / H`` and ``r B sum 1 / K`` with ``r = 2 (n - 1) / n``."""
    n, r = 8, 2 * 7 / 8

    def per_parameter(plan: Plan) -> float:
        formula = closed_form(plan, n, SHAPES, LINK)
        assert formula is not None
        return formula.bytes_per_step / D

    assert per_parameter(plans.diloco(50)) == pytest.approx(r * 4 / 50)
    assert per_parameter(plans.noloco(50)) == pytest.approx(4 / 50)
    assert per_parameter(plans.desloc(256)) == pytest.approx(r * 4 * 9 / 1536)
    assert per_parameter(plans.mt_dao(32)) == pytest.approx(r * 4 * 3 / 32)
    four_bits = plans.streaming_diloco(100, 3, codec=E3M0(block=2 * 64 * 64))
    assert per_parameter(four_bits) == pytest.approx(7 * (0.5 + 4 / (2 * 64 * 64)) / 100)  # gathered
    assert per_parameter(plans.lo_fi()) == 0.0
    assert closed_form(plans.gossip(Tree()), n, SHAPES, LINK) is None  # ranks send unequally much
    assert closed_form(plans.post_local_sgd(), n, SHAPES, LINK) is None


def test_slow_workers_set_the_pace_of_all() -> None:
    times = spread(0.1, 0.5, 16)
    assert isinstance(times, list)
    assert sorted(times) != times
    assert sorted(times)[7] < 0.1 < sorted(times)[8]
    plan = plans.diloco(20)
    formula, told = closed_form(plan, 16, SHAPES, LINK, times), forecast(plan, 16, SHAPES, 200, LINK, times)
    assert formula is not None
    assert told.seconds / 200 == pytest.approx(formula.seconds_per_step)
    assert told.stall_s > 190 * (max(times) - min(times))
    pairs = forecast(plans.noloco(20), 16, SHAPES, 200, LINK, times)
    assert pairs.seconds < told.seconds  # the slowest holds up its partner only


@pytest.mark.parametrize("name", ["streaming_diloco", "noloco", "desloc", "co2", "eager_diloco"])
def test_a_thousand_workers_on_the_command_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = "-n 1024 --mbit 100 --ms 20 --parameters 10e6 --steps 300 --step-seconds 0.2 --spread 0.1"
    run(["simulate", name, *given.split()])
    text = capsys.readouterr().out
    assert "1024 workers, 300 steps of 0.1" in text
    assert "closed formula, in the long run" in text
    assert "times fewer bytes" in text


def test_a_learning_rate_for_methods_that_read_it(capsys: pytest.CaptureFixture[str]) -> None:
    def sent(*more: str) -> str:
        run(["simulate", "qsr", "--steps", "400", "--parameters", "1e6", *more])
        return capsys.readouterr().out.split("bytes per worker")[1].split("\n")[0]

    assert sent() != sent("--lr", "0.008")
    with pytest.raises(BadInputError, match="--spread=9"):
        run(["simulate", "diloco", "--spread", "9"])


def test_links_may_be_unequal_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    given = "-n 64 --mbit 100 --parameters 10e6 --steps 100 --step-seconds 0.2 --link-spread 0.5"
    run(["simulate", "diloco", "--sync_every", "50", *given.split()])
    text = capsys.readouterr().out
    assert "29.9 to 335 Mbit/s" in text  # quantiles 1/128 and 127/128
    assert "closed formula, in the long run" in text
    with pytest.raises(BadInputError, match=r"--link-spread=0.5: spreads a bandwidth, which --mbit sets"):
        run(["simulate", "diloco", "--link-spread", "0.5"])
    with pytest.raises(BadInputError, match="--link-spread=-1"):
        run(["simulate", "diloco", "--mbit", "5", "--link-spread", "-1"])
