"""Orthonormal matrices: on the manifold after every step, and the recursions of Riemannian gossip, number by number."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor

from lightning_dopt import (
    Blocking,
    Delay,
    Difference,
    Every,
    Nesterov,
    Parameters,
    Plan,
    Ring,
    Simulation,
    Sync,
    TopK,
    plans,
)
from lightning_dopt.combine import Repeated
from lightning_dopt.comm.simulated import lockstep
from lightning_dopt.local import ConjugateGradient, ExactDiffusion, GradientTracking, Stiefel
from lightning_dopt.local.base import Correction
from lightning_dopt.local.stiefel import polar, tangent
from lightning_dopt.what import Tracker

N, D, R = 8, 10, 3
EYE = torch.eye(R, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


ROWS = normal(N, 60, D) * torch.tensor([1.1] * R + [0.5] * (D - R), dtype=torch.float64)
A = ROWS.mT @ ROWS / 60
"""Rank ``i`` seeks the leading subspace of ``A[i]``; together they seek that of the mean."""
START = polar(normal(D, R, seed=1))


def pca_gradient(rank: int, x: Tensor) -> Tensor:
    return -(A[rank] @ x)


def pca(plan: Plan, lr: float, wide: bool = False) -> Simulation:
    def backward(rank: int, p: dict[str, Tensor], step: int) -> None:
        x = p["w"].detach()
        p["w"].grad = pca_gradient(rank, x.T).T.clone() if wide else pca_gradient(rank, x)

    start = START.T if wide else START
    return Simulation(plan, N, lambda rank: {"w": start.clone()}, backward, lambda ps: torch.optim.SGD(ps, lr=lr))


def infeasibility(x: Tensor) -> float:
    return float((x.mT @ x - torch.eye(x.shape[-1], dtype=x.dtype)).abs().max())


def outcome(sim: Simulation, steps: int, rate: Callable[[int], float] | None = None) -> tuple[float, float]:
    """Optimality gap of the projected mean and mean squared distance to it; every point is checked on the way."""
    for k in range(1, steps + 1):
        if rate is not None:
            for optimizer in sim.optimizers:
                optimizer.param_groups[0]["lr"] = rate(k)
        sim.run(1)
        assert infeasibility(sim.stacked("w")) < 1e-12
    x = sim.stacked("w")
    best = torch.linalg.eigvalsh(A.mean(0))[-R:].sum()
    point = polar(x.mean(0))
    gap = float(best - torch.trace(point.T @ A.mean(0) @ point)) / 2
    return gap, float((x - x.mean(0)).square().sum()) / N


def mixing(order: Literal["atc", "cta", "awc"] = "awc", rounds: int = 1) -> Sync:
    return Sync(peers=Ring(), apply=Blocking(order), combine=Repeated(rounds))


def drcgd(rounds: int = 1) -> Plan:
    directions = Sync(what=Tracker("w"), peers=Ring(), combine=Repeated(rounds))
    return Plan([directions, mixing(rounds=rounds)], [Stiefel("w"), ConjugateGradient("w")])


def tracking(order: Literal["atc", "awc"] = "awc", form: Literal["atc", "semi"] = "semi") -> Plan:
    syncs = [Sync(what="gradients", peers=Ring()), mixing(order)]
    return Plan(syncs, [GradientTracking(form=form), Stiefel("w")])


# ---------------------------------------------------------------------- the geometry


@pytest.mark.parametrize("method", ["svd", "newton_schulz"])
@pytest.mark.parametrize("shape", [(10, 3), (3, 10), (4, 4), (5, 1)])
def test_polar_is_the_nearest_point(shape: tuple[int, int], method: Literal["svd", "newton_schulz"]) -> None:
    x = polar(normal(*shape, seed=3)) + 0.1 * normal(*shape, seed=4)
    point = polar(x, method)
    tall, near = (x, point) if shape[0] >= shape[1] else (x.T, point.T)
    assert infeasibility(near) < 1e-13
    product = near.T @ tall  # symmetric and positive definite: that makes it the polar factor
    torch.testing.assert_close(product, product.T, rtol=0, atol=1e-13)
    assert float(torch.linalg.eigvalsh(product)[0]) > 0


def test_newton_schulz_leaves_far_matrices_to_the_singular_values() -> None:
    x = 5.0 * normal(6, 3)
    torch.testing.assert_close(polar(x, "newton_schulz"), polar(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", [(10, 3), (3, 10), (4, 4)])
def test_tangent_is_an_orthogonal_projection_on_what_keeps_the_constraint(shape: tuple[int, int]) -> None:
    x, z, other = polar(normal(*shape)), normal(*shape, seed=1), normal(*shape, seed=2)
    t = tangent(x, z)
    tall, along = (x, t) if shape[0] >= shape[1] else (x.T, t.T)
    assert float((tall.T @ along + along.T @ tall).abs().max()) < 1e-14
    torch.testing.assert_close(tangent(x, t), t, rtol=0, atol=1e-14)
    assert float(((z - t) * tangent(x, other)).sum()) == pytest.approx(0.0, abs=1e-13)


# ---------------------------------------------------------------------- the recursions


def w() -> Tensor:
    return Ring().matrix(N).double()


def mix(x: Tensor, rounds: int = 1) -> Tensor:
    return torch.einsum("ij,jkl->ikl", torch.linalg.matrix_power(w(), rounds), x)


def each(function: Callable[..., Tensor], *stacks: Tensor) -> Tensor:
    return torch.stack([function(*rows) for rows in zip(*stacks, strict=True)])


def riemannian(x: Tensor) -> Tensor:
    return torch.stack([tangent(x[i], pca_gradient(i, x[i])) for i in range(N)])


@pytest.mark.parametrize("rounds", [1, 3])
def test_drcgd_is_the_recursion_of_the_paper(rounds: int) -> None:
    lr, x = 0.05, START.expand(N, D, R)
    g = riemannian(x)
    eta = -g
    sim = pca(drcgd(rounds), lr)
    for _ in range(30):
        x = each(polar, mix(x, rounds) + lr * eta)
        new = riemannian(x)
        b = (new.square().sum((1, 2)) / g.square().sum((1, 2))).clamp(max=1.0).view(N, 1, 1)
        eta, g = -new + b * each(tangent, x, mix(eta, rounds)), new
        torch.testing.assert_close(sim.run(1).stacked("w"), x, rtol=0, atol=1e-12)


def test_riemannian_tracking_is_its_recursion() -> None:
    lr, x = 0.1, START.expand(N, D, R)
    g = y = riemannian(x)
    sim = pca(tracking(), lr)
    for _ in range(30):
        x = each(polar, mix(x) - lr * each(tangent, x, y))
        new = riemannian(x)
        y, g = mix(y) + new - g, new
        torch.testing.assert_close(sim.run(1).stacked("w"), x, rtol=0, atol=1e-12)


def test_wide_matrices_are_tall_ones_lying_down() -> None:
    tall, wide = pca(drcgd(), 0.05).run(20), pca(drcgd(), 0.05, wide=True).run(20)
    torch.testing.assert_close(wide.stacked("w").mT, tall.stacked("w"), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "plan",
    [tracking("awc", "semi"), tracking("atc", "semi"), tracking("atc", "atc")],
    ids=["awc, semi", "atc, semi", "atc, atc"],
)
def test_riemannian_tracking_is_exact(plan: Plan) -> None:
    gap, distance = outcome(pca(plan, 0.15), 300)
    assert abs(gap) < 1e-13
    assert distance < 1e-22


def test_without_tracking_a_neighbourhood_is_reached() -> None:
    def falling(step: int) -> float:
        return 0.3 / step**0.5

    plain = outcome(pca(Plan([mixing()], [Stiefel("w")]), 0.3), 150, falling)
    conjugate = outcome(pca(drcgd(), 0.3), 150, falling)
    constant = outcome(pca(drcgd(), 0.05), 150)
    closer = outcome(pca(drcgd(3), 0.05), 150)
    for gap, distance in (plain, conjugate, constant, closer):
        assert 1e-6 < gap < 1e-2
        assert 1e-5 < distance < 1e-2
    assert closer[1] < constant[1] / 4


# ---------------------------------------------------------------------- on the manifold, always


@pytest.mark.parametrize(
    "sync",
    [
        Sync(when=Every(4), peers=Ring()),
        Sync(when=Every(4), peers=Ring(), apply=Delay(2)),
        Sync(peers=Ring(), apply=Blocking("cta")),
        Sync(peers=Ring(), codec=Difference(TopK(0.3), 0.3)),
        Sync(when=Every(3)),
        Sync(when=Every(3), codec=TopK(0.5), signal="delta"),
    ],
    ids=repr,
)
def test_every_rank_is_feasible_after_every_step(sync: Sync) -> None:
    sim = pca(Plan([sync], [Stiefel("w")]), 0.1)
    for _ in range(12):
        assert infeasibility(sim.run(1).stacked("w")) < 1e-12
    spread = sim.stacked("w")
    assert float((spread - START).abs().max()) > 0.1  # it does move


def test_only_matching_parameters_are_held() -> None:
    def backward(rank: int, p: dict[str, Tensor], step: int) -> None:
        for t in p.values():
            t.grad = t.detach() - 1.0

    init = {"turn": 2.0 * normal(4, 4), "free": normal(4, 4, seed=1), "bias": normal(4, seed=2)}
    plan = Plan([Sync(peers=Ring())], [Stiefel("turn", method="newton_schulz")])
    sim = Simulation(plan, 4, lambda rank: init, backward, lambda ps: torch.optim.Adam(ps, lr=0.05)).run(0)
    torch.testing.assert_close(sim.stacked("turn")[0], polar(init["turn"]), rtol=0, atol=1e-13)  # from the start
    sim.run(200)
    assert infeasibility(sim.stacked("turn")) < 1e-12
    torch.testing.assert_close(sim.stacked("free"), torch.ones(4, 4, 4).double(), rtol=0, atol=1e-2)
    torch.testing.assert_close(sim.stacked("bias"), torch.ones(4, 4).double(), rtol=0, atol=1e-2)


def test_float32_stays_near() -> None:
    backward = lambda rank, p, step: setattr(p["w"], "grad", pca_gradient(rank, p["w"].detach().double()).float())  # noqa: E731
    sim = Simulation(
        drcgd(), N, lambda rank: {"w": START.float()}, backward, lambda ps: torch.optim.SGD(ps, lr=0.05)
    ).run(50)
    assert infeasibility(sim.stacked("w")) < 2e-6


DELAYED = Plan([Sync(when=Every(3), peers=Ring(), apply=Delay(2))], [Stiefel("w")])


@pytest.mark.parametrize("plan", [drcgd(), tracking(), DELAYED], ids=["drcgd", "tracking", "delay"])
def test_resume_is_exact(plan: Plan) -> None:
    whole, first, second = pca(plan, 0.05).run(10), pca(plan, 0.05).run(4), pca(plan, 0.05)
    lockstep([engine.land() for engine in first.engines])
    for a, b, old, new in zip(first.engines, second.engines, first.replicas, second.replicas, strict=True):
        b.load_state_dict(pickle.loads(pickle.dumps(a.state_dict())))
        new["w"].data.copy_(old["w"].data)
    assert torch.equal(second.run(6).stacked("w"), whole.stacked("w"))


# ---------------------------------------------------------------------- what is refused


NEEDS_TRACKER = r"needs a plan with one Sync\(what=Tracker"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Stiefel(""), r"Stiefel\(match=''\): must be a pattern "),
        (lambda: Stiefel(method="qr"), r"Stiefel\(method='qr'\): must be one of 'svd', 'newton_schulz'"),  # type: ignore[arg-type]
        (lambda: Plan([Sync(outer=Nesterov())], [Stiefel()]), "Stiefel: an outer optimizer "),
        (
            lambda: Plan([Sync(what="gradients"), Sync()], [Stiefel(), GradientTracking()]),
            "Stiefel: must come after corrections that send gradients, ",
        ),
        (
            lambda: Plan([Sync(peers=Ring())], [ExactDiffusion(), Stiefel()]),
            r"Stiefel: ExactDiffusion\(\) adds gradients of different points, which is right in flat space only; ",
        ),
        (
            lambda: Plan([Sync(what="tracker"), Sync()], [ConjugateGradient()]),
            r"ConjugateGradient\(\): needs Stiefel\(match='\*'\) before it ",
        ),
        (lambda: Plan([Sync()], [Stiefel(), ConjugateGradient()]), rf"ConjugateGradient\(\): {NEEDS_TRACKER}"),
        (
            lambda: Plan([Sync(what=Tracker("a")), Sync()], [Stiefel("b"), ConjugateGradient("b")]),
            rf"ConjugateGradient\(match='b'\): {NEEDS_TRACKER}",
        ),
    ],
)
def test_refusals_in_one_line(make: Callable[[], Correction | Plan], text: str) -> None:
    with pytest.raises(ValueError, match=rf"^{text}[^\n]*$"):
        make()


def test_matches_that_are_no_matrices_are_refused() -> None:
    def run(match: str) -> None:
        Simulation(
            Plan([Sync(what=Parameters())], [Stiefel(match)]),
            2,
            lambda rank: {"w": START, "bias": normal(3)},
            lambda rank, p, step: None,
            lambda ps: torch.optim.SGD(ps, lr=0.1),
        )

    with pytest.raises(ValueError, match=r"^Stiefel\(match='\*'\): 'bias' of shape \(3,\) is no matrix, [^\n]*$"):
        run("*")
    with pytest.raises(ValueError, match=r"^Stiefel\(match='v'\): matches none of the trainable parameters$"):
        run("v")
    run("w")


def test_the_published_names_are_these_configurations() -> None:
    assert plans.drcgd("w", rounds=2) == drcgd(2)
    assert plans.riemannian_tracking("w").syncs[0] == tracking().syncs[0]
    assert plans.riemannian_tracking("w").corrections == tracking().corrections
    assert plans.riemannian_tracking("w").syncs[1].apply == Blocking("awc")
