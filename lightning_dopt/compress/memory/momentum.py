"""Deep Gradient Compression's memory: momentum before the compressor."""

from __future__ import annotations

from torch import Tensor

from lightning_dopt._checks import check_float
from lightning_dopt.compress.base import Compressor
from lightning_dopt.compress.memory.base import Memory


class DGC(Memory):
    """Momentum correction: what is accumulated until it is sent are momentum steps, not gradients.

    ``u <- momentum u + g``, ``v <- v + u``, ``c = C(v)``, ``v <- v - c``, result ``mean c``; Nesterov:
    ``u <- momentum (u + g)``, ``v <- v + u + g``. With ``masking`` the momentum of coordinates just sent is cleared, so that
    old directions do not go on pushing them. The inner optimizer should be plain SGD: momentum is here, and whatever divides
    by the size of gradients (Adam) does not go with it. Two extra vectors. Without momentum it is ``ErrorFeedback``.

    Args:
        codec: a sparsifier, such as ``TopK``.
        momentum: in [0, 1).
        nesterov: whether to look ahead.
        masking: whether to clear the momentum of what was sent (momentum factor masking). With a codec that sends
            everything, that leaves no momentum at all.

    Raises:
        ValueError: ``codec`` is no compressor or ``momentum`` outside [0, 1).

    Source: Lin, Han, Mao, Wang, Dally, "Deep Gradient Compression", arXiv 1712.01887, without its clipping and warm-up.
    """

    keys = ("momentum", "velocity")

    def __init__(self, codec: Compressor, momentum: float = 0.9, nesterov: bool = False, masking: bool = True) -> None:
        super().__init__(codec)
        self.momentum = check_float("DGC", "momentum", momentum, 0.0, 1.0, open_high=True)
        self.nesterov = nesterov
        self.masking = masking

    def load(self, signal: Tensor, state: dict[str, Tensor]) -> Tensor:
        """``u`` and ``v`` take the gradient; ``v`` is returned in place."""
        u, v = state["momentum"], state["velocity"]
        if self.nesterov:
            u.add_(signal).mul_(self.momentum)
            return v.add_(u).add_(signal)
        u.mul_(self.momentum).add_(signal)
        return v.add_(u)

    def sent(self, own: Tensor, state: dict[str, Tensor]) -> None:
        """``v <- v - c``; where something was sent, ``u <- 0``."""
        state["velocity"].sub_(own)
        if self.masking:
            state["momentum"].masked_fill_(own != 0, 0.0)

    def received(self, mixed: Tensor, own: Tensor, signal: Tensor, state: dict[str, Tensor]) -> Tensor:
        """The mixed messages as they are."""
        return mixed
