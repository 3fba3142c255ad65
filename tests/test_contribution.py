"""FedCE: weights by how unlike the others each client's changes are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from problems import mosaic_simulation, p2, sgd
from test_local_updates import close
from torch import Tensor
from trainer_tools import Regressor, on_ranks, regression, trainer

from lightning_dopt import Delay, Int8, Plan, ReplicaStrategy, Ring, Simulation, Sync, client_errors, plans
from lightning_dopt.callbacks import ClientErrors
from lightning_dopt.combine import Contribution
from lightning_dopt.combine.contribution import Errors, cosines
from lightning_dopt.comm import lockstep
from lightning_dopt.strategies.start import refuse_unmeasured_errors


def random(count: int, d: int = 12) -> list[Tensor]:
    return list(torch.randn(count, d, generator=torch.Generator().manual_seed(2), dtype=torch.float64))


def test_cosines_with_the_weighted_sum_of_the_others() -> None:
    messages, weights = random(4), torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)
    for i, found in enumerate(cosines(messages, weights)):
        rest = sum(weights[j] * messages[j] for j in range(4) if j != i)
        close(found, torch.nn.functional.cosine_similarity(messages[i], rest, dim=0))
    assert cosines([torch.zeros(3), torch.ones(3)], weights[:2]).tolist() == [0.0, 0.0]


def test_equal_clients_weigh_alike_and_one_that_turns_round_weighs_more() -> None:
    rule, x = Contribution(), random(1)[0]
    even = torch.full((4,), 0.25, dtype=torch.float64)
    for messages, expected in (([x] * 4, even), ([x, x, x, -x], None)):
        state = rule.state(x, None, 4, 0)  # type: ignore[arg-type]
        close(state["weights"], even)
        state["cosines"] += cosines(messages, state["weights"])
        state["rounds"] += 1
        weights = rule.weights(state)
        assert float(weights.sum()) == pytest.approx(1.0, abs=1e-15)
        if expected is not None:
            close(weights, expected)
        else:
            assert float(weights[3]) > 0.9  # the others are all but floored: their cosines are 1
            assert float(weights[:3].min()) >= 0.9e-3


def share(values: Tensor, floor: float) -> Tensor:
    return (values / values.sum()).clamp(min=floor)


@pytest.mark.parametrize("errors", ["none", "plus", "times"])
def test_it_is_the_loop_of_the_paper(errors: Errors) -> None:
    """Six rounds by hand: cosines with the others' weighted sum, their running mean, errors of the models without a client."""
    problem, h, rate, floor = p2(), 3, 0.1, 0.05
    run = problem.simulate(plans.fedce(h, floor, errors=errors), sgd(rate))
    anchor, weights, total = torch.zeros(5, dtype=torch.float64), torch.full((8,), 0.125, dtype=torch.float64), 0.0
    found = torch.ones(8, dtype=torch.float64)
    for k in range(6):
        x = anchor.expand(8, 5).clone()
        for _ in range(h):
            x = x - rate * torch.stack([problem.gradient(i, x[i]) for i in range(8)])
        changes = anchor - x
        others = weights @ changes - weights[:, None] * changes
        total = total + torch.nn.functional.cosine_similarity(changes, others)
        weights = share(1.0 - total / (k + 1), floor)
        if errors != "none":
            e = share(found, floor)
            weights = share(weights + e if errors == "plus" else weights * e, floor)
        weights = weights / weights.sum()
        anchor = anchor - weights @ changes
        found = torch.stack([error(problem, i, (anchor - weights[i] * x[i]) / (1 - weights[i])) for i in range(8)])
        run.run(h)
        assert [client_errors.due(engine) for engine in run.engines] == [errors != "none"] * 8
        if errors != "none":
            measure(run, problem)
        close(run.stacked(), anchor.expand(8, 5), 1e-10)
    assert float(weights.max()) > 1.5 * float(weights.min())


def error(problem: Any, rank: int, x: Tensor) -> Tensor:
    """Something above 0 that is smaller the better ``x`` suits the rank."""
    return problem.gradient(rank, x).norm()  # type: ignore[no-any-return]


def measure(run: Simulation, problem: Any) -> None:
    for rank, engine in enumerate(run.engines):
        before = run.replicas[rank]["x"].detach().clone()
        with client_errors.without_own(engine):
            value = float(error(problem, rank, run.replicas[rank]["x"].detach()))
        assert torch.equal(run.replicas[rank]["x"].detach(), before)
        client_errors.report(engine, value)
        assert not client_errors.due(engine)


def test_errors_must_be_measured_and_be_numbers() -> None:
    problem = p2()
    run = problem.simulate(plans.fedce(2, errors="plus"), sgd(0.1))
    run.run(2)
    with pytest.raises(ValueError, match=r"^report\(error=-1.0\): must be a number of at least 0"):
        client_errors.report(run.engines[0], -1.0)
    with pytest.raises(
        ValueError, match=r"errors='plus'\): the error without this rank was not measured since the last round"
    ):
        run.run(2)


def trained(rank: int) -> tuple[float, float, float, list[float]]:
    """The error that the callback measured last, the same by hand, what was logged, and the weights."""
    strategy, module = ReplicaStrategy(plan=plans.fedce(2, errors="times")), Regressor()
    fit = trainer(strategy, callbacks=[ClientErrors()], max_steps=4, limit_val_batches=1.0)
    fit.fit(module, regression(), regression(16, seed=3))
    assert strategy.engine is not None
    (lane,) = strategy.engine.runners[0].lanes
    mine = list(fit.val_dataloaders)  # this rank's share
    with client_errors.without_own(strategy.engine):
        losses = [float(module.loss(batch).detach()) for batch in mine]
    state = lane.channel.combine_state
    logged = float(fit.callback_metrics["fedce/error"])
    return float(state["error"]), sum(losses) / len(losses), logged, state["weights"].tolist()


def test_the_callback_measures_on_the_clients_own_data() -> None:
    (a, by_hand_a, logged, weights_a), (b, by_hand_b, _, weights_b) = on_ranks(trained)
    assert (a, b) == (pytest.approx(by_hand_a, rel=1e-6), pytest.approx(by_hand_b, rel=1e-6))
    assert a != pytest.approx(b, rel=1e-2)
    assert logged == pytest.approx(a, rel=1e-6)
    assert weights_a == weights_b != [0.5, 0.5]


def test_errors_want_the_callback() -> None:
    plan = plans.fedce(2, errors="plus")
    with pytest.raises(ValueError, match=r"errors='plus'\): nothing measures errors, add callbacks.ClientErrors\(\)"):
        refuse_unmeasured_errors(plan, [])
    refuse_unmeasured_errors(plan, [ClientErrors()])
    refuse_unmeasured_errors(plans.fedce(2), [])


def test_the_callback_wants_a_plan_that_asks_for_it() -> None:
    with pytest.raises(ValueError, match=r"^ClientErrors\(metric=''\): must be a name that validation_step logs$"):
        ClientErrors("")
    fit = trainer(ReplicaStrategy(plan=plans.fedce(2)), 1, callbacks=[ClientErrors()], max_steps=4)
    with pytest.raises(ValueError, match=r"^ClientErrors: the plan asks for no errors"):
        ClientErrors().setup(fit, Regressor(), "fit")


def test_all_ranks_stay_equal_send_to_all_and_resume() -> None:
    plan = plans.fedce(2)
    whole, first, again = (mosaic_simulation(plan, 4, sgd(0.05)) for _ in range(3))
    whole.run(9)
    assert all(torch.equal(row, rows[0]) for rows in [whole.run(1).stacked("scale")] for row in rows)
    elements = sum(t.numel() for t in whole.replicas[0].values())
    assert whole.bytes == [5 * 3 * 4 * elements] * 4
    first.run(5)
    lockstep([engine.land() for engine in first.engines])
    for k in range(4):
        again.engines[k].load_state_dict(copy.deepcopy(first.engines[k].state_dict()))
        for key, tensor in again.replicas[k].items():
            tensor.data.copy_(first.replicas[k][key].data)
    again.run(5)
    assert all(torch.equal(again.stacked(key), whole.stacked(key)) for key in whole.replicas[0])


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: Contribution(1.0), r"^Contribution\(floor=1.0\): must be a number in \[0, 1\)$"),
        (lambda: plans.fedce(floor=-0.1), r"^fedce\(floor=-0.1\): must be a number in \[0, 1\)$"),
        (lambda: Sync(combine=Contribution()), r"^Sync\(signal='value'.*compares exact changes"),
        (lambda: plans.fedce(errors="min"), r"^fedce\(errors='min'\): must be one of 'none', 'plus', 'times'"),  # type: ignore[arg-type]
        (
            lambda: Sync(signal="delta", combine=Contribution(errors="plus"), apply=Delay(1)),
            r"errors are of results that are taken at once, use Blocking\(\)$",
        ),
        (
            lambda: Sync(signal="delta", codec=Int8(), combine=Contribution()),
            r"compares exact changes, use signal='delta' and",
        ),
        (
            lambda: Plan([Sync(signal="delta", peers=Ring(), combine=Contribution())]).check(6),
            r"every rank must hear all",
        ),
    ],
)
def test_bad_options_are_refused_in_one_line(make: Any, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        make()
