"""The published pipeline schedules, as programs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

from lightning_dopt._checks import check_choice, check_int
from lightning_dopt.pipeline.program import Action, Program
from lightning_dopt.pipeline.torch_schedules import ONE_STAGE, TORCH_SCHEDULES, torch_program

Schedule = Literal[
    "gpipe", "1f1b", "interleaved", "bitpipe", "looped_bfs", "interleaved_zero_bubble", "zbv", "dualpipev"
]
SCHEDULES = get_args(Schedule)
CHUNKED = ("interleaved", "looped_bfs", "interleaved_zero_bubble")
"""Schedules that may have any number of stages per rank."""


def make_program(schedule: Schedule, ranks: int, microbatches: int, chunks: int | None = None) -> Program:
    """The program of a schedule by name.

    :func:`gpipe`, :func:`one_f_one_b`, :func:`interleaved` and :func:`bitpipe` are written here. The others are read from the
    tables of ``torch.distributed.pipelining``: breadth first (``"looped_bfs"``, arXiv 2211.05953), zero bubble with
    interleaved stages (``"interleaved_zero_bubble"``) and in a V (``"zbv"``, both arXiv 2401.10241), and DualPipe in a V
    (``"dualpipev"``, arXiv 2412.19437).

    Args:
        schedule: The name.
        ranks: Ranks of the pipeline.
        microbatches: Micro-batches per optimizer step.
        chunks: Stages per rank of ``"interleaved"``, ``"looped_bfs"`` and ``"interleaved_zero_bubble"``; ``None`` means 2.

    Raises:
        ValueError: An argument out of range, ``chunks`` with another schedule, or a schedule that this torch does not have.
    """
    check_choice("make_program", "schedule", schedule, SCHEDULES)
    if schedule not in CHUNKED and chunks is not None:
        raise ValueError(f"make_program(chunks={chunks!r}): only {', '.join(CHUNKED)} choose their stages per rank")
    if schedule == "interleaved":
        return interleaved(ranks, microbatches, 2 if chunks is None else chunks)
    if schedule in TORCH_SCHEDULES and schedule not in ONE_STAGE:
        _check("make_program", ranks, microbatches)
        if chunks is not None:
            check_int("make_program", "chunks", chunks, 1)
        return torch_program(schedule, ranks, microbatches, 2 if chunks is None else chunks)
    return {"gpipe": gpipe, "1f1b": one_f_one_b, "bitpipe": bitpipe}[schedule](ranks, microbatches)


def gpipe(ranks: int, microbatches: int) -> Program:
    """All forwards, then all backwards (GPipe, arXiv 1811.06965). One stage per rank.

    Bubble ``(D - 1) / (N + D - 1)`` with D ranks and N micro-batches; every rank holds the activations of N of them.

    Raises:
        ValueError: An argument below 1.
    """
    _check("gpipe", ranks, microbatches)
    orders = [
        [Action("forward", r, m) for m in range(microbatches)] + [Action("backward", r, m) for m in range(microbatches)]
        for r in range(ranks)
    ]
    return Program.of("gpipe", [range(ranks)], microbatches, orders)


def one_f_one_b(ranks: int, microbatches: int) -> Program:
    """One forward, one backward (PipeDream-Flush, arXiv 2006.09503). One stage per rank.

    The bubble of :func:`gpipe`, but rank r holds the activations of ``min(N, D - r)`` micro-batches only.

    Raises:
        ValueError: An argument below 1.
    """
    _check("one_f_one_b", ranks, microbatches)
    orders = []
    for r in range(ranks):
        forwards = [Action("forward", r, m) for m in range(microbatches)]
        backwards = [Action("backward", r, m) for m in range(microbatches)]
        orders.append(list(_alternate(forwards, backwards, ranks - 1 - r)))
    return Program.of("1f1b", [range(ranks)], microbatches, orders)


def interleaved(ranks: int, microbatches: int, chunks: int = 2) -> Program:
    """1F1B with ``chunks`` stages per rank, stage s on rank ``s mod D`` (Megatron-LM, arXiv 2104.04473, section 2.2).

    Bubble ``(D - 1) / (v N + D - 1)`` with v chunks per rank, for v times as many messages. Micro-batches go through
    the chunks of a rank in groups of D.

    Raises:
        ValueError: An argument below 1, ``chunks`` below 2, or ``microbatches`` that are no multiple of ``ranks``.
    """
    _check("interleaved", ranks, microbatches)
    check_int("interleaved", "chunks", chunks, 2)
    if microbatches % ranks:
        raise ValueError(f"interleaved(microbatches={microbatches!r}): must be a multiple of the {ranks} ranks")
    turns = [
        (chunk, group + j) for group in range(0, microbatches, ranks) for chunk in range(chunks) for j in range(ranks)
    ]
    orders = []
    for r in range(ranks):
        forwards = [Action("forward", chunk * ranks + r, m) for chunk, m in turns]
        backwards = [Action("backward", (chunks - 1 - chunk) * ranks + r, m) for chunk, m in turns]
        orders.append(list(_alternate(forwards, backwards, 2 * (ranks - 1 - r) + (chunks - 1) * ranks)))
    placement = [[s % ranks for s in range(chunks * ranks)]]
    return Program.of("interleaved", placement, microbatches, orders)


def bitpipe(ranks: int, microbatches: int) -> Program:
    """Two V-shaped pipelines in opposite directions over the same ranks (BitPipe, arXiv 2410.19367).

    The model is cut into 2D stages. In pipe 0 they go down the ranks and up again, in pipe 1 up and down; half of the
    micro-batches take each. Every stage exists twice, on ranks r and D - 1 - r, which sum their gradients. The order of
    one unit (N = D) follows the authors' code. With backwards twice as long as forwards its bubble is
    ``(D - 2) / (3 N + D - 2)``. With N = kD units follow one another, and the ranks stand still for ``(k + 1) (D - 2)``
    forwards in all, against ``2 (D - 2)`` of one unit.

    Raises:
        ValueError: ``ranks`` not even, or ``microbatches`` no multiple of it.
    """
    _check("bitpipe", ranks, microbatches)
    if ranks % 2:
        raise ValueError(f"bitpipe(ranks={ranks!r}): must be even")
    if microbatches % ranks:
        raise ValueError(f"bitpipe(microbatches={microbatches!r}): must be a multiple of the {ranks} ranks")
    down = [*range(ranks), *reversed(range(ranks))]
    up = [ranks - 1 - r for r in down]
    orders = [_both_ways(ranks, r, microbatches // ranks) for r in range(ranks)]
    return Program.of("bitpipe", [down, up], microbatches, orders)


def _both_ways(ranks: int, r: int, units: int) -> list[Action]:
    """What rank ``r`` computes in that many units of ``ranks`` micro-batches.

    The last backwards of a unit take turns with the first forwards of the next one.
    """
    overlap = _near(ranks, r)
    order: list[Action] = []
    for unit in range(units):
        following = _unit(ranks, r, unit * ranks)
        if order:
            tail, order = order[-overlap:], order[:-overlap]
            for backward, forward in zip(tail, following[:overlap], strict=True):
                order += [backward, forward]
            following = following[overlap:]
        order += following
    return order


def _near(ranks: int, r: int) -> int:
    """How many micro-batches a rank forwards of the pipe that begins nearer to it, before the other one comes."""
    return ranks // 2 - min(r, ranks - 1 - r)


def _unit(ranks: int, r: int, first: int) -> list[Action]:
    """What rank ``r`` computes of the micro-batches ``first .. first + ranks - 1``; even ones go down, odd ones up."""
    u, a = ranks // 2, _near(ranks, r)
    own, other = (0, 1) if r < u else (1, 0)  # the pipe that begins nearer to this rank, and the other one
    # (pipe, half): half 0 is the shallow stage of the pipe on this rank, 1 the deep one.
    forward = a * [(own, 0)] + (u - a) * [(other, 0), (own, 0)] + a * [(other, 0), (other, 1)]
    forward += (u - a) * [(own, 1), (other, 1)] + a * [(own, 1)]
    backward = a * [(own, 1)] + (u - a) * [(other, 1), (own, 1)] + a * [(other, 1), (other, 0)]
    backward += (u - a) * [(own, 0), (other, 0)] + a * [(own, 0)]
    forwards = _numbered("forward", forward, ranks, r, first)
    backwards = _numbered("backward", backward, ranks, r, first)
    return list(_alternate(forwards, backwards, ranks + u + min(r, ranks - 1 - r)))


def _numbered(
    kind: Literal["forward", "backward"], turns: list[tuple[int, int]], ranks: int, r: int, first: int
) -> list[Action]:
    """Turns ``(pipe, half)`` with their stages, each taking the next micro-batch of its pipe."""
    seen: dict[tuple[int, int], int] = {}
    actions = []
    for pipe, half in turns:
        count = seen.get((pipe, half), 0)
        seen[pipe, half] = count + 1
        depth = r if pipe == 0 else ranks - 1 - r
        stage = depth if half == 0 else 2 * ranks - 1 - depth
        actions.append(Action(kind, stage, first + 2 * count + pipe, pipe))
    return actions


def _alternate(forwards: list[Action], backwards: list[Action], warmup: int) -> Iterator[Action]:
    """``warmup`` forwards, then one forward and one backward in turns, then the backwards that are left."""
    warmup = min(warmup, len(forwards))
    yield from forwards[:warmup]
    steady = forwards[warmup:]
    for f, b in zip(steady, backwards, strict=False):
        yield f
        yield b
    yield from backwards[len(steady) :]


def _check(owner: str, ranks: int, microbatches: int) -> None:
    check_int(owner, "ranks", ranks, 1)
    check_int(owner, "microbatches", microbatches, 1)
