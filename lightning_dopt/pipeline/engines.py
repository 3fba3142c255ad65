"""Which engine runs a pipeline: torch's own, or the runtime of this package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor, nn

from lightning_dopt._checks import check_choice
from lightning_dopt.pipeline.links import Link
from lightning_dopt.pipeline.mail import BOTH, on_host
from lightning_dopt.pipeline.pipeline import Pipeline, first_of
from lightning_dopt.pipeline.program import Program
from lightning_dopt.pipeline.runner import Context, Loss
from lightning_dopt.pipeline.torch_engine import TorchPipeline
from lightning_dopt.pipeline.torch_schedules import TORCH_SCHEDULES, available

Engine = Literal["auto", "torch", "native"]


def make_pipeline(
    stages: Sequence[nn.Module],
    program: Program,
    loss: Loss,
    inputs: Callable[[Any], Tensor] = first_of,
    activation_link: Link | None = None,
    gradient_link: Link | None = None,
    seed: int = 0,
    timeout: timedelta = timedelta(minutes=30),
    group: dist.ProcessGroup | None = None,
    context: Context = nullcontext,
    engine: Engine = "auto",
) -> Pipeline:
    """A :class:`Pipeline` or a :class:`TorchPipeline`; all arguments but the last are theirs.

    Args:
        stages: As for :class:`Pipeline`, like all that follows.
        program: The schedule.
        loss: ``loss(output, part)``.
        inputs: ``inputs(part)``.
        activation_link: What happens to activations.
        gradient_link: What happens to the gradients of activations.
        seed: Seed of dropout and codecs.
        timeout: How long a rank waits for another one.
        group: The processes of this pipeline.
        context: Entered for every forward.
        engine: ``"torch"``, ``"native"`` (the runtime of this package), or ``"auto"``: torch where there are no links and torch
            has the schedule, and for stages on GPUs NCCL is there.

    Raises:
        ValueError: ``engine="torch"`` with links, with a schedule that torch does not have, or on GPUs without NCCL; else as
            for the two classes.
    """
    check_choice("make_pipeline", "engine", engine, ("auto", "torch", "native"))
    links = {"activation_link": activation_link, "gradient_link": gradient_link}
    given = [f"{name}={link!r}" for name, link in links.items() if link is not None]
    if engine == "torch" and given:
        raise ValueError(
            f"make_pipeline(engine='torch', {given[0]}): torch sends tensors as they are; take engine='native'"
        )
    known = program.name in TORCH_SCHEDULES and available(program.name)
    far = [p.device for stage in stages for p in stage.parameters() if not on_host(p)]
    served = not far or "nccl" in dist.get_backend(group)
    if engine == "torch" and not served:
        raise ValueError(
            f"make_pipeline(engine='torch'): sends tensors from {far[0]}, which needs a group over '{BOTH}', not "
            f"{str(dist.get_backend(group))!r}; take engine='native'"
        )
    if engine == "torch" or (engine == "auto" and known and served and not given):
        return TorchPipeline(stages, program, loss, inputs, seed, timeout, group, context)
    return Pipeline(stages, program, loss, inputs, activation_link, gradient_link, seed, timeout, group, context)
