"""The schedules of ``torch.distributed.pipelining`` as programs, read from torch's own tables before any process starts.

The tables are private to torch: everything that touches them is in this file. What is used: the schedule classes and
``pipeline_order``, which are public names, and ``pipeline_order_with_comms``, where it exists.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from lightning_dopt.pipeline.checker import in_one_order
from lightning_dopt.pipeline.program import COMPUTE, Action, Kind, Program

TORCH_SCHEDULES = {
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "interleaved": "ScheduleInterleaved1F1B",
    "looped_bfs": "ScheduleLoopedBFS",
    "interleaved_zero_bubble": "ScheduleInterleavedZeroBubble",
    "zbv": "ScheduleZBVZeroBubble",
    "dualpipev": "ScheduleDualPipeV",
}
"""The class in ``torch.distributed.pipelining.schedules`` of each schedule that torch can run."""

OLDEST = (2, 14)
"""The oldest torch that this has run with; 2.4 has only some of the schedules, and tables of another form."""

ONE_STAGE = ("gpipe", "1f1b")
"""Schedules with one stage per rank: torch has them as code, without a table to run from."""

V_SHAPED = ("zbv", "dualpipev")
"""Two stages per rank, down the ranks and up again; the others put stage s on rank ``s mod D``."""

_KINDS: dict[str, Kind] = {
    "F": "forward",
    "B": "backward",
    "I": "backward_input",
    "W": "backward_weight",
    "SEND_F": "send_activation",
    "RECV_F": "recv_activation",
    "SEND_B": "send_gradient",
    "RECV_B": "recv_gradient",
}


def available(name: str) -> bool:
    """Whether this torch runs a schedule of ``TORCH_SCHEDULES``."""
    from torch.distributed.pipelining import schedules

    return _version() >= OLDEST and hasattr(schedules, TORCH_SCHEDULES[name])


def torch_schedule(name: str) -> type[Any]:
    """torch's class of a schedule.

    Raises:
        ValueError: This torch has none, or is older than what this was tested with.
    """
    from torch.distributed.pipelining import schedules

    if not available(name):
        oldest = ".".join(map(str, OLDEST))
        raise ValueError(
            f"schedule={name!r}: needs {TORCH_SCHEDULES[name]} of torch >= {oldest}, this is {torch.__version__}"
        )
    made: type[Any] = getattr(schedules, TORCH_SCHEDULES[name])
    return made


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


def torch_program(name: str, ranks: int, microbatches: int, chunks: int = 2) -> Program:
    """What torch runs, as a program: its own order of computations and of sends, and receives right before their use.

    Args:
        name: One of ``TORCH_SCHEDULES`` with several stages per rank.
        ranks: Ranks of the pipeline.
        microbatches: Micro-batches per optimizer step.
        chunks: Stages per rank.

    Raises:
        ValueError: This torch does not have the schedule, or refuses these numbers.
    """
    table = _table(name, ranks, microbatches, chunks)
    orders = {rank: list(_actions(row)) for rank, row in table.items()}
    placement = [0] * (ranks * chunks)
    for rank, order in orders.items():
        for action in order:
            placement[action.stage] = rank
    computed = [[a for a in orders[r] if a.kind in COMPUTE] for r in range(ranks)]
    program = Program.of(name, [placement], microbatches, computed)
    if any(action.kind.startswith("send") for order in orders.values() for action in order):
        program = Program(name, program.placement, microbatches, tuple(_late(program, orders[r]) for r in range(ranks)))
        asked = Program(name, program.placement, microbatches, tuple(tuple(orders[r]) for r in range(ranks)))
        if not in_one_order(asked):
            raise ValueError(
                f"schedule={name!r}: torch {torch.__version__} receives messages in another order than it sends them"
            )
    return program


def _table(name: str, ranks: int, microbatches: int, chunks: int) -> dict[int, list[Any]]:
    """The rows of torch's table; made with stand-ins for its stages, which need processes."""
    kind = torch_schedule(name)
    stages = [_Stand(ranks * chunks, ranks) for _ in range(chunks)]
    try:
        made = kind(stages, microbatches)
    except (ValueError, AssertionError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"schedule={name!r}: torch {torch.__version__} does not run it with {ranks} ranks, {microbatches} micro-batches and "
            f"{chunks} stages per rank: {reason}"
        ) from error
    table: dict[int, list[Any]] = getattr(made, "pipeline_order_with_comms", None) or made.pipeline_order
    return table


class _Stand:
    """Stands for a stage of torch where only its numbers matter; what else is called on it does nothing."""

    def __init__(self, stages: int, ranks: int) -> None:
        self.num_stages, self.group_size, self.group_rank = stages, ranks, 0
        self.stage_index, self.submod, self.has_backward = 0, None, True
        self.is_first = self.is_last = False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


def _actions(row: Iterable[Any]) -> Iterator[Action]:
    """A row as actions; pairs that overlap one after the other; what is not of interest here is left out."""
    for entry in row:
        if entry is None:
            continue
        inner = getattr(entry, "sub_actions", None)
        if inner:
            yield from _actions(inner)
        elif entry.computation_type.value in _KINDS:
            yield Action(_KINDS[entry.computation_type.value], entry.stage_index, entry.microbatch_index)


def _late(program: Program, order: list[Action]) -> tuple[Action, ...]:
    """With each receive where torch waits for it: right before its use."""
    made: list[Action] = []
    for action in order:
        if action.kind.startswith("recv"):
            continue
        if action.kind != "backward_weight":
            need: Kind = "recv_activation" if action.kind == "forward" else "recv_gradient"
            wanted = Action(need, action.stage, action.microbatch)
            if wanted in order and not action.kind.startswith("send"):
                made.append(wanted)
        made.append(action)
    return tuple(made)
