"""What clients start a round from, where the way down is thin, too."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_dopt._random import key
from lightning_dopt.compress.base import Compressor
from lightning_dopt.local.base import BoundCorrection, Context, Correction
from lightning_dopt.local.control_variate import index, zeros
from lightning_dopt.local.rounds import one_change
from lightning_dopt.slots import Lane

if TYPE_CHECKING:
    from lightning_dopt.plan import Plan


class Download(Correction):
    """Every round starts from ``C(anchor)`` instead of the anchor: what a server would send down, packed.

    Changes are measured from there, ``C(anchor) - x``, and move the anchor itself, which nobody trains. All ranks hold the same
    anchor and so make the same ``C(anchor)`` without a message; it is how a server with a thin way down changes a method, and
    costs no byte here. The first round starts from the common model as it is, and after the last one the weights are
    ``C(anchor)``. One vector, ``anchor - C(anchor)``.

    Args:
        codec: ``C``, a compressor that sees one long vector, such as ``TopK(0.25)``.

    Raises:
        ValueError: no such compressor; from the plan, a sync that does not suit.

    Source: the masked download of Kuo et al., "Federated LoRA with Sparse Communication", arXiv 2406.05233.
    """

    slots = frozenset({"parameters"})

    def __init__(self, codec: Compressor) -> None:
        if not isinstance(codec, Compressor) or codec.layerwise or codec.adaptive:
            raise ValueError(f"Download(codec={codec!r}): must be a compressor of one long vector, such as TopK(0.25)")
        self.codec = codec

    def check(self, plan: Plan) -> None:
        """See :meth:`Correction.check`."""
        one_change("Download", plan)

    def bind(self, context: Context) -> BoundCorrection:
        """See :meth:`Correction.bind`."""
        return _BoundDownload(self.codec)


class _BoundDownload(BoundCorrection):
    slots = Download.slots

    def __init__(self, codec: Compressor) -> None:
        self.codec = codec
        self.lanes: list[Lane] = []
        self.dropped: list[Tensor] = []
        self.rounds = torch.zeros(1, dtype=torch.int64)

    def prepare(self, slot: str, lanes: list[Lane]) -> None:
        self.lanes, self.dropped = lanes, zeros(lanes)

    def publish(self, slot: str, lane: Lane, message: Tensor) -> None:
        message.sub_(self.dropped[index(self.lanes, lane)])

    def on_applied(self, slot: str, lane: Lane, sent: Tensor, new: Tensor, steps: int) -> None:
        k = index(self.lanes, lane)
        kept = self.codec.roundtrip(new, key(int(self.rounds), k))
        torch.sub(new, kept, out=self.dropped[k])
        lane.live.copy_(kept)
        self.rounds += k == len(self.lanes) - 1

    def state(self) -> dict[str, Tensor]:
        return {f"dropped{k}": t for k, t in enumerate(self.dropped)} | {"rounds": self.rounds}
