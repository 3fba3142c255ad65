"""Methods that communicate every H steps, against closed forms and against each other."""

from __future__ import annotations

import pytest
import torch
from problems import Quadratics, p1, p2, sgd
from torch import Tensor

from lightning_dopt import (
    AtEnd,
    Delay,
    Every,
    HeavyBall,
    Lerp,
    Nesterov,
    OneRound,
    Plan,
    RandomPairs,
    Sync,
    outer,
    plans,
)

PLAIN = outer.SGD()


def path(problem: Quadratics, plan: Plan, steps: int, optimizer: object, start: object = 0.0, **kw: int) -> Tensor:
    """The weights of all ranks after every step, shape (steps + 1, n, d)."""
    sim = problem.simulate(plan, optimizer, start, **kw)  # type: ignore[arg-type]
    rows = [sim.stacked()]
    for _ in range(steps):
        rows.append(sim.run(1).stacked())
    return torch.stack(rows)


def close(a: Tensor, b: Tensor, tol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def same_curvature(n: int = 4) -> Quadratics:
    g = torch.Generator().manual_seed(1)
    m = torch.randn(3, 3, generator=g, dtype=torch.float64)
    c = torch.randn(n, 3, generator=g, dtype=torch.float64)
    return Quadratics((m @ m.T / 3 + torch.eye(3)).expand(n, 3, 3), c)


# ---------------------------------------------------------------------- DiLoCo


def test_diloco_moves_the_anchor_as_computed_by_hand() -> None:
    problem = Quadratics.scalar([1, 1], [0, 0])
    weights = path(problem, plans.diloco(sync_every=10), 40, 0.1, 1.0)
    expected = torch.tensor([1.0, 0.133742, -0.351412, -0.428759, -0.271151], dtype=torch.float64)
    torch.testing.assert_close(weights[::10, 0, 0], expected, rtol=0, atol=5e-7)
    assert torch.equal(weights[::10, 0], weights[::10, 1])


@pytest.mark.parametrize("h", [1, 3, 10])
@pytest.mark.parametrize(("lr", "mu"), [(0.7, 0.9), (1.0, 0.5), (0.3, 0.3)])
def test_diloco_follows_its_recursion(h: int, lr: float, mu: float) -> None:
    """``e' = (1 + mu)(1 - s) e - mu (1 - s) e_before``, first ``1 - (1 + mu) s``; ``s = lr (1 - (1 - eta)^H)``."""
    problem = Quadratics.scalar([1, 1, 1], [0, 0, 0])
    plan = plans.diloco(h, outer_lr=lr, outer_momentum=mu)
    e = path(problem, plan, 8 * h, 0.1, 1.0)[::h, 0, 0]
    s = lr * (1 - 0.9**h)
    expected = [1.0, 1 - (1 + mu) * s]
    while len(expected) < len(e):
        expected.append((1 + mu) * (1 - s) * expected[-1] - mu * (1 - s) * expected[-2])
    close(e, torch.tensor(expected, dtype=torch.float64))


def test_one_local_step_and_plain_averaging_is_sgd_on_the_mean_gradient() -> None:
    weights = path(p2(), Plan([Sync(outer=PLAIN)]), 30, 0.1)
    expected = p2().centralized(30, 0.1)
    close(weights, expected.unsqueeze(1).expand(31, 8, 5))


def test_one_local_step_and_outer_nesterov_is_nesterov_sgd_on_the_mean_gradient() -> None:
    plan = plans.diloco(1, outer_lr=1.0, outer_momentum=0.8)
    expected = p2().centralized(40, sgd(0.05, momentum=0.8, nesterov=True))
    close(path(p2(), plan, 40, 0.05)[:, 3], expected)


def test_one_local_step_and_outer_heavy_ball_is_momentum_sgd_on_the_mean_gradient() -> None:
    plan = Plan([Sync(outer=HeavyBall(lr=1.0, momentum=0.8))])
    expected = p2().centralized(40, sgd(0.05, momentum=0.8))
    close(path(p2(), plan, 40, 0.05)[:, 7], expected)


@pytest.mark.parametrize("h", [2, 7])
def test_plain_outer_sgd_is_parameter_averaging(h: int) -> None:
    with_anchor = path(p2(), Plan([Sync(when=Every(h), signal="delta", outer=PLAIN)]), 29, 0.1)
    close(with_anchor, path(p2(), plans.local_sgd(h), 29, 0.1))
    sim = p2().simulate(Plan(), 0.1)  # the same written as a loop over rounds
    for _ in range(29 // h):
        mean = sim.run(h).stacked().mean(0)
        for replica in sim.replicas:
            replica["x"].data.copy_(mean)
    close(with_anchor[29 // h * h], sim.stacked())


def test_one_worker_averages_with_itself() -> None:
    problem = Quadratics(p2().A[:1], p2().c[:1])
    alone = path(problem, Plan(), 12, 0.1)
    assert torch.equal(path(problem, plans.local_sgd(3), 12, 0.1), alone)
    close(path(problem, Plan([Sync(when=Every(3), outer=PLAIN)]), 12, 0.1), alone)
    lookahead = path(problem, Plan([Sync(when=Every(3), outer=outer.SGD(0.5))]), 3, 0.1)[-1]
    close(lookahead, 0.5 * (alone[0] + alone[3]))
    assert (path(problem, plans.diloco(3), 12, 0.1)[-1] - alone[-1]).abs().max() > 1e-2


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_linear_invariance(momentum: float) -> None:
    """With equal curvatures the mean over workers does not depend on how often they average."""
    problem, inner = same_curvature(), sgd(0.1, momentum)
    reference = path(problem, Plan(), 20, inner).mean(1)
    spread = path(problem, Plan(), 20, inner)[-1].std(0).min()
    assert spread > 0.1
    for plan in (plans.local_sgd(1), plans.local_sgd(2), plans.local_sgd(5), Plan([Sync(when=Every(5), outer=PLAIN)])):
        close(path(problem, plan, 20, inner).mean(1), reference)
    merged = problem.simulate(plans.lo_fi(), inner).run(20).finish().stacked()
    close(merged, reference[-1].expand(4, 3))


@pytest.mark.parametrize("h", [1, 4, 20])
def test_fedavg_bias(h: int) -> None:
    """The fixed point is ``(sum B_i)^-1 sum B_i c_i`` with ``B_i = I - (I - eta A_i)^H``."""
    problem, eta = p2(), 0.1
    eye = torch.eye(5, dtype=torch.float64)
    b = eye - torch.linalg.matrix_power(eye - eta * problem.A, h)
    fixed = torch.linalg.solve(b.sum(0), (b @ problem.c.unsqueeze(-1)).sum(0)).squeeze(-1)
    weights = problem.simulate(plans.local_sgd(h), eta).run(h * max(300 // h, 30)).stacked()
    close(weights, fixed.expand(8, 5), 1e-8)
    distance = float((fixed - problem.optimum()).norm())
    assert distance < 1e-12 if h == 1 else distance > 0.02


def test_after_each_round_all_ranks_and_anchors_are_bit_equal() -> None:
    sim = p2().simulate(plans.diloco(3), 0.1)
    for _ in range(5):
        rows = sim.run(3).stacked()
        anchors = [e.runners[0].lanes[0].anchor for e in sim.engines]
        assert all(torch.equal(row, rows[0]) for row in rows)
        assert all(torch.equal(a, rows[0]) for a in anchors)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- delayed application


def test_streaming_closed_form() -> None:
    """Send every 10 steps, apply three steps later, half of the live weight stays."""
    plan = Plan([Sync(when=Every(10), outer=PLAIN, apply=Delay(3, Lerp(0.5)))])
    problem = Quadratics.scalar([1, 1], [0, 0])
    sim = problem.simulate(plan, 0.05, 1.0)
    pairs = []
    for t in range(1, 34):
        sim.run(1)
        if t in (13, 23, 33):
            anchor = sim.engines[1].runners[0].lanes[0].anchor
            pairs.append((float(anchor), float(sim.stacked()[1])))  # type: ignore[arg-type]
    expected = [(0.598737, 0.556040), (0.388303, 0.360612), (0.251829, 0.233870)]
    torch.testing.assert_close(torch.tensor(pairs), torch.tensor(expected), rtol=0, atol=6e-7)


@pytest.mark.parametrize(("lr", "alpha", "delay"), [(1.0, 0.0, 1), (0.4, 0.25, 5), (0.7, 0.75, 9)])
def test_streaming_recursion(lr: float, alpha: float, delay: int) -> None:
    """``G' = (1 - lr) G + lr X`` and ``X' = r^(H - tau) (alpha r^tau X + (1 - alpha) G')`` with ``r = 1 - eta``."""
    plan = Plan([Sync(when=Every(10), outer=outer.SGD(lr), apply=Delay(delay, Lerp(alpha)))])
    live = path(Quadratics.scalar([1, 1], [0, 0]), plan, 60, 0.05, 1.0)[10::10, 0, 0]
    r, x, g, expected = 0.95, 0.95**10, 1.0, []
    for _ in range(6):
        expected.append(x)
        g = (1 - lr) * g + lr * x
        x = r ** (10 - delay) * (alpha * r**delay * x + (1 - alpha) * g)
    close(live, torch.tensor(expected, dtype=torch.float64))


def test_anchors_agree_even_where_live_weights_do_not() -> None:
    plan = Plan([Sync(when=Every(4), outer=Nesterov(0.4, 0.9), apply=Delay(2, Lerp(0.5)))])
    sim = p2().simulate(plan, 0.1)
    for _ in range(15):
        sim.run(1)
        anchors = [e.runners[0].lanes[0].anchor for e in sim.engines]
        assert all(torch.equal(a, anchors[0]) for a in anchors)  # type: ignore[arg-type]
    assert sim.distance() > 0.1


def test_live_weights_that_keep_everything_ignore_the_syncs() -> None:
    plan = Plan([Sync(when=Every(4), outer=Nesterov(), apply=Delay(2, Lerp(1.0)))])
    sim, alone = p2().simulate(plan, 0.1).run(21), p2().simulate(Plan(), 0.1).run(21)
    assert torch.equal(sim.stacked(), alone.stacked())
    assert float(sim.engines[0].runners[0].lanes[0].anchor.norm()) > 0.5  # type: ignore[union-attr]


def test_rebase_keeps_the_steps_made_under_way() -> None:
    """Averaging with Rebase: the mean at the send, plus what each rank has done since."""
    plan = Plan([Sync(when=Every(4), apply=Delay(2))])
    live = path(p2(), plan, 6, 0.1)
    free = path(p2(), Plan(), 6, 0.1)
    close(live[:6], free[:6])
    close(live[6], free[4].mean(0) + free[6] - free[4])


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0, "own_share"])
@pytest.mark.parametrize(("h", "n"), [(1, 2), (3, 4)])
def test_one_round_follows_its_pseudo_code(share: float | str, h: int, n: int) -> None:
    problem = Quadratics(p2().A[:n], p2().c[:n])
    w = 1.0 / n if share == "own_share" else float(share)
    plan = Plan([Sync(when=Every(h), outer=Nesterov(0.4, 0.5), apply=OneRound(share))])  # type: ignore[arg-type]
    live = path(problem, plan, 6 * h, 0.1)
    x, anchor, buffer, previous = (torch.zeros(n, 5, dtype=torch.float64) for _ in range(4))
    for step in range(1, 6 * h + 1):
        x = x - 0.1 * torch.stack([problem.gradient(i, x[i]) for i in range(n)])
        if step % h == 0:
            delta = anchor - x
            d = w * delta + previous.mean(0) - w * previous
            buffer = 0.5 * buffer + d
            anchor = anchor - 0.4 * (d + 0.5 * buffer)
            x, previous = anchor.clone(), delta
        close(live[step], x)


@pytest.mark.parametrize(("share", "w"), [(0.0, 0.0), ("own_share", 0.25), (1.0, 1.0)])
def test_one_round_with_plain_outer_sgd(share: float | str, w: float) -> None:
    """``a_i = a_0 - lr (sum_k<K mean Delta^k + w Delta_i^K + (1 - w) * 0)``: the spread does not accumulate."""
    problem = Quadratics(p2().A[:4], p2().c[:4])
    plan = Plan([Sync(when=Every(5), outer=outer.SGD(0.6), apply=OneRound(share))])  # type: ignore[arg-type]
    sim = problem.simulate(plan, 0.1)
    total = torch.zeros(5, dtype=torch.float64)
    before = sim.stacked()
    for _ in range(6):
        sim.run(4)
        last = sim.stacked()
        last = last - 0.1 * torch.stack([problem.gradient(i, last[i]) for i in range(4)])
        delta = before - last
        before = sim.run(1).stacked()
        close(before, -0.6 * (total + w * delta))
        total += delta.mean(0)
    close(sim.finish().stacked(), -0.6 * total.expand(4, 5))  # the last round arrives, the own share goes back


def test_eager_with_one_worker_is_diloco_and_delayed_is_not() -> None:
    problem = Quadratics(p2().A[:1], p2().c[:1])

    def run(apply: OneRound | None) -> Tensor:
        return path(problem, Plan([Sync(when=Every(3), outer=Nesterov(0.5, 0.5), apply=apply)]), 15, 0.1)

    close(run(OneRound("own_share")), run(None))
    assert (run(OneRound(0.0)) - run(None)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("mu", "share", "n", "bound"),
    [
        (0.0, None, 2, 2.0), (0.0, 0.0, 2, 1.0), (0.0, "own_share", 4, 1.33),
        (0.5, None, 2, 1.5), (0.5, 0.0, 2, 0.56), (0.5, "own_share", 2, 1.19), (0.5, "own_share", 4, 0.77),
        (0.9, None, 2, 1.36), (0.9, 0.0, 2, 0.25), (0.9, "own_share", 2, 0.77), (0.9, "own_share", 4, 0.42),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Sync")
def test_stability_bounds(mu: float, share: float | str | None, n: int, bound: float) -> None:
    """Inner steps that solve the problem in one go: the outer rate is stable up to the tabulated bound only."""

    def growth(rate: float) -> float:
        step = outer.SGD(rate, mu, nesterov=mu > 0)
        apply = OneRound(share) if share is not None else None  # type: ignore[arg-type]
        plan = Plan([Sync(when=Every(2), signal="delta", outer=step, apply=apply)])
        e = path(Quadratics.scalar([1] * n, [0] * n), plan, 200, 1.0, 1.0)[::2].abs().amax((1, 2))
        return float(e[-25:].max() / e[25:50].max())

    assert growth(0.95 * bound) < 0.9
    assert growth(1.05 * bound) > 1.1


# ---------------------------------------------------------------------- random pairs with an outer optimizer


def pairs(outer_: outer.Outer | None, h: int = 1) -> Plan:
    return Plan([Sync(when=Every(h), signal="value", peers=RandomPairs(seed=3), outer=outer_)])


def test_pairs_with_plain_outer_sgd_are_gossip() -> None:
    close(path(p2(), pairs(PLAIN), 20, 0.1), path(p2(), pairs(None), 20, 0.1))


def test_a_single_pair_is_heavy_ball_diloco() -> None:
    problem = Quadratics(p2().A[:2], p2().c[:2])
    everybody = Plan([Sync(when=Every(4), outer=HeavyBall(0.7, 0.5))])
    close(path(problem, pairs(HeavyBall(0.7, 0.5), 4), 40, 0.1), path(problem, everybody, 40, 0.1))


@pytest.mark.parametrize("n", [4, 5, 8])
def test_the_mean_of_pairs_follows_heavy_ball_diloco(n: int) -> None:
    problem = same_curvature(n)
    everybody = Plan([Sync(when=Every(4), outer=HeavyBall(0.5, 0.5))])
    mine = path(problem, pairs(HeavyBall(0.5, 0.5), 4), 40, 0.1)
    close(mine.mean(1), path(problem, everybody, 40, 0.1).mean(1))
    assert mine[-1].std(0).max() > 1e-3


def test_outer_momentum_over_pairs_has_a_bound() -> None:
    """Without gradients: 0.5 contracts at 16 workers, 0.9 runs apart, both at the rate 0.7."""
    start = torch.randn(16, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    still = Quadratics(torch.zeros(16, 20, 20), start)

    def after(momentum: float, rounds: int) -> float:
        return still.simulate(pairs(HeavyBall(0.7, momentum)), 0.1, start).run(rounds).distance()

    assert after(0.5, 40) < 1e-3 * after(0.5, 5)
    assert after(0.9, 100) > 3 * after(0.9, 20)


def test_a_sync_at_the_end_happens_once() -> None:
    sim = p1().simulate(Plan([Sync(when=AtEnd())]), 0.1).run(7)
    free = p1().simulate(Plan(), 0.1).run(7)
    assert torch.equal(sim.stacked(), free.stacked())
    assert sim.bytes == [0, 0, 0, 0]
    close(sim.finish().stacked(), free.stacked().mean(0).expand(4, 1))
    assert sim.bytes == [12, 12, 12, 12]  # 2 (n - 1) / n of eight bytes
