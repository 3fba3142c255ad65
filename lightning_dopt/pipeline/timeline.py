"""A picture of a schedule in text."""

from __future__ import annotations

from lightning_dopt.pipeline.checker import check
from lightning_dopt.pipeline.program import Action, Program


def timeline(program: Program, forward: int = 1, backward: int = 2) -> str:
    """The program as it runs, one row per rank and one column per unit of time.

    A column shows the micro-batch that is computed and, where a rank holds several stages, the stage as a letter
    (``a`` is stage 0); forwards are in brackets ``( )``, backwards in ``[ ]``, of backwards in two parts the second one in
    ``{ }``; dots are bubbles.

    Args:
        program: The program; it is checked first.
        forward: Units of time of the forward of one stage.
        backward: Units of time of its backward.

    Raises:
        ValueError: See :func:`~lightning_dopt.pipeline.check`.
    """
    report = check(program, forward, backward)
    several = program.stages > program.ranks
    width = len(str(program.microbatches - 1)) + 2 + several
    rows = []
    for rank, spans in enumerate(report.spans):
        cells = ["." * width] * round(report.makespan)
        for start, end, action in spans:
            cells[round(start) : round(end)] = [_cell(action, several, width)] * round(end - start)
        rows.append(f"rank {rank} " + "".join(cells))
    return "\n".join(rows)


def _cell(action: Action, several: bool, width: int) -> str:
    inside = (chr(ord("a") + action.stage) if several else "") + str(action.microbatch)
    brackets = {"forward": "()", "backward_weight": "{}"}.get(action.kind, "[]")
    return brackets[0] + inside.center(width - 2) + brackets[1]
