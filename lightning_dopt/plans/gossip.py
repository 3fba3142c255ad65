"""Gossip: every rank averages with its neighbours only, after (or before, or during) every step."""

from __future__ import annotations

from typing import Literal

from lightning_dopt._checks import check_choice, check_int
from lightning_dopt.apply import Blocking
from lightning_dopt.combine import Mixing, Repeated
from lightning_dopt.compress import Identity
from lightning_dopt.compress.base import Codec, Compressor
from lightning_dopt.compress.memory import Difference
from lightning_dopt.local import (
    Correction,
    ExactDiffusion,
    Extra,
    GradientTracking,
    LocalTracking,
    QuasiGlobalMomentum,
)
from lightning_dopt.plan import Plan, Sync, is_exact
from lightning_dopt.schedules import Every
from lightning_dopt.topology import Lazy, OnePeerExponential, Ring
from lightning_dopt.topology.base import Topology

Order = Literal["atc", "cta", "awc"]
CorrectionName = Literal[
    "none", "exact_diffusion", "d2", "extra", "gradient_tracking", "local_tracking", "quasi_global"
]
_NAMES: tuple[CorrectionName, ...] = (
    "none",
    "exact_diffusion",
    "d2",
    "extra",
    "gradient_tracking",
    "local_tracking",
    "quasi_global",
)
_MADE: dict[str, type[Correction]] = {
    "exact_diffusion": ExactDiffusion,
    "d2": ExactDiffusion,
    "extra": Extra,
    "gradient_tracking": GradientTracking,
    "local_tracking": LocalTracking,
    "quasi_global": QuasiGlobalMomentum,
}


def gossip(
    topology: Topology | None = None,
    codec: Codec | None = None,
    correction: CorrectionName | Correction = "none",
    order: Order | None = None,
    sync_every: int = 1,
    rounds: int = 1,
) -> Plan:
    """Decentralized SGD with any inner optimizer: ``x_i <- sum_j W_ij x_j`` around every step.

    Args:
        topology: With whom; ``None`` means the one-peer exponential graph: one message per step whatever the number of
            workers, and the exact mean after ``log2(n)`` steps when ``n`` is a power of two. Exact diffusion, D2 and EXTRA
            need symmetric weights: there ``None`` means the ring.
        codec: What is on the wire. A lossy compressor is wrapped in ``Difference(codec)`` (CHOCO-SGD), which needs, for
            strong compression, a smaller ``gamma``: pass ``Difference(codec, gamma)`` yourself. With gradient tracking both
            messages are coded.
        correction: Removes the bias that heterogeneous data cause. ``"exact_diffusion"`` mixes with the lazy matrix
            ``(I + W) / 2``, ``"d2"`` with ``W`` itself; ``"extra"`` is their relative of order ``"awc"``.
            ``"gradient_tracking"`` doubles the messages, ``"local_tracking"`` (K-GT) too and stays exact with
            ``sync_every`` above 1. ``"quasi_global"`` keeps momentum from making the bias larger. Or a correction object
            with its own settings.
        order: ``"atc"`` adapt-then-combine, ``"cta"`` combine-then-adapt, ``"awc"`` adapt while combining (the message
            travels during forward and backward). ``None`` means ``"atc"``, with EXTRA ``"awc"``.
        sync_every: Optimizer steps between mixings (DFedAvg).
        rounds: Exchanges per mixing (multi-gossip).

    Raises:
        ValueError: an unknown correction or order, or one that does not go with the other arguments.

    Source: Lian et al., "Can Decentralized Algorithms Outperform Centralized Algorithms?", arXiv 1705.09056; Koloskova
    et al., "Decentralized Deep Learning with Arbitrary Communication Compression", arXiv 1907.09356.
    """
    check_int("gossip", "sync_every", sync_every, 1)
    check_int("gossip", "rounds", rounds, 1)
    if order is not None:
        check_choice("gossip", "order", order, ("atc", "cta", "awc"))
    made = correction_of(correction)
    symmetric = isinstance(made, (ExactDiffusion, Extra))
    peers = topology or (Ring() if symmetric else OnePeerExponential())
    if isinstance(made, ExactDiffusion) and correction != "d2" and not isinstance(peers, Lazy):
        peers = Lazy(peers)
    when, wire = Every(sync_every), value_codec(codec)
    if isinstance(made, GradientTracking) and sync_every > 1:
        raise ValueError(
            f"gossip(correction={correction!r}, sync_every={sync_every}): tracks in every step, use 'local_tracking'"
        )
    extra = []
    if isinstance(made, GradientTracking):
        extra.append(Sync(what="gradients", codec=wire, peers=peers))
    elif isinstance(made, LocalTracking):
        extra.append(Sync(when, "tracker", codec=wire, peers=peers))
    mix = Sync(
        when,
        signal="value",
        codec=wire,
        peers=peers,
        combine=Mixing() if rounds == 1 else Repeated(rounds),
        apply=Blocking(order=order or ("awc" if isinstance(made, Extra) else "atc")),
    )
    return Plan([*extra, mix], [made] if made is not None else [])


def correction_of(correction: CorrectionName | Correction) -> Correction | None:
    """The correction of that name, with its defaults.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    if isinstance(correction, Correction):
        return correction
    check_choice("gossip", "correction", correction, _NAMES)
    return None if correction == "none" else _MADE[correction]()


def value_codec(codec: Codec | None) -> Codec:
    """A codec under which lossy messages of whole values converge: a bare lossy compressor is wrapped in ``Difference``."""
    wire = codec or Identity()
    return Difference(wire) if isinstance(wire, Compressor) and not is_exact(wire) else wire
