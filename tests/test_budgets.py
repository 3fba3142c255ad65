"""Budgets: every tensor its own setting, by dynamic programming, re-planned on all ranks at once."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import momentum_sgd, mosaic_simulation
from torch import Tensor

from lightning_dopt import (
    BF16,
    EF21,
    Delay,
    Difference,
    Engine,
    ErrorFeedback,
    Every,
    Gradients,
    Identity,
    Int4,
    Int8,
    Link,
    LowRank,
    OnePeerExponential,
    Plan,
    RandK,
    Ring,
    Simulation,
    Sync,
    TopK,
    plans,
)
from lightning_dopt.comm.world import World
from lightning_dopt.compress import (
    DIANA,
    QSGD,
    BlockTopK,
    ByteBudget,
    Compose,
    Compressor,
    DCTTopK,
    DenseBelow,
    Factors,
    LGreCo,
    Sign,
)
from lightning_dopt.compress.allocation import Allocation
from lightning_dopt.compress.alternatives import alternatives
from lightning_dopt.compress.knapsack import allocate
from lightning_dopt.compress.packing import Packing
from lightning_dopt.exchange import Channel
from lightning_dopt.forecast import forecast

Ranks = Callable[..., list[Any]]
SHAPES = {"a": (40, 30), "norm": (40,), "b": (60, 50), "c": (30, 30), "bias": (7,)}
SCALES = {"a": 1.0, "norm": 3.0, "b": 0.05, "c": 10.0, "bias": 0.1}


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def model(rank: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {name: torch.zeros(shape, dtype=dtype) for name, shape in SHAPES.items()}


def gradient(rank: int, name: str, step: int) -> Tensor:
    """Of rank 3 but for a little noise, in sizes that differ between tensors."""
    shape, k = SHAPES[name], list(SHAPES).index(name)
    if len(shape) == 1:
        return SCALES[name] * gaussian(*shape, seed=1000 * step + 10 * rank + k)
    low = gaussian(shape[0], 3, seed=k) @ gaussian(3, shape[1], seed=50 + k)
    return SCALES[name] * (low + (0.3 + 0.2 * k) * gaussian(*shape, seed=1000 * step + 10 * rank + k))


def backward(rank: int, parameters: dict[str, Tensor], step: int) -> None:
    for name, p in parameters.items():
        p.grad = (p.detach().double() * 0.1 + gradient(rank, name, step)).to(p.dtype)


def simulate(plan: Plan, n: int = 4, **options: Any) -> Simulation:
    return Simulation(plan, n, model, backward, momentum_sgd, **options)


def gradient_channels(run: Simulation) -> list[Channel]:
    return [g.runner.lanes[0].channel for engine in run.engines for g in engine.gradients[0]]


def first_channels(run: Simulation) -> list[Channel]:
    return [engine.runners[0].lanes[0].channel for engine in run.engines]


def choice(channel: Channel) -> list[int]:
    assert channel.allocation is not None
    return channel.allocation.choice


def stacked(run: Simulation) -> Tensor:
    return torch.stack([torch.cat([t.detach().reshape(-1) for t in r.values()]) for r in run.replicas])


# ---------------------------------------------------------------------- the problem


@pytest.mark.parametrize("seed", range(12))
def test_the_dynamic_programme_equals_brute_force(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    cost = torch.rand(4, 4, generator=g, dtype=torch.float64)
    weight = torch.randint(0, 30, (4, 4), generator=g).double()
    limit = float(weight.min(1).values.sum() + seed * 4)
    feasible = [
        (sum(float(cost[i, c]) for i, c in enumerate(each)), each)
        for each in itertools.product(range(4), repeat=4)
        if sum(float(weight[i, c]) for i, c in enumerate(each)) <= limit
    ]
    found = allocate(cost, weight, limit)  # whole weights: nothing is rounded
    assert found == list(min(feasible)[1])
    assert allocate(cost, weight * 1.7, limit * 1.7 + 1e-6, 4 * max(1, int(limit - weight.amin(1).sum()))) == found
    assert allocate(cost, weight, float(weight.min(1).values.sum()) - 1) is None
    order = torch.tensor([2, 0, 3, 1])
    assert allocate(cost[order], weight[order], limit) == [found[i] for i in order]


def test_rounded_weights_never_exceed_the_limit() -> None:
    g = torch.Generator().manual_seed(3)
    for bins in (10, 100, 10_000):
        cost, weight = (torch.rand(30, 7, generator=g, dtype=torch.float64) for _ in range(2))
        for part in (0.0, 0.01, 0.3, 1.0):
            limit = float(weight.amin(1).sum() * (1 - part) + weight.amax(1).sum() * part)
            found = allocate(cost, weight, limit, bins)
            assert found is not None
            assert sum(float(weight[i, c]) for i, c in enumerate(found)) <= limit * (1 + 1e-12)
    assert allocate(cost, weight, 100.0) == cost.argmin(1).tolist()  # everything fits


def test_two_hundred_tensors_with_ten_choices_take_little_time() -> None:
    g = torch.Generator().manual_seed(0)
    cost, weight = (torch.rand(200, 10, generator=g) for _ in range(2))
    begin = time.perf_counter()
    allocate(cost, weight, 80.0)
    assert time.perf_counter() - begin < 1.0


def test_alternatives() -> None:
    assert [c.rank for c in alternatives(LowRank(4, 1.5))] == [1, 2, 3, 4, 6, 8, 11, 16]  # type: ignore[attr-defined]
    assert all(c.min_ratio == 1.5 for c in alternatives(LowRank(4, 1.5)))  # type: ignore[attr-defined]
    ratios = [c.ratio for c in alternatives(DCTTopK(0.5, 16))]  # type: ignore[attr-defined]
    assert ratios == pytest.approx(
        [0.125, 0.125 * math.sqrt(2), 0.25, 0.25 * math.sqrt(2), 0.5, 0.5 * math.sqrt(2), 1.0]
    )
    assert alternatives(QSGD(7, 64)) == [QSGD(s, 64) for s in (1, 3, 7, 15, 31, 63, 127)]
    assert alternatives(Int4(64)) == [Int4(64), Int8(64), BF16()]
    assert alternatives(Int8(stochastic=True)) == [Int4(256, True), Int8(256, True)]
    assert alternatives(Sign()) == [Sign()]
    for codec in (
        TopK(0.1),
        RandK(0.01),
        Compose(BlockTopK(0.02), Int8()),
        DenseBelow(LowRank(2)),
        QSGD(7),
        LowRank(5),
        Factors(LowRank(5), Int4()),
    ):
        assert codec in alternatives(codec)


# ---------------------------------------------------------------------- what is chosen


def random_tensors(scales: list[float], d: int = 4096) -> list[Tensor]:
    return [s * gaussian(d, seed=k).float() for k, s in enumerate(scales)]


def planned(budget: Compressor, tensors: list[Tensor], scale: Any = None) -> Allocation:
    assert isinstance(budget, (LGreCo, ByteBudget))
    found = Allocation(budget, [t.shape for t in tensors], 1.0, scale)
    found.update(found.measure([torch.cat([t.reshape(-1) for t in tensors])], 0))
    return found


def error_of(allocation: Allocation, tensors: list[Tensor], squared: bool) -> float:
    codecs = [allocation.options[c] for c in allocation.choice]
    each = [float((c.roundtrip(t) - t).square().sum()) for c, t in zip(codecs, tensors, strict=True)]
    return sum(each if squared else map(math.sqrt, each))


def test_gaussian_tensors_share_a_byte_budget_by_reverse_water_filling() -> None:
    """Each bit divides the squared error of quantisation by about four: levels grow in proportion to the scale."""
    scales = [1.0, 2.0, 4.0, 16.0]
    options = [QSGD(s, block=64) for s in (1, 3, 7, 15, 31, 63, 127)]  # 2 .. 8 bits
    budget = ByteBudget(options[0], nbytes=4 * (4096 // 64 * 4) + 4096 * (3 + 4 + 5 + 7) // 8, choices=options)
    found = planned(budget, random_tensors(scales))
    bits = [found.options[c].bits for c in found.choice]  # type: ignore[attr-defined]
    assert bits == [3, 4, 5, 7]  # one more for each factor of two
    assert Packing(found.parts(), [(4096,)] * 4).nbytes == budget.nbytes


def test_few_elements_go_where_energy_is() -> None:
    """A fixed number of random elements: the energy sent is ``sum k_l s_l^2``, so the largest take all they may."""
    options = [RandK(r) for r in (0.01, 0.1, 0.5, 1.0)]
    tensors = [torch.full((1000,), s) for s in (1.0, 3.0, 2.0)]
    for numbers, expected in ((1510, [0, 3, 2]), (1600, [1, 3, 2]), (30, [0, 0, 0]), (610, [0, 2, 1])):
        found = planned(ByteBudget(options[0], 4 * numbers, options), tensors, ErrorFeedback(options[0]).scale)
        assert found.choice == expected


def test_low_ranks_follow_the_spectra() -> None:
    """Matrices of rank 1, 3 and 8: L-GreCo pays for none beyond, and keeps to the error of rank 4 for all."""
    tensors = [gaussian(60, r, seed=r).float() @ gaussian(r, 50, seed=9 + r).float() for r in (1, 3, 8)]
    tensors[1] *= 10
    found = planned(LGreCo(LowRank(4, 1.0), [LowRank(r, 1.0) for r in range(1, 9)], alpha=1.01, metric="l2sq"), tensors)
    ranks = [found.options[c].rank for c in found.choice]  # type: ignore[attr-defined]
    assert ranks == [1, 3, 4]
    uniform = LowRank(4, 1.0)
    assert 4 * 110 * sum(ranks) < 3 * uniform.payload_bytes((60, 50))
    assert float(uniform.squared_error(tensors[0])) < 1e-4 < float(uniform.squared_error(tensors[2]))


@pytest.mark.parametrize("metric", ["l2", "l2sq"])
@pytest.mark.parametrize("alpha", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("codec", [TopK(0.05), BlockTopK(0.05, 256), Int4(), LowRank(3, 1.0), QSGD(7)], ids=repr)
def test_errors_stay_below_the_constraint(codec: Compressor, alpha: float, metric: Any) -> None:
    tensors = [s * gaussian(64, 48, seed=k).float() for k, s in enumerate([0.1, 1.0, 1.0, 5.0])]
    tensors[2] = tensors[2] ** 3  # heavy tails
    budget = LGreCo(codec, alpha=alpha, metric=metric)
    found = planned(budget, tensors)
    table = found.measure([torch.cat([t.reshape(-1) for t in tensors])], 0).view(4, -1).double()
    table = table.sqrt() if metric == "l2" else table
    uniform = budget.options.index(codec)
    chosen = sum(float(row[c]) for row, c in zip(table, found.choice, strict=True))
    limit = alpha * float(table[:, uniform].sum())
    if float(table.amin(1).sum()) > limit:
        assert found.choice == [uniform] * 4
        return
    assert chosen <= limit * (1 + 1e-9)
    nbytes = sum(float(row[c]) for row, c in zip(found.sizes, found.choice, strict=True))
    if alpha >= 1:
        assert nbytes <= float(found.sizes[:, uniform].sum())
    if not isinstance(codec, (LowRank, QSGD)):  # measured as it is sent
        assert error_of(found, tensors, metric == "l2sq") == pytest.approx(chosen, rel=1e-5)


def test_a_large_alpha_takes_the_fewest_bytes_and_zeros_change_nothing() -> None:
    tensors = random_tensors([1.0, 2.0])
    found = planned(LGreCo(TopK(0.1), alpha=1e6), tensors)
    assert found.choice == [0, 0]
    for table in (torch.zeros(found.entries), torch.full((found.entries,), torch.nan)):
        found.update(table)
        assert found.choice == [0, 0]
    assert bool(found.measure([torch.full((8192,), torch.nan)], 0).isinf().all())


def test_measured_errors_are_those_of_the_codecs() -> None:
    x = gaussian(50, 40)
    s = torch.linalg.svdvals(x)
    for r in (1, 4, 9):
        best = float(s[r:].square().sum())
        assert float(LowRank(r, 0.1).squared_error(x, 1)) == pytest.approx(best, rel=0.02)
        assert float(LowRank(r, 0.1).squared_error(x, 1)) >= best * (1 - 1e-9)
    assert float(LowRank(20).squared_error(x)) == 0.0  # sent whole
    codec, scale = RandK(0.13), 0.4
    draws = [float((codec.roundtrip(x, seed).mul_(scale) - x).square().sum()) for seed in range(3000)]
    assert float(codec.squared_error(x, 0, scale)) == pytest.approx(sum(draws) / 3000, rel=0.02)
    assert float(TopK(0.1).squared_error(x)) == pytest.approx(float((TopK(0.1).roundtrip(x) - x).square().sum()))


# ---------------------------------------------------------------------- limiting cases


@pytest.mark.parametrize("codec", [LowRank(2, 1.0), DCTTopK(0.1, 8)], ids=repr)
def test_one_choice_is_the_compressor_itself(codec: Compressor) -> None:
    transport = "auto" if codec.linear else "all_gather"  # budgets have no second leg, which auto takes over slow links
    plain, budget, bytes_ = (
        simulate(Plan([Sync(what="gradients", codec=ErrorFeedback(c), transport=transport)]), link=Link(1.0, 5.0)).run(
            9
        )
        for c in (codec, LGreCo(codec, [codec], every=3), ByteBudget(codec, 10**6, [codec], every=100))
    )
    assert torch.equal(stacked(plain), stacked(budget))
    assert torch.equal(stacked(plain), stacked(bytes_))
    assert plain.bytes == bytes_.bytes
    tables = 3 * 2 * 3 * 4 * len(SHAPES) // 4  # three sums of one number per tensor over four ranks
    assert budget.bytes == [b + tables for b in plain.bytes]
    shapes = {name: tuple(shape) for name, shape in SHAPES.items()}
    told = forecast(
        plans.compressed_ddp(LGreCo(codec, [codec], every=3)), 4, shapes, 9, Link(1.0, 5.0), dtype=torch.float64
    )
    assert told.bytes == budget.bytes
    assert told.seconds == max(w.clock.now for w in budget.worlds if w.clock)


def test_one_top_k_for_each_tensor_is_the_top_k_of_each() -> None:
    value = gaussian(5000).float()
    shapes = [(40, 30), (300,), (50, 70)]
    budget = LGreCo(TopK(0.1), [TopK(0.1)])
    packing = Packing(budget.parts_of(shapes, [0, 0, 0]), shapes)
    out = torch.zeros_like(value)
    packing.decode_add(packing.encode(value, 1, 2), out, 1.0, 1)
    parts = [TopK(0.1).roundtrip(part) for part in value.split([1200, 300, 3500])]
    assert torch.equal(out, torch.cat(parts))


@pytest.mark.parametrize("inner", [TopK(0.1), Int8(), Int4(stochastic=True), LowRank(2, 1.0), RandK(0.2)], ids=repr)
def test_dense_tensors_arrive_and_the_others_are_the_compressors(inner: Compressor) -> None:
    shapes = [(5,), (40, 30), (3, 3), (60, 50), (2000,)]
    sizes = [5, 1200, 9, 3000, 2000]
    value = gaussian(sum(sizes)).float()
    codec = DenseBelow(inner, 100)
    packing = Packing(codec.parts(shapes), shapes)
    large = [(40, 30), (60, 50)]
    alone = Packing(inner.parts(large), large)
    pieces = value.split(sizes)
    assert packing.nbytes == 4 * 2014 + alone.nbytes
    out = torch.zeros_like(value)
    packing.decode_add(packing.encode(value, 1, 2), out, 1.0, 1)
    for k in (0, 2, 4):
        assert torch.equal(out.split(sizes)[k], pieces[k])
    if inner in (TopK(0.1), Int8()):
        expected = inner.roundtrip(torch.cat([pieces[1], pieces[3]]))
        assert torch.equal(torch.cat([out.split(sizes)[1], out.split(sizes)[3]]), expected)
    assert codec.linear == inner.linear
    assert DenseBelow(inner, 0, vectors=False).parts(shapes) == inner.parts(shapes)


def test_dense_with_a_linear_codec_is_one_sum_per_phase() -> None:
    for codec, sums in ((DenseBelow(LowRank(2, 1.0), 100), 2), (DenseBelow(RandK(0.1), 100), 1)):
        run = simulate(plans.compressed_ddp(codec)).run(2)
        entry = run.worlds[0].ledger.entries["gradients"]
        assert entry.messages == 2 * (sums + 1)  # and which gradients are not finite
        assert torch.equal(stacked(run)[0], stacked(run)[1])
    exact = simulate(Plan([Sync(what="gradients")])).run(4).replicas
    dense = simulate(plans.compressed_ddp(DenseBelow(LowRank(2, 1.0), 10**9))).run(4).replicas
    assert all(torch.equal(a[k], b[k]) for a, b in zip(exact, dense, strict=True) for k in SHAPES)


# ---------------------------------------------------------------------- in training

CODECS = {
    "low rank": LGreCo(LowRank(2, 1.0), every=3, metric="l2sq"),
    "top-k": LGreCo(DenseBelow(TopK(0.1), 100), every=3),
    "rand-k bytes": ByteBudget(DenseBelow(RandK(0.1), 100), 4000, every=2),
    "bits": ByteBudget(Int4(), 5000, every=3),
    "qsgd": LGreCo(QSGD(7, 64), every=3),
    "mixed": LGreCo(TopK(0.1), [LowRank(1, 1.0), Int4(stochastic=True), BF16(), TopK(0.01)], every=3),
    "dct": ByteBudget(DCTTopK(0.05, 16), 2000, every=3),
}
each_codec = pytest.mark.parametrize("name", CODECS)


@each_codec
def test_replans_keep_ranks_together_and_lose_nothing(name: str) -> None:
    """T4: what was applied and what is remembered is the sum of all gradients, through every change of plan."""
    run = simulate(plans.compressed_ddp(CODECS[name]))
    run.optimizers = [torch.optim.SGD(list(r.values()), lr=1.0) for r in run.replicas]
    seen: list[list[list[int]]] = []
    total = torch.zeros_like(stacked(run))

    def remember(rank: int, parameters: dict[str, Tensor], step: int) -> None:
        for k, p in parameters.items():
            p.grad = gradient(rank, k, step)
        total[rank] += torch.cat([p.grad.reshape(-1) for p in parameters.values() if p.grad is not None])

    run.backward = remember
    for _ in range(10):
        run.run(1)
        seen.append([choice(c) for c in gradient_channels(run)])
        assert all(mine == seen[-1][0] for mine in seen[-1])
    first, last = seen[0][0], seen[-1][0]
    assert first == seen[1][0][:] if CODECS[name].every > 2 else True  # type: ignore[attr-defined]
    assert last != first
    assert len(set(last)) > 1, "unequal tensors, unequal settings"
    x = stacked(run)
    assert torch.equal(x[0], x[3])
    channels = gradient_channels(run)
    residual = torch.zeros_like(x[0])
    for channel in channels:
        kept = {f.name: f.of(channel.memory_state["residual"]) for f in channel.lane.fields}
        residual += torch.cat([kept[k].reshape(-1) for k in SHAPES])
    torch.testing.assert_close(-x[0] * 4 + residual, total.sum(0), rtol=1e-5, atol=2e-3)


def test_replans_happen_once_a_period() -> None:
    run = simulate(plans.compressed_ddp(LGreCo(TopK(0.1), every=4)))
    (channel, *_) = gradient_channels(run)
    history = []
    for _ in range(13):
        history.append((list(choice(channel)), channel.message_bytes))
        run.run(1)
    assert len({str(h) for h in history[:4]}) == len({str(h) for h in history[4:8]}) == 1
    assert history[3] != history[4]


@pytest.mark.parametrize("nbytes", [900, 4000, 12_000])
def test_a_byte_budget_is_never_exceeded(nbytes: int) -> None:
    run = simulate(plans.compressed_ddp(ByteBudget(DenseBelow(TopK(0.05), 50), nbytes, every=2)), n=3)
    for _ in range(9):
        before = run.worlds[0].ledger.bytes
        length = gradient_channels(run)[0].message_bytes
        assert length <= nbytes
        run.run(1)
        table = 4 * len(SHAPES) * 9 * 2 * 2 // 3  # the sum of the tables
        assert run.worlds[0].ledger.bytes - before - 2 * length in (0, table)
    assert length > 0.9 * nbytes or nbytes == 12_000


def test_buckets_share_a_byte_budget() -> None:
    codec = ByteBudget(TopK(0.05), 3000, every=2)
    run = simulate(Plan([Sync(what=Gradients(bucket_mb=0.01), codec=ErrorFeedback(codec))]))
    lanes = [lane.channel for g in run.engines[0].gradients[0] for lane in g.runner.lanes]
    assert len(lanes) > 1
    run.run(5)
    assert 2000 < sum(channel.message_bytes for channel in lanes) <= 3000


def settled(run: Simulation, steps: int) -> Simulation:
    run.run(steps)
    return run


def test_a_message_in_flight_is_decoded_as_it_was_packed() -> None:
    """A delayed message leaves before the choice changes and arrives after; nothing is lost."""
    codec = ErrorFeedback(LGreCo(TopK(0.1), every=1))
    run = simulate(Plan([Sync(when=Every(2), codec=codec, apply=Delay(1))]), n=3)
    choices = []
    for _ in range(8):
        run.run(1)
        now = [choice(c) for c in first_channels(run)]
        assert now[0] == now[1] == now[2]
        choices.append(now[0])
        x = stacked(run)
    anchors = [engine.runners[0].lanes[0].anchor for engine in run.engines]
    assert all(torch.equal(anchors[0], other) for other in anchors[1:] if anchors[0] is not None and other is not None)
    assert bool(x.isfinite().all())
    assert len({str(c) for c in choices}) > 1


@pytest.mark.parametrize("peers", [Ring(), OnePeerExponential()], ids=repr)
def test_gossip_with_a_budget_keeps_the_mean_and_agrees(peers: Any) -> None:
    codec = Difference(LGreCo(TopK(0.3), every=5, metric="l2sq"), 0.3)

    def start(rank: int) -> dict[str, Tensor]:
        return {k: SCALES[k] * gaussian(*s, seed=rank * 10 + i) for i, (k, s) in enumerate(SHAPES.items())}

    def still(rank: int, parameters: dict[str, Tensor], step: int) -> None:
        pass

    run = Simulation(Plan([Sync(codec=codec, peers=peers)]), 4, start, still, momentum_sgd)
    mean, far = stacked(run).mean(0), run.distance()
    run.run(160)
    channels = first_channels(run)
    assert all(choice(c) == choice(channels[0]) for c in channels)
    assert len(set(choice(channels[0]))) > 1
    torch.testing.assert_close(stacked(run).mean(0), mean, rtol=0, atol=1e-4)
    assert run.distance() < 1e-2 * far


@pytest.mark.parametrize("memory", [EF21, ErrorFeedback], ids=lambda m: m.__name__)
def test_other_memories(memory: Any) -> None:
    run = simulate(Plan([Sync(what="gradients", codec=memory(LGreCo(TopK(0.2), every=3)))])).run(8)
    assert torch.equal(stacked(run)[0], stacked(run)[2])
    if memory is EF21:
        own = torch.stack([c.memory_state["own"] for c in gradient_channels(run)]).mean(0)
        torch.testing.assert_close(own, gradient_channels(run)[0].memory_state["mean"])


def test_diana_takes_unbiased_choices() -> None:
    run = simulate(Plan([Sync(what="gradients", codec=DIANA(LGreCo(RandK(0.3), every=3)))])).run(8)
    assert torch.equal(stacked(run)[0], stacked(run)[2])
    with pytest.raises(ValueError, match="unbiased"):
        DIANA(LGreCo(TopK(0.1)))


def test_ranks_may_change_and_warm_starts_stay() -> None:
    """The leading columns are kept when the rank falls, and the subspace is found again when it grows."""
    x = gaussian(40, 6) @ torch.diag(torch.tensor([8.0, 4, 2, 1, 0.5, 0.25]).double()) @ gaussian(6, 30, seed=1)
    state: dict[str, Tensor] = {}

    def step(rank: int, seed: int) -> float:
        talk = LowRank(rank, 0.1).rounds(x, state, seed, 1)
        part = next(talk)
        try:
            while True:
                part = talk.send(part)
        except StopIteration as stop:
            return float((stop.value[0] - x).square().sum())

    s = torch.linalg.svdvals(x).square()
    for t in range(60):
        step(4, t)
    assert step(2, 60) == pytest.approx(float(s[2:].sum()), rel=1e-2)  # at once: the leading columns come first
    for t in range(60):
        last = step(5, 61 + t)
    assert last == pytest.approx(float(s[5:].sum()), rel=1e-2)
    assert state["q"].shape == (30, 5)


# ---------------------------------------------------------------------- resume, processes, refusals


@each_codec
def test_resume_is_exact(name: str) -> None:
    plan = plans.compressed_ddp(CODECS[name])
    whole, first, second = (simulate(plan) for _ in range(3))
    whole.run(10)
    first.run(5)
    for rank in range(4):
        for k, p in first.replicas[rank].items():
            second.replicas[rank][k].data.copy_(p.data)
        second.engines[rank].load_state_dict(first.engines[rank].state_dict())
        second.optimizers[rank].load_state_dict(first.optimizers[rank].state_dict())
    steps = iter(range(5, 10))

    def later(rank: int, parameters: dict[str, Tensor], step: int) -> None:
        backward(rank, parameters, step)

    second.backward = later
    assert [choice(c) for c in gradient_channels(second)] == [choice(c) for c in gradient_channels(first)]
    for _ in steps:
        second.run(1)
    assert torch.equal(stacked(whole), stacked(second))
    assert whole.bytes == second.bytes


def on_a_rank(world: World, name: str) -> tuple[Tensor, list[int], int]:
    parameters = {k: t.requires_grad_() for k, t in model(world.rank, torch.float32).items()}
    engine = Engine(plans.compressed_ddp(CODECS[name]), parameters, world)
    optimizer = momentum_sgd(list(parameters.values()))
    for step in range(1, 9):
        engine.run(engine.before_step())
        backward(world.rank, parameters, step)
        engine.run(engine.on_gradients())
        optimizer.step()
        engine.run(engine.after_step())
    allocation = engine.gradients[0][0].runner.lanes[0].channel.allocation
    assert allocation is not None
    return torch.cat([p.detach().reshape(-1) for p in parameters.values()]), allocation.choice, world.ledger.bytes


@each_codec
def test_processes_do_what_the_simulation_does(ranks: Ranks, name: str) -> None:
    simulated = Simulation(
        plans.compressed_ddp(CODECS[name]), 2, lambda rank: model(rank, torch.float32), backward, momentum_sgd
    ).run(8)
    (x0, choice0, bytes0), (x1, choice1, bytes1) = ranks(on_a_rank, 2, name)
    assert torch.equal(x0, x1)
    assert choice0 == choice1 == choice(gradient_channels(simulated)[0])
    assert [bytes0, bytes1] == simulated.bytes
    torch.testing.assert_close(x0, stacked(simulated)[0], rtol=1e-5, atol=1e-5)


def test_refusals() -> None:
    for make in (
        lambda: LGreCo(ErrorFeedback(TopK(0.1))),  # type: ignore[arg-type]
        lambda: LGreCo(Sign()),
        lambda: LGreCo(TopK(0.1), []),
        lambda: LGreCo(LGreCo(TopK(0.1))),
        lambda: LGreCo(TopK(0.1), [ByteBudget(TopK(0.1), 5)]),
        lambda: LGreCo(TopK(0.1), alpha=0.0),
        lambda: LGreCo(TopK(0.1), every=0),
        lambda: LGreCo(TopK(0.1), metric="l1"),  # type: ignore[arg-type]
        lambda: ByteBudget(TopK(0.1), 0),
        lambda: DenseBelow(LGreCo(TopK(0.1))),
        lambda: DenseBelow(TopK(0.1), -1),
        lambda: DenseBelow(TopK(0.1), 10, 1),  # type: ignore[arg-type]
        lambda: Compose(TopK(0.1), LGreCo(TopK(0.1))),
    ):
        with pytest.raises(ValueError, match=r"^[^\n]+$"):
            make()
    with pytest.raises(ValueError, match=r"ByteBudget\(nbytes=40\): the smallest message takes"):
        simulate(plans.compressed_ddp(ByteBudget(TopK(0.1), 40)))
    with pytest.raises(ValueError, match="use a fixed codec"):
        simulate(plans.choco_sgd(Ring(), LGreCo(TopK(0.3)), 0.3), on_lost_peer="continue")


def test_budgets_are_plain_data() -> None:
    budget = LGreCo(LowRank(4), every=100, alpha=1.2)
    assert eval(repr(budget), {"LGreCo": LGreCo, "LowRank": LowRank}) == budget
    assert ByteBudget(TopK(0.1), 5000) != ByteBudget(TopK(0.1), 5001)
    assert DenseBelow(Int8()).parts([(3,), (200, 200), (4,)]) == [(Identity(), [0, 2]), (Int8(), [1])]
    assert mosaic_simulation(plans.compressed_ddp(ByteBudget(QSGD(7), 400, every=2)), 3).run(5).bytes[0] > 0
