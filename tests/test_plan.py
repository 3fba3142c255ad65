"""Plans as data: what is refused and why, how they print, compare and hash."""

from __future__ import annotations

import functools
import inspect
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import mosaic, mosaic_simulation
from zoo import PLANS, sample

import lightning_dopt
from lightning_dopt import (
    BF16,
    EF21,
    After,
    AtEnd,
    Bernoulli,
    Blocking,
    Complete,
    Delay,
    Difference,
    EControl,
    Engine,
    ErrorFeedback,
    Every,
    ExactDiffusion,
    GradientTracking,
    HeavyBall,
    Identity,
    Int4,
    Int8,
    Lerp,
    LowRank,
    Median,
    Nesterov,
    OneRound,
    OptimizerState,
    Parameters,
    Plan,
    RandK,
    RandomPairs,
    Rebase,
    Ring,
    Sign,
    SimulatedWorld,
    Simulation,
    Sync,
    TopK,
    Until,
    compress,
    outer,
    plans,
    schedules,
    topology,
)
from lightning_dopt._part import Part
from lightning_dopt.apply import Replace
from lightning_dopt.combine import Chebyshev, Mixing, MomentumGossip, PushSum, RelaySum, Repeated
from lightning_dopt.what import Buffers, Gradients

NAMES: dict[str, Any] = {
    name: value
    for module in (lightning_dopt, topology, compress, outer, schedules, lightning_dopt.apply, lightning_dopt.what)
    for name, value in vars(module).items()
    if inspect.isclass(value) and issubclass(value, Part)
}


class _Pull(RandomPairs):
    """Says of itself that columns do not sum to one."""

    def doubly_stochastic(self, n: int) -> bool:
        return False


# ---------------------------------------------------------------------- what is refused

REFUSED: dict[str, tuple[Callable[[], object], list[str]]] = {
    # weights that are packed themselves
    "lossy values": (lambda: Sync(peers=Ring(), codec=Int8()), ["codec=Int8()", "Difference(Int8())", "Complete()"]),
    "lossy values with feedback": (
        lambda: Sync(peers=Ring(), codec=ErrorFeedback(TopK(0.1))),
        ["codec=ErrorFeedback(codec=TopK(ratio=0.1))", "Difference(TopK(ratio=0.1))"],
    ),
    "lossy values everywhere": (lambda: Sync(signal="value", codec=Sign()), ["signal='value'", "signal='delta'"]),
    "differences of changes": (
        lambda: Sync(signal="delta", codec=Difference(Int8())),
        ["signal='delta'", "use signal='value'"],
    ),
    # gradients
    "late gradients": (lambda: Sync(what="gradients", apply=Delay(1), when=Every(2)), ["apply=Delay(", "Blocking()"]),
    "gradients now and then": (lambda: Sync(what="gradients", when=Every(2)), ["when=Every(n=2)", "use Every(1)"]),
    "gradients by chance": (lambda: Sync(what="gradients", when=Bernoulli(0.5)), ["when=Bernoulli(p=0.5)", "Every(1)"]),
    "differences of gradients": (
        lambda: Plan([Sync(what="gradients", codec=Difference(Int8()))]),
        ["codec=Difference", "ErrorFeedback or EF21"],
    ),
    "gradients in another order": (
        lambda: Sync(what="gradients", apply=Blocking("cta")),
        ["order='cta'", "Blocking()"],
    ),
    "an anchor of gradients": (lambda: Sync(what="gradients", outer=Nesterov()), ["outer=Nesterov", "only parameters"]),
    "changes of gradients": (lambda: Sync(what="gradients", signal="delta"), ["signal='delta'", "use signal='value'"]),
    # states
    "packed states": (
        lambda: Sync(what="optimizer.exp_avg_sq", codec=Int4()),
        ["OptimizerState(key='exp_avg_sq')", "use Identity()"],
    ),
    "packed buffers": (lambda: Sync(what="buffers", codec=BF16()), ["what=Buffers()", "use Identity()"]),
    "late states": (
        lambda: Sync(when=Every(4), what="optimizer.exp_avg", apply=Delay(2)),
        ["apply=Delay(", "use Blocking()"],
    ),
    "late buffers": (lambda: Sync(when=Every(4), what="buffers", apply=Delay(2)), ["what=Buffers()", "Blocking()"]),
    "buffers in another order": (lambda: Sync(what="buffers", apply=Blocking("cta")), ["order='cta'", "Blocking()"]),
    "an anchor of buffers": (lambda: Sync(what="buffers", outer=outer.SGD()), ["outer=SGD()", "only parameters"]),
    # time
    "as late as the next": (
        lambda: Sync(when=Every(3), apply=Delay(3)),
        ["when=Every(n=3)", "Delay(steps=3", "shorter than the period"],
    ),
    "late at random": (lambda: Sync(when=Bernoulli(0.5), apply=Delay(1)), ["when=Bernoulli(p=0.5)", "an Every"]),
    "late in a phase": (lambda: Sync(when=After(5, Every(4)), apply=Delay(1)), ["when=After(", "an Every"]),
    "one round late by value": (lambda: Sync(peers=Ring(), apply=OneRound()), ["signal='value'", "signal='delta'"]),
    "late at the end": (lambda: Sync(when=AtEnd(), signal="delta", apply=OneRound()), ["when=AtEnd()", "Blocking()"]),
    "before the end": (lambda: Sync(when=AtEnd(), apply=Blocking("cta")), ["when=AtEnd()", "use Blocking()"]),
    # combinations
    "median of estimates": (lambda: Sync(codec=EF21(Int8()), combine=Median()), ["combine=Median()", "weighted sum"]),
    "median of differences": (
        lambda: Sync(codec=Difference(Int8()), peers=Ring(), combine=Median()),
        ["combine=Median()", "weighted sum"],
    ),
    "own share of factors": (
        lambda: Sync(codec=ErrorFeedback(LowRank(1)), apply=OneRound("own_share")),
        ["LowRank(rank=1)", "OneRound(inflight=0)"],
    ),
    # types and names
    "a number as schedule": (lambda: Sync(when=5), ["Sync(when=5)", "When"]),  # type: ignore[arg-type]
    "a class as topology": (lambda: Sync(peers=Ring), ["peers=<class", "Topology"]),  # type: ignore[arg-type]
    "a name as codec": (lambda: Sync(codec="int8"), ["codec='int8'", "Codec"]),  # type: ignore[arg-type]
    "a number as apply": (lambda: Sync(apply=3), ["apply=3", "Apply"]),  # type: ignore[arg-type]
    "a name as combine": (lambda: Sync(combine="mean"), ["combine='mean'", "Combine"]),  # type: ignore[arg-type]
    "an unknown slot": (lambda: Sync(what="weights"), ["what='weights'", "'parameters'", "'optimizer.<state>'"]),
    "a nameless state": (lambda: Sync(what="optimizer."), ["what='optimizer.'", "'optimizer.<state>'"]),
    "an unknown signal": (lambda: Sync(signal="sum"), ["signal='sum'", "'value'", "'delta'"]),  # type: ignore[arg-type]
    "a plan of plans": (lambda: Plan([plans.lo_fi()]), ["Plan(syncs=Plan(", "Sync"]),  # type: ignore[list-item]
    "a sync as correction": (lambda: Plan([], [Sync()]), ["Plan(corrections=", "Correction"]),  # type: ignore[list-item]
    "a negative seed": (lambda: Plan(seed=-1), ["Plan(seed=-1)", "at least 0"]),
    # corrections
    "diffusion of nothing": (lambda: Plan([], [ExactDiffusion()]), ["ExactDiffusion", "exactly one sync"]),
    "diffusion of two": (
        lambda: Plan([Sync(peers=Ring()), Sync(peers=Ring())], [ExactDiffusion()]),
        ["ExactDiffusion", "exactly one sync"],
    ),
    "diffusion of changes": (lambda: Plan([Sync(signal="delta")], [ExactDiffusion()]), ["ExactDiffusion", "by value"]),
    "diffusion with an anchor": (
        lambda: Plan([Sync(peers=Ring(), outer=outer.SGD())], [ExactDiffusion()]),
        ["ExactDiffusion", "without outer"],
    ),
    "late diffusion": (
        lambda: Plan([Sync(when=Every(2), peers=Ring(), apply=Delay(1))], [ExactDiffusion()]),
        ["ExactDiffusion", "needs apply=Blocking(order='atc')"],
    ),
    "diffusion in another order": (
        lambda: plans.gossip(Ring(), correction="exact_diffusion", order="cta"),
        ["ExactDiffusion", "order='atc'", "order='cta'"],
    ),
    "tracking without gradients": (
        lambda: Plan([Sync(peers=Ring())], [GradientTracking()]),
        ["GradientTracking", "one sync of the gradients"],
    ),
    "tracking over two graphs": (
        lambda: Plan([Sync(what="gradients", peers=Ring()), Sync(peers=RandomPairs())], [GradientTracking()]),
        ["GradientTracking", "same peers"],
    ),
    # single parts
    "period zero": (lambda: Every(0), ["Every(n=0)", "at least 1"]),
    "a period of one half": (lambda: Every(0.5), ["Every(n=0.5)", "integer"]),  # type: ignore[arg-type]
    "a yes as period": (lambda: Every(True), ["Every(n=True)", "integer"]),
    "a negative offset": (lambda: Every(2, -1), ["Every(offset=-1)", "at least 0"]),
    "never": (lambda: Bernoulli(0.0), ["Bernoulli(p=0.0)", "(0, 1]"]),
    "a negative start": (lambda: After(-1, Every(1)), ["After(start=-1)", "at least 0"]),
    "until before the start": (lambda: Until(0, Every(1)), ["Until(stop=0)", "at least 1"]),
    "no delay": (lambda: Delay(0), ["Delay(steps=0)", "at least 1"]),
    "too much of the live": (lambda: Lerp(1.5), ["Lerp(alpha=1.5)", "[0, 1]"]),
    "too much of the own": (lambda: OneRound(2.0), ["OneRound(inflight=2.0)", "[0, 1]"]),
    "an unknown order": (lambda: Blocking("abc"), ["Blocking(order='abc')", "'atc', 'cta', 'awc'"]),  # type: ignore[arg-type]
    "awc that replaces": (lambda: Blocking("awc", Replace()), ["Blocking(merge=Replace())", "Rebase()"]),
    "an outer rate of zero": (lambda: outer.SGD(lr=0.0), ["SGD(lr=0.0)", "(0, inf)"]),
    "an outer momentum of one": (lambda: HeavyBall(momentum=1.0), ["HeavyBall(momentum=1.0)", "[0, 1)"]),
    "nesterov without momentum": (lambda: Nesterov(momentum=0.0), ["Nesterov(momentum=0.0)", "(0, 1)"]),
    "nesterov by flag": (lambda: outer.SGD(nesterov=True), ["SGD(nesterov=True)", "momentum"]),
    "outer adam": (lambda: outer.Adam(beta2=1.0), ["Adam(beta2=1.0)", "[0, 1)"]),
    "an empty pattern": (lambda: Parameters(""), ["Parameters(match='')", "pattern"]),
    "an empty state": (lambda: OptimizerState(""), ["OptimizerState(key='')", "exp_avg"]),
    "diffusion too fast": (lambda: ExactDiffusion(1.5), ["ExactDiffusion(kappa=1.5)", "(0, 1]"]),
    "a nested memory": (lambda: ErrorFeedback(EF21(Int8())), ["ErrorFeedback(codec=EF21", "do not nest"]),  # type: ignore[arg-type]
    "an unknown correction": (lambda: plans.gossip(correction="tracking"), ["gossip(correction='tracking')", "'none'"]),  # type: ignore[arg-type]
    # numbers of workers
    "changes over a ring": (
        lambda: Plan([Sync(signal="delta", peers=Ring())]).check(4),
        ["peers=Ring()", "signal='value'", "Complete()"],
    ),
    "differences over a changing graph that loses the mean": (
        lambda: plans.gossip(_Pull(), Difference(Int8())).check(4),
        ["peers=_Pull()", "doubly stochastic", "exact codec"],
    ),
    "a tracker of nobody": (lambda: Plan([Sync(what="tracker")]), ["what='tracker'", "no correction"]),
    "an accelerated lossy code": (
        lambda: Sync(peers=Ring(), codec=Difference(Int8()), combine=Chebyshev(3)),
        ["codec=Difference", "Identity()"],
    ),
    "acceleration over pairs": (
        lambda: Plan([Sync(peers=RandomPairs(), combine=Chebyshev(3))]).check(4),
        ["peers=RandomPairs()", "one fixed undirected graph"],
    ),
    "momentum over pairs": (
        lambda: Plan([Sync(peers=RandomPairs(), combine=MomentumGossip(3))]).check(4),
        ["chi=None", "give the condition number"],
    ),
    "relays round a ring": (
        lambda: Plan([Sync(peers=Ring(), combine=RelaySum())]).check(5),
        ["peers=Ring()", "no tree", "Chain()"],
    ),
    "relayed codes": (lambda: Sync(codec=Difference(Int8()), combine=RelaySum()), ["combine=RelaySum()", "Identity()"]),
    "pushed codes": (lambda: Sync(codec=Difference(Int8()), combine=PushSum()), ["combine=PushSum()", "Identity()"]),
    "pushes before the step": (lambda: Sync(apply=Blocking("cta"), combine=PushSum()), ["order='atc'"]),
    "repeated changes": (lambda: Sync(signal="delta", combine=Repeated(2)), ["signal='delta'", "signal='value'"]),
    "gradients over a ring": (
        lambda: Plan([Sync(what="gradients", peers=Ring())]).check(4),
        ["what='gradients'", "Complete()", "a sync of the parameters"],
    ),
    "a cube of six": (lambda: plans.gossip(lightning_dopt.Hypercube()).check(6), ["Hypercube(n=6)", "power of two"]),
    "no workers": (lambda: Plan().check(0), ["n=0", "at least 1"]),
    "a pattern for nothing": (
        lambda: mosaic_simulation(Plan([Sync(what=Parameters("tail.*"))]), 2),
        ["Parameters(match='tail.*')", "none of the 6"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_in_one_line_that_says_what_and_why(case: str) -> None:
    make, parts = REFUSED[case]
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        make()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_small_number_of_workers_can_make_a_graph_complete() -> None:
    Plan([Sync(signal="delta", peers=Ring())]).check(3)
    Plan([Sync(what="gradients", peers=Ring())]).check(2)
    plans.gossip(RandomPairs(), Difference(Int8())).check(2)


@pytest.mark.parametrize(
    "call",
    [
        lambda: Sync(every=5),  # type: ignore[call-arg]
        lambda: Every(period=3),  # type: ignore[call-arg]
        lambda: plans.diloco(H=3),  # type: ignore[call-arg]
        lambda: Plan(sync=Sync()),  # type: ignore[call-arg]
        lambda: outer.FromOptimizer(3),  # type: ignore[arg-type]
    ],
)
def test_unknown_keywords_and_functions_that_are_none_raise(call: Callable[[], object]) -> None:
    with pytest.raises(TypeError):
        call()


def test_simulations_check_their_arguments() -> None:
    def make(n: int, seconds: object) -> Simulation:
        return Simulation(Plan(), n, mosaic, lambda r, p, s: None, lambda ps: torch.optim.SGD(ps, lr=1), None, seconds)  # type: ignore[arg-type]

    with pytest.raises(ValueError, match=r"Simulation\(n=0\): must be an integer of at least 1"):
        make(0, 0.0)
    with pytest.raises(ValueError, match=r"Simulation\(step_seconds=\[1.0\]\): must be one number or 2 numbers"):
        make(2, [1.0])


def test_a_correction_without_a_rate_and_a_state_without_an_optimizer_say_what_is_missing() -> None:
    x = {"x": torch.ones(1).requires_grad_()}
    world = SimulatedWorld.create(1)[0]
    engine = Engine(plans.gossip(Ring(), correction="exact_diffusion"), x, world)
    with pytest.raises(RuntimeError, match=r"give Engine\(lr=\.\.\.\)"):
        engine.run(engine.after_step())
    engine = Engine(Plan([Sync(what="optimizer.exp_avg")]), x, world)
    with pytest.raises(RuntimeError, match=r"sync 'optimizer.exp_avg' needs Engine\(optimizer_state=\.\.\.\)"):
        engine.run(engine.after_step())


# ---------------------------------------------------------------------- what is warned about


@pytest.mark.parametrize("codec", [TopK(0.1), TopK(0.01), Sign(), LowRank(4)], ids=repr)
def test_dropping_most_of_a_message_without_a_memory_warns(codec: compress.Compressor) -> None:
    for what in ("gradients", "parameters"):
        with pytest.warns(UserWarning, match=re.escape(f"use codec=ErrorFeedback({codec!r})")):
            Plan([Sync(what=what, codec=codec)])


def test_unstable_outer_rates_warn() -> None:
    with pytest.warns(UserWarning, match=r"lower lr, or use OneRound\('own_share'\)"):
        Sync(when=Every(50), outer=Nesterov(0.7, 0.9), apply=OneRound())


@pytest.mark.parametrize(
    "make",
    [
        lambda: Sync(codec=ErrorFeedback(TopK(0.01))),
        lambda: Sync(what="gradients", codec=BF16()),
        lambda: Sync(what="gradients", codec=Int8()),
        lambda: Sync(what="gradients", codec=RandK(0.01)),
        lambda: Sync(outer=Nesterov(0.7, 0.9), apply=OneRound("own_share")),
        lambda: Sync(outer=Nesterov(0.2, 0.9), apply=OneRound()),
        lambda: Sync(outer=Nesterov(0.7, 0.9)),
    ],
)
def test_sound_plans_do_not_warn(make: Callable[[], Sync]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Plan([make()])


# ---------------------------------------------------------------------- what is filled in


def test_defaults() -> None:
    assert Sync() == Sync(Every(1), "parameters", "value", Identity(), Complete(), Mixing(), None, Blocking())
    assert Sync(outer=Nesterov()).signal == "delta"
    assert Sync(codec=ErrorFeedback(Int8())).signal == "delta"
    assert Sync(when=Every(2), apply=OneRound()).signal == "delta"
    assert Sync(outer=Nesterov(), peers=Ring()).signal == "value"
    assert Sync(codec=Difference(Int8())).signal == "value"
    assert Sync(what="gradients", codec=ErrorFeedback(Int8())).signal == "value"
    assert Delay(2).merge == Rebase()
    assert OneRound("own_share").share(8) == 0.125


def test_short_names_of_slots() -> None:
    assert Sync(what="gradients").what == Gradients()
    assert Sync(what="buffers").what == Buffers()
    assert Sync(what="optimizer.exp_avg").what == OptimizerState("exp_avg")
    assert Gradients() != Parameters()


def test_labels_are_unique() -> None:
    plan = Plan([Sync(), Sync(), Sync(what=Parameters("a.*")), Sync(what="optimizer.exp_avg"), Sync(what="gradients")])
    assert plan.labels() == ["parameters", "parameters#2", "parameters[a.*]", "optimizer.exp_avg", "gradients"]


def test_presets_are_the_plans_they_name() -> None:
    assert plans.diloco() == Plan([Sync(Every(500), signal="delta", outer=outer.SGD(0.7, 0.9, True))])
    noloco = plans.diloco(50, 0.7, 0.5, False, codec=Int8(), topology=Ring())
    assert noloco == Plan(
        [Sync(Every(50), signal="value", codec=Difference(Int8()), peers=Ring(), outer=outer.SGD(0.7, 0.5))]
    )
    assert plans.local_sgd() == Plan([Sync(Every(8))])
    assert plans.lo_fi() == Plan([Sync(AtEnd())])
    assert plans.compressed_ddp() == Plan([Sync(what="gradients", codec=ErrorFeedback(Int8()))])
    assert plans.compressed_ddp(EControl(TopK(0.1), 0.03)).syncs[0].codec == EControl(TopK(0.1), 0.03)
    assert plans.gossip() == Plan([Sync(peers=topology.OnePeerExponential())])
    assert plans.gossip(Ring(), Int8()).syncs[0].codec == Difference(Int8())
    diffusion = plans.gossip(Ring(), correction="exact_diffusion")
    assert diffusion.syncs[0].peers == topology.Lazy(Ring())
    assert plans.gossip(topology.Lazy(Ring()), correction="exact_diffusion") == diffusion
    tracking = plans.gossip(Ring(), correction="gradient_tracking")
    assert tracking == Plan([Sync(what="gradients", peers=Ring()), Sync(peers=Ring())], [GradientTracking()])


# ---------------------------------------------------------------------- schedules


def due(when: schedules.When, last: int = 12) -> list[int]:
    return [t for t in range(1, last + 1) if when.due(t)]


def test_schedules_count_from_one() -> None:
    assert due(Every(1), 4) == [1, 2, 3, 4]
    assert due(Every(5)) == [5, 10]
    assert due(Every(5, 2)) == [7, 12]
    assert due(Every(3, 4)) == [7, 10]
    assert due(After(4, Every(3))) == [7, 10]
    assert due(Until(5, Every(2))) == [2, 4]
    assert due(Until(6, Every(3))) == [3, 6]
    assert due(After(6, Until(3, Every(1)))) == [7, 8, 9]
    assert due(AtEnd()) == []
    assert AtEnd().at_end
    assert due(Bernoulli(1.0), 4) == [1, 2, 3, 4]


def test_random_schedules_have_their_rate_and_their_seed() -> None:
    draws = due(Bernoulli(0.3, seed=1), 4000)
    assert abs(len(draws) / 4000 - 0.3) < 0.03
    assert draws == due(Bernoulli(0.3, seed=1), 4000)
    assert draws != due(Bernoulli(0.3, seed=2), 4000)


# ---------------------------------------------------------------------- print, compare, hash, pickle

EVERY = [
    *PLANS.values(),
    *sample(60),
    plans.gossip(topology.Lazy(Ring()), correction="exact_diffusion"),
    Plan([Sync(After(3, Until(5, Every(1, 2))), what="optimizer.exp_avg")], seed=3),
    plans.compressed_ddp(EControl(TopK(0.1), 0.1)),
]


@pytest.mark.parametrize("plan", EVERY)
def test_the_printed_form_is_the_code_that_makes_the_plan(plan: Plan) -> None:
    made = eval(repr(plan), dict(NAMES))
    assert made == plan
    assert hash(made) == hash(plan)
    assert repr(made) == repr(plan)
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_plans_differ_where_any_part_differs() -> None:
    base = Sync(Every(4), signal="delta", outer=Nesterov(0.7, 0.9), apply=Delay(2, Lerp(0.5)))
    others = [
        Sync(Every(5), signal="delta", outer=Nesterov(0.7, 0.9), apply=Delay(2, Lerp(0.5))),
        Sync(Every(4), signal="delta", outer=Nesterov(0.7, 0.8), apply=Delay(2, Lerp(0.5))),
        Sync(Every(4), signal="delta", outer=outer.SGD(0.7, 0.9, True), apply=Delay(2, Lerp(0.5))),
        Sync(Every(4), signal="delta", outer=Nesterov(0.7, 0.9), apply=Delay(2, Lerp(0.4))),
        Sync(Every(4), signal="delta", outer=Nesterov(0.7, 0.9), apply=Delay(1, Lerp(0.5))),
        Sync(Every(4), Parameters("a*"), "delta", outer=Nesterov(0.7, 0.9), apply=Delay(2, Lerp(0.5))),
    ]
    assert all(Plan([base]) != Plan([o]) for o in others)
    assert (
        len({base, *others, Sync(Every(4), signal="delta", outer=Nesterov(0.7, 0.9), apply=Delay(2, Lerp(0.5)))}) == 7
    )
    assert Plan([base], seed=1) != Plan([base])
    assert Plan([base, others[0]]) != Plan([others[0], base])
    assert list(Plan([base, others[0]])) == [base, others[0]]


def test_functions_print_without_an_address() -> None:
    """The text of a plan is compared on resume, in another process."""
    text = repr(Sync(outer=lambda ps: torch.optim.Adagrad(ps, lr=0.1)))
    assert "0x" not in text
    assert "<lambda>" in text
    partial = repr(Sync(outer=functools.partial(torch.optim.Adagrad, lr=0.1)))
    assert "Adagrad" in partial
    assert "0x" not in partial


def test_seeds_of_syncs_differ() -> None:
    seeds = [Plan(seed=s).sync_seed(k) for s in (0, 1) for k in (0, 1, 2)]
    assert len(set(seeds)) == 6
    assert Plan(seed=1).sync_seed(2) == seeds[5]


def test_corrections_refuse_topologies_that_bias_them() -> None:
    """Exact diffusion needs symmetric weights, tracking a preserved mean; both say what to use instead."""
    directed = plans.gossip(lightning_dopt.OnePeerExponential(), correction="exact_diffusion")
    directed.check(2)  # two workers swap: symmetric
    with pytest.raises(
        ValueError, match=r"^ExactDiffusion: needs symmetric mixing weights, .* use an undirected topology"
    ):
        directed.check(8)
    pull = topology.FromMatrix([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.75, 0.0, 0.25]])
    with pytest.raises(ValueError, match=r"^GradientTracking: .* use a doubly stochastic topology$"):
        plans.gossip(topology.RandomPull(), correction="gradient_tracking").check(3)
    plans.gossip(pull, correction="gradient_tracking").check(3)  # one fixed matrix: exact for its stationary weights
    plans.gossip(correction="exact_diffusion").check(7)  # its default is a ring


def test_outer_momentum_over_pairs_warns_beyond_the_bound() -> None:
    """alpha = 0.9, lr = 0.7 diverges for 4 workers or more (NoLoCo's bound), 0.5 does not."""
    with pytest.warns(UserWarning, match="replicas run apart from lr"):
        plans.diloco(50, outer_momentum=0.9, topology=lightning_dopt.RandomPairs()).check(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plans.diloco(50, outer_momentum=0.5, topology=lightning_dopt.RandomPairs()).check(16)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: plans.diloco(outer_lr=-1), r"^diloco\(outer_lr=-1\): must be a number in \(0, inf\)$"),
        (lambda: plans.diloco(sync_every=0), r"^diloco\(sync_every=0\): must be an integer of at least 1$"),
        (
            lambda: plans.diloco(outer_momentum=0.0),
            r"^diloco\(nesterov=True, outer_momentum=0\): .* use nesterov=False$",
        ),
        (lambda: plans.local_sgd(0), r"^local_sgd\(sync_every=0\): must be an integer of at least 1$"),
    ],
)
def test_presets_name_their_own_options(make: Callable[[], Plan], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        make()
