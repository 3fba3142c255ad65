"""Published compression systems under a Trainer: the same steps as in a simulation, and momentum that is refused."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainer_tools import Regressor, on_ranks, regression, shares, trainer

from lightning_dopt import LowRank, Plan, RandK, ReplicaStrategy, Simulation, TopK, plans

pytestmark = [pytest.mark.trainer, pytest.mark.filterwarnings("ignore:Sync")]
STEPS, LR = 12, 0.1

PLANS: dict[str, Plan] = {
    "powersgd": plans.powersgd(1, dense_steps=2, min_ratio=0.5),
    "dgc": plans.dgc(0.2, 0.5, warmup=(0.5,), warmup_steps=3, clip=2.0),
    "gmf": plans.gmf(0.2, 0.5, fusion=(0.0, 0.3), fusion_steps=4, dense_below=0),
    "terngrad": plans.terngrad(block=16),
    "qsgd": plans.qsgd(7, 16, dense_below=10),
    "sign_sgd": plans.sign_sgd(),
    "ef21": plans.ef21(TopK(0.3)),
    "econtrol": plans.econtrol(TopK(0.3)),
    "diana": plans.diana(RandK(0.3), dense_below=0),
    "fedzip": plans.fedzip(3, 0.3),
    "sketched": plans.sketched(RandK(0.3), 3, clip=1.0, sigma=0.01),
    "scaffold": plans.scaffold(3),
    "scallion": plans.scallion(RandK(0.5), 3),
    "scafcom": plans.scafcom(TopK(0.3), 3, 0.7),
    "l_greco": plans.l_greco(LowRank(1, 0.5), every=3),
    "fish_mask": plans.fish_mask(0.3, batches=2, sync_every=2, refresh=2, codec=None),
}


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=LR)


def vector(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def trained(plan: Plan) -> tuple[Tensor, float]:
    """The weights of this process, before they become the mean of all at the end, and the bytes it sent."""
    rows: list[Tensor] = []

    class Last(Regressor):
        def on_train_batch_end(self, *_: Any) -> None:
            rows.append(vector(self))

    fitter = trainer(ReplicaStrategy(plan=plan), max_steps=STEPS, max_epochs=-1)
    fitter.fit(Last(optimizer=sgd), regression())
    return rows[-1], float(fitter.callback_metrics["comm/bytes"])


def simulated(plan: Plan) -> Simulation:
    """The same model on the same batches."""
    modules = [Regressor(optimizer=sgd) for _ in range(2)]
    batches = [[b for epoch in range(3) for b in shares(regression(), rank, epoch)] for rank in range(2)]

    def start(rank: int) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in modules[rank].named_parameters()}

    def backward(rank: int, parameters: dict[str, Tensor], step: int) -> None:
        net = {name.removeprefix("net."): p for name, p in parameters.items()}
        x, y = batches[rank][step - 1]
        (torch.func.functional_call(modules[rank].net, net, x) - y).square().mean().backward()

    return Simulation(plan, 2, start, backward, sgd).run(STEPS)


def test_every_system_does_on_processes_what_it_does_in_a_simulation() -> None:
    def job(rank: int) -> dict[str, tuple[Tensor, float]]:
        warnings.simplefilter("ignore")
        return {name: trained(plan) for name, plan in PLANS.items()}

    got = on_ranks(job, timeout=180.0)
    start = vector(Regressor())
    for name, plan in PLANS.items():
        sim = simulated(plan)
        for rank in range(2):
            weights, sent = got[rank][name]
            expected = torch.cat([p.detach().reshape(-1) for p in sim.replicas[rank].values()])
            torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
            assert sent == sim.bytes[rank], name
            assert float((weights - start).norm()) > 0.01, name


# ---------------------------------------------------------------------- momentum in two places


def said(plan: Plan, optimizer: Any) -> list[str]:
    """The warnings and the error of one step of one process, which is forked: a Trainer leaves threads behind."""

    def job(rank: int) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                trainer(ReplicaStrategy(plan=plan), 1, max_steps=1).fit(Regressor(optimizer=optimizer), regression())
            except ValueError as error:
                return [str(error)]
        return [str(w.message) for w in caught]

    return on_ranks(job, 1)[0]


@pytest.mark.parametrize("plan", [plans.dgc(), plans.gmf()], ids=["DGC", "GMF"])
def test_momentum_before_the_compressor_and_in_the_optimizer_is_refused(plan: Plan) -> None:
    (error,) = said(plan, lambda ps: torch.optim.SGD(ps, lr=LR, momentum=0.9))
    assert re.search(r"(DGC|GMF)\(.*with SGD\(momentum=\.\.\.\): momentum would be applied twice", error)


def test_displacements_of_momentum_or_adam_are_refused_at_the_start() -> None:
    for optimizer in (lambda ps: torch.optim.SGD(ps, lr=LR, momentum=0.9), lambda ps: torch.optim.AdamW(ps, lr=LR)):
        (error,) = said(plans.scaffold(), optimizer)
        name = type(optimizer([torch.zeros(1)])).__name__
        assert re.fullmatch(rf"Scaffold: reads .*plans.scaffold\(option='mean'\); the inner optimizer is {name}", error)
    assert not [line for line in said(plans.scaffold(), lambda ps: torch.optim.SGD(ps, lr=LR)) if "Scaffold" in line]


def test_optimizers_that_divide_by_the_size_of_gradients_warn_and_plain_sgd_does_not() -> None:
    adam = said(plans.dgc(), lambda ps: torch.optim.AdamW(ps, lr=LR))
    assert any(re.search(r"DGC\(.*with AdamW: has its momentum before the compressor; use plain SGD", w) for w in adam)
    momentum = lambda ps: torch.optim.SGD(ps, lr=LR, momentum=0.9)  # noqa: E731
    fits = ((plans.dgc(), sgd), (plans.dgc(momentum=0.0), momentum), (plans.powersgd(), momentum))
    assert not [w for plan, optimizer in fits for w in said(plan, optimizer) if "momentum" in w]
