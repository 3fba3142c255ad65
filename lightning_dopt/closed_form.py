"""Closed formulas for bytes and time of a plan, beside which a forecast can be checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_dopt.apply import OneRound
from lightning_dopt.comm.link import Link, one_per_rank, slowest
from lightning_dopt.compress import Identity
from lightning_dopt.compress.base import Compressor
from lightning_dopt.compress.memory import Memory
from lightning_dopt.plan import Plan, Sync
from lightning_dopt.schedules import QSR, AtEnd, Bernoulli, ByBytes, Every, When

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class ClosedForm:
    """What one optimizer step costs in the long run."""

    bytes_per_step: float
    """Payload bytes that a rank sends."""
    seconds_per_step: float
    """Computing of the slowest rank, and what of the transfers it does not hide."""


def closed_form(
    plan: Plan, n: int, shapes: Shapes, link: Link | Sequence[Link], step_seconds: float | Sequence[float] = 0.0
) -> ClosedForm | None:
    """``sum over syncs of rate * bytes`` and ``t + sum of rate * max(0, transfer - delay * t)``; the end of training is left out.

    A message of ``B`` bytes over the complete graph costs ``2 (n - 1) / n B`` where it is summed and ``(n - 1) B`` where it is
    gathered, else ``B`` for every neighbour. A transfer may take ``delay`` steps of ``t`` seconds, the slowest rank's, before
    anybody waits (a whole period for ``OneRound``). Syncs whose transfers overlap each other, or which talk to
    neighbours of unequal speed, cost no less than this.

    Args:
        plan: The plan; buffers are not counted.
        n: Number of workers.
        shapes: Shape of each trainable parameter by name.
        link: Speed of the workers' links, one for all or one per rank; a transfer among all takes as long as the slowest needs.
        step_seconds: Seconds of one inner step, one number or one per rank.

    Returns:
        ``None`` where there is no simple formula: schedules without a fixed rate, ranks that send unequally much, codecs that are
        summed over several rounds, combines that send more than a message, neighbours with unequal links.
    """
    links = one_per_rank("closed_form", link, n) or []
    common = slowest(links)
    if len(set(map(repr, links))) > 1 and not all(sync.peers.is_mean(n) for sync in plan):
        return None
    step = float(step_seconds) if isinstance(step_seconds, (int, float)) else max(step_seconds)
    nbytes, seconds = 0.0, step
    for sync in plan:
        rate, sent = _rate(sync.when), _bytes(sync, n, shapes)
        if rate is None or sent is None:
            return None
        nbytes += rate * sum(sent)
        hidden = step / rate if rate and isinstance(sync.apply, OneRound) else sync.apply.delay * step
        seconds += rate * max(0.0, _seconds(sync, n, sent, common) - hidden)
    return ClosedForm(nbytes, seconds)


def _rate(when: When) -> float | None:
    """Rounds per optimizer step."""
    if isinstance(when, (Every, ByBytes)):
        return 1.0 / when.n  # of messages as they start
    if isinstance(when, Bernoulli):
        return when.p
    if isinstance(when, QSR):
        return 1.0 / when.base  # as a forecast without a learning rate
    return 0.0 if isinstance(when, AtEnd) else None


def _bytes(sync: Sync, n: int, shapes: Shapes) -> list[int] | None:
    """Payload bytes a rank sends per round, by message."""
    codec = sync.codec.codec if isinstance(sync.codec, Memory) else sync.codec
    assert isinstance(codec, Compressor)
    if sync.what.slot == "buffers":
        return [0]
    if sync.combine.extra_bytes or sync.combine.exchanges(sync.peers, n) != 1:
        return None
    names = sync.what.select({k: math.prod(s) for k, s in shapes.items()})  # type: ignore[attr-defined]
    if codec.layerwise:
        message = sum(codec.payload_bytes(shapes[k]) for k in names)
    elif isinstance(codec, Identity):
        message = 4 * sum(math.prod(shapes[k]) for k in names)
    else:
        message = codec.payload_bytes((sum(math.prod(shapes[k]) for k in names),))
    if n == 1:
        return [0]
    if sync.peers.is_mean(n):
        if codec.linear and sync.combine.linear:
            return [2 * (n - 1) * message // n] if isinstance(codec, Identity) else None
        return [(n - 1) * message]
    degrees = {len(sync.peers.receivers(n, rank, 0)) for rank in range(n)}
    return [message] * degrees.pop() if len(degrees) == 1 else None


def _seconds(sync: Sync, n: int, sent: list[int], link: Link) -> float:
    """How long one round travels."""
    if n == 1 or not sum(sent):
        return 0.0
    if not sync.peers.is_mean(n):
        return link.exchange(sum(sent))
    codec = sync.codec.codec if isinstance(sync.codec, Memory) else sync.codec
    hops = 2 * (n - 1) if isinstance(codec, Identity) and sync.combine.linear else n - 1
    return hops * link.ms * 1e-3 + link.transfer(sum(sent))
