"""The program checker: proves a schedule before any process starts, and tells what it costs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from lightning_dopt.pipeline.program import COMPUTE, Action, Program

Message = tuple[str, int, int, int]
"""``("activation" or "gradient", pipe, boundary, micro-batch)``; boundary b is between the stages b and b + 1."""


@dataclass(frozen=True)
class Report:
    """What a program costs, if every stage takes the same time and messages take none (see :func:`check`).

    Attributes:
        makespan: Time from the first forward to the last backward.
        bubble: Mean over the ranks of the part of that time in which they stand still, in [0, 1).
        peak: For each rank the largest number of (stage, micro-batch) whose activations it holds at a time.
        messages: Activations and gradients sent between ranks.
        in_order: Whether each rank receives what another one sends it, activations and gradients of each pipe taken
            for themselves, in the order in which it is sent. Needed where messages have no tags (NCCL).
        spans: For each rank its computations as (start, end, action).
    """

    makespan: float
    bubble: float
    peak: tuple[int, ...]
    messages: int
    in_order: bool
    spans: tuple[tuple[tuple[float, float, Action], ...], ...]


def check(program: Program, forward: float = 1.0, backward: float = 2.0) -> Report:
    """Prove that a program is right and say what it costs.

    Proved: every micro-batch goes through exactly one pipe; there, each stage computes its forward and its backward once
    and on the rank it is placed on; nothing is computed or sent before this rank has what it needs for it; every message
    is sent once and received once; all ranks come to their end, so there is no deadlock. Sends are taken to need no
    receiver to be ready.

    Args:
        program: The program.
        forward: Time of the forward of one stage.
        backward: Time of its backward; of one in two parts each takes half.

    Raises:
        ValueError: The program is wrong; the one line names the schedule, the rank, the action and what is missing.
    """
    if forward <= 0 or backward <= 0:
        raise ValueError(f"check(forward={forward!r}, backward={backward!r}): must be above 0")
    _check_placement(program)
    _check_counts(program)
    for rank in range(program.ranks):
        _check_order(program, rank)
    _check_messages(program)
    return _execute(program, forward, backward)


def message_of(action: Action) -> Message | None:
    """The message that an action sends or receives; ``None`` if it computes."""
    if action.kind in COMPUTE:
        return None
    what = "activation" if action.kind.endswith("activation") else "gradient"
    after = action.kind in ("send_activation", "recv_gradient")
    return what, action.pipe, action.stage if after else action.stage - 1, action.microbatch


def _wrong(program: Program, text: str) -> ValueError:
    return ValueError(f"program '{program.name}': {text}")


def _check_placement(program: Program) -> None:
    if program.microbatches < 1 or not program.placement or not program.placement[0]:
        raise _wrong(program, "has no stages or no micro-batches")
    for pipe, row in enumerate(program.placement):
        if len(row) != program.stages:
            raise _wrong(program, f"pipe {pipe} has {len(row)} stages, pipe 0 has {program.stages}")
        for stage, rank in enumerate(row):
            if not 0 <= rank < program.ranks:
                raise _wrong(program, f"stage {stage} of pipe {pipe} is on rank {rank} of {program.ranks}")


def _check_counts(program: Program) -> None:
    """Each forward and each backward once, in one pipe, where it belongs."""
    done: Counter[tuple[str, int, int, int]] = Counter()
    pipes: dict[int, int] = {}
    for rank, actions in enumerate(program.actions):
        for action in actions:
            pipe, stage, m = action.cell
            inside = (
                0 <= pipe < len(program.placement) and 0 <= stage < program.stages and 0 <= m < program.microbatches
            )
            if not inside:
                raise _wrong(program, f"rank {rank} does {action}, which does not exist")
            if program.rank_of(pipe, stage) != rank:
                raise _wrong(
                    program, f"rank {rank} does {action}, but its stage is on rank {program.rank_of(pipe, stage)}"
                )
            if pipes.setdefault(m, pipe) != pipe:
                raise _wrong(program, f"micro-batch {m} is in the pipes {pipes[m]} and {pipe}")
            if message_of(action) is None:
                done[action.kind, pipe, stage, m] += 1
    for m in range(program.microbatches):
        for stage in range(program.stages):
            pipe = pipes.get(m, 0)
            count = {kind: done[kind, pipe, stage, m] for kind in COMPUTE}
            parted = (count["backward_input"] or count["backward_weight"]) and not count["backward"]
            for kind in ("forward", "backward_input", "backward_weight") if parted else ("forward", "backward"):
                times = count[kind] + (count["backward_input"] if kind == "backward" else 0)
                if times != 1:
                    raise _wrong(program, f"{kind} of stage {stage} on micro-batch {m} happens {times} times, not once")


def _check_order(program: Program, rank: int) -> None:
    """Nothing before what this rank needs for it."""
    done: set[Action] = set()
    for action in program.actions[rank]:
        for need in _needs(program, action):
            if need not in done:
                raise _wrong(program, f"rank {rank} does {action} before {need}")
        done.add(action)
        if action.kind == "backward_input":  # what others need of a backward
            done.add(Action("backward", action.stage, action.microbatch, action.pipe))


def _needs(program: Program, action: Action) -> list[Action]:
    """What must come before an action on the same rank."""
    pipe, stage, m = action.cell
    last = program.stages - 1
    if action.kind == "forward":
        if stage == 0:
            return []
        if program.local(pipe, stage - 1):
            return [Action("forward", stage - 1, m, pipe)]
        return [Action("recv_activation", stage, m, pipe)]
    if action.kind == "backward_weight":
        return [Action("backward_input", stage, m, pipe)]
    if action.kind in ("backward", "backward_input"):
        needs = [Action("forward", stage, m, pipe)]
        if stage < last:
            local = program.local(pipe, stage)
            needs.append(Action("backward", stage + 1, m, pipe) if local else Action("recv_gradient", stage, m, pipe))
        return needs
    if action.kind == "send_activation":
        return [Action("forward", stage, m, pipe)]
    if action.kind == "send_gradient":
        return [Action("backward", stage, m, pipe)]
    return []


def _check_messages(program: Program) -> None:
    """Exactly those messages that cross ranks, each sent and received once."""
    sends: Counter[Message] = Counter()
    receives: Counter[Message] = Counter()
    for rank, actions in enumerate(program.actions):
        for action in actions:
            message = message_of(action)
            if message is None:
                continue
            _, pipe, boundary, _ = message
            if not 0 <= boundary < program.stages - 1:
                raise _wrong(program, f"rank {rank} does {action}, but no stage is there")
            if program.local(pipe, boundary):
                raise _wrong(program, f"rank {rank} does {action}, but both stages are on this rank")
            (sends if action.kind.startswith("send") else receives)[message] += 1
    for message in sends.keys() | receives.keys():
        if sends[message] != 1 or receives[message] != 1:
            what, pipe, boundary, m = message
            raise _wrong(
                program,
                f"the {what} of micro-batch {m} between the stages {boundary} and {boundary + 1} of pipe {pipe} is "
                f"sent {sends[message]} times and received {receives[message]} times, not once each",
            )


def _execute(program: Program, forward: float, backward: float) -> Report:
    """Let all ranks run until nobody can go on."""
    half = backward / 2
    times = {"forward": forward, "backward": backward, "backward_input": half, "backward_weight": half}
    at = [0] * program.ranks
    clock = [0.0] * program.ranks
    sent: dict[Message, float] = {}
    spans: list[list[tuple[float, float, Action]]] = [[] for _ in range(program.ranks)]
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(program.actions):
            while at[rank] < len(actions):
                action = actions[at[rank]]
                message = message_of(action)
                if message is None:
                    end = clock[rank] + times[action.kind]
                    spans[rank].append((clock[rank], end, action))
                    clock[rank] = end
                elif action.kind.startswith("send"):
                    sent[message] = clock[rank]
                elif message in sent:
                    clock[rank] = max(clock[rank], sent[message])
                else:
                    break
                at[rank] += 1
                moved = True
    stuck = [r for r in range(program.ranks) if at[r] < len(program.actions[r])]
    if stuck:
        waits = "; ".join(
            f"rank {r} waits in {program.actions[r][at[r]]} for rank {program.peer(program.actions[r][at[r]])}"
            for r in stuck
        )
        raise _wrong(program, f"deadlock: {waits}")
    makespan = max(clock)
    busy = sum(end - start for row in spans for start, end, _ in row)
    return Report(
        makespan=makespan,
        bubble=1.0 - busy / (makespan * program.ranks),
        peak=tuple(_peak(actions) for actions in program.actions),
        messages=len(sent),
        in_order=_in_order(program),
        spans=tuple(tuple(row) for row in spans),
    )


def _peak(actions: tuple[Action, ...]) -> int:
    live = most = 0
    for action in actions:
        live += {"forward": 1, "backward": -1, "backward_weight": -1}.get(action.kind, 0)
        most = max(most, live)
    return most


def _in_order(program: Program, together: bool = False) -> bool:
    lines: dict[tuple[object, ...], tuple[list[Message], list[Message]]] = {}
    for rank, actions in enumerate(program.actions):
        for action in actions:
            message = message_of(action)
            if message is None:
                continue
            sends = action.kind.startswith("send")
            ends = (rank, program.peer(action)) if sends else (program.peer(action), rank)
            line = ends if together else (*ends, message[0], message[1])
            lines.setdefault(line, ([], []))[0 if sends else 1].append(message)
    return all(sent == got for sent, got in lines.values())


def in_one_order(program: Program) -> bool:
    """Whether each rank asks another one for all messages, activations and gradients alike, in the order they are sent in."""
    return _in_order(program, together=True)
