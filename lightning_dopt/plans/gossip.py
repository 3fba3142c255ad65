"""Gossip: every rank averages with its neighbours only, after (or before, or during) every step."""

from __future__ import annotations

from typing import Literal

from lightning_dopt._checks import check_choice
from lightning_dopt.apply import Blocking
from lightning_dopt.compress import Identity
from lightning_dopt.compress.base import Codec, Compressor
from lightning_dopt.compress.memory import Difference
from lightning_dopt.local import Correction, ExactDiffusion, GradientTracking
from lightning_dopt.plan import Plan, Sync, is_exact
from lightning_dopt.topology import Lazy, OnePeerExponential, Ring
from lightning_dopt.topology.base import Topology


def gossip(
    topology: Topology | None = None,
    codec: Codec | None = None,
    correction: Literal["none", "exact_diffusion", "gradient_tracking"] = "none",
    order: Literal["atc", "cta", "awc"] = "atc",
) -> Plan:
    """Decentralized SGD with any inner optimizer: ``x_i <- sum_j W_ij x_j`` around every step.

    Args:
        topology: With whom; ``None`` means the one-peer exponential graph: one message per step whatever the number of
            workers, and the exact mean after ``log2(n)`` steps when ``n`` is a power of two. Exact diffusion needs
            symmetric weights: there ``None`` means the ring.
        codec: What is on the wire. A lossy compressor is wrapped in ``Difference(codec)`` (CHOCO-SGD), which needs a
            static topology and, for strong compression, a smaller ``gamma``: pass ``Difference(codec, gamma)`` yourself.
        correction: ``"exact_diffusion"`` or ``"gradient_tracking"`` remove the bias that heterogeneous data cause. Exact
            diffusion mixes with the lazy matrix ``(I + W) / 2``; tracking doubles the messages.
        order: ``"atc"`` adapt-then-combine, ``"cta"`` combine-then-adapt, ``"awc"`` adapt while combining (the message
            travels during forward and backward).

    Raises:
        ValueError: an unknown correction or order, or one that does not go with the other arguments.

    Source: Lian et al., "Can Decentralized Algorithms Outperform Centralized Algorithms?", arXiv 1705.09056; Koloskova
    et al., "Decentralized Deep Learning with Arbitrary Communication Compression", arXiv 1907.09356.
    """
    check_choice("gossip", "correction", correction, ("none", "exact_diffusion", "gradient_tracking"))
    peers = topology or (Ring() if correction == "exact_diffusion" else OnePeerExponential())
    wire = codec or Identity()
    if isinstance(wire, Compressor) and not is_exact(wire):
        wire = Difference(wire)
    corrections: list[Correction] = []
    extra = []
    if correction == "exact_diffusion":
        peers = peers if isinstance(peers, Lazy) else Lazy(peers)
        corrections.append(ExactDiffusion())
    elif correction == "gradient_tracking":
        extra.append(Sync(what="gradients", peers=peers))
        corrections.append(GradientTracking())
    mix = Sync(signal="value", codec=wire, peers=peers, apply=Blocking(order=order))
    return Plan([*extra, mix], corrections)
