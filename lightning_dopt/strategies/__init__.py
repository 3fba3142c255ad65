"""Lightning strategies."""

from __future__ import annotations

from lightning.pytorch.strategies import StrategyRegistry

from lightning_dopt.strategies.async_gossip import AsyncGossipStrategy
from lightning_dopt.strategies.named import (
    NAMES,
    CompressedDDPStrategy,
    DiLoCoStrategy,
    GossipStrategy,
    LocalSGDStrategy,
    LoFiStrategy,
)
from lightning_dopt.strategies.replica import ReplicaStrategy

__all__ = [
    "NAMES",
    "AsyncGossipStrategy",
    "CompressedDDPStrategy",
    "DiLoCoStrategy",
    "GossipStrategy",
    "LoFiStrategy",
    "LocalSGDStrategy",
    "ReplicaStrategy",
    "register",
]


def register() -> None:
    """Make the names known to ``Trainer(strategy=...)``: each as it is, and with ``_notebook`` (forked processes)."""
    for name, cls in (NAMES | {"async_gossip": AsyncGossipStrategy}).items():
        text = (cls.__doc__ or "").splitlines()[0]
        if name not in StrategyRegistry:
            StrategyRegistry.register(name, cls, description=text)
        if f"{name}_notebook" not in StrategyRegistry:
            StrategyRegistry.register(f"{name}_notebook", cls, description=f"{text} (notebooks)", start_method="fork")
