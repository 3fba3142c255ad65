"""Min-max problems: ascending players, and extragradient steps with compressed differences (MASHA)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from problems import mosaic_simulation, p2, sgd
from torch import Tensor

from lightning_dopt import (
    SAM,
    Ascend,
    Bernoulli,
    Difference,
    Either,
    ErrorFeedback,
    Every,
    Extragradient,
    Identity,
    Int8,
    LossWeights,
    Plan,
    RandK,
    Ring,
    Simulation,
    Sync,
    TopK,
    Until,
    plans,
)
from lightning_dopt._random import key, uniform
from lightning_dopt.compress import QSGD, Compressor
from lightning_dopt.forecast import forecast

pytestmark = pytest.mark.filterwarnings("ignore:Sync")
HALF, WORKERS, RATE = 20, 4, 0.05


class Saddle:
    """``f_i = |x|^2 / 2 + x' A_i y - |y|^2 / 2 + b_i' x - c_i' y`` with ``||A_i|| = 3`` and unequal ranks, in float64."""

    def __init__(self, equal: bool = False) -> None:
        g = torch.Generator().manual_seed(1)
        a = torch.randn(WORKERS, HALF, HALF, generator=g, dtype=torch.float64)
        self.A = 3 * a / torch.linalg.matrix_norm(a, 2)[:, None, None]
        self.b, self.c = 3 * torch.randn(2, WORKERS, HALF, generator=g, dtype=torch.float64)
        if equal:
            self.A, self.b, self.c = (t[:1].expand_as(t) for t in (self.A, self.b, self.c))

        self.scale = torch.ones(WORKERS, dtype=torch.float64)
        """Of the whole ``f_i``."""

    def operator(self, rank: int, z: Tensor) -> Tensor:
        """``(grad_x f, -grad_y f)`` by hand."""
        x, y = z.split(HALF)
        A = self.A[rank]
        return self.scale[rank] * torch.cat([x + A @ y + self.b[rank], y - A.T @ x + self.c[rank]])

    def mean(self, z: Tensor) -> Tensor:
        return torch.stack([self.operator(i, z) for i in range(WORKERS)]).mean(0)

    def solution(self) -> Tensor:
        A, one = self.A.mean(0), torch.eye(HALF, dtype=torch.float64)
        matrix = torch.cat([torch.cat([one, A], 1), torch.cat([-A.T, one], 1)])
        return -torch.linalg.solve(matrix, torch.cat([self.b.mean(0), self.c.mean(0)]))

    def error(self, z: Tensor) -> float:
        star = self.solution()
        return float((z - star).norm() / star.norm())

    def backward(self, rank: int, parameters: dict[str, Tensor], step: int) -> None:
        """The gradient of the loss for both players, by hand."""
        descent, ascent = self.operator(rank, torch.cat([parameters["x"], parameters["y"]]).detach()).split(HALF)
        parameters["x"].grad, parameters["y"].grad = descent.clone(), -ascent

    def simulate(self, plan: Plan, lr: float = RATE, n: int = WORKERS) -> Simulation:
        def zeros(rank: int) -> dict[str, Tensor]:
            return {name: torch.zeros(HALF, dtype=torch.float64) for name in "xy"}

        return Simulation(plan, n, zeros, self.backward, sgd(lr))


def point(sim: Simulation, rank: int = 0) -> Tensor:
    return torch.cat([sim.replicas[rank]["x"].detach(), sim.replicas[rank]["y"].detach()])


def naive(problem: Saddle, codec: Compressor, steps: int, rate: float) -> Tensor:
    """Extragradient with both operator evaluations compressed as they are, by every rank on its own."""
    z = torch.zeros(2 * HALF, dtype=torch.float64)

    def sent(at: Tensor, step: int) -> Tensor:
        return torch.stack([codec.roundtrip(problem.operator(i, at), key(step, i)) for i in range(WORKERS)]).mean(0)

    for t in range(steps):
        z = z - rate * sent(z - rate * sent(z, 2 * t), 2 * t + 1)
    return z


@pytest.mark.parametrize("codec", [RandK(0.25), TopK(0.25)], ids=repr)
def test_compressed_differences_reach_the_saddle_point_where_naive_compression_does_not(codec: Compressor) -> None:
    """MASHA1 and MASHA2 against compressed extragradient steps."""
    problem = Saddle()
    assert problem.error(point(problem.simulate(plans.masha(codec, 0.25, "y", seed=3), 0.1).run(600))) < 1e-12
    assert problem.error(naive(problem, codec, 200, 0.1)) > 0.1


@pytest.mark.parametrize("codec", [TopK(0.1), QSGD(1, 64)], ids=repr)
def test_compressed_descent_ascent_stalls_where_every_rank_has_errors_of_its_own(codec: Compressor) -> None:
    problem, plan = Saddle(), Plan([Sync(what="gradients", codec=codec)], [Ascend("y")])
    sim = problem.simulate(plan, 0.05).run(150)
    assert min(problem.error(point(sim.run(1))) for _ in range(20)) > 0.05


def test_positions_that_all_ranks_share_compress_the_mean_and_do_not_stall() -> None:
    """``mean C(F_i) = C(mean F_i)`` vanishes at the saddle point, however unequal the ranks are; it only takes longer."""
    problem, plan = Saddle(), Plan([Sync(what="gradients", codec=RandK(0.5))], [Ascend("y")])
    assert problem.error(point(problem.simulate(plan, 0.05).run(200))) < 1e-3
    assert problem.error(naive(problem, RandK(0.5), 200, 0.05)) > 0.05  # a draw of its own for each rank


def written_out(problem: Saddle, codec: Compressor, refresh: float, seed: int, steps: int) -> Tensor:
    """The method as published (MASHA2; with Identity the compressor of MASHA1), one loop."""
    z = w = torch.zeros(2 * HALF, dtype=torch.float64)
    own = [problem.operator(i, w) for i in range(WORKERS)]
    errors = [torch.zeros_like(z) for _ in range(WORKERS)]
    for step in range(1, steps + 1):
        zbar = (1 - refresh) * z + refresh * w
        ahead = zbar - RATE * torch.stack(own).mean(0)
        messages = []
        for i in range(WORKERS):
            v = RATE * (problem.operator(i, ahead) - own[i]) + errors[i]
            messages.append(codec.roundtrip(v) if codec != Identity() else v)
            errors[i] = v - messages[i]
        z = ahead - torch.stack(messages).mean(0)
        if uniform(seed, step + 1) < refresh:  # the coin of the step that begins with the refresh
            w = z
            own = [problem.operator(i, w) for i in range(WORKERS)]
    return z


@pytest.mark.parametrize(("codec", "refresh"), [(TopK(0.1), 0.1), (Identity(), 0.3), (TopK(0.3), 1.0)], ids=repr)
def test_it_is_the_published_recursion(codec: Compressor, refresh: float) -> None:
    problem = Saddle()
    sim = problem.simulate(plans.masha(codec, refresh, "y", seed=5)).run(60)
    for rank in range(WORKERS):
        assert torch.equal(point(sim, rank), point(sim))
    torch.testing.assert_close(point(sim), written_out(problem, codec, refresh, 5, 60), rtol=1e-5, atol=1e-6)
    if codec == Identity():
        torch.testing.assert_close(point(sim), written_out(problem, codec, refresh, 5, 60), rtol=1e-11, atol=1e-12)


def test_a_refresh_in_every_step_is_the_extragradient_method() -> None:
    problem = Saddle()
    sim = problem.simulate(plans.masha(Identity(), 1.0, "y")).run(80)
    z = torch.zeros(2 * HALF, dtype=torch.float64)
    for _ in range(80):
        z = z - RATE * problem.mean(z - RATE * problem.mean(z))
    torch.testing.assert_close(point(sim), z, rtol=1e-11, atol=1e-12)


def test_equal_data_are_one_worker() -> None:
    problem, plan = Saddle(equal=True), plans.masha(TopK(0.2), 0.2, "y", seed=1)
    many, one = problem.simulate(plan).run(50), problem.simulate(plan, n=1).run(50)
    torch.testing.assert_close(point(many), point(one), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("codec", [RandK(0.1), TopK(0.1), Int8()], ids=repr)
def test_bytes_are_exact_and_vary_by_step(codec: Compressor) -> None:
    """Forecasts know the coin: dense messages at its steps and at step 1 beside the compressed ones of every step."""
    plan = plans.masha(codec, 0.2, "y", seed=7)
    problem, steps = Saddle(), 30
    sim = problem.simulate(plan)
    told = forecast(plan, WORKERS, {"x": (HALF,), "y": (HALF,)}, steps, dtype=torch.float64)
    seen = []
    for _ in range(steps):
        before = sim.bytes[0]
        seen.append(sim.run(1).bytes[0] - before)
    heads = [step for step in range(1, steps + 1) if step == 1 or uniform(7, step) < 0.2]
    dense = 2 * (WORKERS - 1) * (8 * 2 * HALF) // WORKERS  # all-reduce of float64
    assert 3 < len(heads) < 15
    assert {s + 1 for s, sent in enumerate(seen) if sent == max(seen)} == set(heads)
    assert max(seen) - min(seen) == dense
    assert sum(seen) == told.bytes[0]
    assert told.rounds == {"reference": len(heads), "gradients": steps}


def test_a_run_goes_on_from_its_state() -> None:
    problem, plan = Saddle(), plans.masha(TopK(0.2), 0.3, "y", seed=2)
    whole, first = problem.simulate(plan).run(30), problem.simulate(plan).run(17)
    second = problem.simulate(plan)
    for rank in range(WORKERS):
        with torch.no_grad():
            for name, p in second.replicas[rank].items():
                p.copy_(first.replicas[rank][name])
        second.engines[rank].load_state_dict(first.engines[rank].state_dict())
    assert torch.equal(point(second.run(13)), point(whole))


def test_minimising_alone_needs_no_ascent_and_finds_the_minimum() -> None:
    problem = p2()
    sim = problem.simulate(plans.masha(RandK(0.4), 0.4), 0.1).run(400)
    torch.testing.assert_close(sim.stacked()[3], problem.optimum(), rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------- Ascend


@pytest.mark.parametrize("plan", [plans.local_sgd(3), plans.compressed_ddp(Int8()), plans.gossip(Ring())], ids=repr)
def test_ascending_is_descending_the_negative(plan: Plan) -> None:
    problem = Saddle()

    def operator(rank: int, parameters: dict[str, Tensor], step: int) -> None:
        z = torch.cat([parameters["x"], parameters["y"]]).detach()
        parameters["x"].grad, parameters["y"].grad = problem.operator(rank, z).split(HALF)

    by_hand = problem.simulate(plan)
    by_hand.backward = operator
    sim = problem.simulate(Plan(plan.syncs, [*plan.corrections, Ascend("y")], plan.seed))
    for rank in range(WORKERS):
        torch.testing.assert_close(point(sim.run(3), rank), point(by_hand.run(3), rank), rtol=1e-5, atol=1e-6)


def test_both_passes_see_the_weighted_operator() -> None:
    """Weighted losses are losses multiplied: the reference is weighted as the rest is."""
    problem, shares = Saddle(), [0.4, 0.3, 0.2, 0.1]
    plan = plans.masha(Identity(), 0.5, "y", seed=1)
    weighted = problem.simulate(Plan(plan.syncs, [LossWeights(shares), *plan.corrections])).run(20)
    problem.scale = torch.tensor(shares, dtype=torch.float64) * WORKERS
    torch.testing.assert_close(point(weighted), point(problem.simulate(plan).run(20)), rtol=1e-10, atol=1e-11)


# ---------------------------------------------------------------------- what is refused


def dense() -> list[Sync]:
    return [Sync(what="reference"), Sync(what="gradients")]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Extragradient(1.5), r"Extragradient\(tau=1.5\)"),
        (lambda: Extragradient(step=0.0), r"Extragradient\(step=0.0\)"),
        (lambda: Ascend(""), r"Ascend\(match=''\)"),
        (lambda: plans.masha(refresh=0.0), r"masha\(refresh=0.0\)"),
        (lambda: Plan(dense()), "no correction of the plan sends a reference"),
        (lambda: Plan([Sync(what="gradients")], [Extragradient()]), "needs one sync of what='reference'"),
        (lambda: Plan(dense(), [SAM(), Extragradient()]), "not with SAM"),
        (lambda: Plan([Sync(Every(2), "reference"), Sync(what="gradients")], [Extragradient()]), "due at step 1"),
        (lambda: Sync(what="reference", codec=RandK(0.1)), "exact"),
        (
            lambda: Plan([Sync(what="reference"), Sync(what="gradients", codec=Difference(Int8()))], [Extragradient()]),
            "is for values",
        ),
    ],
)
def test_refused(make: Callable[[], object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


def test_refused_over_a_sparse_graph_and_without_matches() -> None:
    sparse = Plan([Sync(what="reference", peers=Ring()), Sync(what="gradients"), Sync(peers=Ring())], [Extragradient()])
    with pytest.raises(ValueError, match="all ranks must know"):
        sparse.check(5)
    with pytest.raises(ValueError, match="matches none of the 6 parameters"):
        mosaic_simulation(Plan([Sync()], [Ascend("critic.*")]), 2)


def test_either_is_one_or_the_other() -> None:
    when = Either(Until(1, Every(1)), Bernoulli(0.25, seed=4))
    coins = {s for s in range(1, 200) if Bernoulli(0.25, seed=4).due(s)}
    assert {s for s in range(1, 200) if when.due(s)} == coins | {1}


def test_the_plan_tells_the_two_methods_apart() -> None:
    assert plans.masha(RandK(0.1)).syncs[1].codec == RandK(0.1)
    assert plans.masha(TopK(0.1)).syncs[1].codec == ErrorFeedback(TopK(0.1))
    assert plans.masha(Identity()).syncs[1].codec == Identity()
