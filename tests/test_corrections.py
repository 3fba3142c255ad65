"""Corrections: what they make exact, what they leave, by closed forms and published numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from problems import Optimizer, Quadratics, p1, p2, sgd
from torch import Tensor

from lightning_dopt import Every, Plan, Simulation, Sync, outer, plans
from lightning_dopt.apply import Blocking
from lightning_dopt.combine import Damped, PushSum, Repeated
from lightning_dopt.local import (
    SAM,
    Correction,
    ExactDiffusion,
    Extra,
    GradientTracking,
    LocalTracking,
    Prox,
    QuasiGlobalMomentum,
)
from lightning_dopt.topology import (
    Chain,
    Complete,
    Directed,
    FromMatrix,
    Lazy,
    NodeWeighted,
    OnePeerExponential,
    OnePeerHypercube,
    RandomPairs,
    Ring,
    Torus,
)
from lightning_dopt.topology.base import Topology

W = Ring().matrix(4)


def adam(lr: float) -> Optimizer:
    return lambda ps: torch.optim.AdamW(ps, lr=lr, weight_decay=0.0)


def mixed(correction: Correction | None = None, peers: Topology | None = None, **parts: object) -> Plan:
    return Plan([Sync(peers=peers or Ring(), **parts)], [correction] if correction else [])  # type: ignore[arg-type]


def extra(peers: Topology | None = None, kappa: float = 1.0) -> Plan:
    return mixed(Extra(kappa), peers, apply=Blocking("awc"))


def tracked(peers: Topology | None = None, form: str = "atc", order: str = "atc", **mixing: object) -> Plan:
    peers = peers or Ring()
    syncs = [Sync(what="gradients", peers=peers), Sync(peers=peers, apply=Blocking(order), **mixing)]  # type: ignore[arg-type]
    return Plan(syncs, [GradientTracking(form)])  # type: ignore[arg-type]


def local_tracked(k: int, peers: Topology | None = None) -> Plan:
    peers = peers or Ring()
    return Plan([Sync(Every(k), "tracker", peers=peers), Sync(Every(k), peers=peers)], [LocalTracking()])


def error(sim: Simulation, optimum: Tensor | float) -> float:
    return float((sim.stacked() - optimum).abs().max())


def settled(plan: Plan, optimizer: float | Optimizer, steps: int = 800) -> Tensor:
    return p1().simulate(plan, optimizer).run(steps).stacked()[:, 0]


def near(got: Tensor, *expected: float) -> None:
    torch.testing.assert_close(got.float(), torch.tensor(expected), rtol=0, atol=2e-6)


# ---------------------------------------------------------------------- exact methods


EXACT: dict[str, tuple[Callable[[], Plan], float | Optimizer]] = {
    "exact diffusion": (lambda: mixed(ExactDiffusion(), Lazy(Ring())), 0.1),
    "exact diffusion with momentum": (lambda: mixed(ExactDiffusion(0.1), Lazy(Ring())), sgd(0.02, 0.9)),
    "exact diffusion with AdamW": (lambda: mixed(ExactDiffusion(0.05), Lazy(Ring())), adam(0.02)),
    "EXTRA": (extra, 0.05),
    "EXTRA with momentum": (lambda: extra(kappa=0.1), sgd(0.01, 0.9)),
    "EXTRA with AdamW": (lambda: extra(kappa=0.05), adam(0.02)),
    "DIGing with momentum": (lambda: tracked(form="semi", order="awc"), sgd(0.005, 0.9)),
    "DIGing with AdamW": (lambda: tracked(form="semi", order="awc"), adam(0.02)),
    "local tracking, 3 steps, with momentum": (lambda: local_tracked(3), sgd(0.01, 0.8)),
    "local tracking, 3 steps, with AdamW": (lambda: local_tracked(3), adam(0.01)),
    "tracking": (tracked, 0.1),
    "tracking with momentum": (tracked, sgd(0.02, 0.9)),
    "tracking with AdamW": (tracked, adam(0.02)),
    "semi tracking": (lambda: tracked(form="semi"), 0.05),
    "DIGing": (lambda: tracked(form="semi", order="awc"), 0.05),
    "tracking over pairs": (lambda: tracked(RandomPairs()), 0.05),
    "tracking over the one-peer exponential graph": (lambda: tracked(OnePeerExponential()), 0.05),
    "exact diffusion over changing lazy pairs": (lambda: mixed(ExactDiffusion(), Lazy(OnePeerHypercube())), 0.05),
    "local tracking, 1 step": (lambda: local_tracked(1), 0.05),
    "local tracking, 5 steps": (lambda: local_tracked(5), 0.05),
    "local tracking, 10 steps": (lambda: local_tracked(10), 0.05),
    "local exact diffusion, 5 steps": (lambda: mixed(ExactDiffusion(), Lazy(Ring()), when=Every(5)), 0.05),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_under_heterogeneous_data(name: str) -> None:
    make, optimizer = EXACT[name]
    adaptive = "AdamW" in name
    sim = p1().simulate(make(), optimizer).run(1500 if adaptive else 1000)
    assert error(sim, 3.0) < (1e-3 if adaptive else 1e-5)


def test_without_correction_adam_tends_to_another_point() -> None:
    decaying = adam(0.004)
    assert float(settled(mixed(), decaying, 2500).mean()) == pytest.approx(2.2, abs=0.1)


@pytest.mark.parametrize("lr", [0.1, 0.2, 0.3, 0.4])
def test_tracking_is_stable_at_large_steps(lr: float) -> None:
    assert error(p1().simulate(tracked(), lr).run(600), 3.0) < 1e-9


@pytest.mark.parametrize(("lr", "converges"), [(0.08, True), (0.09, False)])
def test_diging_is_stable_up_to_its_published_step(lr: float, converges: bool) -> None:
    wrong = error(p1().simulate(tracked(form="semi", order="awc"), lr).run(1200), 3.0)
    assert wrong < 1e-6 if converges else not wrong < 1e2


@pytest.mark.parametrize("form", ["atc", "semi"])
@pytest.mark.parametrize("peers", [Ring(), OnePeerExponential(), RandomPairs()])
def test_trackers_sum_to_the_gradients(form: str, peers: Topology) -> None:
    problem = p2()
    sim = problem.simulate(tracked(peers, form), 0.05)
    for _ in range(5):
        gradients = torch.stack([problem.gradient(i, x) for i, x in enumerate(sim.stacked())])
        sim.run(1)
        y = torch.stack([e.corrections[0].state()["y.x"] for e in sim.engines])
        torch.testing.assert_close(y.sum(0), gradients.sum(0), rtol=1e-12, atol=1e-12)


def test_diging_by_its_recursion() -> None:
    problem, lr = p1(), 0.03
    sim = problem.simulate(tracked(form="semi", order="awc"), lr)
    x, c = torch.zeros(4, 1).double(), problem.c
    a = problem.A.view(4, 1)
    y = g = a * (x - c)
    for _ in range(6):
        x = W @ x - lr * y
        new = a * (x - c)
        y, g = W @ y + new - g, new
        torch.testing.assert_close(sim.run(1).stacked(), x, rtol=0, atol=1e-12)


def test_extra_by_its_recursion() -> None:
    problem, lr = p1(), 0.07
    sim = problem.simulate(extra(), lr)
    c, a, eye = problem.c, problem.A.view(4, 1), torch.eye(4).double()
    old = torch.zeros(4, 1).double()
    x = W @ old - lr * a * (old - c)
    torch.testing.assert_close(sim.run(1).stacked(), x, rtol=0, atol=1e-12)
    for _ in range(6):
        x, old = (eye + W) @ x - (eye + W) / 2 @ old - lr * (a * (x - c) - a * (old - c)), x
        torch.testing.assert_close(sim.run(1).stacked(), x, rtol=0, atol=1e-12)


def test_exact_diffusion_by_its_recursion_and_d2() -> None:
    problem, lr = p1(), 0.07
    c, a, eye = problem.c, problem.A.view(4, 1), torch.eye(4).double()
    for peers, m in ((Lazy(Ring()), (eye + W) / 2), (Lazy(Lazy(Ring())), (3 * eye + W) / 4)):
        sim = problem.simulate(mixed(ExactDiffusion(), peers), lr)
        old = torch.zeros(4, 1).double()
        x = m @ (old - lr * a * (old - c))
        torch.testing.assert_close(sim.run(1).stacked(), x, rtol=0, atol=1e-12)
        for _ in range(6):
            x, old = m @ (2 * x - old - lr * (a * (x - c) - a * (old - c))), x
            torch.testing.assert_close(sim.run(1).stacked(), x, rtol=0, atol=1e-12)


def test_a_drop_of_the_learning_rate_does_not_disturb_exact_diffusion() -> None:
    sim = p1().simulate(mixed(ExactDiffusion(), Lazy(Ring())), 0.1).run(400)
    before = error(sim, 3.0)
    for opt in sim.optimizers:
        opt.param_groups[0]["lr"] = 0.01
    worst = max(error(sim.run(1), 3.0) for _ in range(30))
    assert before < 1e-9
    assert worst < 2 * before + 1e-12


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("optimizer", [sgd(0.05), sgd(0.01, 0.9), adam(0.02)])
def test_the_corrections_of_local_tracking_cancel(k: int, optimizer: Optimizer) -> None:
    sim = p2().simulate(local_tracked(k), optimizer).run(4 * k)
    c = torch.stack([e.corrections[0].state()["c0"] for e in sim.engines])
    assert float(c.abs().max()) > 1e-3
    torch.testing.assert_close(c.sum(0), torch.zeros(5).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "plan", [tracked(Complete()), mixed(ExactDiffusion(), Complete()), local_tracked(1, Complete())]
)
def test_over_the_complete_graph_the_mean_is_centralized(plan: Plan) -> None:
    got = p2().simulate(plan, 0.05).run(20).stacked()
    torch.testing.assert_close(got.mean(0), p2().centralized(20, 0.05)[-1], rtol=0, atol=0.02)
    if isinstance(plan.corrections[0], GradientTracking):
        torch.testing.assert_close(got, p2().centralized(20, 0.05)[-1].expand(8, 5), rtol=0, atol=1e-12)


# ---------------------------------------------------------------------- weighted means


SHARES = [0.1, 0.2, 0.3, 0.4]


def test_weighted_mixing_has_the_published_limit() -> None:
    got = settled(mixed(None, NodeWeighted(Ring(), SHARES)), 0.05)
    near(got, 3.205329, 3.083911, 3.283438, 3.431755)


@pytest.mark.parametrize("order", ["tracking", "exact diffusion", "EXTRA"])
def test_corrections_are_exact_for_the_weighted_loss(order: str) -> None:
    peers = NodeWeighted(Ring(), SHARES)
    plan = {
        "tracking": lambda: tracked(peers),
        "exact diffusion": lambda: mixed(ExactDiffusion(), Lazy(peers)),
        "EXTRA": lambda: extra(peers),
    }[order]()
    sim = p1().simulate(plan, 0.05).run(900)
    assert error(sim, 10 / 3) < 1e-6
    if order != "tracking":
        h = torch.stack([e.corrections[0].state()["h0"] for e in sim.engines])
        assert float((torch.tensor(SHARES, dtype=torch.float64) @ h).abs().max()) < 1e-10


# ---------------------------------------------------------------------- directed graphs


DIGRAPH = Directed([[1, 2], [2], [3], [4, 0], [0]], "push")


def test_push_sum_ends_in_the_plain_mean() -> None:
    problem = Quadratics(torch.zeros(5, 2, 2), torch.arange(10.0).view(5, 2))
    sim = problem.simulate(mixed(None, DIGRAPH, combine=PushSum()), 0.1, problem.c).run(300)
    torch.testing.assert_close(sim.stacked(), problem.c.mean(0).expand(5, 2), rtol=0, atol=1e-12)
    v = torch.stack([e.runners[0].lanes[0].channel.combine_state["weight"] for e in sim.engines]).flatten()
    near(v, 1.071429, 0.714286, 1.428571, 1.071429, 0.714286)
    assert float(v.sum()) == pytest.approx(5, abs=1e-12)
    assert sim.bytes[0] == 300 * 2 * (2 * 8 + 8)


def test_push_sum_and_push_diging_on_the_digraph() -> None:
    problem = Quadratics.scalar([1, 2, 3, 4, 5], [1, 2, 3, 4, 5])
    plain = problem.simulate(mixed(None, DIGRAPH, combine=PushSum()), 0.02).run(800)
    assert error(plain, 11 / 3) == pytest.approx(0.1163, abs=1e-4)
    exact = problem.simulate(tracked(DIGRAPH, "semi", combine=PushSum()), 0.02).run(1500)
    assert error(exact, 11 / 3) < 1e-7
    momentum = problem.simulate(tracked(DIGRAPH, "semi", combine=PushSum()), sgd(0.004, 0.8)).run(1500)
    assert error(momentum, 11 / 3) < 1e-6


# ---------------------------------------------------------------------- momentum


def test_local_momentum_multiplies_the_bias() -> None:
    near(settled(mixed(), sgd(0.05, 0.9)), 2.915493, 2.281690, 3.225352, 3.211268)


def test_mixed_momentum() -> None:
    near(settled(plans.dmsgd(Ring(), True, 0.9), 0.05, 1500), 2.975161, 2.958699, 2.998721, 3.027820)
    problem, lr, beta = p1(), 0.05, 0.8
    sim = problem.simulate(plans.dmsgd(Ring(), True, beta), lr)
    a, c = problem.A.view(4, 1), problem.c
    x = m = torch.zeros(4, 1).double()
    for _ in range(5):
        m = W @ (beta * m + a * (x - c))
        x = W @ (x - lr * m)
        torch.testing.assert_close(sim.run(1).stacked(), x, rtol=0, atol=1e-12)


DSGD = (2.972487, 2.900523, 3.020278, 3.041408)


def test_quasi_global_momentum_keeps_the_bias_of_plain_sgd() -> None:
    plan = mixed(QuasiGlobalMomentum(0.9))
    near(settled(plan, sgd(0.05, 0.9), 1200), *DSGD)
    near(settled(plan, sgd(0.05, 0.9, True), 1200), 2.951790, 2.819278, 3.038950, 3.073201)


def test_quasi_global_momentum_by_its_recursion() -> None:
    problem, lr, beta, mu = p1(), 0.05, 0.9, 0.8
    sim = problem.simulate(mixed(QuasiGlobalMomentum(mu)), sgd(lr, beta))
    a, c = problem.A.view(4, 1), problem.c
    x = m = torch.zeros(4, 1).double()
    for _ in range(5):
        new = W @ (x - lr * (beta * m + a * (x - c)))
        m, x = mu * m + (1 - mu) * (x - new) / lr, new
        torch.testing.assert_close(sim.run(1).stacked(), x, rtol=0, atol=1e-12)


def test_quasi_global_adam_by_its_recursion() -> None:
    problem, lr = p1(), 0.05
    sim = problem.simulate(mixed(QuasiGlobalMomentum(0.9, 0.99)), lambda ps: torch.optim.Adam(ps, lr, (0.9, 0.99)))
    a, c = problem.A.view(4, 1), problem.c
    x = m = v = torch.zeros(4, 1).double()
    for t in range(1, 6):
        g = a * (x - c)
        m1, v1 = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        new = W @ (x - lr * (m1 / (1 - 0.9**t)) / ((v1 / (1 - 0.99**t)).sqrt() + 1e-8))
        q = (x - new) / ((x - new).abs() + 1e-8)  # one parameter: its norm is its size
        m, v, x = 0.9 * m + 0.1 * q, 0.99 * v + 0.01 * q * q, new
        torch.testing.assert_close(sim.run(1).stacked(), x, rtol=0, atol=1e-9)


def test_decentlam_is_heavy_ball_on_the_mixed_step() -> None:
    plan = mixed(None, None, signal="value", outer=outer.HeavyBall(1.0, 0.9))
    problem, lr = p1(), 0.05
    sim = problem.simulate(plan, lr)
    a, c = problem.A.view(4, 1), problem.c
    old = x = torch.zeros(4, 1).double()
    for _ in range(5):
        x, old = W @ (x - lr * a * (x - c)) + 0.9 * (x - old), x
        torch.testing.assert_close(sim.run(1).stacked(), x, rtol=0, atol=1e-12)
    near(settled(plan, lr, 700), *DSGD)


# ---------------------------------------------------------------------- prox and SAM


def test_the_prox_is_soft_thresholding() -> None:
    problem = Quadratics(torch.eye(3).expand(2, 3, 3), torch.tensor([[2.0, -0.3, -2.0]] * 2))
    sim = problem.simulate(mixed(Prox(0.5), Complete()), 0.1).run(400)
    torch.testing.assert_close(sim.stacked(), torch.tensor([1.5, 0.0, -1.5]).double().expand(2, 3), rtol=0, atol=1e-12)
    assert float(sim.stacked()[0, 1]) == 0.0


def test_dproxsgt_finds_the_sparse_optimum_on_every_rank() -> None:
    rng = torch.Generator().manual_seed(3)
    roots = torch.randn(4, 12, 20, generator=rng).double() / 12**0.5
    problem = Quadratics(roots.mT @ roots + 0.2 * torch.eye(20), torch.randn(4, 20, generator=rng).double())
    l1, peers = 0.3, Ring()
    plan = Plan([Sync(what="gradients", peers=peers), Sync(peers=peers)], [GradientTracking(), Prox(l1)])
    got = problem.simulate(plan, 0.05).run(900).stacked()
    x = torch.zeros(20).double()
    for _ in range(3000):  # proximal gradient descent on the mean
        x = x - 0.05 * (problem.A @ (x - problem.c).unsqueeze(-1)).mean(0).squeeze(-1)
        x = x.sign() * (x.abs() - 0.05 * l1).clamp(min=0)
    torch.testing.assert_close(got, x.expand(4, 20), rtol=0, atol=1e-6)
    support = got.abs() > 1e-6
    assert torch.equal(support, (x != 0).expand(4, 20))
    assert 3 < int(support[0].sum()) < 18


def test_sam_takes_the_gradient_uphill() -> None:
    problem, lr, rho = p2(), 0.05, 0.3
    sim = problem.simulate(mixed(SAM(rho), Ring()), lr)
    x, w = torch.zeros(8, 5).double(), Ring().matrix(8)
    for _ in range(4):
        g = torch.stack([problem.gradient(i, x[i]) for i in range(8)])
        up = x + rho * g / g.norm(dim=1, keepdim=True)
        x = w @ (x - lr * torch.stack([problem.gradient(i, up[i]) for i in range(8)]))
        torch.testing.assert_close(sim.run(1).stacked(), x, rtol=0, atol=1e-12)


def test_sam_without_distance_and_one_gossip_is_plain_local_training() -> None:
    plain = p2().simulate(mixed(None, Ring(), when=Every(3)), 0.05).run(9).stacked()
    assert torch.equal(p2().simulate(mixed(SAM(0.0), Ring(), when=Every(3)), 0.05).run(9).stacked(), plain)
    often = p2().simulate(mixed(SAM(0.0), Ring(), when=Every(3), combine=Repeated(1)), 0.05).run(9).stacked()
    assert torch.equal(often, plain)


# ---------------------------------------------------------------------- what is refused


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "D2 on a torus": (lambda: mixed(ExactDiffusion(), Torus()).check(8), r"eigenvalue -0.5.*above -1/3.*Lazy"),
    "D2 over pairs": (
        lambda: mixed(ExactDiffusion(), OnePeerHypercube()).check(8),
        "diverges over a changing graph.*Lazy",
    ),
    "exact diffusion on a digraph": (
        lambda: mixed(ExactDiffusion(), OnePeerExponential()).check(8),
        "symmetric.*GradientTracking",
    ),
    "EXTRA over pairs": (lambda: extra(RandomPairs()).check(8), "one fixed graph.*changes"),
    "EXTRA on an indefinite matrix": (lambda: extra(FLIP).check(2), "eigenvalue -1.*positive definite.*Lazy"),
    "EXTRA after the step": (lambda: mixed(Extra()), r"order='awc'"),
    "EXTRA now and then": (lambda: mixed(Extra(), when=Every(2), apply=Blocking("awc")), r"Every\(1\)"),
    "tracking without gradients": (lambda: mixed(GradientTracking()), "one sync of the gradients"),
    "local tracking without a tracker": (lambda: mixed(LocalTracking()), "what='tracker'"),
    "quasi-global now and then": (lambda: mixed(QuasiGlobalMomentum(), when=Every(2)), "mixing after every step"),
    "a prox of nothing": (lambda: p1().simulate(mixed(Prox(0.1, "head.*")), 0.1), "matches none"),
    "quasi-global without momentum": (lambda: p1().simulate(mixed(QuasiGlobalMomentum()), 0.1).run(1), "no momentum"),
    "rows that do not sum to one": (lambda: mixed(None, DIGRAPH).check(5), r"rows.*combine=PushSum"),
    "columns that do not sum to one": (
        lambda: mixed(None, NodeWeighted(Ring(), SHARES), combine=PushSum()).check(4),
        r"columns.*weights='push'",
    ),
}


class _Flip(FromMatrix):
    """Swaps two ranks: the extreme of an indefinite matrix."""

    def __init__(self) -> None:
        super().__init__([[0.5, 0.5], [0.5, 0.5]])

    def row(self, n: int, rank: int, step: int = 0) -> dict[int, float]:
        return {1 - rank: 1.0}

    def is_mean(self, n: int) -> bool:
        return False


FLIP = _Flip()


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_in_one_line(case: str) -> None:
    make, pattern = REFUSED[case]
    with pytest.raises(ValueError, match=pattern) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_d2_diverges_where_it_is_refused() -> None:
    """The bound on the eigenvalues is not caution: without it the recursion runs away."""

    class Unchecked(ExactDiffusion):
        def check_size(self, plan: Plan, n: int) -> None: ...

    sim = p2().simulate(mixed(Unchecked(), Torus()), 0.05).run(300)
    assert error(sim, p2().optimum()) > 1e2
    assert error(p2().simulate(mixed(ExactDiffusion(), Lazy(Torus())), 0.05).run(700), p2().optimum()) < 1e-4
    assert error(p2().simulate(mixed(ExactDiffusion(), Chain()), 0.05).run(900), p2().optimum()) < 1e-3


# ---------------------------------------------------------------------- fading gains


@pytest.mark.parametrize("noise", [0.1, 0.0])
def test_noise_and_a_fading_gain_leave_the_saddle(noise: float) -> None:
    """``f_i = x^2 / 2 + s_i x + y^4 / 4 - y^2 / 2``: a saddle at the origin, minima at (0, 1) and (0, -1)."""
    slopes = torch.tensor([1.0, -1.0, 2.0, -2.0], dtype=torch.float64)
    random = torch.Generator().manual_seed(0)

    def backward(rank: int, replica: dict[str, Tensor], step: int) -> None:
        x, y = replica["x"].detach()
        exact = torch.stack([x + slopes[rank], y**3 - y])
        replica["x"].grad = exact + noise * torch.randn(2, generator=random, dtype=torch.float64)

    plan = Plan([Sync(peers=Ring(), combine=Damped(1.0, 0.1, 10.0), apply=Blocking("awc"))])
    sim = Simulation(plan, 4, lambda _: {"x": torch.zeros(2, dtype=torch.float64)}, backward, sgd(0.5))
    for t in range(1500):
        for opt in sim.optimizers:
            opt.param_groups[0]["lr"] = 0.5 / (t + 10) ** 0.75
        sim.run(1)
    x, y = sim.stacked().mean(0).tolist()
    assert abs(x) < 0.05
    assert (abs(abs(y) - 1) < 0.1) if noise else y == 0.0


def test_a_damped_gain_is_lazy_mixing_and_fades_as_told() -> None:
    half = p2().simulate(mixed(None, Ring(), combine=Damped(0.5)), 0.05).run(15).stacked()
    torch.testing.assert_close(
        half, p2().simulate(mixed(None, Lazy(Ring())), 0.05).run(15).stacked(), rtol=0, atol=1e-13
    )
    still = p2()
    still.A.zero_()
    sim, x, w = (
        still.simulate(mixed(None, Ring(), combine=Damped(0.8, 1.5, 3.0)), 0.1, still.c),
        still.c,
        Ring().matrix(8),
    )
    for t in range(5):
        x = x + 0.8 * (3 / (t + 3)) ** 1.5 * (w @ x - x)
        torch.testing.assert_close(sim.run(1).stacked(), x, rtol=0, atol=1e-13)
