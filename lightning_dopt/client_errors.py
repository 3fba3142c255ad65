"""How well each client's data are served without that client: what FedCE's weights count beside directions.

After a round of a plan whose :class:`~lightning_dopt.combine.Contribution` counts errors, every rank measures the error, on its own
data, of the model that the round would have made without it, ``(x - w_i x_i) / (1 - w_i)`` for the result ``x`` and its own
``x_i``; the next round sends it along. ``callbacks.ClientErrors`` does this in a Trainer; elsewhere::

    if client_errors.due(engine):
        with client_errors.without_own(engine):
            error = ...
        client_errors.report(engine, error)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_dopt.combine import Contribution
from lightning_dopt.engine import Engine
from lightning_dopt.plan import Plan
from lightning_dopt.runners import LaneRunner


def counted(plan: Plan) -> bool:
    """Whether weights of this plan count errors."""
    return any(isinstance(sync.combine, Contribution) and sync.combine.errors != "none" for sync in plan)


def due(engine: Engine) -> bool:
    """Whether a round has ended and its errors have not been measured."""
    return any(int(state["rounds"]) and bool(state["error"].isnan()) for _, state in _lanes(engine))


@contextmanager
def without_own(engine: Engine) -> Iterator[None]:
    """Within the block, right after a round, parameters are those that the round would have left without this rank."""
    saved = [(runner.lane.live, runner.lane.live.clone()) for runner, _ in _lanes(engine)]
    try:
        with torch.no_grad():
            for runner, state in _lanes(engine):
                runner.lane.live.add_(state["away"].to(runner.lane.live.dtype))
        yield
    finally:
        for live, before in saved:
            live.copy_(before)


def report(engine: Engine, error: float) -> None:
    """Send ``error`` along in the next round.

    Raises:
        ValueError: it is negative or no number.
    """
    if not math.isfinite(error) or error < 0:
        raise ValueError(f"report(error={error}): must be a number of at least 0, the larger the worse")
    for _, state in _lanes(engine):
        state["error"].fill_(error)


def _lanes(engine: Engine) -> list[tuple[LaneRunner, dict[str, Tensor]]]:
    chosen = [r for r in engine.runners if isinstance(r.sync.combine, Contribution) and r.sync.combine.errors != "none"]
    return [(lane, lane.channel.combine_state) for runner in chosen for lane in runner.lanes]
