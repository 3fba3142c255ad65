"""Pipelines: a model cut into stages on several ranks, with what travels between them compressed."""

from __future__ import annotations

from lightning_dopt.pipeline.batches import cut_batch
from lightning_dopt.pipeline.checker import Report, check
from lightning_dopt.pipeline.cut import cut
from lightning_dopt.pipeline.engines import make_pipeline
from lightning_dopt.pipeline.families import Family, register_family
from lightning_dopt.pipeline.lazy import LazyClock, LazyLoader
from lightning_dopt.pipeline.links import AQSGD, Clapping, Direct, Link
from lightning_dopt.pipeline.pipeline import Pipeline, SimulatedPipeline
from lightning_dopt.pipeline.program import Action, Program
from lightning_dopt.pipeline.replay import Replay
from lightning_dopt.pipeline.schedules import Schedule, bitpipe, gpipe, interleaved, make_program, one_f_one_b
from lightning_dopt.pipeline.stage import Stage
from lightning_dopt.pipeline.timeline import timeline
from lightning_dopt.pipeline.torch_engine import TorchPipeline

__all__ = [
    "AQSGD",
    "Action",
    "Clapping",
    "Direct",
    "Family",
    "LazyClock",
    "LazyLoader",
    "Link",
    "Pipeline",
    "Program",
    "Replay",
    "Report",
    "Schedule",
    "SimulatedPipeline",
    "Stage",
    "TorchPipeline",
    "bitpipe",
    "check",
    "cut",
    "cut_batch",
    "gpipe",
    "interleaved",
    "make_pipeline",
    "make_program",
    "one_f_one_b",
    "register_family",
    "timeline",
]
