"""Gradients in few levels and without a memory: TernGrad, QSGD, signs."""

from __future__ import annotations

from lightning_dopt.combine import MajorityVote
from lightning_dopt.compress import QSGD, Sign, TernGrad
from lightning_dopt.plan import Plan, Sync
from lightning_dopt.plans._dense import large_only


def terngrad(clip: float = 2.5, block: int = 4096, dense_below: int | None = None) -> Plan:
    """TernGrad: every element of a gradient is -1, 0 or 1 times the scale of its block, at random and unbiased.

    Args:
        clip: Elements beyond so many root mean squares of their block are cut, which biases them and lowers the noise;
            0 does not.
        block: Elements with one scale. The paper has one per layer; noise grows with the root.
        dense_below: Tensors of fewer elements, and vectors, travel whole; ``None`` packs all of them.

    Raises:
        ValueError: an option out of range.

    Source: Wen et al., "TernGrad", arXiv 1705.07878. Every rank has its own scale, where the paper has a shared one.
    """
    return Plan([Sync(what="gradients", codec=large_only(TernGrad(block, clip), dense_below))])


def qsgd(levels: int = 7, block: int = 512, dense_below: int | None = 10_000) -> Plan:
    """QSGD: every element of a gradient is a random level times the norm of its block, unbiased.

    Args:
        levels: Levels of each sign; 7 take 4 bits per element, 127 take 8, 1 takes 2.
        block: Elements with one norm (the paper's bucket).
        dense_below: Tensors of fewer elements, and vectors, travel whole; ``None`` packs all of them, where
            the paper packs all from 10,000 elements on.

    Raises:
        ValueError: an option out of range.

    Source: Alistarh et al., "QSGD", arXiv 1610.02132.
    """
    return Plan([Sync(what="gradients", codec=large_only(QSGD(levels, block), dense_below))])


def sign_sgd() -> Plan:
    """signSGD with majority vote: one bit per element there, the sign of the majority is the gradient.

    The learning rate is the length of every element's step, as with Adam's: take a small one and let it fall. With momentum
    in the optimizer momentum is of the votes. All tensors vote, as published: beside signs a gradient of another size would
    ask for another learning rate.

    Source: Bernstein, Zhao, Azizzadenesheli, Anandkumar, "signSGD with Majority Vote", arXiv 1810.05291.
    """
    return Plan([Sync(what="gradients", codec=Sign(), combine=MajorityVote())])
