"""Lightning strategies."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import StrategyRegistry

from lightning_dopt.sharded import ShardCodecs, qsdp, zeropp
from lightning_dopt.strategies.async_gossip import AsyncGossipStrategy
from lightning_dopt.strategies.async_local import AsyncLocalStrategy
from lightning_dopt.strategies.bilevel import BilevelStrategy, DSOBAStrategy, SparkleStrategy
from lightning_dopt.strategies.bilevel_module import BilevelModule
from lightning_dopt.strategies.elastic import ElasticStrategy
from lightning_dopt.strategies.elastic_diloco import ElasticDiLoCoStrategy
from lightning_dopt.strategies.named import (
    NAMES,
    CompressedDDPStrategy,
    DiLoCoStrategy,
    GossipStrategy,
    LocalSGDStrategy,
    LoFiStrategy,
)
from lightning_dopt.strategies.pipeline import PipelineStrategy
from lightning_dopt.strategies.replica import ReplicaStrategy
from lightning_dopt.strategies.sharded import ShardedStrategy

__all__ = [
    "NAMES",
    "WITHOUT_PLAN",
    "AsyncGossipStrategy",
    "AsyncLocalStrategy",
    "BilevelModule",
    "BilevelStrategy",
    "CompressedDDPStrategy",
    "DSOBAStrategy",
    "DiLoCoStrategy",
    "ElasticDiLoCoStrategy",
    "ElasticStrategy",
    "GossipStrategy",
    "LoFiStrategy",
    "LocalSGDStrategy",
    "PipelineStrategy",
    "ReplicaStrategy",
    "ShardedStrategy",
    "SparkleStrategy",
    "register",
]


WITHOUT_PLAN = {
    "async_gossip": "pairs of ranks average in the background while each trains at its own pace",
    "dsoba": "bilevel: gossip for lower, auxiliary and upper variables of a BilevelModule (D-SOBA)",
    "sparkle": "bilevel: a correction of its own for each variable, exact diffusion by default (SPARKLE)",
    "async_local": "local steps at every rank's own speed, pushed to a hub that answers at once",
    "elastic_diloco": "DiLoCo whose workers may die, leave and join while the others go on; started by dopt workers",
    "pipeline": "one model in stages over the ranks; its arguments choose schedule, cuts and what compresses the messages",
    "sharded": "FSDP2 with counted messages; its arguments compress them",
    "qsdp": "FSDP2 with unbiased 8-bit weights and gradients",
    "zeropp": "FSDP2 with int8 weights and int4 gradients in blocks, ZeRO++'s qwZ and qgZ",
}
"""The names under which ``Trainer(strategy=...)`` knows strategies that follow no plan, or need more than ``Trainer``."""


_WITHOUT = {
    "async_gossip": AsyncGossipStrategy,
    "pipeline": PipelineStrategy,
    "async_local": AsyncLocalStrategy,
    "dsoba": DSOBAStrategy,
    "sparkle": SparkleStrategy,
}


def register() -> None:
    """Make the names known to ``Trainer(strategy=...)``: each as it is, and most with ``_notebook`` behind them, too."""
    for name, cls in (NAMES | _WITHOUT).items():
        text = (cls.__doc__ or "").splitlines()[0]
        if name not in StrategyRegistry:
            StrategyRegistry.register(name, cls, description=text)
        if f"{name}_notebook" not in StrategyRegistry:
            StrategyRegistry.register(f"{name}_notebook", cls, description=f"{text} (notebooks)", start_method="fork")
    if "elastic_diloco" not in StrategyRegistry:
        StrategyRegistry.register("elastic_diloco", ElasticDiLoCoStrategy, description=WITHOUT_PLAN["elastic_diloco"])
    for name, codecs in (("sharded", ShardCodecs()), ("qsdp", qsdp()), ("zeropp", zeropp())):
        if name not in StrategyRegistry:
            parts: dict[str, Any] = {"weights": codecs.weights, "gradients": codecs.gradients}
            StrategyRegistry.register(name, ShardedStrategy, description=WITHOUT_PLAN[name], **parts)
