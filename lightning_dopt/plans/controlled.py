"""Federated methods that are exact on unlike data: they learn what each client's gradients differ by."""

from __future__ import annotations

from typing import Literal

from lightning_dopt._checks import check_float, check_int
from lightning_dopt.local import (
    SAM,
    Ascend,
    ConsensusADMM,
    DualProximal,
    ProxSkip,
)
from lightning_dopt.plan import Plan, Sync
from lightning_dopt.plans.federated import clients
from lightning_dopt.schedules import Bernoulli, Every


def fedspeed(
    sync_every: int = 20,
    rho: float = 0.1,
    weight: float = 0.1,
    dual_mean: Literal["participants", "all"] = "all",
    fraction: float = 1.0,
    seed: int = 0,
) -> Plan:
    """FedSpeed: proximal local steps with a dual variable, along gradients taken uphill; defaults of the authors' code.

    Args:
        sync_every: Optimizer steps per round.
        rho: Distance uphill; 0 takes ordinary gradients in one pass per step.
        weight: Of the proximal term, ``1 / lambda``.
        dual_mean: See :class:`~lightning_dopt.local.DualProximal`.
        fraction: Share of the ranks drawn for a round.
        seed: Of the draws.

    Raises:
        ValueError: an option out of range.

    Source: Sun et al., arXiv 2302.10429.
    """
    check_int("fedspeed", "sync_every", sync_every, 1)
    check_float("fedspeed", "rho", rho, 0.0)
    sync = Sync(Every(sync_every), signal="delta", peers=clients("fedspeed", fraction, None, seed))
    return Plan([sync], [*([SAM(rho)] if rho > 0 else []), DualProximal(weight, dual_mean)])


def proxskip(p: float = 0.1, l1: float = 0.0, maximise: str | None = None, seed: int = 0) -> Plan:
    """ProxSkip: exact local steps; all ranks meet in a step with probability ``p``, by one coin for all.

    Args:
        p: Probability of a sync after a step, in (0, 1].
        l1: Weight of the l1 norm beside the losses.
        maximise: Pattern on the parameters that maximise, for games (ProxSkip-VIP); ``None`` minimises over all.
        seed: Of the coin.

    Raises:
        ValueError: an option out of range.

    Source: Mishchenko et al., arXiv 2202.09357; Zhang, Choudhury et al., arXiv 2306.05100.
    """
    check_float("proxskip", "p", p, 0.0, 1.0, open_low=True)
    check_int("proxskip", "seed", seed, 0)
    skip = ProxSkip(p, l1)
    return Plan(
        [Sync(Bernoulli(p, seed), signal="value")], [*([Ascend(maximise)] if maximise is not None else []), skip]
    )


def local_gda(maximise: str, sync_every: int = 8) -> Plan:
    """Local gradient descent-ascent: local SGD for games, with its bias on unlike data.

    Args:
        maximise: Pattern on the names of the parameters that maximise.
        sync_every: Optimizer steps between averages.

    Raises:
        ValueError: an option out of range.

    Source: the baseline of Zhang, Choudhury et al., arXiv 2306.05100.
    """
    check_int("local_gda", "sync_every", sync_every, 1)
    return Plan([Sync(Every(sync_every))], [Ascend(maximise)])


def fed_admm(sync_every: int = 20, rho: float = 1.0) -> Plan:
    """Consensus ADMM whose local problems are solved by ``sync_every`` optimizer steps; all ranks take part.

    Args:
        sync_every: Optimizer steps per round.
        rho: Penalty.

    Raises:
        ValueError: an option out of range.

    Source: Boyd et al. (2011), section 7.1, in the setting of arXiv 2409.13451; see
    :class:`~lightning_dopt.local.ConsensusADMM`.
    """
    check_int("fed_admm", "sync_every", sync_every, 1)
    check_float("fed_admm", "rho", rho, 0.0, open_low=True)
    return Plan([Sync(Every(sync_every), signal="delta")], [ConsensusADMM(rho)])
