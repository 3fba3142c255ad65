"""Combine: how the messages of several ranks become one, and in how many exchanges."""

from lightning_dopt.combine.base import Combine, Decode, Wire
from lightning_dopt.combine.contribution import Contribution
from lightning_dopt.combine.damped import Damped
from lightning_dopt.combine.mixing import Median, Mixing
from lightning_dopt.combine.push_sum import PushSum
from lightning_dopt.combine.relay import RelaySum
from lightning_dopt.combine.repeated import Chebyshev, MomentumGossip, Repeated
from lightning_dopt.combine.rescaled import Rescaled
from lightning_dopt.combine.vote import MajorityVote

__all__ = [
    "Chebyshev",
    "Combine",
    "Contribution",
    "Damped",
    "Decode",
    "MajorityVote",
    "Median",
    "Mixing",
    "MomentumGossip",
    "PushSum",
    "RelaySum",
    "Repeated",
    "Rescaled",
    "Wire",
]
