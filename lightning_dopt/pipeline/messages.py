"""What the messages of a pipeline are told apart by, and how the shape of an activation is told."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dopt.pipeline.links import Spec
from lightning_dopt.pipeline.program import Program

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DIMENSIONS = 8
KINDS = (
    "activation",
    "gradient",
    "shape of activation",
    "loss",
    "gradient sum",
    "norm",
    "shape",
    "output",
    "shared",
    "tied gradient",
)


def tag(program: Program, kind: str, pipe: int, place: int, m: int) -> int:
    """A number of its own for each kind of message, pipe, stage or boundary, and micro-batch."""
    number = (KINDS.index(kind) * 2 + pipe) * program.stages + place
    return number * program.microbatches + m


def header_of(spec: Spec) -> Tensor:
    """Shape and dtype in ``2 + DIMENSIONS`` integers.

    Raises:
        ValueError: More dimensions than that.
    """
    if len(spec.shape) > DIMENSIONS:
        raise ValueError(f"an activation of {len(spec.shape)} dimensions: at most {DIMENSIONS} can be sent")
    fill = [0] * (DIMENSIONS - len(spec.shape))
    return torch.tensor([DTYPES.index(spec.dtype), len(spec.shape), *spec.shape, *fill], dtype=torch.int64)


def read_header(header: Tensor, device: torch.device) -> Spec:
    """What :func:`header_of` told."""
    kind, dimensions, *shape = header.tolist()
    return Spec(tuple(shape[:dimensions]), DTYPES[kind], device)
