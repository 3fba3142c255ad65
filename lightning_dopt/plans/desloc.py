"""DES-LOC: parameters and every state of the optimizer are averaged, each with a period of its own."""

from __future__ import annotations

from lightning_dopt._checks import check_float, check_int
from lightning_dopt.local import CoordinateClip
from lightning_dopt.outer import Outer
from lightning_dopt.plan import Plan, Sync
from lightning_dopt.schedules import Every
from lightning_dopt.what import OptimizerState


def desloc(
    sync_every: int = 256,
    states: dict[str, int] | None = None,
    clip: float | None = None,
    outer: Outer | None = None,
) -> Plan:
    """Plain averages of the parameters every ``sync_every`` steps, and of optimizer states less often.

    Slow states forget slowly, so they may be averaged rarely, but not never: a rank that joins would keep its own. A
    useful period of a state with decay ``beta`` is its half-life ``log(1/2) / log(beta)``: 13.5 steps for 0.95, 693 for
    0.999. With all periods equal this is Local Adam. With periods 256, 768, 1536 it sends ``9 / 1536`` of what data parallel
    training sends, half of Local Adam's bytes.

    Args:
        sync_every: Optimizer steps between averages of the parameters.
        states: Period by name of the state in ``optimizer.state[p]``; ``None`` means those of Adam, AdamW and their kin,
            ``{"exp_avg": 3 * sync_every, "exp_avg_sq": 6 * sync_every}``.
        clip: Clip gradients to this magnitude coordinate by coordinate (rho), which bounds how far states drift; ``None``
            does not.
        outer: Optimizer on the mean parameters; ``None`` takes the mean, as the theory does.

    Raises:
        ValueError: a period below 1, no state, or ``clip <= 0``.

    Source: Iacob et al., "DES-LOC: Desynced Low Communication Adaptive Optimizers for Training Foundation Models",
    arXiv 2505.22549.
    """
    check_int("desloc", "sync_every", sync_every, 1)
    return with_states(
        "desloc",
        sync_every,
        {"exp_avg": 3 * sync_every, "exp_avg_sq": 6 * sync_every} if states is None else states,
        clip,
        outer,
    )


def mt_dao(
    sync_every: int = 32,
    states: dict[str, int] | None = None,
    clip: float | None = None,
) -> Plan:
    """MT-DAO: averages of parameters and states, for an optimizer with a momentum slow enough to outlast a round.

    The inner optimizer should be :class:`~lightning_dopt.optim.MultiMomentumAdam`, whose decay of 0.99 to 0.999 keeps
    ``beta^K`` of an averaged momentum over ``K`` steps: 97 % for 0.999 and 32 steps, where 0.9 keeps 3 %. With several
    momenta name each: ``{"exp_avg": 32, "exp_avg_1": 64, "exp_avg_sq": 64}``.

    Args:
        sync_every: Optimizer steps between averages of the parameters.
        states: As for :func:`desloc`; ``None`` means ``exp_avg`` and ``exp_avg_sq``, both every ``sync_every`` steps.
        clip: As for :func:`desloc`.

    Raises:
        ValueError: as for :func:`desloc`.

    Source: Iacob et al., "MT-DAO: Multi-Timescale Distributed Adaptive Optimizers with Local Updates", arXiv 2510.05361.
    """
    check_int("mt_dao", "sync_every", sync_every, 1)
    given = {"exp_avg": sync_every, "exp_avg_sq": sync_every} if states is None else states
    return with_states("mt_dao", sync_every, given, clip, None)


def with_states(owner: str, sync_every: int, states: dict[str, int], clip: float | None, outer: Outer | None) -> Plan:
    """A sync of the parameters and one per state, and the clip if there is one.

    Raises:
        ValueError: a period below 1 or ``clip <= 0``; errors name the options of ``owner``.
    """
    for name, period in states.items():
        check_int(owner, f"states[{name!r}]", period, 1)
    if clip is not None:
        check_float(owner, "clip", clip, 0.0, open_low=True)
    return Plan(
        [Sync(Every(sync_every), outer=outer), *(Sync(Every(n), OptimizerState(key)) for key, n in states.items())],
        [CoordinateClip(clip)] if clip is not None else [],
    )
