"""Compressed collectives for fully sharded training (``torch.distributed.fsdp.fully_shard``), without Lightning."""

from __future__ import annotations

from lightning_dopt.sharded.codecs import ShardCodecs, qsdp, zeropp
from lightning_dopt.sharded.collectives import Counter, PackedAllGather, PackedReduceScatter

__all__ = ["Counter", "PackedAllGather", "PackedReduceScatter", "ShardCodecs", "qsdp", "zeropp"]
