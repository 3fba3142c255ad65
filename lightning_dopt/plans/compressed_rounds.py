"""Rounds of local steps whose changes are compressed: FedZip, sketches, and control variates learnt from them."""

from __future__ import annotations

from typing import Literal

from lightning_dopt._checks import check_choice, check_flag
from lightning_dopt.compress import Compressor, CountSketch, ErrorFeedback, FedZip, RandK, TopK
from lightning_dopt.local import ClipLocal, ControlVariate, Correction, NoisyGradients, Scaffold
from lightning_dopt.outer import SGD
from lightning_dopt.plan import Plan, Sync
from lightning_dopt.plans.federated import clients
from lightning_dopt.schedules import Every

_SHAPE = (1 << 20,)


def fedzip(sync_every: int = 8, ratio: float = 0.01, clusters: int = 3, feedback: bool = True) -> Plan:
    """FedZip: every few steps the largest changes of each tensor, rounded to a few values, positions in few bits.

    Args:
        sync_every: Optimizer steps per round.
        ratio: Share of each tensor that is sent.
        clusters: Values per tensor.
        feedback: Whether what was not sent is added to the next round; the paper loses it, and a warning says so.

    Raises:
        ValueError: an option out of range.

    Source: Malekijoo et al., "FEDZIP", arXiv 2102.01593; with a memory, and a code of fixed length for the positions.
    """
    check_flag("fedzip", "feedback", feedback)
    wire = FedZip(ratio, clusters)
    return Plan([Sync(when=Every(sync_every), signal="delta", codec=ErrorFeedback(wire) if feedback else wire)])


def sketched(
    codec: Compressor | None = None,
    sync_every: int = 8,
    outer_lr: float | None = None,
    clip: float | None = None,
    sigma: float = 0.0,
    seed: int = 0,
) -> Plan:
    """Sketched local SGD: random projections of the changes are summed on the way; optionally noise covers gradients.

    *Privacy.* A sketch hides nothing: with the shared seed much of what was sketched can be computed back. With ``clip``
    and ``sigma`` every local gradient is clipped as a whole and gets Gaussian noise before it is used. No level of
    differential privacy is claimed for a run: single examples are not clipped one by one, no accountant adds up the
    steps, and noise drawn from ``seed`` hides nothing from those who know it.

    Args:
        codec: A linear unbiased compressor; ``None`` means ``CountSketch(0.1)``.
        sync_every: Optimizer steps per round.
        outer_lr: Step of the anchor along the estimated change; ``None`` means ``1 / (1 + omega)``, as noise of the sketch
            calls for.
        clip: Largest norm of a local gradient; ``None`` does not clip.
        sigma: Standard deviation of the noise in each element of a local gradient.
        seed: Seed of that noise.

    Raises:
        ValueError: an option out of range, or a codec that is not linear and unbiased.

    Source: Song et al., "Sketching for First Order Method: Efficient Algorithm for Low-Bandwidth Channel and Vulnerability",
    arXiv 2210.08371.
    """
    wire = codec or CountSketch(0.1)
    omega = wire.variance(_SHAPE)
    if not wire.linear or omega is None:
        raise ValueError(
            f"sketched(codec={wire!r}): must be linear and unbiased, such as CountSketch(0.1) or RandK(0.1)"
        )
    outer = SGD(outer_lr if outer_lr is not None else 1.0 / (1.0 + omega))
    corrections: list[Correction] = [] if clip is None else [ClipLocal(clip)]
    corrections += [NoisyGradients(sigma, seed)] if sigma else []
    return Plan([Sync(when=Every(sync_every), codec=wire, outer=outer)], corrections)


def scaffold(
    sync_every: int = 8,
    outer_lr: float = 1.0,
    option: Literal["I", "II", "mean"] = "II",
    fraction: float = 1.0,
    counts: list[int] | None = None,
    seed: int = 0,
) -> Plan:
    """SCAFFOLD: control variates for local steps, without a bias of unlike data.

    Option ``"II"`` learns them from the change of the weights itself, one message per round; the others send a second one, see
    :class:`~lightning_dopt.local.ControlVariate`.

    Args:
        sync_every: Optimizer steps per round.
        outer_lr: Step of the anchor along the mean change.
        option: Where control variates come from: the displacement of a round (plain SGD only), the first gradient of a round
            (``"I"``), or the mean of its gradients (``"mean"``, any inner optimizer).
        fraction: Share of the ranks drawn for a round.
        counts: Samples of each rank, its weight in the means; ``None`` weighs all alike.
        seed: Of the draws.

    Raises:
        ValueError: an option out of range.

    Source: Karimireddy et al., "SCAFFOLD", arXiv 1910.06378.
    """
    check_choice("scaffold", "option", option, ("I", "II", "mean"))
    peers = clients("scaffold", fraction, counts, seed)
    move = Sync(when=Every(sync_every), signal="delta", peers=peers, outer=SGD(outer_lr))
    if option == "II":
        return Plan([move], [Scaffold()])
    return Plan([move, Sync(when=Every(sync_every), what="tracker", peers=peers)], [ControlVariate(option)])


def scallion(
    codec: Compressor | None = None,
    sync_every: int = 8,
    alpha: float | None = None,
    outer_lr: float | None = None,
    fraction: float = 1.0,
    counts: list[int] | None = None,
    seed: int = 0,
) -> Plan:
    """SCALLION: SCAFFOLD with one compressed message per round, by an unbiased compressor.

    Args:
        codec: An unbiased compressor; ``None`` means ``RandK(0.1)``.
        sync_every: Optimizer steps per round.
        alpha: Share of what is missing that is sent; ``None`` means ``1 / (1 + omega)``.
        outer_lr: Step of the anchor along the estimated change, which lags the more the smaller ``alpha`` is; ``None`` means
            ``alpha``. With 1 a quadratic problem whose curvature times the rate of a round was about 1 diverged.
        fraction: Share of the ranks drawn for a round.
        counts: Samples of each rank, its weight in the means; ``None`` weighs all alike.
        seed: Of the draws.

    Raises:
        ValueError: an option out of range, or a biased codec.

    Source: Huang, Li, Li, "Stochastic Controlled Averaging for Federated Learning with Communication Compression", arXiv
    2308.08165.
    """
    wire = codec or RandK(0.1)
    omega = wire.variance(_SHAPE)
    if omega is None:
        raise ValueError(f"scallion(codec={wire!r}): must be unbiased, such as RandK(0.1); for others use scafcom")
    peers = clients("scallion", fraction, counts, seed)
    share = alpha if alpha is not None else 1.0 / (1.0 + omega)
    return Plan(
        [Sync(when=Every(sync_every), signal="delta", codec=wire, peers=peers, outer=SGD(outer_lr or share))],
        [Scaffold(share)],
    )


def scafcom(
    codec: Compressor | None = None,
    sync_every: int = 8,
    beta: float = 0.5,
    outer_lr: float = 1.0,
    fraction: float = 1.0,
    counts: list[int] | None = None,
    seed: int = 0,
) -> Plan:
    """SCAFCOM: SCAFFOLD with one compressed message per round, by a biased compressor and with momentum.

    Args:
        codec: A contractive compressor; ``None`` means ``TopK(0.1)``.
        sync_every: Optimizer steps per round.
        beta: Share of the new gradient in the one that is learnt, in (0, 1]; smaller for noisier batches.
        outer_lr: Step of the anchor along the estimated change.
        fraction: Share of the ranks drawn for a round.
        counts: Samples of each rank, its weight in the means; ``None`` weighs all alike.
        seed: Of the draws.

    Raises:
        ValueError: an option out of range.

    Source: Huang, Li, Li, "Stochastic Controlled Averaging for Federated Learning with Communication Compression", arXiv
    2308.08165.
    """
    wire, peers = codec or TopK(0.1), clients("scafcom", fraction, counts, seed)
    return Plan(
        [Sync(when=Every(sync_every), signal="delta", codec=wire, peers=peers, outer=SGD(outer_lr))],
        [Scaffold(1.0, beta)],
    )
