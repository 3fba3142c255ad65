"""Which plans workers may miss rounds of, leave and join."""

from __future__ import annotations

from lightning_dopt.apply import Blocking, Delay
from lightning_dopt.combine import Mixing
from lightning_dopt.compress import Budget, Phases
from lightning_dopt.compress.base import Compressor
from lightning_dopt.compress.memory import ErrorFeedback, as_compressor
from lightning_dopt.plan import Plan, Sync
from lightning_dopt.schedules import Every
from lightning_dopt.topology import Complete


def check_elastic(plan: Plan, owner: str) -> None:
    """Check that workers may miss rounds of a plan, leave it and join it.

    That is so if all that workers share between rounds are anchors and outer optimizers, equal on all of them, so that a
    member that comes can be given them, and if a message that does not come leaves nothing behind at others.

    Args:
        plan: The plan.
        owner: Whose option the plan is, for errors.

    Raises:
        ValueError: it is not, in one line with what to use instead.
    """
    if not plan.syncs:
        raise ValueError(f"{owner}(plan={plan!r}): has no sync, so there is no round to meet at; use plans.diloco(...)")
    if plan.corrections:
        raise ValueError(
            f"{owner}(plan=...): {plan.corrections[0]!r} remembers what others sent or counts on their number; use a plan without "
            "corrections, such as plans.diloco(...)"
        )
    for sync in plan:
        _check_sync(sync, owner)
    periods = {sync.when.n for sync in plan if isinstance(sync.when, Every)}
    if len(periods) > 1:
        raise ValueError(
            f"{owner}(plan=...): syncs with periods {sorted(periods)} do not meet in rounds; use one period"
        )
    sends = sorted({sync.when.offset % sync.when.n for sync in plan if isinstance(sync.when, Every)})
    gap = min(b - a for a, b in zip(sends, [*sends[1:], sends[0] + max(periods)], strict=True))
    delays = {sync.apply.delay for sync in plan}
    if len(delays) > 1:
        raise ValueError(f"{owner}(plan=...): syncs with delays {sorted(delays)} do not land together; use one delay")
    late = max(delays)
    if late >= gap:
        raise ValueError(
            f"{owner}(plan=...): a message under way for {late} steps is not there when the next leaves, {gap} steps after it, "
            "and members may change then; use a shorter delay (overlap), a longer period or fewer fragments"
        )


def _check_sync(sync: Sync, owner: str) -> None:
    where = f"{owner}(plan=...): Sync"
    if sync.what.slot != "parameters":
        raise ValueError(
            f"{where}(what={sync.what!r}): only parameters have an anchor to join at; use what='parameters'"
        )
    if not isinstance(sync.peers, Complete):
        raise ValueError(
            f"{where}(peers={sync.peers!r}): a graph has a place for each of a fixed number of ranks; use Complete(), or "
            "GossipStrategy(on_lost_peer='continue')"
        )
    if sync.signal != "delta":
        raise ValueError(f"{where}(signal={sync.signal!r}): there is no anchor to join at; use signal='delta'")
    if not isinstance(sync.when, Every):
        raise ValueError(
            f"{where}(when={sync.when!r}): workers that join must know when the next round is; use Every(...)"
        )
    if not isinstance(sync.apply, (Blocking, Delay)):
        raise ValueError(
            f"{where}(apply={sync.apply!r}): a message is always on its way, and members may change before it arrives; use "
            "Blocking() or Delay(...)"
        )
    if not isinstance(sync.combine, Mixing):
        raise ValueError(f"{where}(combine={sync.combine!r}): counts on every rank; use Mixing()")
    if not isinstance(sync.codec, (Compressor, ErrorFeedback)):
        raise ValueError(
            f"{where}(codec={sync.codec!r}): remembers what all others sent, of which a worker that joins knows nothing; use "
            "ErrorFeedback(...) or no memory"
        )
    if isinstance(as_compressor(sync.codec)[0], (Budget, Phases)):
        raise ValueError(f"{where}(codec={sync.codec!r}): changes as the run goes on; use a fixed codec")
    if sync.transport == "two_phase":
        raise ValueError(f"{where}(transport='two_phase'): chunks belong to a fixed number of ranks; use 'auto'")
