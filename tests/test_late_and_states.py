"""CO2, SlowMo, post-local SGD, DES-LOC and MT-DAO against their pseudo-code and limiting cases."""

from __future__ import annotations

import pytest
import torch
from problems import Quadratics, adam, mosaic_simulation, p2, sgd
from test_local_updates import close, path
from torch import Tensor

from lightning_dopt import CoordinateClip, Every, HeavyBall, Plan, Sync, outer, plans
from lightning_dopt.forecast import forecast
from lightning_dopt.optim import FrozenScaling, MultiMomentumAdam, StaleMomentum

# ---------------------------------------------------------------------- SlowMo, post-local SGD


def test_slowmo_follows_its_pseudo_code() -> None:
    live = path(p2(), plans.slowmo(4, 0.8, 0.6), 24, 0.05)
    x, start, u = (torch.zeros(8, 5, dtype=torch.float64) for _ in range(3))
    for step in range(1, 25):
        x = x - 0.05 * torch.stack([p2().gradient(i, x[i]) for i in range(8)])
        if step % 4 == 0:
            u = 0.6 * u + (start - x.mean(0)) / 0.05
            start = start - 0.8 * 0.05 * u
            x = start.clone()
        close(live[step], x)
    close(path(p2(), plans.slowmo(4, 1.0, 0.0), 24, 0.05), path(p2(), plans.local_sgd(4), 24, 0.05))


def test_post_local_sgd_is_dense_first_and_rare_later() -> None:
    plan = plans.post_local_sgd(10, 4)
    due = [s for s in range(1, 23) if any(sync.when.due(s) for sync in plan)]
    assert due == [*range(1, 11), 14, 18, 22]
    live = path(p2(), plan, 22, 0.05)
    close(live[:11, 0], p2().centralized(10, 0.05))
    close(live[22], path(p2(), plans.local_sgd(4), 12, 0.05, live[10])[12])


# ---------------------------------------------------------------------- CO2


@pytest.mark.parametrize(("mu", "clip", "penalty"), [(0.0, None, 1.0), (0.3, None, 2.0), (0.5, 0.02, 1.0)])
def test_co2_follows_its_pseudo_code(mu: float, clip: float | None, penalty: float) -> None:
    live = path(p2(), plans.co2(3, 0.6, mu, clip, penalty), 21, 0.05)
    x, m = torch.zeros(8, 5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    start, before, end = torch.zeros(5, dtype=torch.float64), None, None
    for step in range(1, 22):
        x = x - 0.05 * torch.stack([p2().gradient(i, x[i]) for i in range(8)])
        if step % 3 == 0:
            now = x.mean(0)
            if end is not None and before is not None:
                m = mu * m + (before - end) / penalty
                m = m.clamp(-clip, clip) if clip is not None else m
            before, end = start, now
            start = start - 0.6 * m
            x = start.expand(8, 5).clone()
        close(live[step], x)


def test_gap_aware_penalty_by_hand() -> None:
    """Two elements: the gap is the last step, measured by its mean; decay 0.9 from the second gap on."""
    x = torch.zeros(2, dtype=torch.float64)
    opt = StaleMomentum([x], lr=0.5, momentum=0.0, clip=None, gap_aware=True)

    def step(*grad: float) -> list[float]:
        x.grad = torch.tensor(grad, dtype=torch.float64)
        opt.step()
        return x.tolist()

    assert step(1.0, 3.0) == [-0.5, -1.5]  # no gap yet
    # gaps 0.5 and 1.5, mean 1: penalties 1.5 and 2.5
    assert step(3.0, 5.0) == pytest.approx([-0.5 - 1.0, -1.5 - 1.0])
    # gaps 1 and 1, size 0.9 * 1 + 0.1 * 1: penalty 2
    assert step(2.0, 2.0) == pytest.approx([-2.0, -3.0])
    # gaps 0.5 and 0.5, size 0.9 + 0.05: penalty 1 + 0.5 / 0.95
    late = 1 / (1 + 0.5 / 0.95)
    assert step(2.0, 4.0) == pytest.approx([-2.0 - late, -3.0 - 2 * late])


def test_without_delay_co2s_outer_step_is_slowmo() -> None:
    fresh = Plan([Sync(Every(4), outer=outer.LateMomentum(0.9, 0.4, None))])
    close(path(p2(), fresh, 24, 0.05), path(p2(), plans.slowmo(4, 0.9, 0.4), 24, 0.05))
    plain = Plan([Sync(Every(4), outer=outer.LateMomentum(1.0, 0.0, None))])
    close(path(p2(), plain, 24, 0.05), path(p2(), plans.local_sgd(4), 24, 0.05))


def test_the_clip_clips() -> None:
    frozen = path(p2(), plans.co2(2, clip=0.0), 12, 0.1)
    assert float(frozen[::2].abs().max()) == 0.0
    sim = p2().simulate(plans.co2(2, 1.0, 0.5, clip=0.01), 0.1)
    for _ in range(10):
        sim.run(2)
        lane = sim.engines[0].runners[0].lanes[0]
        buffer = next(iter(lane.optimizer.state.values()))["momentum_buffer"]  # type: ignore[union-attr]
        assert float(buffer.abs().max()) <= 0.01
    assert float(buffer.abs().max()) == 0.01
    loose = path(p2(), plans.co2(3, 0.5, clip=1e9), 24, 0.05)
    assert torch.equal(loose, path(p2(), plans.co2(3, 0.5, clip=None), 24, 0.05))


@pytest.mark.filterwarnings("ignore:Sync")
@pytest.mark.parametrize("mu", [0.0, 0.3, 0.6])
def test_late_heavy_ball_is_stable_below_one_minus_momentum(mu: float) -> None:
    def growth(rate: float) -> float:
        plan = plans.co2(2, rate, mu, clip=None)
        e = path(Quadratics.scalar([1, 1], [0, 0]), plan, 400, 1.0, 1.0)[::2].abs().amax((1, 2))
        return float(e[-25:].max() / e[25:50].max())

    assert growth(0.95 * (1 - mu)) < 0.9
    assert growth(1.05 * (1 - mu)) > 1.1


def test_a_quarter_is_the_best_rate_without_momentum() -> None:
    """Contraction one half per round."""
    e = path(Quadratics.scalar([1, 1], [0, 0]), plans.co2(1, 0.25, clip=None), 60, 1.0, 1.0)[:, 0, 0]
    assert float(e[60] / e[40]) ** (1 / 20) == pytest.approx(0.5, abs=0.02)


def test_starts_are_equal_and_a_round_hides_the_message() -> None:
    from lightning_dopt import Link

    sim = p2().simulate(plans.co2(3), 0.05)
    for _ in range(6):
        rows = sim.run(3).stacked()
        assert all(torch.equal(row, rows[0]) for row in rows)
    shapes, link = {"x": (1000, 100)}, Link(mbit=10, ms=5)
    hidden = forecast(plans.co2(10), 4, shapes, 40, link, 0.1)
    waiting = forecast(plans.local_sgd(10), 4, shapes, 40, link, 0.1)
    each = link.all_reduce(400_000, 4)
    assert each < 10 * 0.1
    assert waiting.stall_s == pytest.approx(4 * each)
    assert hidden.stall_s == pytest.approx(each)  # the last, at the end
    slow = Link(mbit=2, ms=5)
    late = forecast(plans.co2(10), 4, shapes, 40, slow, 0.1)
    assert late.stall_s == pytest.approx(4 * slow.all_reduce(400_000, 4) - 3 * 10 * 0.1)


# ---------------------------------------------------------------------- DES-LOC


def local_adam(h: int) -> Plan:
    return Plan([Sync(Every(h)), Sync(Every(h), "optimizer.exp_avg"), Sync(Every(h), "optimizer.exp_avg_sq")])


def test_equal_periods_are_local_adam() -> None:
    assert plans.desloc(4, {"exp_avg": 4, "exp_avg_sq": 4}) == local_adam(4)
    never = plans.desloc(4, {"exp_avg": 10**6, "exp_avg_sq": 10**6})
    mine = mosaic_simulation(never, 4, adam).run(20).stacked("head.weight")
    assert torch.equal(mine, mosaic_simulation(plans.local_sgd(4), 4, adam).run(20).stacked("head.weight"))


def test_desloc_follows_its_pseudo_code() -> None:
    """Averages before the step whose number (from 0) a period divides; clipping first. One final average joins both."""
    problem, n, kx, ku, kv, rho = p2(), 8, 2, 4, 6, 0.7
    b1, b2, lr, eps = 0.8, 0.9, 0.03, 1e-8
    x, u, v = (torch.zeros(n, 5, dtype=torch.float64) for _ in range(3))
    for t in range(24):
        g = torch.stack([problem.gradient(i, x[i]) for i in range(n)]).clamp(-rho, rho)
        if t % ku == 0:
            u = u.mean(0).expand(n, 5)
        if t % kv == 0:
            v = v.mean(0).expand(n, 5)
        if t % kx == 0:
            x = x.mean(0).expand(n, 5)
            g = torch.stack([problem.gradient(i, x[i]) for i in range(n)]).clamp(-rho, rho)
        u, v = b1 * u + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        x = x - lr * (u / (1 - b1 ** (t + 1))) / ((v / (1 - b2 ** (t + 1))).sqrt() + eps)

    def inner(ps: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.Adam(ps, lr=lr, betas=(b1, b2), eps=eps)

    sim = problem.simulate(plans.desloc(kx, {"exp_avg": ku, "exp_avg_sq": kv}, clip=rho), inner).run(24)
    close(sim.stacked(), x.mean(0).expand(n, 5), 1e-9)


def test_momentum_averaged_in_every_step_is_momentum_sgd_on_the_mean_gradient() -> None:
    plan = plans.desloc(1, {"momentum_buffer": 1})
    close(path(p2(), plan, 30, sgd(0.05, 0.8))[:, 2], p2().centralized(30, sgd(0.05, 0.8)))


def test_desloc_sends_half_of_local_adam_and_170_times_less_than_data_parallel() -> None:
    shapes = {"x": (64, 64)}
    mine = forecast(plans.desloc(), 4, shapes, 1536).bytes[0]
    ddp = forecast(Plan([Sync(what="gradients")]), 4, shapes, 1536).bytes[0]
    assert mine * 1536 == ddp * 9
    assert forecast(local_adam(256), 4, shapes, 1536).bytes[0] == 2 * mine
    assert (
        forecast(plans.mt_dao(32), 4, shapes, 96).bytes[0] * 32
        == 3 * forecast(Plan([Sync(what="gradients")]), 4, shapes, 96).bytes[0]
    )


def test_moments_drift_within_their_bounds() -> None:
    """Clipped gradients: ``|u_{t+K} - u_t| <= 2 rho (1 - beta1^K)`` and ``|v_{t+K} - v_t| <= rho^2 (1 - beta2^K)``."""
    rho, b1, b2, k = 0.1, 0.9, 0.99, 5
    plan = Plan([], [CoordinateClip(rho)])

    def inner(ps: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.Adam(ps, lr=0.2, betas=(b1, b2))

    sim = mosaic_simulation(plan, 2, inner).run(1)
    state = sim.optimizers[0].state[sim.replicas[0]["head.weight"]]
    tight = 0.0
    for _ in range(12):
        u, v = state["exp_avg"].clone(), state["exp_avg_sq"].clone()
        sim.run(k)
        tight = max(tight, float((state["exp_avg"] - u).abs().max()) / (2 * rho * (1 - b1**k)))
        assert float((state["exp_avg_sq"] - v).abs().max()) <= rho**2 * (1 - b2**k) * 1.001
    assert 0.1 < tight <= 1.0


def test_a_rank_that_lost_its_states_gets_those_of_the_others_back() -> None:
    """Averaged states reach whoever joins; with local states it stays apart for as long as they remember."""

    def apart(plan: Plan) -> float:
        sim = mosaic_simulation(plan, 4, adam).run(12)
        for state in sim.optimizers[2].state.values():
            state["exp_avg_sq"].zero_().add_(100.0)
        sim.run(12)
        rows = [o.state[r["head.weight"]]["exp_avg_sq"] for o, r in zip(sim.optimizers, sim.replicas, strict=True)]
        return float((rows[2] - rows[0]).abs().mean())

    assert apart(plans.desloc(4, {"exp_avg": 4, "exp_avg_sq": 12})) == 0.0
    assert apart(plans.local_sgd(4)) > 50.0


# ---------------------------------------------------------------------- MT-DAO


def twin(optimizer: object, reference: object, steps: int = 12) -> None:
    g = torch.Generator().manual_seed(0)
    a = torch.randn(7, generator=g, dtype=torch.float64).requires_grad_()
    b = a.detach().clone().requires_grad_()
    first, second = optimizer([a]), reference([b])  # type: ignore[operator]
    for k in range(steps):
        a.grad, b.grad = torch.cos(a.detach() * 3 + k), torch.cos(b.detach() * 3 + k)
        first.step(), second.step()
        close(a.detach(), b.detach(), 1e-11)


def test_one_momentum_with_full_weight_is_adamw() -> None:
    twin(
        lambda ps: MultiMomentumAdam(ps, 0.01, (0.9,), (1.0,), 0.99, weight_decay=0.1),
        lambda ps: torch.optim.AdamW(ps, 0.01, (0.9, 0.99), weight_decay=0.1),
    )


def test_no_momentum_is_an_adaptive_step_on_the_gradient() -> None:
    twin(
        lambda ps: MultiMomentumAdam(ps, 0.01, (0.9,), (0.0,), 0.99, 1e-6, bias_correction=False),
        lambda ps: torch.optim.RMSprop(ps, 0.01, alpha=0.99, eps=1e-6),
    )


def test_equal_momenta_are_one() -> None:
    twin(
        lambda ps: MultiMomentumAdam(ps, 0.01, (0.9, 0.9), (0.3, 0.5), 0.99),
        lambda ps: MultiMomentumAdam(ps, 0.01, (0.9,), (0.8,), 0.99),
    )


def test_adopt_by_hand() -> None:
    """The first step starts the second moment; then the gradient is divided by the root of the previous one."""
    x = torch.zeros(1, dtype=torch.float64)
    opt = MultiMomentumAdam([x], 0.1, (0.5,), (0.8,), 0.9, base="adopt")
    for grad in (2.0, 4.0, 6.0):
        x.grad = torch.full_like(x, grad)
        opt.step()
    v1 = 4.0
    g2, u2 = 4.0 / v1**0.5, 0.5 * 4.0 / v1**0.5
    v2 = 0.9 * v1 + 0.1 * 16.0
    g3 = 6.0 / v2**0.5
    u3 = 0.5 * u2 + 0.5 * g3
    assert float(x) == pytest.approx(-0.1 * (0.2 * g2 + 0.8 * u2) - 0.1 * (0.2 * g3 + 0.8 * u3), abs=1e-12)


def test_quasi_hyperbolic_sgd_averaged_in_every_step_is_that_of_the_mean_gradient() -> None:
    def inner(ps: list[Tensor]) -> torch.optim.Optimizer:
        return MultiMomentumAdam(ps, 0.05, (0.9,), (0.7,), None, bias_correction=False)

    plan = plans.mt_dao(1, {"exp_avg": 1})
    close(path(p2(), plan, 30, inner)[:, 4], p2().centralized(30, inner))


@pytest.mark.parametrize(("beta", "left"), [(0.9, 0.0343), (0.999, 0.9685)])
def test_a_slow_momentum_outlasts_a_round(beta: float, left: float) -> None:
    def inner(ps: list[Tensor]) -> torch.optim.Optimizer:
        return MultiMomentumAdam(ps, 0.01, (beta,), (1.0,), None)

    sim = p2().simulate(plans.mt_dao(4, {"exp_avg": 4}), inner).run(4)
    state = sim.optimizers[0].state[sim.replicas[0]["x"]]
    shared = state["exp_avg"].clone()
    sim.backward = lambda rank, parameters, step: parameters["x"].__setattr__(
        "grad", torch.zeros(5, dtype=torch.float64)
    )
    for engine in sim.engines:
        engine.runners.clear()  # 32 steps on their own
    sim.run(32)
    ratio = state["exp_avg"] / shared
    close(ratio, torch.full_like(ratio, beta**32), 1e-9)
    assert beta**32 == pytest.approx(left, abs=1e-3)


def test_every_momentum_has_a_period_of_its_own() -> None:
    def inner(ps: list[Tensor]) -> torch.optim.Optimizer:
        return MultiMomentumAdam(ps, 0.01, (0.9, 0.99), (0.4, 0.5))

    sim = p2().simulate(plans.mt_dao(2, {"exp_avg": 2, "exp_avg_1": 3}), inner).run(2)

    def equal(key: str) -> bool:
        rows = [o.state[r["x"]][key] for o, r in zip(sim.optimizers, sim.replicas, strict=True)]
        return all(torch.equal(row, rows[0]) for row in rows)

    assert (equal("exp_avg"), equal("exp_avg_1")) == (True, False)
    sim.run(1)
    assert (equal("exp_avg"), equal("exp_avg_1")) == (False, True)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: plans.desloc(0), r"desloc\(sync_every=0\)"),
        (lambda: plans.desloc(4, {"exp_avg": 0}), r"desloc\(states\['exp_avg'\]=0\)"),
        (lambda: plans.desloc(clip=0.0), r"desloc\(clip=0.0\)"),
        (lambda: plans.mt_dao(0), r"mt_dao\(sync_every=0\)"),
        (lambda: plans.co2(penalty=0.5), r"co2\(penalty=0.5\)"),
        (lambda: plans.co2(clip=-1.0), r"co2\(clip=-1.0\)"),
        (lambda: plans.savic(0), r"savic\(sync_every=0\)"),
        (lambda: plans.savic(scope="all"), r"savic\(scope='all'\)"),  # type: ignore[arg-type]
        (lambda: FrozenScaling([torch.zeros(1)], floor=0.0), r"FrozenScaling\(floor=0.0\)"),
        (lambda: plans.slowmo(outer_momentum=1.0), r"slowmo\(outer_momentum=1.0\)"),
        (lambda: plans.post_local_sgd(start=0), r"post_local_sgd\(start=0\)"),
        (lambda: CoordinateClip(0.0), r"CoordinateClip\(bound=0.0\)"),
        (lambda: MultiMomentumAdam([torch.zeros(1)], betas=(0.9,), weights=(0.5, 0.6)), "one weight"),
        (lambda: MultiMomentumAdam([torch.zeros(1)], beta2=None, base="adopt"), "ADOPT divides"),
    ],
)
def test_bad_options_are_refused_in_one_line(make: object, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        make()  # type: ignore[operator]
    assert "\n" not in str(caught.value)


def test_heavy_ball_outer_is_allowed_beside_states() -> None:
    assert plans.desloc(4, outer=HeavyBall()).syncs[0].outer == HeavyBall()


# ---------------------------------------------------------------------- SAVIC


def frozen(every: int, lr: float = 0.05, **options: float | bool) -> object:
    return lambda ps: FrozenScaling(ps, lr, every, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("h", [1, 3])
def test_savic_follows_its_pseudo_code(h: int, squared: bool) -> None:
    problem, beta, floor = p2(), 0.6, 0.3
    live = path(problem, plans.savic(h), 24, frozen(h, beta=beta, floor=floor, squared=squared))  # type: ignore[arg-type]
    x, scale = torch.zeros(8, 5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    for step in range(1, 25):
        g = torch.stack([problem.gradient(i, x[i]) for i in range(8)])
        x = x - 0.05 * g / (scale.sqrt() if squared else scale).clamp(min=floor)
        if step % h == 0:
            x = x.mean(0).expand(8, 5)
            s = g.mean(0).square() if squared else g.mean(0).abs()
            scale = s if step == h else beta * scale + (1 - beta) * s
        close(live[step], x)


def test_savic_with_an_even_scaling_is_local_sgd_and_local_scalings_differ() -> None:
    inner = frozen(4, beta=0.9, floor=1e3, lr=50.0)  # the floor is above all statistics: D = 1000 from the start
    close(path(p2(), plans.savic(4), 24, inner), path(p2(), plans.local_sgd(4), 24, 0.05))  # type: ignore[arg-type]

    def scales(scope: str) -> Tensor:
        sim = p2().simulate(plans.savic(4, scope), frozen(4)).run(9)  # type: ignore[arg-type]
        return torch.stack([o.state[r["x"]]["scale"] for o, r in zip(sim.optimizers, sim.replicas, strict=True)])

    assert float(scales("global").std(0).max()) == 0.0
    assert float(scales("local").std(0).min()) > 0.0
    assert plans.savic(4, "local") == plans.local_sgd(4)


def test_the_right_scaling_contracts_all_coordinates_alike() -> None:
    curvature = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)
    x = torch.ones(3, dtype=torch.float64)
    opt = FrozenScaling([x], lr=0.2, every=5, beta=1.0)
    opt.state[x] = {"step": torch.tensor(10.0), "scale": curvature.square(), "statistic": torch.zeros_like(x)}
    for _ in range(5):
        x.grad = curvature * x
        opt.step()
    close(x, torch.full((3,), 0.8**5, dtype=torch.float64))


def test_a_statistic_doubles_the_bytes() -> None:
    shapes = {"x": (64, 64)}
    one, two = (forecast(plans.savic(8, scope), 4, shapes, 32).bytes[0] for scope in ("local", "global"))
    assert two == 2 * one
