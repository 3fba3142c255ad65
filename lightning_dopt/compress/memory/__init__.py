"""Memories: what happens to what a compressor leaves out."""

from __future__ import annotations

from lightning_dopt.compress.memory.base import Memory, as_compressor
from lightning_dopt.compress.memory.diana import DIANA
from lightning_dopt.compress.memory.error_feedback import EF21, EControl, ErrorFeedback
from lightning_dopt.compress.memory.gossip import DeepSqueeze, Difference, MoniQua
from lightning_dopt.compress.memory.inexact import Averaged, Direct
from lightning_dopt.compress.memory.momentum import DGC, GMF

__all__ = [
    "DGC",
    "DIANA",
    "EF21",
    "GMF",
    "Averaged",
    "DeepSqueeze",
    "Difference",
    "Direct",
    "EControl",
    "ErrorFeedback",
    "Memory",
    "MoniQua",
    "as_compressor",
]
