"""Compressed gradients through the engine: exact limits, telescoping, and an oracle that separates all memories."""

from __future__ import annotations

import pytest
import torch
from problems import Quadratics, mosaic_simulation, p2, sgd
from torch import Tensor

from lightning_dopt import (
    EF21,
    Complete,
    EControl,
    ErrorFeedback,
    Identity,
    Int4,
    Int8,
    LowRank,
    Median,
    Plan,
    RandK,
    Ring,
    Sign,
    Simulation,
    Sync,
    TopK,
    plans,
)
from lightning_dopt.compress import BF16, DGC, DIANA, FP16, QSGD, Compressor, as_compressor
from lightning_dopt.compress.base import Codec

pytestmark = pytest.mark.filterwarnings("ignore:Sync")


def close(a: Tensor, b: Tensor, tol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


class Matrices:
    """Quadratics of a 5 x 6 weight; the gradient is ``A_i (x - c_i)``."""

    def __init__(self, n: int) -> None:
        g = torch.Generator().manual_seed(3)
        m = torch.randn(n, 5, 5, generator=g, dtype=torch.float64)
        self.n, self.A = n, m @ m.mT / 5 + 0.3 * torch.eye(5, dtype=torch.float64)
        self.c = torch.randn(n, 5, 6, generator=g, dtype=torch.float64)

    def gradient(self, rank: int, x: Tensor) -> Tensor:
        return self.A[rank] @ (x - self.c[rank])

    def run(self, codec: Codec, steps: int, lr: float = 0.1) -> tuple[Simulation, Tensor, Tensor]:
        """The simulation, the sum of mean raw gradients and the sum of the gradients applied by rank 0."""
        raw, applied = torch.zeros(2, 5, 6, dtype=torch.float64)

        def backward(rank: int, parameters: dict[str, Tensor], step: int) -> None:
            g = self.gradient(rank, parameters["x"].detach())
            raw.add_(g, alpha=1 / self.n)
            parameters["x"].grad = g

        sim = Simulation(
            Plan([Sync(what="gradients", codec=codec)]),
            self.n,
            lambda rank: {"x": torch.zeros(5, 6, dtype=torch.float64)},
            backward,
            sgd(lr),
        )
        for _ in range(steps):
            grad = sim.run(1).replicas[0]["x"].grad
            assert grad is not None
            applied += grad
        return sim, raw, applied


def test_identity_is_sgd_on_the_mean_gradient() -> None:
    sim = p2().simulate(plans.compressed_ddp(Identity()), sgd(0.05, 0.9, nesterov=True)).run(30)
    close(sim.stacked(), p2().centralized(30, sgd(0.05, 0.9, nesterov=True))[-1].expand(8, 5))


@pytest.mark.parametrize("codec", [Identity(), LowRank(5, 0.5), TopK(1.0), RandK(1.0)], ids=repr)
@pytest.mark.parametrize("memory", [None, ErrorFeedback, EF21])
def test_what_sends_everything_is_dense(codec: Compressor, memory: type[ErrorFeedback] | None) -> None:
    """Full rank and full length leave no residual; what passes through bytes is float32."""
    dense = Matrices(3).run(Identity(), 25)[0].stacked()
    sim = Matrices(3).run(memory(codec) if memory is not None else codec, 25)[0]
    close(sim.stacked(), dense, 1e-5 if isinstance(codec, TopK) else 1e-11)
    for engine in sim.engines:
        state = engine.gradients[0][0].runner.lanes[0].channel.memory_state
        if "residual" in state:
            close(state["residual"], torch.zeros(30, dtype=torch.float64), 1e-5 if isinstance(codec, TopK) else 1e-11)


@pytest.mark.parametrize(
    "codec", [Identity(), TopK(0.1), RandK(0.2), Sign(), Int8(), Int4(), BF16(), FP16(), LowRank(1, 1.0)], ids=repr
)
def test_nothing_is_lost_with_error_feedback(codec: Compressor) -> None:
    """Sum of applied gradients + mean residual = sum of mean gradients."""
    sim, raw, applied = Matrices(4).run(ErrorFeedback(codec), 60)
    residuals = [e.gradients[0][0].runner.lanes[0].channel.memory_state["residual"] for e in sim.engines]
    close(applied + torch.stack(residuals).mean(0).view(5, 6), raw, 1e-6)


@pytest.mark.parametrize("codec", [TopK(0.1), RandK(0.2), Sign(), LowRank(1, 1.0)], ids=repr)
def test_shared_estimates_are_the_mean_of_the_own_ones(codec: Compressor) -> None:
    """EF21: the gradient applied is the mean of all ranks' estimates, bit-equal on all ranks."""
    for memory in (EF21(codec), EControl(codec, 0.05)):
        sim, _, _ = Matrices(4).run(memory, 30, lr=0.02)
        states = [e.gradients[0][0].runner.lanes[0].channel.memory_state for e in sim.engines]
        close(states[0]["mean"], torch.stack([s["own"] for s in states]).mean(0), 1e-6)
        assert all(torch.equal(s["mean"], states[0]["mean"]) for s in states)
        assert torch.equal(sim.replicas[2]["x"].grad.reshape(-1), states[0]["mean"])  # type: ignore[union-attr]


def test_ranks_round_independently_and_choose_entries_together() -> None:
    """Equal signals: errors of stochastic rounding differ, so that they average out; random entries must be the same."""

    def residuals(codec: Compressor) -> list[Tensor]:
        problem = Matrices(2)
        problem.A[1], problem.c[1] = problem.A[0], problem.c[0]
        sim, _, _ = problem.run(ErrorFeedback(codec), 1)
        return [e.gradients[0][0].runner.lanes[0].channel.memory_state["residual"] for e in sim.engines]

    a, b = residuals(Int8(stochastic=True))
    assert 0 < (a - b).abs().max() < 0.1
    a, b = residuals(RandK(0.3))
    assert torch.equal(a, b)
    assert int((a.abs() < 1e-12).sum()) == 9


def test_decay_forgets_the_residual() -> None:
    codec = ErrorFeedback(TopK(0.1), decay=0.5)
    sim, raw, applied = Matrices(4).run(codec, 30)
    residuals = [e.gradients[0][0].runner.lanes[0].channel.memory_state["residual"] for e in sim.engines]
    assert float((applied + torch.stack(residuals).mean(0).view(5, 6) - raw).norm()) > 0.5


@pytest.mark.parametrize("codec", [Identity(), Int8(), TopK(0.3), RandK(0.3), Sign(), LowRank(2), BF16()], ids=repr)
def test_equal_data_on_equal_ranks_is_a_single_worker(codec: Compressor) -> None:
    """Deterministic codecs only see one signal; the others agree as all ranks apply the same gradient."""
    sim = mosaic_simulation(plans.compressed_ddp(codec), 3).run(15)
    for name in sim.replicas[0]:
        rows = sim.stacked(name)
        assert all(torch.equal(row, rows[0]) for row in rows)


# ---------------------------------------------------------------------- the divergence oracle


def oracle(codec: Codec, steps: int, lr: float = 0.05) -> float:
    """``f_i = <a_i, x>^2 + |x|^2 / 4``: the average of the largest entries of the gradients points uphill."""
    a = torch.tensor([[-3.0, 2, 2], [2, -3, 2], [2, 2, -3]], dtype=torch.float64)
    curvature = 2 * torch.einsum("ni,nj->nij", a, a) + 0.5 * torch.eye(3, dtype=torch.float64)
    problem = Quadratics(curvature, torch.zeros(3, 3))
    sim = problem.simulate(Plan([Sync(what="gradients", codec=codec)]), lr, torch.ones(3, dtype=torch.float64))
    return float(sim.run(steps).stacked().norm())


@pytest.mark.parametrize("lr", [0.05, 0.01])
def test_top_k_without_a_memory_diverges_and_says_so(lr: float) -> None:
    with pytest.warns(UserWarning, match=r"nothing remembers it.*use codec=ErrorFeedback\(TopK\(ratio=0\.3\)\)"):
        growth = oracle(TopK(0.3), 10, lr) / 3
    assert growth == pytest.approx((1 + 11 * lr / 6) ** 10, rel=1e-5)


REPAIRED: list[Codec] = [
    ErrorFeedback(TopK(0.3)),
    EF21(TopK(0.3)),
    EControl(TopK(0.3), 0.1),
    EControl(TopK(0.3), 0.3),
    ErrorFeedback(RandK(0.3)),
    EF21(RandK(0.3)),
]


@pytest.mark.parametrize("codec", REPAIRED, ids=repr)
def test_every_memory_converges(codec: Codec) -> None:
    blind = isinstance(as_compressor(codec)[0], RandK)  # each entry waits for three steps: a smaller rate is needed
    assert oracle(codec, 250, 0.015 if blind else 0.05) < 0.1


def test_econtrol_with_full_gain_diverges() -> None:
    assert oracle(EControl(TopK(0.3), 1.0), 150) > 1e3


def test_econtrol_without_gain_is_ef21() -> None:
    a, b = (Matrices(3).run(codec, 20, 0.05)[0].stacked() for codec in (EControl(TopK(0.2), 0.0), EF21(TopK(0.2))))
    assert torch.equal(a, b)


def test_unequal_data_leave_a_bias_with_error_feedback_but_not_with_ef21() -> None:
    problem = p2()

    def distance(codec: Codec) -> float:
        sim = problem.simulate(Plan([Sync(what="gradients", codec=codec)]), 0.1).run(120)
        return float((sim.stacked()[0] - problem.optimum()).norm())

    assert distance(EF21(TopK(0.2))) < 1e-3
    assert distance(ErrorFeedback(TopK(0.2))) > 1e-2


# ---------------------------------------------------------------------- other ways to combine


def test_feedback_around_identity_equals_identity_over_any_graph() -> None:
    """What is sent must be what the memory held before it took note of the send."""

    def run(codec: Codec, peers: Complete | Ring) -> Tensor:
        plan = Plan([Sync(what="gradients", codec=codec, peers=peers), Sync(peers=Ring())])
        return p2().simulate(plan, 0.1).run(10).stacked()

    for peers in (Complete(), Ring()):
        close(run(ErrorFeedback(Identity()), peers), run(Identity(), peers))


def test_the_median_of_gradients_shrugs_off_a_liar() -> None:
    c = torch.tensor([1.0, 2.0, 3.0, 1e9])
    problem = Quadratics(torch.ones(4, 1, 1), c.view(4, 1))
    plan = Plan([Sync(what="gradients", combine=Median())])
    close(problem.simulate(plan, 0.1).run(200).stacked(), torch.full((4, 1), 2.5, dtype=torch.float64), 1e-8)
    coded = Plan([Sync(what="gradients", combine=Median(), codec=ErrorFeedback(Int8()))])
    close(problem.simulate(coded, 0.1).run(200).stacked(), torch.full((4, 1), 2.5, dtype=torch.float64), 0.1)


# ---------------------------------------------------------------------- momentum before the compressor, shifts


def tracked_path(codec: Codec, optimizer: object, steps: int = 30) -> Tensor:
    return p2().simulate(Plan([Sync(what="gradients", codec=codec)]), optimizer).run(steps).stacked()  # type: ignore[arg-type]


@pytest.mark.parametrize("nesterov", [False, True])
def test_dgc_that_sends_everything_is_momentum_sgd_without_masks_and_plain_sgd_with_them(nesterov: bool) -> None:
    codec = DGC(TopK(1.0), 0.9, nesterov, masking=False)
    close(tracked_path(codec, 0.02), tracked_path(Identity(), sgd(0.02, 0.9, nesterov)), 1e-6)
    if not nesterov:
        close(tracked_path(DGC(TopK(1.0), 0.9), 0.02), tracked_path(Identity(), 0.02), 1e-6)


def test_dgc_without_momentum_is_error_feedback() -> None:
    assert torch.equal(tracked_path(DGC(TopK(0.4), 0.0), 0.02), tracked_path(ErrorFeedback(TopK(0.4)), 0.02))


def test_dgc_clears_the_momentum_of_what_it_sent_and_loses_nothing_else() -> None:
    memory, g = DGC(TopK(0.25), 0.9), torch.Generator().manual_seed(0)
    state = memory.state(torch.zeros(40))
    sent, pushed, u = torch.zeros(40), torch.zeros(40), torch.zeros(40)
    for _ in range(20):
        x = torch.randn(40, generator=g)
        u = 0.9 * u + x
        pushed += u
        own = memory.codec.roundtrip(memory.load(x, state))
        memory.sent(own, state)
        sent += own
        assert int((own != 0).sum()) == 10
        u[own != 0] = 0.0
        assert torch.equal(state["momentum"], u)
        assert float(state["velocity"][own != 0].abs().max()) == 0.0
    torch.testing.assert_close(sent + state["velocity"], pushed, rtol=1e-5, atol=1e-5)


def test_diana_is_unbiased_and_exact_where_compression_alone_is_not() -> None:
    problem = p2()

    def wrong(codec: Codec, steps: int) -> float:
        sim = problem.simulate(Plan([Sync(what="gradients", codec=codec)]), 0.1).run(steps)
        return float((sim.stacked() - problem.optimum()).abs().max())

    assert wrong(DIANA(QSGD(2)), 700) < 1e-5
    assert wrong(QSGD(2), 200) > 1e-2


def test_diana_with_exact_messages_is_plain_averaging() -> None:
    close(tracked_path(DIANA(Identity()), 0.05), tracked_path(Identity(), 0.05), 1e-9)


def test_diana_refuses_biased_compressors() -> None:
    with pytest.raises(ValueError, match=r"DIANA\(codec=TopK.*must be unbiased.*EF21"):
        DIANA(TopK(0.1))
