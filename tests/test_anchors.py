"""Where anchors and outer optimizers live, and how many vectors each method of the DiLoCo family holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from problems import SHAPES, adam, mosaic, mosaic_backward, mosaic_simulation
from torch import Tensor

from lightning_dopt import Difference, Int8, Plan, RandomPairs, Simulation, plans
from lightning_dopt.comm import lockstep
from lightning_dopt.forecast import forecast
from lightning_dopt.optim import FrozenScaling

P = sum(torch.Size(s).numel() for s in SHAPES.values())
WITH_ANCHOR: dict[str, Callable[[], Plan]] = {
    "diloco": lambda: plans.diloco(4),
    "int8": lambda: plans.diloco(4, codec=Int8()),
    "streaming": lambda: plans.streaming_diloco(4, 3, 2),
    "eager": lambda: plans.eager_diloco(4, outer_momentum=0.5),
    "delayed fragments": lambda: plans.delayed_diloco(4, fragments=2),
    "co2": lambda: plans.co2(4, 0.5, 0.2, gap_aware=True),
    "noloco": lambda: plans.noloco(4, gamma=0.4, overlap=2),
    "pairs, coded": lambda: plans.diloco(4, outer_momentum=0.3, topology=RandomPairs(), codec=Difference(Int8())),
}


def simulated(plan: Plan, offload: bool, steps: int, dtype: torch.dtype = torch.float32) -> Simulation:
    start = lambda rank: mosaic(rank, dtype)  # noqa: E731
    return Simulation(plan, 4, start, mosaic_backward, adam, offload=offload).run(steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WITH_ANCHOR)
def test_offloaded_anchors_change_no_bit(name: str, dtype: torch.dtype) -> None:
    """On a machine without an accelerator: the same numbers by the other path, at the end of training, too."""
    plan = WITH_ANCHOR[name]()
    here, there = (simulated(plan, offload, 19, dtype) for offload in (False, True))
    assert all(torch.equal(here.stacked(key), there.stacked(key)) for key in SHAPES)
    here.finish(), there.finish()
    assert all(torch.equal(here.stacked(key), there.stacked(key)) for key in SHAPES)


def test_a_checkpoint_goes_on_with_and_without_offloading() -> None:
    whole = simulated(plans.streaming_diloco(4, 3, 2), False, 14)
    first = simulated(plans.streaming_diloco(4, 3, 2), False, 9)
    again = simulated(plans.streaming_diloco(4, 3, 2), True, 0)
    lockstep([engine.land() for engine in first.engines])
    for k in range(4):
        again.engines[k].load_state_dict(first.engines[k].state_dict())
        again.optimizers[k].load_state_dict(first.optimizers[k].state_dict())
        for key, tensor in again.replicas[k].items():
            tensor.data.copy_(first.replicas[k][key].data)
    again.run(5)
    assert all(torch.equal(again.stacked(key), whole.stacked(key)) for key in SHAPES)


# ---------------------------------------------------------------------- extra memory


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors inside plain containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)


HELD: dict[str, tuple[Callable[[], Plan], int]] = {
    "local_sgd": (lambda: plans.local_sgd(4), 0),
    "post_local_sgd": (lambda: plans.post_local_sgd(3, 4), 0),
    "qsr": (lambda: plans.qsr(0.1, 4), 0),
    "lo_fi": (plans.lo_fi, 0),
    "diloco": (lambda: plans.diloco(4), 2),
    "slowmo": (lambda: plans.slowmo(4), 2),
    "streaming": (lambda: plans.streaming_diloco(4, 3, 2), 2),
    "noloco": (lambda: plans.noloco(4, gamma=0.4), 2),
    "desloc": (lambda: plans.desloc(4), 0),
    "mt_dao": (lambda: plans.mt_dao(4), 0),
    "co2": (lambda: plans.co2(4), 2),
    "delayed": (lambda: plans.delayed_diloco(4), 2),
    "eager": (lambda: plans.eager_diloco(4, outer_momentum=0.5), 2),
}
FLYING = {"co2": 1, "delayed": 1, "eager": 2}
"""Between two steps: the mean that is on its way, and the own message that will be taken out of it."""


@pytest.mark.parametrize("name", HELD)
def test_vectors_held_between_steps(name: str) -> None:
    """Counted over the state of a landed engine, and forecast by purpose."""
    make, vectors = HELD[name]
    sim = mosaic_simulation(make(), 4, adam).run(13)
    lockstep([engine.land() for engine in sim.engines])
    state = sim.engines[0].state_dict()["runners"]
    lanes = [lane for runner in state for lane in runner["lanes"]]
    kept = [{k: v for k, v in lane.items() if k != "flights"} for lane in lanes]
    assert sum(t.numel() for t in tensors(kept)) / P == vectors
    flying = sum(t.numel() for lane in lanes for f in lane["flights"] for t in tensors(f)) / P
    assert flying == FLYING.get(name, 0) or (name == "streaming" and flying <= 1)
    told = forecast(make(), 4, SHAPES, 1).memory
    assert sum(v for k, v in told.items() if k != "in flight") / (4 * P) == vectors


def test_frozen_scaling_keeps_two_vectors() -> None:
    sim = Simulation(plans.savic(4), 2, mosaic, mosaic_backward, lambda ps: FrozenScaling(ps)).run(5)
    assert sum(t.numel() for s in sim.optimizers[0].state.values() for t in s.values() if t.dim()) <= 2 * P
    assert forecast(plans.savic(4), 2, SHAPES, 1).memory == {}
