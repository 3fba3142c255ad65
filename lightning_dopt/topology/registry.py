"""Topologies by name, for command lines and configuration files."""

from __future__ import annotations

import re

from lightning_dopt.topology.base import Topology
from lightning_dopt.topology.directed_dynamic import RandomPull
from lightning_dopt.topology.dynamic import (
    AlternatingRing,
    BipartiteExponential,
    OnePeerHypercube,
    RandomPairs,
    RoundRobin,
)
from lightning_dopt.topology.equi import DEquiStatic, ODEquiDyn, OUEquiDyn, UEquiStatic
from lightning_dopt.topology.exponential import DirectedRing, Exponential, OnePeerExponential
from lightning_dopt.topology.finite_time import BaseGraph, HyperHypercube, MoshpitGrid
from lightning_dopt.topology.lattice import Grid, Torus
from lightning_dopt.topology.random_graphs import ErdosRenyi, RandomRegular, SmallWorld
from lightning_dopt.topology.static import Chain, Complete, Hypercube, Ring, Star, SymmetricExponential, Tree

_CLASSES: tuple[type[Topology], ...] = (
    Complete,
    Ring,
    DirectedRing,
    Chain,
    Grid,
    Torus,
    Tree,
    Star,
    Hypercube,
    Exponential,
    SymmetricExponential,
    ErdosRenyi,
    RandomRegular,
    SmallWorld,
    DEquiStatic,
    UEquiStatic,
    OnePeerExponential,
    OnePeerHypercube,
    HyperHypercube,
    BaseGraph,
    MoshpitGrid,
    RandomPairs,
    RoundRobin,
    AlternatingRing,
    BipartiteExponential,
    ODEquiDyn,
    OUEquiDyn,
    RandomPull,
)
_ALIASES: dict[str, type[Topology]] = {"path": Chain}


def _snake(name: str) -> str:
    """``OnePeerExponential`` as ``one_peer_exponential``, ``ODEquiDyn`` as ``od_equi_dyn``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def classes() -> dict[str, type[Topology]]:
    """The topologies that have a name, by their name in snake case; static graphs first, second names last."""
    return {_snake(cls.__name__): cls for cls in _CLASSES} | _ALIASES


def names() -> list[str]:
    """The names :func:`by_name` knows, in snake case; static graphs first, second names (``path``) left out."""
    return [_snake(cls.__name__) for cls in _CLASSES]


def by_name(name: str) -> Topology:
    """The topology called ``name``, with default arguments.

    Topologies that cannot be made without arguments (``Lazy``, ``FromAdjacency``, ...) have no name here.

    Args:
        name: in snake case (``"one_peer_exponential"``) or as the class is called (``"OnePeerExponential"``);
            ``"path"`` is another name of ``"chain"``.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    for known, cls in classes().items():
        if name in (known, cls.__name__):
            return cls()
    raise ValueError(f"by_name(name={name!r}): must be one of {', '.join(names())}")
