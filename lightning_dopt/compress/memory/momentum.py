"""Momentum before the compressor: Deep Gradient Compression, and global momentum that joins in the choice."""

from __future__ import annotations

from torch import Tensor

from lightning_dopt._checks import check_float
from lightning_dopt.compress.base import Compressor
from lightning_dopt.compress.compose import Compose
from lightning_dopt.compress.memory.base import Memory
from lightning_dopt.compress.memory.error_feedback import ErrorFeedback
from lightning_dopt.compress.phases import Phases
from lightning_dopt.compress.sparse import TopK
from lightning_dopt.compress.sparse_blocks import BlockTopK


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

    Source: Lin, Han, Mao, Wang, Dally, "Deep Gradient Compression", arXiv 1712.01887;
    its clipping is ``ClipLocal(norm, spread=True)``, its warm-up ``Phases``, both in ``plans.dgc``.
    """

    keys: tuple[str, ...] = ("momentum", "velocity")

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

    def relay(self) -> Memory:
        """Error feedback: momentum is in what ranks send already."""
        return ErrorFeedback(self.codec)

    def received(self, mixed: Tensor, own: Tensor, signal: Tensor, state: dict[str, Tensor]) -> Tensor:
        """The mixed messages as they are."""
        return mixed


class GMF(DGC):
    """:class:`DGC` that sends what matters locally or globally: a shared momentum has a say in the choice of elements.

    ``u`` and ``v`` as there. Sent are the elements of ``v`` with the largest score
    ``(1 - fusion) |v| / ||v|| + fusion |m| / ||m||``, where ``m <- global_momentum m + mean c`` is the same on all ranks. On
    unequal data ranks choose different elements and the union of their choices grows; ``m`` draws the choices
    together, and with ``fusion=1`` all choose the same. Norms are of the whole message. Three extra vectors.

    Args:
        codec: ``TopK`` or ``BlockTopK``, on its own, first in a ``Compose`` or in ``Phases``.
        momentum: of the rank, in [0, 1).
        fusion: ``tau``, weight of the shared momentum, in [0, 1]; with 0 it is :class:`DGC`. The authors' code raises it in ten
            steps from 0 to 0.6.
        global_momentum: decay of the shared momentum, in [0, 1).
        nesterov: as in :class:`DGC`.
        masking: as in :class:`DGC`.

    Raises:
        ValueError: a codec that does not choose elements by their size, or a number out of range.

    Source: Kuo, Kuo, Lin, "Improving Federated Learning Communication Efficiency with Global Momentum Fusion for Gradient
    Compression Schemes", arXiv 2211.09320; the sum of magnitudes as in the authors' code.
    """

    keys = ("momentum", "velocity", "shared")

    def __init__(
        self,
        codec: Compressor,
        momentum: float = 0.9,
        fusion: float = 0.3,
        global_momentum: float = 0.9,
        nesterov: bool = False,
        masking: bool = True,
    ) -> None:
        super().__init__(codec, momentum, nesterov, masking)
        self.fusion = check_float("GMF", "fusion", fusion, 0.0, 1.0)
        self.global_momentum = check_float("GMF", "global_momentum", global_momentum, 0.0, 1.0, open_high=True)
        for choice in codec.codecs if isinstance(codec, Phases) else [codec]:
            if not isinstance(_selector(choice), TopK | BlockTopK):
                raise ValueError(f"GMF(codec={codec!r}): must choose elements by their size, as TopK and BlockTopK do")

    def load(self, signal: Tensor, state: dict[str, Tensor]) -> Tensor:
        """``v`` where the codec would choose if the score were the message, zero elsewhere."""
        v, shared = super().load(signal, state), state["shared"]
        score = v.abs().mul_(1.0 - self.fusion)
        norm = float(shared.norm())
        if norm > 0:
            score.add_(shared.abs(), alpha=self.fusion * float(v.norm()) / norm)
        else:
            score = v.abs()
        codec = self.codec.last if isinstance(self.codec, Phases) else self.codec
        return v * (_selector(codec).roundtrip(score) != 0)

    def received(self, mixed: Tensor, own: Tensor, signal: Tensor, state: dict[str, Tensor]) -> Tensor:
        """The mixed messages as they are; ``m`` takes them."""
        state["shared"].mul_(self.global_momentum).add_(mixed)
        return mixed


def _selector(codec: Compressor) -> Compressor:
    return codec.first if isinstance(codec, Compose) else codec
