"""Rates of links against the published constants, closed forms and a search by hand."""

from __future__ import annotations

import math

import pytest

from lightning_dopt.topology import (
    Chain,
    Complete,
    FromAdjacency,
    Hypercube,
    Ring,
    Star,
    SymmetricExponential,
    Torus,
    UndirectedGraph,
    optimal_rates,
    rates,
)

TABLE = [
    (Ring(), 4, (1.0000, 0.7500, 0.5774, 0.5774)),
    (Ring(), 8, (3.4142, 0.8750, 0.2893, 0.9877)),
    (Ring(), 16, (13.1371, 0.9375, 0.1425, 1.8717)),
    (Ring(), 32, (52.0434, 0.96875, 0.0704, 3.6648)),
    (Hypercube(), 8, (1.5000, 0.8750, 0.4364, 0.6547)),
    (Hypercube(), 16, (2.0000, 0.9375, 0.3651, 0.7303)),
    (SymmetricExponential(), 16, (1.7500, 0.9571, 0.3863, 0.6761)),
    (SymmetricExponential(), 32, (2.2500, 0.9881, 0.3353, 0.7545)),
]
BARBELL = FromAdjacency([[1, 2], [0, 2], [0, 1, 3], [2, 4, 5], [3, 5], [3, 4]])


@pytest.mark.parametrize(("graph", "n", "expected"), TABLE, ids=str)
def test_constants_of_the_table(graph: UndirectedGraph, n: int, expected: tuple[float, ...]) -> None:
    found = rates(graph, n)
    assert (found.chi1, found.chi2, found.eta, found.momentum_step) == pytest.approx(expected, abs=6e-5)
    assert found.total == pytest.approx(n / 2)


def test_constants_scale_with_the_total_rate() -> None:
    once, twice = rates(Torus(), 12, 6.0), rates(Torus(), 12, 12.0)
    assert (2 * twice.chi1, 2 * twice.chi2) == pytest.approx((once.chi1, once.chi2))
    assert twice.exchange_rate == pytest.approx(once.exchange_rate)
    unit = rates(Torus(), 12, 1.0)
    assert unit.exchange_rate == pytest.approx(math.sqrt(2 * unit.chi1 * unit.chi2))


def test_resistance_of_trees() -> None:
    """On a tree every link is the only way: its resistance is the inverse of its rate."""
    found = rates(Star(), 5, 1.0)
    assert found.chi2 == pytest.approx(0.5 * 4)
    assert found.chi1 == pytest.approx(4.0)  # lambda_2 of a star's Laplacian is 1, divided by four links
    assert all(rate == 0.25 for rate in found.rates.values())


@pytest.mark.parametrize(("graph", "n"), [(Ring(), 7), (Hypercube(), 8), (Star(), 6)])
def test_equal_rates_are_best_where_all_links_look_alike(graph: UndirectedGraph, n: int) -> None:
    found = optimal_rates(graph, n)
    assert found.time == pytest.approx(rates(graph, n).time, rel=1e-9)
    assert max(found.rates.values()) == pytest.approx(min(found.rates.values()), rel=1e-4)


def test_optimal_rates_of_a_chain_by_hand() -> None:
    """Outer rates a, inner rate b, 2 a + b = 1: lambda_2 = a + b - sqrt(a**2 + b**2), resistance 1 / min(a, b)."""

    def squared(b: float) -> float:
        a = (1 - b) / 2
        return 0.5 / (min(a, b) * (a + b - math.hypot(a, b)))

    best = min(squared(k / 100_000) for k in range(1, 100_000))
    found = optimal_rates(Chain(), 4, 1.0)
    assert found.time == pytest.approx(math.sqrt(best), rel=2e-3)
    assert found.time <= rates(Chain(), 4, 1.0).time


def test_optimal_rates_favour_a_bridge() -> None:
    equal, best = rates(BARBELL, 6), optimal_rates(BARBELL, 6)
    assert best.time < 0.9 * equal.time
    assert best.rates[2, 3] > 1.5 * best.rates[0, 1]
    assert best.total == pytest.approx(equal.total) == pytest.approx(3.0)


def test_error_lines() -> None:
    with pytest.raises(
        ValueError, match=r"^rates\(graph=Complete\(\)\): must be an undirected graph such as Ring\(\)$"
    ):
        rates(Complete(), 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^optimal_rates\(n=1\): a single worker has no links; must be at least 2$"):
        optimal_rates(Ring(), 1)
    with pytest.raises(ValueError, match=r"^rates\(total=0.0\): must be a number in \(0, inf\)$"):
        rates(Ring(), 4, 0.0)
