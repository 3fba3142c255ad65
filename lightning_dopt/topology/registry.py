"""Topologies by name, for command lines and configuration files."""

from __future__ import annotations

import re

from lightning_dopt.topology.base import Topology
from lightning_dopt.topology.custom import ErdosRenyi
from lightning_dopt.topology.dynamic import OnePeerHypercube, RandomPairs, RoundRobin
from lightning_dopt.topology.exponential import DirectedRing, Exponential, OnePeerExponential
from lightning_dopt.topology.static import Chain, Complete, Grid, Hypercube, Ring, Star, Torus

_CLASSES: tuple[type[Topology], ...] = (
    Complete,
    Ring,
    DirectedRing,
    Chain,
    Grid,
    Torus,
    Star,
    Hypercube,
    Exponential,
    ErdosRenyi,
    OnePeerExponential,
    OnePeerHypercube,
    RandomPairs,
    RoundRobin,
)


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def classes() -> dict[str, type[Topology]]:
    """The topologies that have a name, by their name in snake case; static graphs first."""
    return {_snake(cls.__name__): cls for cls in _CLASSES}


def names() -> list[str]:
    """The names :func:`by_name` knows, in snake case; static graphs first."""
    return list(classes())


def by_name(name: str) -> Topology:
    """The topology called ``name``, with default arguments.

    Topologies that cannot be made without arguments (``Lazy``, ``FromAdjacency``, ``FromMatrix``) have no name here.

    Args:
        name: in snake case (``"one_peer_exponential"``) or as the class is called (``"OnePeerExponential"``).

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    for cls in _CLASSES:
        if name in (cls.__name__, _snake(cls.__name__)):
            return cls()
    raise ValueError(f"by_name(name={name!r}): must be one of {', '.join(names())}")
