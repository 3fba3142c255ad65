"""Links that may fail or rest: who is lost, who was slow, and what both ends of a link agree on."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Literal, cast

from lightning_dopt._checks import check_choice, check_float, check_int

OnLostPeer = Literal["end", "continue"]
REST = 8
"""Meetings that a link rests by default."""
SLOW, HELD = 1, 2
"""Bits of the byte that rides on a message: "you were slow, let our link rest"; "I was held up by others"."""


class Links:
    """One rank's view of its links to all others. A link that is not open gives its weight to the own weight at both ends.

    *Lost peers* (``on_lost_peer="continue"``). A link on which a message failed is lost for ever; the message counts as
    not received. The other end notices the same if it lives.

    *Slow peers* (``patience``). A rank that waited longer than ``patience`` seconds for a peer says so with a byte on the
    next message of that link. When it has arrived both ends know, and from the next optimizer step on they let the link
    rest for as many steps as they would have met in, ``rest``. Then they use it again. A byte also says that a rank was
    held up itself at its last exchange, so that only the rank that holds up others is found slow.

    Both ends always agree, so symmetric weights stay symmetric and every row keeps its sum: the mean over the ranks that
    are left is preserved. With reversible weights the same holds for the weighted mean, its weights scaled to sum to one.

    Args:
        rank: This rank.
        size: Number of ranks.
        on_lost_peer: ``"end"`` lets a failed message end the run, ``"continue"`` goes on without the peer.
        patience: Seconds to wait for a peer before its link is to rest; ``None`` never lets one rest.
        rest: Optimizer steps with a meeting of the pair that a link rests.
        owner: Class to be named in errors.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        on_lost_peer: OnLostPeer = "end",
        patience: float | None = None,
        rest: int = REST,
        owner: str = "Links",
    ) -> None:
        check_links(owner, on_lost_peer, patience, rest)
        self.rank, self.size = rank, size
        self.on_lost_peer, self.patience, self.rest = on_lost_peer, patience, rest
        self.lost: set[int] = set()
        """The peers whose links are lost."""
        self._resting: dict[int, _Rest] = {}
        self._slow: set[int] = set()
        self._held = -1
        self._steps = (-1, -1)

    @property
    def goes_on(self) -> bool:
        """Whether the run goes on without a lost peer."""
        return self.on_lost_peer == "continue"

    def open(self, peers: Iterable[int], step: int) -> list[int]:
        """Those of ``peers`` that this rank exchanges messages with in this optimizer step."""
        return [j for j in peers if j not in self.lost and not self._rests(j, step)]

    def _rests(self, j: int, step: int) -> bool:
        rest = self._resting.get(j)
        if rest is None or step <= rest.since:
            return False
        if step != rest.last:
            if rest.left == 0:
                del self._resting[j]
                return False
            rest.left, rest.last = rest.left - 1, step
        return True

    def flag(self, j: int, step: int) -> int:
        """The byte to send to ``j`` beside the next message."""
        if step != self._steps[1]:
            self._steps = (self._steps[1], step)
        held = self._held >= 0 and self._held in self._steps
        return (SLOW if j in self._slow else 0) | (HELD if held else 0)

    def met(self, j: int, step: int, sent: int, got: int, waited: float) -> None:
        """Messages were exchanged with ``j`` after ``waited`` seconds; both ends know both bytes now."""
        if self.patience is None:
            return
        late = waited > self.patience
        if late:
            self._held = step
        if (sent | got) & SLOW:
            self._resting[j] = _Rest(self.rest, step)
            self._slow.discard(j)
        elif late and not got & HELD:
            self._slow.add(j)

    def lose(self, j: int, step: int, why: str) -> None:
        """The link to ``j`` is lost; warns once, naming the peer and the optimizer step."""
        if j in self.lost:
            return
        self.lost.add(j)
        warnings.warn(f"rank {self.rank}, step {step}: lost rank {j}, goes on without it ({why})", stacklevel=2)


class _Rest:
    """How many more steps a link rests, since which step, and which step was counted last."""

    def __init__(self, left: int, since: int) -> None:
        self.left, self.since, self.last = left, since, since


def check_links(owner: str, on_lost_peer: str, patience: float | None, rest: int) -> None:
    """Check what is asked of links.

    Raises:
        ValueError: an argument out of range, in one line.
    """
    check_choice(owner, "on_lost_peer", on_lost_peer, ("end", "continue"))
    if patience is not None:
        check_float(owner, "patience", patience, 0.0, open_low=True)
    check_int(owner, "rest", rest, 1)
    if patience is None and rest != REST:
        raise ValueError(f"{owner}(rest={rest!r}): links rest only with patience=..., the seconds to wait for a peer")


def make_links(rank: int, size: int, on_lost_peer: str, patience: float | None, rest: int, owner: str) -> Links | None:
    """The links of a rank, or ``None`` if they can neither fail nor rest."""
    check_links(owner, on_lost_peer, patience, rest)
    if on_lost_peer == "end" and patience is None:
        return None
    return Links(rank, size, cast(OnLostPeer, on_lost_peer), patience, rest, owner)
