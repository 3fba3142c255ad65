"""Every published method: it builds, trains, resumes, and costs what it says."""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Callable

import pytest
import torch
from problems import p2
from torch import Tensor

from lightning_dopt import Every, Plan, Simulation, Sync, plans
from lightning_dopt.comm import lockstep
from lightning_dopt.compress import Averaged, GaussianNoise, RandK, TopK
from lightning_dopt.local import GradientTracking, Scaffold
from lightning_dopt.outer import SGD
from lightning_dopt.plan import Plan as PlanType
from lightning_dopt.topology import Directed, Ring

ELSEWHERE = ("drcgd", "riemannian_tracking", "local_gda")  # tested beside the manifold, and with games
MADE: dict[str, Callable[[], Plan]] = {
    name: getattr(plans, name) for name in plans.__all__ if name not in ELSEWHERE
} | {
    "weighted_gossip": lambda: plans.weighted_gossip(counts=[1, 2, 3, 4]),
    "weighted losses": lambda: plans.weighted_gossip(counts=[1, 2, 3, 4], weighting="loss"),
    "push-sum on a digraph": lambda: plans.sgp(Directed([[1, 2], [2], [3], [0]], "push")),
    "push-diging on a digraph": lambda: plans.push_diging(Directed([[1, 2], [2], [3], [0]], "push")),
    "single merge with a window": lambda: plans.single_merge(3, 0.5, dense_from=5, dense_steps=2),
    "robust with averages": lambda: plans.robust_tracking(codec=Averaged(GaussianNoise(0.01))),
    "streaming_diloco": lambda: plans.streaming_diloco(6, 1, 2),
    "eager_diloco": lambda: plans.eager_diloco(5, outer_momentum=0.5),
    "delayed_diloco": lambda: plans.delayed_diloco(5),
    "slowmo": lambda: plans.slowmo(5),
    "post_local_sgd": lambda: plans.post_local_sgd(4, 3),
    "noloco": lambda: plans.noloco(5),
    "noloco with another pull": lambda: plans.noloco(5, gamma=0.4),
    "co2": lambda: plans.co2(5, 0.8),
    "co2 aware of gaps": lambda: plans.co2(5, 0.5, 0.3, gap_aware=True),
    "apfl": lambda: plans.apfl("*"),
    "cellm": lambda: plans.cellm("*", 5, 0.6, 0.8, SGD(1.0)),
    "fsgld": lambda: plans.fsgld(5, 8, temperature=1e-4),
    "dipaco": lambda: plans.dipaco([[0], [1], [0], [0]], ["*"], 4, 0.5, 0.5, rescale=True),
    "adloco": lambda: plans.adloco([[0], [1], [2, 3]], 4),
    "dilocox": lambda: plans.dilocox(5, keep=None),
    "qsr": lambda: plans.qsr(0.05, 2),
    "savic": lambda: plans.savic(4, "local"),
    "desloc": lambda: plans.desloc(4, {"momentum_buffer": 8}, clip=2.0),
    "mt_dao": lambda: plans.mt_dao(4, {"momentum_buffer": 4}),
    "sketched": lambda: plans.sketched(RandK(0.5), sync_every=2),
    "scallion": lambda: plans.scallion(RandK(0.5), sync_every=4),
    "fish_mask": lambda: plans.fish_mask(0.8, batches=3, sync_every=3, refresh=2),
    "dmsgd mixed": lambda: plans.dmsgd(mix_momentum=True),
}
N = 4


def momentum(ps: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(ps, lr=0.02, momentum=0.5)


def made(name: str) -> Simulation:
    plan = MADE[name]()
    plain = any(isinstance(c, Scaffold) for c in plan.corrections)  # which refuses momentum
    return p2().simulate(plan, 0.04 if plain else momentum, n=N)


@pytest.mark.parametrize("name", MADE)
def test_it_trains(name: str) -> None:
    sim = made(name)
    problem = p2()
    best = torch.linalg.solve(problem.A[:N].sum(0), (problem.A[:N] @ problem.c[:N].unsqueeze(-1)).sum(0)).squeeze(-1)
    start = float(best.norm())
    sim.run(150).finish()
    assert float((sim.stacked().mean(0) - best).norm()) < (0.8 if "weighted" in name else 0.5) * start


@pytest.mark.parametrize("name", MADE)
def test_a_saved_engine_goes_on_as_if_nothing_had_happened(name: str) -> None:
    whole = made(name).run(11)
    first = made(name).run(6)
    lockstep([engine.land() for engine in first.engines])
    again = made(name)
    for k in range(N):
        again.engines[k].load_state_dict(copy.deepcopy(first.engines[k].state_dict()))
        again.optimizers[k].load_state_dict(copy.deepcopy(first.optimizers[k].state_dict()))
        again.replicas[k]["x"].data.copy_(first.replicas[k]["x"].data)
    assert torch.equal(again.run(5).stacked(), whole.stacked())
    assert again.bytes == whole.bytes


@pytest.mark.parametrize(
    "name", [name for name in MADE if name not in ("push-sum on a digraph", "push-diging on a digraph")]
)
def test_equal_plans_print_alike(name: str) -> None:
    assert repr(MADE[name]()) == repr(MADE[name]())
    assert MADE[name]() == MADE[name]()
    assert isinstance(MADE[name](), PlanType)


# ---------------------------------------------------------------------- names for configurations


def test_names_stand_for_configurations() -> None:
    ring = Ring()
    assert plans.dfedsam(ring, 3, rho=0.0).syncs == plans.gossip(ring, sync_every=3).syncs
    assert plans.extra(ring) == plans.gossip(ring, correction="extra")
    assert plans.d2(ring) == plans.gossip(ring, correction="d2")
    assert plans.k_gt(ring, 4) == plans.gossip(ring, correction="local_tracking", sync_every=4)
    assert plans.gradient_tracking(ring) == Plan(
        [Sync(what="gradients", peers=ring), Sync(signal="value", peers=ring)], [GradientTracking()]
    )
    assert plans.qg_dsgdm(ring) == plans.gossip(ring, correction="quasi_global")


@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        (lambda: plans.gossip(correction="gt"), r"gossip\(correction='gt'\).*gradient_tracking"),
        (lambda: plans.gossip(correction="gradient_tracking", sync_every=2), "use 'local_tracking'"),
        (lambda: plans.gossip(rounds=0), r"gossip\(rounds=0\)"),
        (lambda: plans.gossip(order="abc"), r"gossip\(order='abc'\)"),
        (lambda: plans.single_merge(dense_from=10), "give both"),
        (lambda: plans.single_merge(p=0.0), r"single_merge\(p=0.0\)"),
        (lambda: plans.decentlam(momentum=1.0), r"decentlam\(momentum=1.0\)"),
        (lambda: plans.weighted_gossip(shares=[0.5, 0.6]), "sum to 1.1, must sum to 1"),
        (lambda: plans.weighted_gossip(weighting="loss", rule="paper"), "rule is of the row-stochastic"),
        (lambda: plans.weighted_gossip(counts=[1, 2, 3]).check(4), "3 numbers for 4 workers"),
    ],
)
def test_bad_options_are_refused_in_one_line(make: Callable[[], object], pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern) as caught:
        make()
    assert "\n" not in str(caught.value)


NEEDED: dict[str, object] = {"paths": [[0], [1], [0], [0]], "modules": ["*"], "maximise": "y"}


def bad_values() -> list[tuple[str, str, object]]:
    """Every option of every plan that is a number or a choice, with a value that none allows."""
    found: list[tuple[str, str, object]] = []
    for name in plans.__all__:
        for option in inspect.signature(getattr(plans, name)).parameters.values():
            kind = str(option.annotation).replace(" | None", "")
            wrong: list[object] = {"int": [-7], "float": [-7.25, math.nan], "bool": ["perhaps"]}.get(kind, [])  # type: ignore[assignment]
            found += [(name, option.name, value) for value in wrong if option.name != "seed"]
    return found


@pytest.mark.parametrize(("name", "option", "value"), bad_values(), ids=lambda v: str(v))
@pytest.mark.filterwarnings("ignore")
def test_plans_refuse_under_their_own_names(name: str, option: str, value: object) -> None:
    make = getattr(plans, name)
    needed = {k: v for k, v in NEEDED.items() if k in inspect.signature(make).parameters}
    with pytest.raises(ValueError, match=rf"^{name}\([^\n]*\b{option}={re.escape(repr(value))}[,)][^\n]*: [^\n]*$"):
        make(**{**needed, option: value})


def test_options_go_by_name_and_by_value() -> None:
    with pytest.raises(ValueError, match=r"^dgc\(ratio=2\): must be a number in \(0, 1\]$") as caught:
        plans.dgc(ratio=2)
    assert str(caught.value.__cause__) == "TopK(ratio=2): must be a number in (0, 1]"
    with pytest.raises(ValueError, match=r"^dgc\(warmup=\(0\.5, 2\.0\)\): must be a number in \(0, 1\]$"):
        plans.dgc(warmup=(0.5, 2.0))
    with pytest.raises(ValueError, match=r"^diloco\(outer_lr=0\.0\): must be a number in \(0, inf\)$"):
        plans.diloco(outer_lr=0.0)  # the argument of the part is lr
    with pytest.raises(ValueError, match=r"^TopK\(ratio=2\): "):
        plans.ef21(TopK(2))  # no option of the plan


def test_single_merging_keeps_the_mean_and_ends_in_it() -> None:
    still = p2()
    still.A.zero_()
    start = still.c
    sim = still.simulate(plans.single_merge(2, 0.5), 0.1, start)
    sim.run(40)
    torch.testing.assert_close(sim.stacked().mean(0), start.mean(0), rtol=0, atol=1e-12)
    assert 0.01 < sim.distance() < float((start - start.mean(0)).square().sum(1).mean().sqrt())
    sim.finish()
    torch.testing.assert_close(sim.stacked(), start.mean(0).expand(8, 5), rtol=0, atol=1e-12)


def test_single_merging_without_gossip_is_lo_fi_and_with_a_full_window_is_every_step() -> None:
    rare = p2().simulate(plans.single_merge(10**6), 0.05).run(20).finish().stacked()
    torch.testing.assert_close(rare, p2().simulate(plans.lo_fi(), 0.05).run(20).finish().stacked(), rtol=0, atol=0)
    dense = p2().simulate(plans.single_merge(10**6, dense_from=0, dense_steps=10**6), 0.05).run(20).stacked()
    assert torch.equal(dense, p2().simulate(Plan([Sync(Every(1))]), 0.05).run(20).stacked())


# ---------------------------------------------------------------------- noise on the wire


def noisy_error(plan: Plan, steps: int, decay: bool) -> float:
    """Mean square distance to the optimum with noise on every message."""
    problem = p2()
    sim = problem.simulate(plan, 0.2 if decay else 0.05)
    for t in range(steps):
        if decay:
            for opt in sim.optimizers:
                opt.param_groups[0]["lr"] = 0.2 / (1 + t / 50)
        sim.run(1)
    return float((sim.stacked() - problem.optimum()).square().sum(1).mean())


def test_noise_makes_plain_tracking_diverge_and_robust_tracking_converge() -> None:
    from lightning_dopt.compress import Direct

    noise = Direct(GaussianNoise(0.05))
    tracking = plans.gossip(Ring(), noise, "gradient_tracking")
    short, long = (noisy_error(tracking, steps, False) for steps in (100, 1000))
    assert long > 3 * short
    robust = plans.robust_tracking(Ring(), GaussianNoise(0.05), offset=50.0)
    early, late = (noisy_error(robust, steps, True) for steps in (150, 1500))
    assert late < 0.4 * early
    assert late < 0.02 * long


def test_averaged_messages_carry_less_and_less_noise() -> None:
    still = p2()
    still.A.zero_()
    start = still.c.mean(0).expand(8, 5)
    apart = {}
    for name, codec in (("direct", GaussianNoise(0.1)), ("averaged", Averaged(GaussianNoise(0.1)))):
        plan = plans.robust_tracking(Ring(), codec, gain=1.0, power=0.0)
        sim = still.simulate(plan, 0.1, start).run(150)
        apart[name] = sim.distance()
    assert apart["averaged"] < 0.5 * apart["direct"]
    exact = Plan([Sync(signal="value", peers=Ring(), codec=Averaged(plans.compressed_ddp().syncs[0].codec.codec))])  # type: ignore[attr-defined]
    assert exact.syncs[0].codec.static  # type: ignore[attr-defined]


def test_averaged_with_exact_messages_is_plain_gossip() -> None:
    from lightning_dopt import Identity

    got = p2().simulate(Plan([Sync(peers=Ring(), codec=Averaged(Identity()))]), 0.05).run(30).stacked()
    plain = p2().simulate(plans.gossip(Ring()), 0.05).run(30).stacked()
    torch.testing.assert_close(got, plain, rtol=0, atol=1e-11)
