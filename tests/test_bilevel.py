"""Bilevel methods in float64 against what they must equal: textbook recursions, closed forms, limiting cases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bilevel_problems import MU, P, Q, Quadratic, sgd
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_dopt import Complete, Difference, ExactDiffusion, Exponential, Lazy, Ring, SimulatedWorld, TopK
from lightning_dopt.bilevel import (
    BilevelEngine,
    BilevelPlan,
    BilevelSimulation,
    FirstOrder,
    Level,
    Losses,
    SecondOrder,
    double_loop,
    dsoba,
    soba,
    sparkle,
)
from lightning_dopt.topology import FromMatrix, NodeWeighted

ROWS = ("ed", "extra", "gt", "semi_gt", "non_atc_gt", "dsgd")
LAZY = Lazy(Ring())


def same(row: Any, topology: Any = LAZY, **options: Any) -> BilevelPlan:
    """SPARKLE with one row on all levels; every row mixes with the lazy ring itself."""
    return sparkle(topology, row, row, row, **options)


# ---------------------------------------------------------------------- recursions


@pytest.mark.parametrize("row", ROWS)
def test_every_row_equals_the_matrix_form(row: str) -> None:
    problem = Quadratic.drawn(6, h=1.0)
    x = problem.simulate(same(row)).run(25).stacked("upper", "x")
    expected = problem.reference(dict.fromkeys("xyz", row), LAZY.matrix(6), 25)
    assert (x - expected).abs().max() < 1e-12
    assert (x - x[0]).abs().max() > 1e-3  # workers differ


def test_levels_may_mix_rows_and_graphs() -> None:
    problem = Quadratic.drawn(6, h=1.0)
    plan = sparkle(LAZY, upper=Level("gt", Exponential()), lower="ed", auxiliary=Level("extra", Lazy(Complete())))
    x = problem.simulate(plan).run(25).stacked("upper", "x")
    w = {"y": LAZY.matrix(6), "z": Lazy(Complete()).matrix(6), "x": Exponential().matrix(6)}
    assert (x - problem.reference({"y": "ed", "z": "extra", "x": "gt"}, w, 25)).abs().max() < 1e-12


def test_dsoba_is_sparkle_without_corrections() -> None:
    problem = Quadratic.drawn(6, h=1.0)
    x = problem.simulate(dsoba(Ring(), theta=0.5)).run(25).stacked("upper", "x")
    expected = problem.reference(dict.fromkeys("xyz", "dsgd"), Ring().matrix(6), 25, theta=0.5)
    assert (x - expected).abs().max() < 1e-12


def test_the_auxiliary_variable_may_have_a_step_of_its_own() -> None:
    problem = Quadratic.drawn(4, h=1.0)
    x = problem.simulate(same("ed", auxiliary_lr=0.2)).run(25).stacked("upper", "x")
    assert (x - problem.reference(dict.fromkeys("xyz", "ed"), LAZY.matrix(4), 25, gamma=0.2)).abs().max() < 1e-12


def soba_by_hand(problem: Quadratic, steps: int, theta: float, jacobi: bool = False) -> Tensor:
    """One model on the mean directions of all workers."""
    one = Quadratic(*(t.mean(0, keepdim=True) for t in (problem.A, problem.B, problem.b)), problem.C, problem.c)
    x, y, z, r = (torch.zeros(1, size, dtype=torch.float64) for size in (P, Q, Q, P))

    def directions() -> tuple[Tensor, ...]:
        rows = [t.expand(problem.n, -1) for t in (x, y, z)]
        return tuple(t.mean(0, keepdim=True) for t in problem.directions(*rows))

    assert one.n == 1
    for _ in range(steps):
        v, p, u = directions()
        y = y - 0.1 * v
        if not jacobi:
            p = directions()[1]
        z = z - 0.1 * p
        if not jacobi:
            u = directions()[2]
        r = (1 - theta) * r + theta * u
        x = x - 0.05 * r
    return x[0]


@pytest.mark.parametrize("n", [1, 4])
def test_the_complete_graph_is_soba_on_mean_directions(n: int) -> None:
    problem = Quadratic.drawn(n, h=1.0)
    expected = soba_by_hand(problem, 20, 0.4)
    for plan in (soba(0.4), same("ed", Complete(), theta=0.4), same("gt", Complete(), theta=0.4)):
        x = problem.simulate(plan).run(20).stacked("upper", "x")
        assert (x - expected).abs().max() < 1e-12
    first = problem.simulate(soba(0.4, order="first")).run(20).stacked("upper", "x")
    assert (first - expected).abs().max() < 1e-9


def test_jacobi_uses_the_values_of_the_step_before() -> None:
    problem = Quadratic.drawn(3, h=1.0)
    expected = soba_by_hand(problem, 20, 0.4, jacobi=True)
    for order in ("second", "first"):
        plan = dsoba(Complete(), order, 0.4, sweep="jacobi")
        x = problem.simulate(plan).run(20).stacked("upper", "x")
        assert (x - expected).abs().max() < 1e-9
    assert (expected - soba_by_hand(problem, 20, 0.4)).abs().max() > 1e-4


def test_equal_workers_stay_equal_on_any_graph() -> None:
    problem = Quadratic.drawn(4, h=0.0)
    for row in ("dsgd", "extra", "gt"):
        x = problem.simulate(same(row)).run(20).stacked("upper", "x")
        assert (x - soba_by_hand(problem, 20, 0.3)).abs().max() < 1e-12


# ---------------------------------------------------------------------- where they end


@pytest.mark.parametrize("row", ROWS)
def test_corrections_are_exact_under_heterogeneity_and_dsoba_is_not(row: str) -> None:
    problem = Quadratic.drawn(4, h=1.0)
    error = problem.error(problem.simulate(same(row, theta=1.0), alpha=0.1, beta=0.15).run(150))
    assert error > 0.1 if row == "dsgd" else error < 1e-7


def test_the_bias_of_dsoba_is_proportional_to_the_steps() -> None:
    problem = Quadratic.drawn(4, h=0.5)
    far = problem.error(problem.simulate(dsoba(LAZY, theta=1.0), 0.1, 0.2).run(120)) ** 0.5
    near = problem.error(problem.simulate(dsoba(LAZY, theta=1.0), 0.05, 0.1).run(240)) ** 0.5
    assert far / near == pytest.approx(1.88, abs=0.05)  # 2 as the steps go to zero


def test_the_order_of_variants_on_a_ring_of_16() -> None:
    problem = Quadratic.drawn(16, h=1.0)
    rows = {"ed": ("ed", "ed"), "mixed": ("ed", "gt"), "gt": ("gt", "gt"), "dsoba": ("dsgd", "dsgd")}
    plans = {name: sparkle(LAZY, upper, lower, lower) for name, (lower, upper) in rows.items()}
    error = {name: problem.error(problem.simulate(plan).run(80)) for name, plan in plans.items()}
    assert error["ed"] < error["mixed"] < error["gt"] / 2 < error["dsoba"] / 4


def test_the_order_of_variants_after_many_steps() -> None:
    """Of the matrix form, which all of them equal (see above), as it takes a moment only."""
    problem = Quadratic.drawn(16, h=1.0)

    def error(lower: str, upper: str) -> float:
        x = problem.reference({"y": lower, "z": lower, "x": upper}, LAZY.matrix(16), 400)
        return float((x - problem.best()).square().sum(1).mean())

    ed = error("ed", "ed")
    assert ed == pytest.approx(error("extra", "extra"), rel=0.3)
    found = [ed, error("ed", "gt"), error("gt", "ed"), error("gt", "gt"), error("dsgd", "dsgd")]
    assert found == sorted(found)
    assert found[0] < found[1] / 10 < found[3] / 1000 < found[4] / 10000


def test_noise_falls_with_the_number_of_workers() -> None:
    """Many independent copies of one problem in one run, as columns, tell the mean of the floor."""
    copies, sigma = 300, 0.1

    def floor(n: int) -> float:
        problem = Quadratic.drawn(1, h=0.0)
        a, b, c, start = problem.A[0], problem.B[0], problem.c[0], problem.best()

        def noise(rank: int, step: int, kind: int, size: int) -> Tensor:
            g = torch.Generator().manual_seed((rank * 1009 + step) * 4 + kind)
            return sigma * torch.randn(size, copies, generator=g, dtype=torch.float64)

        def lower_loss(rank: int, lower: dict[str, Tensor], upper: dict[str, Tensor], step: int) -> Tensor:
            x, y = upper["x"], lower["y"]
            return (y * (0.5 * a @ y - b @ x - problem.b[0][:, None] + noise(rank, step, 0, Q))).sum()

        def upper_loss(rank: int, lower: dict[str, Tensor], upper: dict[str, Tensor], step: int) -> Tensor:
            x, y = upper["x"], lower["y"]
            noisy = (x * noise(rank, step, 1, P)).sum() + (y * noise(rank, step, 2, Q)).sum()
            return 0.5 * MU * x.square().sum() + 0.5 * (y - c[:, None]).square().sum() + noisy

        y, _, _ = problem.solution(start)
        run = BilevelSimulation(
            sparkle(Ring()),
            n,
            lambda rank: {"y": y[:, None].expand(-1, copies).clone()},
            lambda rank: {"x": start[:, None].expand(-1, copies).clone()},
            lower_loss,
            upper_loss,
            sgd(0.2),
            sgd(0.1),
        ).run(80)
        return float(run.stacked("upper", "x").mean(0).var(1).sum())

    one = floor(1)
    for n in (2, 8):
        assert n * floor(n) == pytest.approx(one, rel=0.15)


def test_a_double_loop_follows_the_hypergradient() -> None:
    problem = Quadratic.drawn(3, h=1.0)
    plan = double_loop(Complete(), lower_steps=150, auxiliary_steps=150)
    x = torch.zeros(P, dtype=torch.float64)
    for _ in range(3):
        x = x - 0.2 * problem.solution(x)[2]
    found = problem.simulate(plan, alpha=0.2, beta=0.3).run(3)
    assert (found.stacked("upper", "x") - x).abs().max() < 1e-6
    assert found.worlds[0].ledger.entries["lower/parameters"].messages == 450


# ---------------------------------------------------------------------- directions


def test_the_mean_direction_is_the_gradient_of_the_upper_objective() -> None:
    problem = Quadratic.drawn(5, h=1.0)
    x = torch.linspace(-1, 1, P, dtype=torch.float64)
    y, z, gradient = problem.solution(x)
    u = problem.directions(*(t.expand(5, -1) for t in (x, y, z)))[2].mean(0)
    eye = 1e-5 * torch.eye(P, dtype=torch.float64)
    slopes = torch.stack([(problem.value(x + e) - problem.value(x - e)) / 2e-5 for e in eye])
    assert (u - slopes).abs().max() < 1e-8
    assert (gradient - slopes).abs().max() < 1e-8


class Ridge:
    """Logistic regression with a weight decay per weight, ``exp(x)``: a hypergradient without closed form."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(1)
        self.a = torch.randn(2, 12, 3, generator=g, dtype=torch.float64)
        self.b = torch.randint(2, (2, 12), generator=g).double()

    def lower(self, x: Tensor, y: Tensor) -> Tensor:
        fit = functional.binary_cross_entropy_with_logits(self.a[0] @ y, self.b[0])
        return fit + (x.exp() * y.square()).sum()

    def upper(self, y: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(self.a[1] @ y, self.b[1])

    def solve(self, x: Tensor) -> Tensor:
        y = torch.zeros(3, dtype=torch.float64)
        for _ in range(20):
            gradient = torch.func.grad(self.lower, 1)(x, y)
            y = y - torch.linalg.solve(torch.func.hessian(self.lower, 1)(x, y), gradient)
        return y


@pytest.mark.parametrize("order", ["second", "first"])
def test_hypergradients_against_finite_differences(order: str) -> None:
    ridge, x = Ridge(), torch.tensor([-2.0, -1.0, -3.0], dtype=torch.float64, requires_grad=True)
    y = ridge.solve(x.detach()).requires_grad_()
    losses = Losses(lambda: ridge.lower(x, y), lambda: ridge.upper(y), {"y": y}, {"x": x})
    upper, lower = losses.upper_gradients()
    z = torch.linalg.solve(torch.func.hessian(ridge.lower, 1)(x.detach(), y.detach()), lower[0])
    curvature = SecondOrder(losses) if order == "second" else FirstOrder(losses, 1e-4, "central")
    assert (curvature.hessian([z])[0] - lower[0]).abs().max() < 1e-8
    u = upper[0] - curvature.cross([z])[0]
    eye = 1e-5 * torch.eye(3, dtype=torch.float64)
    at = x.detach()
    slopes = [(ridge.upper(ridge.solve(at + e)) - ridge.upper(ridge.solve(at - e))) / 2e-5 for e in eye]
    assert (u - torch.stack(slopes)).abs().max() < 1e-8


def network() -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor], Losses, list[Tensor]]:
    """A network of several tensors whose lower loss weighs samples by upper logits and decays weights by upper exponents."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    lower = dict(net.named_parameters())
    upper = {
        "logits": torch.randn(8, dtype=torch.float64, requires_grad=True),
        "decay": torch.zeros((), dtype=torch.float64, requires_grad=True),
    }
    data, target = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 1, dtype=torch.float64)

    def lower_loss() -> Tensor:
        weighted = (upper["logits"].sigmoid()[:, None] * (net(data) - target).square()).mean()
        return weighted + upper["decay"].exp() * sum(p.square().sum() for p in lower.values())

    losses = Losses(lower_loss, lambda: (net(data) - target).square().mean(), lower, upper)
    return net, lower, upper, losses, [torch.randn_like(p) for p in lower.values()]


def test_products_equal_those_of_the_whole_matrices() -> None:
    _, lower, upper, losses, z = network()
    data = losses.lower_value  # the same loss as a function of flat vectors
    sizes = [t.numel() for t in (*lower.values(), *upper.values())]
    everything = [*lower.values(), *upper.values()]
    gradient = torch.autograd.grad(data(), everything, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])
    rows = [torch.autograd.grad(value, everything, retain_graph=True, allow_unused=True) for value in flat]
    matrix = torch.stack(
        [
            torch.cat([(torch.zeros(k) if g is None else g).reshape(-1) for g, k in zip(r, sizes, strict=True)])
            for r in rows
        ]
    )
    count = sum(t.numel() for t in lower.values())
    expected = matrix[:, :count] @ torch.cat([t.reshape(-1) for t in z])
    second, first = SecondOrder(losses), FirstOrder(losses, 1e-3, "central")
    for curvature, error in ((second, 1e-12), (first, 1e-5)):
        hessian, cross = curvature.both(z)
        found = torch.cat([t.reshape(-1) for t in (*hessian, *cross)])
        assert (found - expected).abs().max() < error
        assert all(torch.equal(a, b) for a, b in zip(hessian, curvature.hessian(z), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(cross, curvature.cross(z), strict=True))
        assert torch.equal(torch.cat([t.reshape(-1) for t in curvature.lower_gradient()]), flat[:count].detach())


def test_errors_of_differences_fall_with_delta() -> None:
    losses, z = network()[3:]
    exact = torch.cat([t.reshape(-1) for t in SecondOrder(losses).hessian(z)])

    def error(delta: float, difference: Any) -> float:
        found = FirstOrder(losses, delta, difference).hessian(z)
        return float((torch.cat([t.reshape(-1) for t in found]) - exact).norm())

    assert error(0.02, "central") / error(0.01, "central") == pytest.approx(4, rel=0.05)
    assert error(0.02, "forward") / error(0.01, "forward") == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("delta", [0.1, 1e-3, 1e-6])
def test_differences_are_exact_on_quadratics(delta: float) -> None:
    problem, x = Quadratic.drawn(1, 0.0), torch.ones(P, dtype=torch.float64, requires_grad=True)
    y = torch.ones(Q, dtype=torch.float64, requires_grad=True)
    losses = Losses(lambda: problem.lower_loss(0, {"y": y}, {"x": x}, 0), lambda: y.sum(), {"y": y}, {"x": x})
    z = torch.linspace(-50, 70, Q, dtype=torch.float64)
    hessian, cross = FirstOrder(losses, delta, "central").both([z])
    tolerance = 1e-14 / delta * float(z.norm())
    assert (hessian[0] - problem.A[0] @ z).abs().max() < tolerance
    assert (cross[0] + problem.B[0].T @ z).abs().max() < tolerance
    assert torch.equal(y.detach(), torch.ones(Q, dtype=torch.float64))  # restored, not added back
    assert not any(t.any() for t in FirstOrder(losses, delta, "central").hessian([torch.zeros_like(z)]))


def test_all_evaluations_of_a_step_draw_the_same_numbers_and_buffers_move_once() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    x, data = torch.zeros((), requires_grad=True), torch.randn(6, 3)
    lower, buffers = dict(net.named_parameters()), list(net.buffers())

    def lower_loss() -> Tensor:
        return x.exp() * net(data).square().mean()

    losses = Losses(lower_loss, lambda: net(2 * data).mean() + 0 * x, lower, {"x": x}, buffers)
    first = losses.lower_gradient()
    moved, state = [b.clone() for b in buffers], torch.get_rng_state()
    assert not torch.equal(moved[0], torch.zeros(4))
    second = FirstOrder(losses, 0.1, "forward").lower_gradient()
    SecondOrder(losses).hessian([torch.ones_like(p) for p in lower.values()])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    losses.upper_gradients()
    assert all(torch.equal(a, b) for a, b in zip(moved, buffers, strict=True))


# ---------------------------------------------------------------------- schedules, codecs, bytes, state


def test_bytes_are_those_of_the_formula() -> None:
    problem = Quadratic.drawn(4, h=1.0)
    for plan, floats in ((same("ed"), P + 2 * Q), (same("gt"), 2 * (P + 2 * Q)), (sparkle(LAZY, "gt"), 2 * P + 2 * Q)):
        run = problem.simulate(plan).run(5)
        assert run.bytes == [5 * 2 * 8 * floats] * 4  # two neighbours, float64
    entries = problem.simulate(sparkle(LAZY, "gt")).run(5).worlds[0].ledger.entries
    assert {label: e.bytes for label, e in entries.items()} == {
        "lower/parameters": 80 * Q,
        "auxiliary/parameters": 80 * Q,
        "upper/gradients": 80 * P,
        "upper/parameters": 80 * P,
    }


def test_no_gradients_are_left_for_checkpoints() -> None:
    run = Quadratic.drawn(2, h=1.0).simulate(sparkle(Ring(), "gt")).run(2)
    assert all(p.grad is None for e in run.engines for level in e.levels.values() for p in level.parameters.values())


@pytest.mark.parametrize("row", ["ed", "gt"])
def test_local_updates_stay_exact(row: str) -> None:
    problem = Quadratic.drawn(4, h=0.5)
    run = problem.simulate(same(row, Ring(), sync_every=4, theta=1.0), 0.1, 0.15).run(200)
    assert problem.error(run) < 1e-4
    assert run.bytes == [50 * 2 * 8 * (P + 2 * Q) * (2 if row == "gt" else 1)] * 4


def test_local_updates_without_correction_are_not() -> None:
    problem = Quadratic.drawn(4, h=0.5)
    run = problem.simulate(dsoba(Ring(), theta=1.0, sync_every=4), 0.1, 0.15).run(150)
    assert problem.error(run) > 1e-2


def test_compressed_messages_keep_the_solution() -> None:
    problem = Quadratic.drawn(4, h=0.5)
    codec = Difference(TopK(0.4), gamma=0.4)
    run = problem.simulate(sparkle(Ring(), "gt", "gt", "gt", codec=codec, theta=1.0), 0.1, 0.15).run(140)
    assert problem.error(run) < 1e-4
    assert run.bytes[0] < 0.8 * 140 * 2 * 8 * 2 * (P + 2 * Q)
    assert same("ed", codec=TopK(0.4)).lower.syncs[0].codec == Difference(TopK(0.4))
    upper = sparkle(upper=Level("ed", codec=TopK(0.4)))
    assert upper.lower == sparkle().lower
    assert upper.upper != sparkle().upper


@pytest.mark.parametrize("row", ["ed", "extra", "gt", "non_atc_gt"])
def test_saved_state_continues_exactly(row: str) -> None:
    problem = Quadratic.drawn(3, h=1.0)
    plan = same(row, codec=TopK(0.5) if row == "gt" else None, sweep="jacobi" if row == "ed" else "gauss_seidel")
    whole = problem.simulate(plan).run(14)
    half = problem.simulate(plan).run(7)
    other = problem.simulate(plan)
    for k, engine in enumerate(half.engines):
        for mine, theirs in ((other.lower[k], half.lower[k]), (other.upper[k], half.upper[k])):
            for name in mine:
                mine[name].data.copy_(theirs[name].data)
        other.engines[k].load_state_dict(engine.state_dict())
    other.run(7)
    for level, name in (("upper", "x"), ("lower", "y"), ("auxiliary", "y")):
        assert torch.equal(other.stacked(level, name), whole.stacked(level, name))
    assert other.bytes == whole.bytes


def test_a_state_belongs_to_one_plan() -> None:
    problem = Quadratic.drawn(2, h=1.0)
    state = problem.simulate(sparkle()).run(1).engines[0].state_dict()
    with pytest.raises(ValueError, match="written by another plan"):
        problem.simulate(dsoba()).engines[0].load_state_dict(state)


# ---------------------------------------------------------------------- refusals


def test_matrices_that_do_not_suit_are_lifted_or_refused() -> None:
    assert sparkle(Ring()).lower.syncs[0].peers == Lazy(Ring())
    assert sparkle(Lazy(Ring()), "extra").upper.syncs[0].peers == Ring()  # EXTRA mixes with (I + W) / 2 itself
    assert sparkle(Complete()).lower.syncs[0].peers == Complete()
    plain = Level("ed", Ring(), lazy=False)
    assert sparkle(lower=plain).lower.syncs[0].peers == Ring()
    with pytest.raises(
        ValueError, match=r"^lower level: ExactDiffusion: .* eigenvalue -0.333, must be above -1/3; use"
    ):
        sparkle(lower=plain).check(4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sparkle(upper="adam"), r"sparkle\(upper='adam'\): must be one of 'dsgd', 'gt'"),
        (lambda: Level("adam"), r"Level\(correction='adam'\)"),
        (lambda: sparkle(lower="extra", sync_every=2), r"sparkle\(lower='extra', sync_every=2\): mixes in every step"),
        (lambda: sparkle(theta=0.0), r"sparkle\(theta=0.0\)"),
        (lambda: dsoba(order="third"), r"dsoba\(order='third'\): must be one of 'second', 'first'"),
        (lambda: dsoba(delta=0.0), r"dsoba\(delta=0.0\)"),
        (lambda: soba(auxiliary_lr=-1.0), r"soba\(auxiliary_lr=-1.0\)"),
        (lambda: double_loop(lower_steps=0), r"double_loop\(lower_steps=0\)"),
        (lambda: dsoba(NodeWeighted(Ring(), counts=[1, 2, 3, 4])).check(4), "keeps a weighted mean"),
        (lambda: sparkle(FromMatrix([[0.5, 0.5], [0.2, 0.8]])).check(2), "symmetric|sum to one|mean"),
    ],
)
def test_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def engine(lower: dict[str, Tensor], upper: dict[str, Tensor]) -> BilevelEngine:
    return BilevelEngine(sparkle(), lower, upper, SimulatedWorld.create(1)[0], lambda name: 0.1)


def test_levels_that_are_none_are_refused() -> None:
    t = torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match="lower level has no trainable parameters"):
        engine({}, {"x": t})
    with pytest.raises(ValueError, match="upper level has no trainable parameters"):
        engine({"x": t}, {})
    with pytest.raises(ValueError, match="parameter 'y' is on both levels"):
        engine({"y": t}, {"x": t})


def test_losses_that_are_none_are_refused() -> None:
    x, y = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)

    def tell(lower: Any, upper: Any) -> str:
        made = engine({"y": y}, {"x": x})
        losses = Losses(lower, upper, {"y": y}, {"x": x})
        with pytest.raises((ValueError, FloatingPointError)) as caught:
            made.run(made.descend(losses, lambda: None))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    good = lambda: (y - x).square().sum()  # noqa: E731
    assert "lower_loss depends on no lower parameter" in tell(lambda: x.sum(), good)
    assert "must return a tensor with one element, got shape (2,)" in tell(lambda: y, good)
    assert "upper_loss: must return a tensor" in tell(good, lambda: None)
    assert "depends on no trainable parameter" in tell(good, lambda: torch.ones(()))
    assert tell(good, lambda: (x / 0).sum()).startswith("step 1: the hypergradient of rank 0 is not finite; lower the")
    assert "the auxiliary direction of rank 0 is not finite" in tell(good, lambda: (y + 1).log().sum() / 0)
    assert "the lower gradient of rank 0 is not finite" in tell(lambda: (y / 0).sum(), good)


class Once(torch.autograd.Function):
    """The sum of squares, without second derivative."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return y.square().sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g * ctx.saved_tensors[0]


def test_lower_losses_without_second_derivatives_are_refused_or_differenced() -> None:
    y, x = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)

    def losses(lower: Any) -> Losses:
        return Losses(lower, lambda: (x + y).sum(), {"y": y}, {"x": x})

    z = [torch.ones(2)]
    for lower in (lambda: Once.apply(y), lambda: Once.apply(y).square(), lambda: Once.apply(y) ** 2 + y @ y, y.sum):
        with pytest.raises(ValueError, match=r"^order='second': [^\n]*use order='first'[^\n]*$"):
            SecondOrder(losses(lower)).hessian(z)

    def attention() -> Tensor:  # in one kernel, whose backward has no derivative
        h = (y.repeat(32).view(1, 1, 4, 16) + torch.eye(4, 16)).contiguous()
        return functional.scaled_dot_product_attention(h, h, h).square().sum()

    with (
        sdpa_kernel(SDPBackend.FLASH_ATTENTION),
        pytest.raises(ValueError, match=r"^order='second': .* use order='first'"),
    ):
        SecondOrder(losses(attention)).hessian(z)
    assert FirstOrder(losses(lambda: Once.apply(y)), 0.1, "central").hessian(z)[0].tolist() == pytest.approx([2, 2])


def test_kappa_may_be_given() -> None:
    assert ExactDiffusion(0.1) in sparkle(lower=Level(ExactDiffusion(0.1))).lower.corrections
