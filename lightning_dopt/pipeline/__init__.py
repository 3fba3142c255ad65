"""Pipelines: a model cut into stages on several ranks, with what travels between them compressed."""

from __future__ import annotations

from lightning_dopt.pipeline.checker import Report, check
from lightning_dopt.pipeline.program import Action, Program
from lightning_dopt.pipeline.schedules import bitpipe, gpipe, interleaved, make_program, one_f_one_b
from lightning_dopt.pipeline.timeline import timeline

__all__ = [
    "Action",
    "Program",
    "Report",
    "bitpipe",
    "check",
    "gpipe",
    "interleaved",
    "make_program",
    "one_f_one_b",
    "timeline",
]
