"""A pipeline schedule as data: for every rank the list of what it computes, sends and receives, in order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "forward",
    "backward",
    "backward_input",
    "backward_weight",
    "send_activation",
    "recv_activation",
    "send_gradient",
    "recv_gradient",
]
COMPUTE = ("forward", "backward", "backward_input", "backward_weight")
"""Kinds that are no messages."""
LETTERS: dict[str, str] = {
    "forward": "F",
    "backward": "B",
    "backward_input": "I",
    "backward_weight": "W",
    "send_activation": "SA",
    "recv_activation": "RA",
    "send_gradient": "SG",
    "recv_gradient": "RG",
}


@dataclass(frozen=True)
class Action:
    """One thing a rank does with one stage and one micro-batch.

    Attributes:
        kind: ``forward`` and ``backward`` compute; a backward may be in two parts, ``backward_input`` (the gradient of the
            stage's input) and later ``backward_weight`` (those of its parameters). ``send_activation`` sends the output of
            the stage to the next one, ``recv_activation`` gets its input from the one before; ``send_gradient`` sends the
            gradient of the input to the stage before, ``recv_gradient`` gets the gradient of the output from the next one.
        stage: The stage that computes, sends or receives, counted from 0.
        microbatch: The micro-batch, counted from 0 over all pipes.
        pipe: The pipe it runs in: 0, or 1 for the second direction of a bidirectional schedule.
    """

    kind: Kind
    stage: int
    microbatch: int
    pipe: int = 0

    @property
    def cell(self) -> tuple[int, int, int]:
        """``(pipe, stage, microbatch)``."""
        return self.pipe, self.stage, self.microbatch

    def __str__(self) -> str:
        return f"{LETTERS[self.kind]}{self.stage}.{self.microbatch}" + (f" of pipe {self.pipe}" if self.pipe else "")


Order = Sequence[Action]


@dataclass(frozen=True)
class Program:
    """What all ranks do in one optimizer step.

    Sends do not block; a receive blocks until the message is there. Between two stages on one rank nothing is sent, the
    tensor is handed over.

    Attributes:
        name: Name of the schedule, for messages.
        placement: For each pipe the rank of each stage.
        microbatches: How many micro-batches there are.
        actions: For each rank its actions, in order.
    """

    name: str
    placement: tuple[tuple[int, ...], ...]
    microbatches: int
    actions: tuple[tuple[Action, ...], ...]

    @property
    def ranks(self) -> int:
        """How many ranks take part."""
        return len(self.actions)

    @property
    def stages(self) -> int:
        """How many stages the model is cut into."""
        return len(self.placement[0])

    def rank_of(self, pipe: int, stage: int) -> int:
        """Where a stage of a pipe is."""
        return self.placement[pipe][stage]

    def local(self, pipe: int, stage: int) -> bool:
        """Whether a stage and the next one are on one rank."""
        return self.placement[pipe][stage] == self.placement[pipe][stage + 1]

    def held(self, rank: int) -> list[tuple[int, int]]:
        """The ``(pipe, stage)`` that are on a rank, in the order of stages."""
        here = [(p, s) for p, row in enumerate(self.placement) for s, r in enumerate(row) if r == rank]
        return sorted(here, key=lambda held: (held[1], held[0]))

    def peer(self, action: Action) -> int:
        """The rank at the other end of a send or receive."""
        towards_next = action.kind in ("send_activation", "recv_gradient")
        return self.rank_of(action.pipe, action.stage + (1 if towards_next else -1))

    @staticmethod
    def of(name: str, placement: Sequence[Sequence[int]], microbatches: int, orders: Iterable[Order]) -> Program:
        """The program of forwards and backwards in these orders, one per rank, with the messages they need.

        A message is received right before it is used and sent as soon as it exists.
        """
        places = tuple(tuple(row) for row in placement)
        bare = Program(name, places, microbatches, ())
        return Program(name, places, microbatches, tuple(tuple(_with_messages(bare, order)) for order in orders))


def _with_messages(program: Program, order: Order) -> Iterable[Action]:
    last = program.stages - 1
    for action in order:
        pipe, stage, m = action.cell
        before = stage > 0 and not program.local(pipe, stage - 1)
        after = stage < last and not program.local(pipe, stage)
        if action.kind == "forward":
            if before:
                yield Action("recv_activation", stage, m, pipe)
            yield action
            if after:
                yield Action("send_activation", stage, m, pipe)
        elif action.kind == "backward_weight":
            yield action
        else:
            if after:
                yield Action("recv_gradient", stage, m, pipe)
            yield action
            if before:
                yield Action("send_gradient", stage, m, pipe)
