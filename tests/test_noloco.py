"""NoLoCo against its pseudo-code, heavy-ball DiLoCo and its consensus bound."""

from __future__ import annotations

import warnings

import pytest
import torch
from problems import Quadratics, mosaic_simulation, p2
from test_local_updates import close, path, same_curvature

from lightning_dopt import Every, HeavyBall, Identity, Plan, RandomPairs, Sync, plans
from lightning_dopt.forecast import forecast
from lightning_dopt.outer import GossipMomentum
from lightning_dopt.stability import pairs_bound
from lightning_dopt.topology import RandomGroups


@pytest.mark.parametrize("n", [2, 5, 8])
@pytest.mark.parametrize(("alpha", "beta", "gamma"), [(0.5, 0.7, 0.7), (0.3, 0.7, 0.2), (0.4, 0.5, 0.9)])
def test_it_follows_its_pseudo_code_with_both_tensors(n: int, alpha: float, beta: float, gamma: float) -> None:
    """Deltas and anchors exchanged, as in the paper; here one tensor crosses the network. Odd n: one rank idles."""
    problem = Quadratics(p2().A[:n], p2().c[:n])
    live = path(problem, plans.noloco(3, alpha, beta, gamma, seed=4), 24, 0.1)
    x, anchor, d = (torch.zeros(n, 5, dtype=torch.float64) for _ in range(3))
    for step in range(1, 25):
        x = x - 0.1 * torch.stack([problem.gradient(i, x[i]) for i in range(n)])
        if step % 3 == 0:
            w = RandomPairs(4).matrix(n, step // 3 - 1)
            w = torch.as_tensor(w, dtype=torch.float64)
            d = alpha * d - beta * (w @ (anchor - x)) - gamma * (anchor - w @ anchor)
            anchor = anchor + d
            x = anchor.clone()
        close(live[step], x)


@pytest.mark.parametrize(("n", "group"), [(8, 3), (8, 4), (7, 3), (4, 4)])
def test_larger_groups_follow_the_same_pseudo_code(n: int, group: int) -> None:
    """Eight ranks in threes leave a pair, seven leave one that idles; four in fours are everybody."""
    problem = Quadratics(p2().A[:n], p2().c[:n])
    live = path(problem, plans.noloco(3, 0.4, 0.7, 0.5, seed=4, group=group), 24, 0.1)
    x, anchor, d = (torch.zeros(n, 5, dtype=torch.float64) for _ in range(3))
    for step in range(1, 25):
        x = x - 0.1 * torch.stack([problem.gradient(i, x[i]) for i in range(n)])
        if step % 3 == 0:
            w = torch.as_tensor(RandomGroups(group, 4).matrix(n, step // 3 - 1), dtype=torch.float64)
            sizes = sorted(int(c) for c in (w > 0).sum(1))
            assert sizes == sorted(size for size in [group] * (n // group) + [n % group] for _ in range(size))
            d = 0.4 * d - 0.7 * (w @ (anchor - x)) - 0.5 * (anchor - w @ anchor)
            anchor = anchor + d
            x = anchor.clone()
        close(live[step], x)


def test_equal_pulls_are_heavy_ball_over_pairs() -> None:
    single = Plan([Sync(Every(4), signal="value", peers=RandomPairs(), outer=HeavyBall(0.7, 0.5))])
    close(path(p2(), plans.noloco(4), 40, 0.1), path(p2(), single, 40, 0.1))


def test_without_momentum_at_rate_one_it_is_gossip() -> None:
    gossip = Plan([Sync(Every(4), signal="value", peers=RandomPairs())])
    close(path(p2(), plans.noloco(4, 0.0, 1.0, 1.0), 40, 0.1), path(p2(), gossip, 40, 0.1))


@pytest.mark.parametrize("gamma", [0.2, 0.7, 1.1])
def test_the_mean_follows_heavy_ball_diloco_whatever_the_pull(gamma: float) -> None:
    problem = same_curvature(6)
    everybody = Plan([Sync(Every(4), outer=HeavyBall(0.7, 0.5))])
    mine = path(problem, plans.noloco(4, 0.5, 0.7, gamma), 40, 0.1)
    close(mine.mean(1), path(problem, everybody, 40, 0.1).mean(1))
    over_all = Plan([Sync(Every(4), outer=GossipMomentum(0.5, 0.7, gamma))])
    close(path(problem, over_all, 40, 0.1), path(problem, everybody, 40, 0.1))


@pytest.mark.filterwarnings("ignore:Sync")
@pytest.mark.parametrize(("alpha", "group"), [(0.5, 2), (0.9, 2), (0.9, 4)])
def test_replicas_stay_together_up_to_the_bound(alpha: float, group: int) -> None:
    """No gradients, 16 workers, averaged over coordinates: the squared distance shrinks below the bound only."""
    start = torch.randn(16, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    still = Quadratics(torch.zeros(16, 1, 1).expand(16, 200, 200), start)
    still.backward = lambda rank, parameters, step: None  # type: ignore[method-assign]
    bound = pairs_bound(alpha, 16, group)

    def growth(gamma: float) -> float:
        sim = still.simulate(plans.noloco(1, alpha, 0.3, gamma, group=group), 0.1, start).run(40)
        early = sim.distance()
        return sim.run(80).distance() / early

    assert growth(0.7 * bound) < 0.5
    assert growth(1.4 * bound) > 2.0


def test_growth_per_round_is_as_tabulated() -> None:
    """Of the squared distance: 0.69 at momentum 0.5 and rate 0.7, above one at 0.9, with 16 workers."""
    start = torch.randn(16, 2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    still = Quadratics(torch.zeros(16, 1, 1).expand(16, 2000, 2000), start)

    still.backward = lambda rank, parameters, step: None  # type: ignore[method-assign]

    def rate(alpha: float) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            total = 0.0
            for seed in range(4):
                sim = still.simulate(plans.noloco(1, alpha, 0.7, 0.7, seed=seed), 0.1, start).run(10)
                early = sim.distance()
                total += (sim.run(20).distance() / early) ** (2 / 20) / 4
            return total

    assert rate(0.5) == pytest.approx(0.69, abs=0.06)
    assert rate(0.9) == pytest.approx(1.09, abs=0.06)


@pytest.mark.parametrize("n", [4, 16])
def test_the_bound_is_named(n: int) -> None:
    plans.noloco().check(n)  # quiet
    for bad, name in (
        (plans.noloco(gamma=2.0), "gamma"),
        (Plan([Sync(signal="value", peers=RandomPairs(), outer=HeavyBall(0.7, 0.9))]), "lr"),
    ):
        alpha = 0.9 if name == "lr" else 0.5
        with pytest.warns(UserWarning, match=f"from {name} {pairs_bound(alpha, n):.2f} on at momentum {alpha}"):
            bad.check(n)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plans.noloco(gamma=2.0).check(2)  # one pair is everybody


def test_bytes_do_not_grow_with_the_workers() -> None:
    shapes = {"x": (1000, 100)}
    for n in (4, 8, 64):
        assert forecast(plans.noloco(10), n, shapes, 100).bytes == [10 * 4 * 100_000] * n
        assert forecast(plans.noloco(10, gamma=0.3), n, shapes, 100).bytes == [10 * 4 * 100_000] * n


def test_fragments_meet_in_pairs_of_their_own() -> None:
    plan = plans.noloco(6, fragments=3, overlap=2)
    assert [s.peers for s in plan] == [RandomPairs(0), RandomPairs(1), RandomPairs(2)]
    sim = mosaic_simulation(plan, 4).run(60)
    assert 0 < sim.distance() < mosaic_simulation(Plan(), 4).run(60).distance()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: plans.noloco(alpha=1.0), r"noloco\(alpha=1.0\)"),
        (lambda: plans.noloco(gamma=0.0), r"noloco\(gamma=0.0\)"),
        (lambda: plans.noloco(5, overlap=5), r"noloco\(sync_every=5, fragments=1, overlap=5\)"),
        (lambda: GossipMomentum(beta=0.0), r"GossipMomentum\(beta=0.0\)"),
    ],
)
def test_bad_options_are_refused(make: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()  # type: ignore[operator]


def test_exact_messages_need_no_memory() -> None:
    assert plans.noloco().syncs[0].codec == Identity()
