"""Federated averaging and its relatives: local steps of a few clients at a time, one mean per round."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_dopt._checks import check_flag, check_float, check_int
from lightning_dopt.adaptive import FedAdagrad, FedAdam, FedYogi
from lightning_dopt.compress import Identity
from lightning_dopt.compress.base import Codec, Compressor
from lightning_dopt.compress.memory import ErrorFeedback
from lightning_dopt.local import Correction, Proximal, Restart
from lightning_dopt.outer import Outer
from lightning_dopt.plan import Plan, Sync, is_exact
from lightning_dopt.schedules import Every
from lightning_dopt.topology import Complete, Sample
from lightning_dopt.topology.base import Topology
from lightning_dopt.what import Parameters


def clients(owner: str, fraction: float, counts: list[int] | None, seed: int) -> Topology:
    """Who takes part: everybody with the same weight, or a :class:`Sample`.

    Raises:
        ValueError: an option out of range, naming the plan ``owner``.
    """
    check_float(owner, "fraction", fraction, 0.0, 1.0, open_low=True)
    check_int(owner, "seed", seed, 0)
    return Complete() if fraction == 1.0 and counts is None else Sample(fraction, counts, seed)


def change_codec(codec: Codec | None) -> Codec:
    """A codec for changes: a bare lossy compressor gets an ``ErrorFeedback``, whose residual waits between rounds."""
    wire = codec or Identity()
    return ErrorFeedback(wire) if isinstance(wire, Compressor) and not is_exact(wire) else wire


def fedavg(
    sync_every: int = 20,
    fraction: float = 1.0,
    counts: list[int] | None = None,
    outer: Outer | None = None,
    codec: Codec | None = None,
    restart: bool = True,
    match: str = "*",
    seed: int = 0,
) -> Plan:
    """FedAvg: each round a random share of the clients trains from the common weights; these move to the mean of theirs.

    Ranks that are not drawn compute in lockstep as well; they send nothing, and take the result like all others, so that what
    they computed is dropped.

    Args:
        sync_every: Optimizer steps per round (local epochs times batches per epoch).
        fraction: Share of the ranks drawn for a round, in (0, 1].
        counts: Samples of each rank, its weight in the mean; ``None`` weighs all alike.
        outer: Optimizer on the common weights; ``None`` takes the mean.
        codec: What is on the wire; a lossy compressor without a memory is wrapped in ``ErrorFeedback``.
        restart: Whether the inner optimizer forgets its moments between rounds, as clients without a memory do.
        match: Pattern on the names of the parameters that are shared; the others stay personal, see :func:`apfl`.
        seed: Of the draws.

    Raises:
        ValueError: an option out of range.

    Source: McMahan et al., arXiv 1602.05629, algorithm 1.
    """
    peers = clients("fedavg", fraction, counts, seed)
    return averaging("fedavg", sync_every, peers, outer, change_codec(codec), restart, match)


def averaging(
    owner: str,
    sync_every: int,
    peers: Topology,
    outer: Outer | None = None,
    codec: Codec | None = None,
    restart: bool = True,
    match: str = "*",
    corrections: Sequence[Correction] = (),
) -> Plan:
    """What all plans of this page are: rounds of local steps from a shared anchor, which moves by their mean change.

    Raises:
        ValueError: ``sync_every`` below 1, naming the plan ``owner``.
    """
    check_int(owner, "sync_every", sync_every, 1)
    check_flag(owner, "restart", restart)
    sync = Sync(Every(sync_every), Parameters(match), "delta", codec or Identity(), peers, outer=outer)
    return Plan([sync], [*corrections, *([Restart()] if restart else [])])


def fedadagrad(
    sync_every: int = 20,
    outer_lr: float = 0.1,
    tau: float = 1e-3,
    fraction: float = 1.0,
    counts: list[int] | None = None,
    seed: int = 0,
) -> Plan:
    """FedAvg with Adagrad on the common weights.

    Args:
        sync_every: Optimizer steps per round.
        outer_lr: Learning rate of the outer optimizer.
        tau: Its degree of adaptivity.
        fraction: Share of the ranks drawn for a round.
        counts: Samples of each rank.
        seed: Of the draws.

    Raises:
        ValueError: an option out of range.

    Source: Reddi et al., "Adaptive Federated Optimization", arXiv 2003.00295.
    """
    check_float("fedadagrad", "outer_lr", outer_lr, 0.0, open_low=True)
    return averaging(
        "fedadagrad", sync_every, clients("fedadagrad", fraction, counts, seed), FedAdagrad(outer_lr, tau=tau)
    )


def fedadam(
    sync_every: int = 20,
    outer_lr: float = 0.1,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
    fraction: float = 1.0,
    counts: list[int] | None = None,
    seed: int = 0,
) -> Plan:
    """FedAvg with Adam on the common weights, without bias correction.

    Args:
        sync_every: Optimizer steps per round.
        outer_lr: Learning rate of the outer optimizer.
        beta1: Decay of its first moment.
        beta2: Decay of its second moment.
        tau: Its degree of adaptivity.
        fraction: Share of the ranks drawn for a round.
        counts: Samples of each rank.
        seed: Of the draws.

    Raises:
        ValueError: an option out of range.

    Source: Reddi et al., "Adaptive Federated Optimization", arXiv 2003.00295.
    """
    check_float("fedadam", "outer_lr", outer_lr, 0.0, open_low=True)
    return averaging(
        "fedadam", sync_every, clients("fedadam", fraction, counts, seed), FedAdam(outer_lr, beta1, beta2, tau)
    )


def fedyogi(
    sync_every: int = 20,
    outer_lr: float = 0.1,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
    fraction: float = 1.0,
    counts: list[int] | None = None,
    seed: int = 0,
) -> Plan:
    """FedAvg with Yogi on the common weights: Adam whose second moment falls slowly.

    Args:
        sync_every: Optimizer steps per round.
        outer_lr: Learning rate of the outer optimizer.
        beta1: Decay of its first moment.
        beta2: Decay of its second moment.
        tau: Its degree of adaptivity.
        fraction: Share of the ranks drawn for a round.
        counts: Samples of each rank.
        seed: Of the draws.

    Raises:
        ValueError: an option out of range.

    Source: Reddi et al., "Adaptive Federated Optimization", arXiv 2003.00295.
    """
    check_float("fedyogi", "outer_lr", outer_lr, 0.0, open_low=True)
    return averaging(
        "fedyogi", sync_every, clients("fedyogi", fraction, counts, seed), FedYogi(outer_lr, beta1, beta2, tau)
    )


def fedprox(
    sync_every: int = 20,
    mu: float = 0.01,
    fraction: float = 1.0,
    counts: list[int] | None = None,
    outer: Outer | None = None,
    codec: Codec | None = None,
    seed: int = 0,
) -> Plan:
    """FedAvg whose local steps stay near the common weights; the bias of unlike data gets smaller, not zero.

    Args:
        sync_every: Optimizer steps per round.
        mu: Weight of ``|x - anchor|^2 / 2`` in the local losses.
        fraction: Share of the ranks drawn for a round.
        counts: Samples of each rank.
        outer: Optimizer on the common weights.
        codec: As for :func:`fedavg`.
        seed: Of the draws.

    Raises:
        ValueError: an option out of range.

    Source: Li et al., "Federated Optimization in Heterogeneous Networks", arXiv 1812.06127.
    """
    check_float("fedprox", "mu", mu, 0.0)
    peers = clients("fedprox", fraction, counts, seed)
    return averaging("fedprox", sync_every, peers, outer, change_codec(codec), corrections=[Proximal(mu)])


def apfl(
    match: str = "*.shared.*",
    sync_every: int = 20,
    fraction: float = 1.0,
    counts: list[int] | None = None,
    seed: int = 0,
) -> Plan:
    """APFL: only the shared copy inside :class:`~lightning_dopt.personal.Personal` is averaged, the personal one never leaves.

    Use it with ``ReplicaStrategy(evaluate="local", buffers="local")``: the mean of personal models means nothing.

    Args:
        match: Pattern on the names of the shared parameters.
        sync_every: Optimizer steps per round.
        fraction: Share of the ranks drawn for a round.
        counts: Samples of each rank.
        seed: Of the draws.

    Raises:
        ValueError: an option out of range.

    Source: Deng, Kamani, Mahdavi, "Adaptive Personalized Federated Learning", arXiv 2003.13461.
    """
    return averaging("apfl", sync_every, clients("apfl", fraction, counts, seed), match=match)
