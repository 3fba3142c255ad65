"""A message on its way: started, advanced from one wait to the next, landed."""

from __future__ import annotations

from torch import Tensor

from lightning_dopt.comm.world import Pending, Talk


class Flight:
    """A message between its send and its apply.

    Attributes:
        own: What receivers decode of this rank's message (``None`` if nobody needs it).
        sent: The live tensor when the message left (``None`` if nobody needs it).
        step: The optimizer step of the send.
        buffers: Buffers of the channel that the flight occupies.
    """

    def __init__(self, talk: Talk[Tensor], step: int) -> None:
        self.step = step
        self.own: Tensor | None = None
        self.sent: Tensor | None = None
        self.buffers: list[Tensor] = []
        self._talk = talk
        self.hops = 1
        """How many times somebody has to wait until it has landed."""
        self.done = 0
        """How many of these are behind it."""
        self._pending: Pending | None = None
        self._result: Tensor | None = None

    def start(self) -> None:
        """Run up to the first wait."""
        try:
            self._pending = next(self._talk)
        except StopIteration as stop:
            self._result = stop.value

    @property
    def landed(self) -> bool:
        """Whether the result is there."""
        return self._result is not None

    def finish(self) -> Talk[Tensor]:
        """Wait for the rest and return the combined result; calling it again returns the same."""
        while self._result is None:
            yield from self.advance()
        return self._result

    def advance(self) -> Talk[None]:
        """Wait for what is under way and send what follows from it, if anything does."""
        if self._result is not None:
            return
        assert self._pending is not None
        answer = yield self._pending
        self.done += 1
        try:
            self._pending = self._talk.send(answer)
        except StopIteration as stop:
            self._result = stop.value

    def state_dict(self) -> dict[str, object]:
        """A landed flight (see :meth:`finish`) for a checkpoint."""
        assert self._result is not None, "finish the flight first"
        return {"step": self.step, "own": self.own, "sent": self.sent, "result": self._result}

    @classmethod
    def from_state_dict(cls, state: dict[str, object]) -> Flight:
        """The landed flight of a checkpoint."""
        flight = cls(_no_talk(), int(state["step"]))  # type: ignore[call-overload]
        flight.own, flight.sent, flight._result = state["own"], state["sent"], state["result"]  # type: ignore[assignment]
        return flight


def _no_talk() -> Talk[Tensor]:
    raise RuntimeError("a restored flight has landed already")
    yield
