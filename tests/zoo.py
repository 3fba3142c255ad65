"""Plans to run through every test: named ones, and all legal combinations of the parts of a sync."""

from __future__ import annotations

import itertools
import random
import warnings

from lightning_dopt import (
    BF16,
    EF21,
    AtEnd,
    Bernoulli,
    Blocking,
    Complete,
    Delay,
    Difference,
    ErrorFeedback,
    Every,
    Gradients,
    HeavyBall,
    Identity,
    Int4,
    Int8,
    Lerp,
    LowRank,
    Median,
    Nesterov,
    OneRound,
    Parameters,
    Plan,
    RandK,
    RandomPairs,
    Ring,
    Sign,
    Star,
    Sync,
    TopK,
    outer,
    plans,
)
from lightning_dopt.compress import ByteBudget, LGreCo
from lightning_dopt.topology import DirectedRing, Exponential, OnePeerExponential

PLANS: dict[str, Plan] = {
    "nothing": Plan(),
    "mean gradients": plans.compressed_ddp(BF16()),
    "dense gradients": Plan([Sync(what="gradients")]),
    "int8": plans.compressed_ddp(Int8()),
    "int4 estimates": plans.compressed_ddp(EF21(Int4())),
    "stochastic int8": plans.compressed_ddp(Int8(stochastic=True)),
    "sign": plans.compressed_ddp(Sign()),
    "top-k": plans.compressed_ddp(TopK(0.1)),
    "rand-k": plans.compressed_ddp(RandK(0.2)),
    "low rank": plans.compressed_ddp(LowRank(1, 1.0)),
    "l-greco": plans.l_greco(LowRank(1, 1.0), every=2),
    "byte budget": plans.compressed_ddp(ByteBudget(TopK(0.1), 600, every=2)),
    "choco budget": plans.gossip(Ring(), Difference(LGreCo(TopK(0.2), every=2), 0.3)),
    "local sgd": plans.local_sgd(3),
    "lo-fi": plans.lo_fi(),
    "diloco": plans.diloco(3),
    "diloco int8": plans.diloco(3, codec=ErrorFeedback(Int8())),
    "diloco low rank": plans.diloco(3, codec=ErrorFeedback(LowRank(1, 1.0))),
    "streaming": Plan(
        [
            Sync(when=Every(4), what=Parameters("body.*"), outer=Nesterov(0.4), apply=Delay(2, Lerp(0.5))),
            Sync(when=Every(4, 2), what=Parameters("[!b]*"), outer=Nesterov(0.4), apply=Delay(2, Lerp(0.5))),
        ]
    ),
    "eager": Plan([Sync(when=Every(3), outer=Nesterov(0.4, 0.5), apply=OneRound("own_share"))]),
    "fragments": plans.streaming_diloco(4, 3, overlap=1),
    "fragments over pairs": plans.streaming_diloco(4, 2, 1, outer_momentum=0.3, topology=RandomPairs()),
    "eager fragments": plans.eager_diloco(4, 0.3, 0.5, fragments=2, pattern="balanced"),
    "co2": plans.co2(3, 0.6, 0.3, clip=0.05, gap_aware=True),
    "dilocox": plans.dilocox(3, 2, keep=0.5, window=2, least=2, outer_momentum=0.3),
    "delayed rand-k": Plan(
        [Sync(when=Every(2), codec=ErrorFeedback(RandK(0.3)), outer=outer.SGD(0.5), apply=OneRound(0.5))]
    ),
    "random": Plan([Sync(when=Bernoulli(0.5, seed=3), outer=outer.Adam())]),
    "noloco with another pull": plans.noloco(3, gamma=0.3, overlap=1, fragments=2),
    "noloco": plans.diloco(2, outer_momentum=0.3, topology=RandomPairs()),
    "gossip": plans.gossip(),
    "gossip ring": plans.gossip(Ring(), order="cta"),
    "gossip star": plans.gossip(Star(), order="awc"),
    "gossip directed": plans.gossip(DirectedRing()),
    "choco": plans.gossip(Ring(), Difference(TopK(0.2), 0.3)),
    "choco exponential": plans.gossip(Exponential(), Difference(Int8(stochastic=True))),
    "exact diffusion": plans.gossip(Ring(), correction="exact_diffusion"),
    "tracking": plans.gossip(OnePeerExponential(), correction="gradient_tracking"),
    "median": Plan([Sync(what="gradients", combine=Median()), Sync(when=Every(3), peers=Ring())]),
    "two parts": Plan([Sync(what=Gradients("head.*")), Sync(when=Every(2), what=Parameters("body.*"), peers=Ring())]),
}


def combinations(n: int) -> list[Plan]:
    """Every topology x codec x schedule x outer x apply that is accepted for ``n`` workers."""
    topologies = [Complete(), Ring(), Star(), OnePeerExponential(), RandomPairs(seed=2), DirectedRing()]
    codecs = [
        Identity(),
        BF16(),
        ErrorFeedback(TopK(0.1)),
        ErrorFeedback(RandK(0.2)),
        ErrorFeedback(LowRank(1, 1.0)),
        EF21(Sign()),
        Difference(Int8()),
        Difference(LowRank(2, 1.0), 0.5),
    ]
    schedules = [Every(1), Every(3), Every(2, 1), Bernoulli(0.5), AtEnd()]
    outers = [None, outer.SGD(), Nesterov(0.3, 0.3), HeavyBall(0.5, 0.3), outer.Adam()]
    applies = [
        Blocking(),
        Blocking(merge=Lerp(0.5)),
        Blocking("cta"),
        Blocking("awc"),
        Delay(1),
        Delay(2, Lerp(0.3)),
        OneRound(),
        OneRound("own_share"),
    ]
    legal = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for peers, codec, when, outer_, apply in itertools.product(topologies, codecs, schedules, outers, applies):
            try:
                plan = Plan([Sync(when, peers=peers, codec=codec, outer=outer_, apply=apply)])
                plan.check(n)
            except ValueError:
                continue
            legal.append(plan)
    return legal


def sample(count: int) -> list[Plan]:
    """The same ``count`` combinations for four workers every time."""
    return random.Random(4).sample(combinations(4), count)
