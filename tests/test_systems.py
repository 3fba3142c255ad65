"""Published compression systems: each equals something simpler where it must, and what is new in them does its work."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from problems import Optimizer, Quadratics, momentum_sgd, mosaic_run, mosaic_simulation, p2, sgd
from torch import Tensor

from lightning_dopt import (
    EF21,
    EControl,
    ErrorFeedback,
    Every,
    Identity,
    Int8,
    LowRank,
    Plan,
    RandK,
    Sign,
    Simulation,
    Sync,
    TopK,
    plans,
)
from lightning_dopt.comm import World, lockstep
from lightning_dopt.comm.ledger import Ledger
from lightning_dopt.compress import (
    DGC,
    DIANA,
    GMF,
    BlockTopK,
    Codec,
    Compose,
    Compressor,
    CountSketch,
    DCTTopK,
    DenseBelow,
    Phases,
    RandomProjection,
)
from lightning_dopt.forecast import forecast
from lightning_dopt.local import ClipLocal, NeuronMask, NoisyGradients, Scaffold
from lightning_dopt.outer import SGD

pytestmark = pytest.mark.filterwarnings("ignore:Sync")


def close(a: Tensor, b: Tensor, tol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def gradients(codec: Codec) -> Plan:
    return Plan([Sync(what="gradients", codec=codec)])


def after(plan: Plan, steps: int = 20, lr: float = 0.02) -> Tensor:
    return p2().simulate(plan, lr).run(steps).stacked()


def memory_of(sim: Simulation, rank: int = 0) -> dict[str, Tensor]:
    return sim.engines[rank].gradients[0][0].runner.lanes[0].channel.memory_state


def constant(n: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Gradients that do not depend on the parameters."""
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pushed(plan: Plan, g: Tensor, steps: int, optimizer: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Simulation:
    def backward(rank: int, parameters: dict[str, Tensor], step: int) -> None:
        parameters["x"].grad = g[rank].clone()

    start = torch.zeros(g.shape[1:], dtype=torch.float64)
    return Simulation(plan, len(g), lambda rank: {"x": start}, backward, optimizer).run(steps)


# ---------------------------------------------------------------------- phases


def test_phases_are_their_compressors_in_turn() -> None:
    """Round by round the residual is that of the compressor whose turn it is; nothing is lost on the way."""
    g, sizes = constant(2, (20,)), []
    sim = pushed(gradients(ErrorFeedback(Phases([Identity(), TopK(0.5), TopK(0.1)], [2, 1]))), g, 0, sgd(1.0))
    for _ in range(5):
        before = sim.bytes[0]
        sim.run(1)
        sizes.append(sim.bytes[0] - before)
    dense = 20 * 8  # float64, summed
    assert sizes == [dense, dense, 10 * 5, 2 * 5, 2 * 5]
    residual = torch.stack([memory_of(sim, k)["residual"] for k in range(2)]).mean(0)
    close(residual - sim.stacked()[0], 5 * g.mean(0), 1e-6)


@pytest.mark.parametrize("codec", [Phases([Int8()], []), Phases([Sign(), Int8()], [1])], ids=repr)
def test_one_phase_and_the_last_phase_are_the_compressor(codec: Phases) -> None:
    x = torch.randn(40, generator=torch.Generator().manual_seed(1))
    assert torch.equal(codec.roundtrip(x), Int8().roundtrip(x))
    assert codec.payload_bytes((40,)) == Int8().payload_bytes((40,))
    if not codec.lengths:
        assert torch.equal(after(gradients(ErrorFeedback(codec))), after(gradients(ErrorFeedback(Int8()))))


def test_a_dense_start_is_sgd_and_leaves_no_residual() -> None:
    plan = plans.powersgd(1, dense_steps=4, min_ratio=0.5)
    one, other = (mosaic_simulation(p, 3).run(4) for p in (plan, gradients(Identity())))
    for name in one.replicas[0]:
        close(one.stacked(name), other.stacked(name), 1e-5)
    assert not memory_of(one)["residual"].any()
    one.run(1)
    assert memory_of(one)["residual"].any()


def test_a_message_under_way_is_decoded_as_it_was_packed() -> None:
    """A delayed apply crosses the border between two phases with messages of unequal size."""
    from lightning_dopt import Delay

    def run(codec: Codec) -> Tensor:
        plan = Plan([Sync(when=Every(2), signal="delta", codec=ErrorFeedback(codec), apply=Delay(1))])
        return p2().simulate(plan, 0.05).run(9).finish().stacked()

    close(run(Phases([TopK(1.0), TopK(0.999), Identity()], [2, 1])), run(Identity()), 1e-6)


def test_phases_forecast_what_they_send() -> None:
    plan = plans.dgc(0.01, warmup=(0.25, 0.05), warmup_steps=2, dense_below=None)
    g = constant(3, (400,))
    told = forecast(plan, 3, {"x": (400,)}, steps=6, dtype=torch.float64)
    assert told.bytes == pushed(plan, g, 6, sgd(0.1)).bytes
    assert told.bytes[0] == 2 * 6 * (2 * 100 + 2 * 20 + 2 * 4)  # two others, six bytes an element


def test_what_phases_refuse() -> None:
    for make in (
        lambda: Phases([], []),
        lambda: Phases([TopK(0.1), Int8()], []),
        lambda: Phases([TopK(0.1), Phases([Int8()], [])], [1]),
        lambda: Phases([TopK(0.1), Int8()], [0]),
        lambda: Compose(TopK(0.1), Phases([Int8()], [])),
    ):
        with pytest.raises(ValueError, match=r"^[^\n]+$"):
            make()


# ---------------------------------------------------------------------- the learning rate inside


def falling(lr: float) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    return sgd(lr)


def run_with_rates(codec: Codec, rates: list[float], g: Tensor) -> Simulation:
    sim = pushed(gradients(codec), g, 0, sgd(rates[0]))
    for rate in rates:
        for optimizer in sim.optimizers:
            optimizer.param_groups[0]["lr"] = rate
        sim.run(1)
    return sim


def test_inside_the_residual_keeps_the_rate_of_its_own_step() -> None:
    """``x_0 - x_T = mean of sum lr_t g_t - e_T`` inside; the reference of the paper's algorithm written out."""
    rates, g = [0.5, 0.5, 0.05, 0.05, 0.01, 0.2], constant(3, (12,))
    x, e = torch.zeros(12, dtype=torch.float64), torch.zeros(3, 12, dtype=torch.float64)
    for rate in rates:
        v = e + rate * g
        c = torch.stack([TopK(0.25).roundtrip(row) for row in v])
        e, x = v - c, x - c.mean(0)
    sim = run_with_rates(ErrorFeedback(TopK(0.25), lr_inside=True), rates, g)
    close(sim.stacked()[0], x, 1e-6)
    close(memory_of(sim, 1)["residual"], e[1], 1e-6)
    outside = run_with_rates(ErrorFeedback(TopK(0.25)), rates, g)
    assert float((outside.stacked()[0] - x).abs().max()) > 0.05


def test_inside_and_outside_agree_while_the_rate_stays() -> None:
    codecs = [ErrorFeedback(TopK(0.4), lr_inside=inside) for inside in (True, False)]
    close(*(after(gradients(codec)) for codec in codecs), 1e-6)


def test_a_rate_of_zero_does_no_harm() -> None:
    sim = run_with_rates(ErrorFeedback(TopK(0.25), lr_inside=True), [0.0, 0.1, 0.0, 0.1], constant(2, (12,)))
    assert torch.isfinite(sim.stacked()).all()


# ---------------------------------------------------------------------- DGC and GMF


def test_dgc_of_everything_is_momentum_sgd() -> None:
    for nesterov in (False, True):
        plan = plans.dgc(1.0, 0.9, nesterov, masking=False, warmup=())
        other = p2().simulate(gradients(Identity()), sgd(0.02, 0.9, nesterov)).run(20).stacked()
        close(after(plan), other, 1e-6)


@pytest.mark.parametrize("masking", [True, False])
def test_dgc_is_the_published_recursion(masking: bool) -> None:
    g, x = constant(3, (30,)), torch.zeros(30, dtype=torch.float64)
    u, v = torch.zeros_like(g), torch.zeros_like(g)
    for _ in range(12):
        u = 0.9 * u + g
        v = v + u
        c = torch.stack([TopK(0.2).roundtrip(row) for row in v])
        v, x = v - c, x - c.mean(0)
        if masking:
            u[c != 0] = 0.0
    sim = pushed(plans.dgc(0.2, warmup=(), masking=masking, dense_below=None), g, 12, sgd(1.0))
    close(sim.stacked()[1], x, 1e-5)
    close(memory_of(sim, 2)["momentum"], u[2], 1e-5)
    assert bool((u == 0).any()) == masking


def test_dgc_clips_each_rank_to_its_share() -> None:
    g = 5 * constant(4, (12,))
    sim = pushed(plans.dgc(1.0, 0.0, warmup=(), clip=2.0), g, 1, sgd(1.0))
    clipped = g / g.norm(dim=1, keepdim=True) * 2.0 / 2.0  # the root of four ranks
    close(sim.stacked()[0], -clipped.mean(0), 1e-6)
    small = 1e-3 * g
    close(pushed(plans.dgc(1.0, 0.0, warmup=(), clip=2.0), small, 1, sgd(1.0)).stacked()[0], -small.mean(0), 1e-9)


def test_gmf_without_fusion_is_dgc() -> None:
    for codec in (TopK(0.4), BlockTopK(0.4, 4), Compose(TopK(0.4), Int8())):
        assert torch.equal(after(gradients(GMF(codec, fusion=0.0))), after(gradients(DGC(codec))))


def test_with_fusion_ranks_choose_alike() -> None:
    def union(fusion: float) -> int:
        """Elements that any rank sends in the last of some steps, of 4 ranks that send 10 each."""
        sim = pushed(gradients(GMF(TopK(0.1), fusion=fusion)), constant(4, (100,)), 6, sgd(0.1))
        grad = sim.replicas[0]["x"].grad
        assert grad is not None
        return int((grad != 0).sum())

    assert union(0.9) < union(0.5) < union(0.0) <= 40


def test_fusion_that_sends_the_same_for_ever_is_refused_and_less_of_it_drains() -> None:
    """With all the say the shared momentum chooses what it holds: what was not sent at the start is never sent."""
    for fusion in (1.0, [0.0, 1.0]):
        with pytest.raises(ValueError, match=r"GMF\(fusion=1.0\): must be a number in \[0, 1\)"):
            GMF(Phases([TopK(0.1), TopK(0.1)], [1]) if isinstance(fusion, list) else TopK(0.1), fusion=fusion)

    def waiting(fusion: float, steps: int) -> float:
        """The largest number of steps whose gradients an element still waits to send; its gradient does not change."""
        sim = pushed(gradients(GMF(TopK(0.1), momentum=0.0, fusion=fusion)), constant(2, (100,)), steps, sgd(1.0))
        g = constant(2, (100,))
        large = g.abs() > 0.5
        left = torch.stack([memory_of(sim, k)["velocity"] for k in range(2)]) / g
        return float(left[large].max())

    assert waiting(0.3, 200) < 40
    assert waiting(0.9, 200) == pytest.approx(200)


def test_fusion_rises_from_phase_to_phase() -> None:
    """Round by round as with the fusion of its phase, the memory going on."""
    steps = 8
    for codec in (TopK(0.4), Compose(TopK(0.4), Int8())):
        rising = p2().simulate(plans.gmf(momentum=0.5, fusion=(0.0, 0.3, 0.6), codec=codec, fusion_steps=2), 0.02)
        by_hand = p2().simulate(gradients(GMF(codec, 0.5, 0.0)), 0.02)
        for k in range(steps):
            fusion = (0.0, 0.0, 0.3, 0.3)[k] if k < 4 else 0.6
            for engine in by_hand.engines:
                engine.gradients[0][0].runner.lanes[0].channel.memory = GMF(codec, 0.5, fusion)
            assert torch.equal(rising.run(1).stacked(), by_hand.run(1).stacked())
    assert not torch.equal(rising.stacked(), after(gradients(GMF(codec, 0.5, 0.6)), steps))
    with pytest.raises(ValueError, match="must be 1 numbers, one for each phase"):
        GMF(TopK(0.1), fusion=[0.1, 0.2])
    with pytest.raises(ValueError, match=r"gmf\(fusion_steps=0\)"):
        plans.gmf(fusion_steps=0)


# ---------------------------------------------------------------------- residuals drain

DRAIN = [
    RandK(0.25),
    TopK(0.25),
    BlockTopK(0.25, 16),
    Compose(TopK(0.5), Int8()),
    CountSketch(0.25),
    RandomProjection(0.25),
]
DRAIN += [DCTTopK(0.25), LowRank(2, 0.5), Sign(), Phases([TopK(0.1), RandK(0.25)], [20]), DenseBelow(TopK(0.25), 8)]


@pytest.mark.parametrize("codec", DRAIN, ids=repr)
def test_a_residual_drains(codec: Compressor) -> None:
    """``||e|| <= 2 / delta ||g||`` for gradients that never change; with positions that never change it would be 100."""
    g = constant(1, (12, 10))
    sim = pushed(gradients(ErrorFeedback(codec)), g, 150, sgd(1.0))
    delta = codec.contraction((12, 10)) or 1.0 / (1.0 + (codec.variance((12, 10)) or 0.0))
    assert float(memory_of(sim)["residual"].norm()) <= min(80.0, 2.0 / delta) * float(g.norm())


def test_memories_of_masked_tensors_hold_only_what_is_selected() -> None:
    """So what is not selected leaves nothing behind that could wait for ever."""
    plan = Plan([Sync(what="gradients", codec=ErrorFeedback(TopK(0.5)))], [NeuronMask(0.2)])
    sim = pushed(plan, constant(2, (12, 10)), 4, sgd(0.1))
    assert memory_of(sim)["residual"].numel() == 12 * 2


# ---------------------------------------------------------------------- small tensors

SHAPES = {"head.bias": (7,), "head.weight": (5, 7), "body.weight": (20, 30), "norm": (40,)}


def small_and_large(plan: Plan, steps: int, lr: float = 0.1) -> Simulation:
    """Constant gradients of two ranks for tensors of several sizes."""
    g = {name: constant(2, shape, k) for k, (name, shape) in enumerate(SHAPES.items())}

    def backward(rank: int, parameters: dict[str, Tensor], step: int) -> None:
        for name, p in parameters.items():
            p.grad = g[name][rank].clone()

    def start(rank: int) -> dict[str, Tensor]:
        return {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}

    return Simulation(plan, 2, start, backward, sgd(lr)).run(steps)


def packed_bytes(name: str) -> int:
    """Of ``body.weight`` with the options of :data:`DENSE`: 600 elements."""
    return {"qsgd": (600 * 4 + 7) // 8 + 4 * 2, "terngrad": 600 // 5 + 4}.get(name, 60 * (4 + 2))


DENSE: dict[str, Callable[[int | None], Plan]] = {
    "dgc": lambda d: plans.dgc(0.1, warmup=(), dense_below=d),
    "gmf": lambda d: plans.gmf(0.1, dense_below=d),
    "terngrad": lambda d: plans.terngrad(0.0, 1024, d),
    "qsgd": lambda d: plans.qsgd(7, 512, d),
    "ef21": lambda d: plans.ef21(TopK(0.1), d),
    "econtrol": lambda d: plans.econtrol(TopK(0.1), 0.03, d),
    "diana": lambda d: plans.diana(RandK(0.1), dense_below=d),
}


@pytest.mark.parametrize("name", DENSE)
def test_small_tensors_and_vectors_arrive_as_they_are_and_cost_their_size(name: str) -> None:
    """82 small elements as float32 beside the message of the matrix; without momentum they take the mean gradient."""
    sim, dense = small_and_large(DENSE[name](100), 1), small_and_large(gradients(Identity()), 1)
    for small in ("head.bias", "head.weight", "norm"):
        close(sim.stacked(small), dense.stacked(small), 1e-6)
    assert not torch.allclose(sim.stacked("body.weight"), dense.stacked("body.weight"), atol=1e-3)
    if name == "diana":  # summed, in the type of the tensors
        assert sim.bytes[0] == 8 * (82 + 60)
    else:
        assert sim.bytes[0] == 4 * 82 + packed_bytes(name)
    told = forecast(DENSE[name](100), 2, SHAPES, steps=3, dtype=torch.float64)
    assert told.bytes == small_and_large(DENSE[name](100), 3).bytes
    assert DENSE[name](None) != DENSE[name](0)
    vectors = small_and_large(DENSE[name](0), 1)  # the small matrix is packed, vectors are not
    close(vectors.stacked("norm"), dense.stacked("norm"), 1e-6)
    assert not torch.allclose(vectors.stacked("head.weight"), dense.stacked("head.weight"), atol=1e-3)


def test_published_defaults_for_small_tensors() -> None:
    assert plans.dgc() == plans.dgc(dense_below=0)
    assert plans.qsgd() == plans.qsgd(dense_below=10_000)
    for plan in (plans.gmf(), plans.terngrad(), plans.ef21(), plans.econtrol(), plans.diana(), plans.sign_sgd()):
        assert "DenseBelow" not in repr(plan)
    with pytest.raises(ValueError, match=r"^ef21\(dense_below=-1\): must be an integer of at least 0$"):
        plans.ef21(dense_below=-1)


@pytest.mark.parametrize("plan", [DENSE["dgc"](100), DENSE["gmf"](100), plans.dgc(0.1, warmup=(0.5,), warmup_steps=2)])
def test_what_travels_whole_has_plain_momentum_although_sent_momentum_is_cleared(plan: Plan) -> None:
    steps, g = 6, constant(2, SHAPES["norm"], 3).mean(0)
    sim = small_and_large(plan, steps)
    u, x = torch.zeros_like(g), torch.zeros_like(g)
    for _ in range(steps):
        u = 0.9 * u + g
        x = x - 0.1 * u
    close(sim.stacked("norm")[1], x, 1e-5)


def test_diana_learns_small_tensors_and_large_ones_at_one_pace() -> None:
    """The shift's share is that of the compressor, also where it does not see all tensors."""
    codec = RandK(0.1)
    assert DIANA(codec).share((600,)) == pytest.approx(0.1)
    assert plans.diana(codec, dense_below=100).syncs[0].codec.share((682,)) == pytest.approx(0.1, rel=0.01)  # type: ignore[attr-defined]
    sim = small_and_large(plans.diana(codec, dense_below=100), 400)
    channel = sim.engines[0].gradients[0][0].runner.lanes[0].channel
    body = constant(2, SHAPES["body.weight"], 2)[0]
    learnt = dict(
        zip([f.name for f in channel.lane.fields], channel.lane.views(channel.memory_state["own"]), strict=True)
    )
    close(learnt["body.weight"], body, 1e-3)


def test_gmf_shares_one_momentum_and_loses_nothing() -> None:
    g = constant(3, (50,))
    plan = gradients(GMF(TopK(0.2), momentum=0.0, fusion=0.5, global_momentum=0.5))
    sim, shared, applied = pushed(plan, g, 0, sgd(1.0)), torch.zeros(50), torch.zeros(50)
    for _ in range(8):
        grad = sim.run(1).replicas[1]["x"].grad
        assert grad is not None
        shared, applied = 0.5 * shared + grad, applied + grad
    close(memory_of(sim, 2)["shared"], shared.double(), 1e-6)
    left = torch.stack([memory_of(sim, k)["velocity"] for k in range(3)]).mean(0)
    close(applied + left, 8 * g.mean(0), 1e-6)


@pytest.mark.parametrize("codec", [Int8(), LowRank(2), Phases([Int8(), TopK(0.1)], [1])], ids=repr)
def test_gmf_needs_a_codec_that_chooses(codec: object) -> None:
    with pytest.raises(ValueError, match=r"GMF\(codec=.*must choose"):
        GMF(codec)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- PowerSGD


def orthonormal(p: Tensor) -> Tensor:
    """Gram-Schmidt."""
    q = torch.zeros_like(p)
    for k in range(p.shape[1]):
        column = p[:, k] - q[:, :k] @ (q[:, :k].T @ p[:, k])
        q[:, k] = column / column.norm()
    return q


class Matrices:
    """Quadratics of a 12 x 9 weight; the gradient is ``A_i (x - c_i)``."""

    def __init__(self, n: int = 3) -> None:
        m, self.c, self.n = constant(n, (12, 12), 3), constant(n, (12, 9), 4), n
        self.A = m @ m.mT / 12 + 0.3 * torch.eye(12, dtype=torch.float64)

    def run(self, plan: Plan, steps: int, lr: float = 0.1) -> Simulation:
        def backward(rank: int, parameters: dict[str, Tensor], step: int) -> None:
            parameters["x"].grad = self.A[rank] @ (parameters["x"].detach() - self.c[rank])

        start = torch.zeros(12, 9, dtype=torch.float64)
        return Simulation(plan, self.n, lambda rank: {"x": start}, backward, sgd(lr)).run(steps)


def test_powersgd_is_the_published_algorithm() -> None:
    """Written from the paper, with the same first ``Q``: the best start is to take it from the first step of ours."""
    problem, r = Matrices(), 2
    sim = problem.run(plans.powersgd(r, min_ratio=0.5), 1)
    channel = sim.engines[0].gradients[0][0].runner.lanes[0].channel
    (q,) = channel.codec_state.values()
    q = q.reshape(9, r).clone()
    x = sim.stacked()[0].clone()
    e = torch.stack([memory_of(sim, k)["residual"].view(12, 9) for k in range(problem.n)]).clone()
    for _ in range(20):
        d = problem.A @ (x - problem.c) + e
        p = orthonormal((d @ orthonormal(q)).mean(0))
        own = torch.stack([row.T @ p for row in d])
        q = own.mean(0)
        e = d - torch.stack([p @ o.T for o in own])
        x = x - 0.1 * p @ q.T
    sim.run(20)
    close(sim.stacked()[0], x, 1e-9)
    close(memory_of(sim, 2)["residual"].view(12, 9), e[2], 1e-9)


def test_powersgd_at_full_rank_is_sgd() -> None:
    close(*(Matrices().run(p, 20).stacked() for p in (plans.powersgd(9, min_ratio=0.01), gradients(Identity()))), 1e-9)


def test_the_mean_of_all_residuals_is_all_that_matters_to_powersgd() -> None:
    one = Matrices().run(plans.powersgd(2, min_ratio=0.5), 10)
    other = Matrices().run(plans.powersgd(2, min_ratio=0.5), 10)
    residuals = [memory_of(other, k)["residual"] for k in range(3)]
    mean = torch.stack(residuals).mean(0)
    assert float((residuals[0] - mean).norm()) > 0.1
    for residual in residuals:
        residual.copy_(mean)
    close(one.run(20).stacked(), other.run(20).stacked(), 1e-9)


# ---------------------------------------------------------------------- few levels


@pytest.mark.parametrize(
    "plan", [plans.terngrad(clip=0.0, block=64), plans.qsgd(3, 64, None)], ids=["terngrad", "qsgd"]
)
def test_unbiased_over_the_steps(plan: Plan) -> None:
    """The sum of many random gradients is that many times the mean gradient, within four standard deviations."""
    g, steps = constant(2, (64,)), 300
    codec = plan.syncs[0].codec
    moved = -pushed(plan, g, steps, sgd(1.0)).stacked()[0] / steps
    bound = float((codec.variance((64,)) * g.square().sum(1)).sum().sqrt()) / 2  # type: ignore[attr-defined]
    assert float((moved - g.mean(0)).norm()) < 4 * bound / steps**0.5
    assert float((moved - g.mean(0)).norm()) > 0.0


def test_terngrad_sends_three_values_per_block() -> None:
    g = constant(1, (64,))
    grad = pushed(plans.terngrad(clip=0.0), g, 1, sgd(1.0)).stacked()[0]
    assert {round(float(v), 6) for v in grad.abs()} == {0.0, round(float(g.abs().max()), 6)}


def test_a_vote_is_the_sign_of_the_sum_of_signs() -> None:
    g = constant(5, (200,))
    votes = torch.sign(torch.sign(g).sum(0))
    assert torch.equal(pushed(plans.sign_sgd(), g, 3, sgd(0.5)).stacked()[2], -1.5 * votes)


# ---------------------------------------------------------------------- shifts


def test_weights_by_smoothness_change_nothing_in_ef21() -> None:
    """EF21-W as published, with unequal weights, against EF21: top-k scales with its input."""
    problem, w = p2(), torch.arange(1.0, 9.0, dtype=torch.float64) / 36
    x, h = torch.zeros(5, dtype=torch.float64), torch.zeros(8, 5, dtype=torch.float64)
    for _ in range(40):
        scaled = torch.stack([problem.gradient(i, x) for i in range(8)]) / (8 * w[:, None])
        h = h + torch.stack([TopK(0.4).roundtrip(row) for row in scaled - h])
        x = x - 0.05 * (w[:, None] * h).sum(0)
    close(after(plans.ef21(TopK(0.4)), 40, 0.05)[0], x, 1e-5)


def heterogeneous(codec: Codec, lr: float, steps: int) -> float:
    """Four ranks, 20 dimensions, eigenvalues in [1, 10], linear terms of size 10: distance to the optimum, relative."""
    generator = torch.Generator().manual_seed(0)
    basis = [torch.linalg.qr(torch.randn(20, 20, generator=generator, dtype=torch.float64))[0] for _ in range(4)]
    values = 1 + 9 * torch.rand(4, 20, generator=generator, dtype=torch.float64)
    curvature = torch.stack([q @ torch.diag(v) @ q.T for q, v in zip(basis, values, strict=True)])
    b = 10 * torch.randn(4, 20, generator=generator, dtype=torch.float64)
    problem = Quadratics(curvature, torch.linalg.solve(curvature, b))
    best = problem.optimum()
    return float((problem.simulate(gradients(codec), lr).run(steps).stacked()[0] - best).norm() / best.norm())


def test_only_shifts_reach_the_optimum_of_unequal_data() -> None:
    top = TopK(0.1)
    assert heterogeneous(top, 0.02, 300) > 0.2
    coarse, fine = (heterogeneous(ErrorFeedback(top), lr, steps) for lr, steps in ((0.02, 300), (0.005, 800)))
    assert 0.01 < fine < 0.5 * coarse
    for codec in (EF21(top), EControl(top, 0.1 / 3)):
        assert heterogeneous(codec, 0.02, 500) < 1e-6


A = torch.tensor([[-3.0, 2, 2], [2, -3, 2], [2, 2, -3]], dtype=torch.float64)


def oracle(plan: Plan, steps: int, lr: float = 0.05) -> float:
    """``f_i = <a_i, x>^2 + |x|^2 / 4``: the mean of the largest entries of the gradients points uphill."""
    curvature = 2 * torch.einsum("ni,nj->nij", A, A) + 0.5 * torch.eye(3, dtype=torch.float64)
    problem = Quadratics(curvature, torch.zeros(3, 3))
    return float(problem.simulate(plan, lr, torch.ones(3, dtype=torch.float64)).run(steps).stacked().norm())


SAFE = {
    "inside": gradients(ErrorFeedback(TopK(0.3), lr_inside=True)),
    "dgc": plans.dgc(0.3, 0.5, warmup=(0.9,), warmup_steps=3, dense_below=None),
    "gmf": plans.gmf(0.3, 0.5, 0.3),
    "ef21": plans.ef21(TopK(0.3)),
    "econtrol": plans.econtrol(TopK(0.3)),
    "scafcom": plans.scafcom(TopK(0.3), 1, 0.5),
}


@pytest.mark.parametrize("name", SAFE)
def test_the_oracle_separates_every_memory_from_none(name: str) -> None:
    lr = 0.02 if name in ("dgc", "gmf", "scafcom") else 0.05
    assert oracle(gradients(TopK(0.3)), 20, lr) == pytest.approx(3 * (1 + 11 * lr / 6) ** 20, rel=1e-4)
    assert oracle(SAFE[name], 400, lr) < 0.05


# ---------------------------------------------------------------------- control variates from compressed changes


def scaffold_by_hand(problem: Quadratics, rounds: int, steps: int, lr: float, alpha: float = 1.0) -> Tensor:
    """SCAFFOLD with option II and all workers, its two messages averaged exactly; SCALLION's damping."""
    n = problem.n
    x, c = torch.zeros(problem.d, dtype=torch.float64), torch.zeros(problem.d, dtype=torch.float64)
    ci = torch.zeros(n, problem.d, dtype=torch.float64)
    for _ in range(rounds):
        delta = torch.zeros_like(ci)
        for i in range(n):
            y = x.clone()
            for _ in range(steps):
                y -= lr * (problem.gradient(i, y) - ci[i] + c)
            delta[i] = alpha * ((x - y) / (steps * lr) - c)
        ci, c = ci + delta, c + delta.mean(0)
        x = x - steps * lr * c
    return x


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_scaffold_is_the_published_recursion(alpha: float) -> None:
    plan = plans.scallion(Identity(), 5, alpha, 1.0)
    sim = p2().simulate(plan, 0.02).run(60)
    close(sim.stacked()[3], scaffold_by_hand(p2(), 12, 5, 0.02, alpha), 1e-11)
    if alpha == 1.0:
        assert torch.equal(p2().simulate(plans.scaffold(5), 0.02).run(60).stacked(), sim.stacked())


def test_scaffold_with_one_step_is_sgd() -> None:
    close(after(plans.scaffold(1)), after(gradients(Identity())), 1e-11)


@pytest.mark.parametrize(
    ("plan", "steps"),
    [
        (plans.scaffold(5), 400),
        (plans.scallion(RandK(0.4), 5, outer_lr=1.0), 600),
        (plans.scafcom(TopK(0.4), 5, 0.5), 600),
        (Plan([Sync(Every(5), signal="delta", codec=Int8(), outer=SGD(0.7))], [Scaffold(1.0, 0.7)]), 600),
    ],
    ids=["scaffold", "scallion", "scafcom", "int8"],
)
def test_control_variates_remove_the_bias(plan: Plan, steps: int) -> None:
    problem = Quadratics(p2().A[:4], p2().c[:4])
    sim = problem.simulate(plan, 0.05).run(steps)
    close(sim.stacked(), problem.optimum().expand(4, 5), 1e-4)
    own = [e.corrections[0].own[0] for e in sim.engines]  # type: ignore[attr-defined]
    close(own[2], problem.gradient(2, problem.optimum()), 1e-3)
    close(torch.stack(own).mean(0), sim.engines[3].corrections[0].mean[0], 1e-6)  # type: ignore[attr-defined]
    biased = problem.simulate(plans.local_sgd(5), 0.05).run(steps)
    assert float((biased.stacked() - problem.optimum()).abs().max()) > 1e-3


def test_rates_that_change_within_a_round_are_added_up() -> None:
    """Two steps at 0.1 and 0.3: the same gradient everywhere is learnt exactly."""
    g = constant(2, (6,))
    sim = pushed(plans.scaffold(2), g, 0, sgd(0.1))
    for rate in (0.1, 0.3):
        for optimizer in sim.optimizers:
            optimizer.param_groups[0]["lr"] = rate
        sim.run(1)
    close(sim.engines[1].corrections[0].own[0], g[1], 1e-12)  # type: ignore[attr-defined]
    close(sim.stacked()[0], -0.4 * g.mean(0), 1e-12)


# ---------------------------------------------------------------------- sketches and noise


def test_a_sketch_of_everything_is_local_sgd() -> None:
    close(*(after(p) for p in (plans.sketched(RandK(1.0), 4), plans.local_sgd(4))), 1e-12)


def test_noise_has_its_variance_and_differs_between_ranks_and_steps() -> None:
    plan = Plan([Sync(what="gradients")], [NoisyGradients(0.5, seed=3)])
    zeros = torch.zeros(2, 20000, dtype=torch.float64)
    alone = [pushed(Plan([], [NoisyGradients(0.5, seed=3)]), zeros, steps, sgd(1.0)).stacked() for steps in (1, 2)]
    assert float(alone[0][0].std()) == pytest.approx(0.5, rel=0.03)
    first, second = alone[0], alone[1] - alone[0]
    for a, b in ((first[0], first[1]), (first[0], second[0])):
        assert abs(float((a * b).mean())) < 4 * 0.25 / 20000**0.5
    assert float(pushed(plan, zeros, 1, sgd(1.0)).stacked().std()) == pytest.approx(0.5 / 2**0.5, rel=0.03)


def test_clipping_bounds_each_rank_and_leaves_what_is_not_finite() -> None:
    g = constant(2, (30,))
    sim = pushed(Plan([], [ClipLocal(1.5)]), g, 1, sgd(1.0))
    close(sim.stacked().norm(dim=1), torch.full((2,), 1.5, dtype=torch.float64))
    g[0, 0] = float("inf")
    assert not torch.isfinite(pushed(Plan([], [ClipLocal(1.5)]), g, 1, sgd(1.0)).stacked()[0]).all()


def test_sketched_names_its_parts() -> None:
    plan = plans.sketched(clip=1.0, sigma=0.1, seed=4)
    assert plan.corrections == [ClipLocal(1.0), NoisyGradients(0.1, 4)]
    assert plan.syncs[0].outer == SGD(0.1)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sync(signal="delta", codec=ErrorFeedback(TopK(0.1), lr_inside=True)), "use lr_inside=False"),
        (lambda: plans.sketched(TopK(0.1)), "must be linear and unbiased"),
        (lambda: plans.scallion(TopK(0.1)), "must be unbiased"),
        (lambda: Plan([Sync()], [Scaffold()]), "Scaffold: needs one sync"),
        (lambda: Plan([Sync(signal="delta", codec=ErrorFeedback(Int8()))], [Scaffold()]), "its own memory"),
        (lambda: plans.dgc(warmup_steps=0), "at least 1"),
    ],
)
def test_what_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_what_warns_and_what_does_not() -> None:
    import warnings

    with pytest.warns(UserWarning, match=r"EControl.*eta above the compressor's delta"):
        gradients(EControl(TopK(0.1), 0.5))
    with pytest.warns(UserWarning, match="nothing remembers it"):
        plans.fedzip(feedback=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plans.scafcom()
        plans.econtrol()
        plans.fedzip()


# ---------------------------------------------------------------------- checkpoints and real processes

EVERY: dict[str, Plan] = {
    "dgc": plans.dgc(0.05, 0.5, warmup=(0.5, 0.2), warmup_steps=2, clip=5.0),
    "gmf": plans.gmf(0.2, 0.5),
    "powersgd": plans.powersgd(1, dense_steps=2, min_ratio=1.0),
    "terngrad": plans.terngrad(),
    "qsgd": plans.qsgd(),
    "sign_sgd": plans.sign_sgd(),
    "ef21": plans.ef21(TopK(0.1)),
    "econtrol": plans.econtrol(TopK(0.1)),
    "diana": plans.diana(),
    "inside": gradients(ErrorFeedback(TopK(0.1), lr_inside=True)),
    "fedzip": plans.fedzip(2, 0.2),
    "sketched": plans.sketched(sync_every=2, clip=1.0, sigma=0.01),
    "scaffold": plans.scaffold(2),
    "scallion": plans.scallion(RandK(0.3), 2),
    "scafcom": plans.scafcom(TopK(0.2), 2),
    "diana rand-k": gradients(DIANA(RandK(0.3))),
    "dilocox": plans.dilocox(2, 2, keep=0.5, window=1, least=1, outer_momentum=0.3),
    "adloco": plans.adloco([[0], [1]], 1),
    "dipaco": plans.dipaco([[0, 0], [0, 1]], ["body.*", "head.*"], 2, rescale=True),
    "cellm": plans.cellm("body.*", 2),
    "fedce": plans.fedce(1),
    "fsgld": plans.fsgld(1, 4, 0.01),
}


def suited(plan: Plan) -> Optimizer:
    """An inner optimizer with momentum, unless the plan refuses it."""
    return sgd(0.05) if any(isinstance(c, Scaffold) for c in plan.corrections) else momentum_sgd


@pytest.mark.parametrize("name", EVERY)
def test_resume_is_exact(name: str) -> None:
    plan = EVERY[name]
    for stop in (1, 3):
        whole, first, again = (mosaic_simulation(plan, 2, suited(plan)) for _ in range(3))
        whole.run(6)
        first.run(stop)
        lockstep([engine.land() for engine in first.engines])
        for k in range(2):
            again.engines[k].load_state_dict(copy.deepcopy(first.engines[k].state_dict()))
            again.optimizers[k].load_state_dict(copy.deepcopy(first.optimizers[k].state_dict()))
            for key, tensor in again.replicas[k].items():
                tensor.data.copy_(first.replicas[k][key].data)
        again.run(6 - stop)
        assert all(torch.equal(again.stacked(key), whole.stacked(key)) for key in whole.replicas[0])
        assert again.bytes == whole.bytes


def all_plans(world: World) -> dict[str, tuple[dict[str, Tensor], object]]:
    answers: dict[str, tuple[dict[str, Tensor], object]] = {}
    for name, plan in EVERY.items():
        world.ledger = Ledger()
        answers[name] = mosaic_run(world, plan, 5, suited(plan), None)[:2]
    return answers


def test_two_processes_do_what_the_simulation_does(ranks: Callable[..., list[dict[str, tuple]]]) -> None:
    answers = ranks(all_plans, 2)
    for name, plan in EVERY.items():
        sim = mosaic_simulation(plan, 2, suited(plan)).run(5).finish()
        for rank, answer in enumerate(answers):
            weights, ledger = answer[name]
            for key, tensor in weights.items():
                torch.testing.assert_close(tensor, sim.replicas[rank][key].detach(), rtol=1e-5, atol=1e-6)
            for label, told in sim.worlds[rank].ledger.state_dict().items():
                assert {k: ledger[label][k] for k in ("bytes", "messages")} == {  # type: ignore[index]
                    k: told[k] for k in ("bytes", "messages")
                }, name
