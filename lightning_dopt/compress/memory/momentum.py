"""Momentum before the compressor: Deep Gradient Compression, and global momentum that joins in the choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_dopt._checks import check_flag, check_float
from lightning_dopt.compress.base import Compressor
from lightning_dopt.compress.compose import Compose
from lightning_dopt.compress.dense import Identity
from lightning_dopt.compress.dense_below import DenseBelow
from lightning_dopt.compress.memory.base import Memory
from lightning_dopt.compress.memory.error_feedback import ErrorFeedback
from lightning_dopt.compress.phases import Phases
from lightning_dopt.compress.sparse import TopK
from lightning_dopt.compress.sparse_blocks import BlockTopK

if TYPE_CHECKING:
    from lightning_dopt.compress.packing import Packing


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
        masking: whether to clear the momentum of what was sent (momentum factor masking). Tensors that travel whole
            (``DenseBelow``) keep theirs, so that they have plain momentum; ``TopK(1.0)`` leaves none.

    Raises:
        ValueError: ``codec`` is no compressor or ``momentum`` outside [0, 1).

    Source: Lin, Han, Mao, Wang, Dally, "Deep Gradient Compression", arXiv 1712.01887;
    its clipping is ``ClipLocal(norm, spread=True)``, its warm-up ``Phases``, both in ``plans.dgc``.
    """

    keys: tuple[str, ...] = ("momentum", "velocity")

    def __init__(self, codec: Compressor, momentum: float = 0.9, nesterov: bool = False, masking: bool = True) -> None:
        super().__init__(codec)
        self.momentum = check_float("DGC", "momentum", momentum, 0.0, 1.0, open_high=True)
        self.nesterov = check_flag(type(self).__name__, "nesterov", nesterov)
        self.masking = check_flag(type(self).__name__, "masking", masking)

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

    def sent_packed(self, own: Tensor, state: dict[str, Tensor], packing: Packing) -> None:
        """The same, but what travels whole keeps its momentum."""
        state["velocity"].sub_(own)
        for piece in packing.pieces:
            if self.masking and not isinstance(piece.codec, Identity):
                for first, last in piece.stretches:
                    state["momentum"][first:last].masked_fill_(own[first:last] != 0, 0.0)

    def received(self, mixed: Tensor, own: Tensor, signal: Tensor, state: dict[str, Tensor]) -> Tensor:
        """The mixed messages as they are."""
        return mixed


class GMF(DGC):
    """:class:`DGC` that sends what matters locally or globally: a shared momentum has a say in the choice of elements.

    ``u`` and ``v`` as there. Sent are the elements of ``v`` with the largest score
    ``(1 - fusion) |v| / ||v|| + fusion |m| / ||m||``, where ``m <- global_momentum m + mean c`` is the same on all ranks. On
    unequal data ranks choose different elements and the union of their choices grows; ``m`` draws the choices
    together. Norms are of the elements to choose from. Three extra vectors.

    What has been sent is chosen again: the larger ``fusion``, the longer the rest waits. With 1 it would wait for ever and its
    memory grow without bound, which is refused. With ``TopK(0.1)``, four ranks and gradients that never changed all
    elements took their turn up to 0.3, and from 0.6 on seven in ten were never sent; with noise of three times the gradients'
    size 0.6 left out none and 0.9 a quarter in 500 steps.

    Args:
        codec: ``TopK`` or ``BlockTopK``, on its own, first in a ``Compose``, in ``DenseBelow`` or in ``Phases``.
        momentum: of the rank, in [0, 1).
        fusion: ``tau``, weight of the shared momentum, in [0, 1); with 0 it is :class:`DGC`. Several are for the phases of
            ``codec``, one for each.
        global_momentum: decay of the shared momentum, in [0, 1).
        nesterov: as in :class:`DGC`.
        masking: as in :class:`DGC`.

    Raises:
        ValueError: a codec that does not choose elements by their size, a number out of range, or not one ``fusion`` for each
            phase.

    Source: Kuo, Kuo, Lin, "Improving Federated Learning Communication Efficiency with Global Momentum Fusion for Gradient
    Compression Schemes", arXiv 2211.09320; the sum of magnitudes as in the authors' code.
    """

    keys = ("momentum", "velocity", "shared")

    def __init__(
        self,
        codec: Compressor,
        momentum: float = 0.9,
        fusion: float | Sequence[float] = 0.3,
        global_momentum: float = 0.9,
        nesterov: bool = False,
        masking: bool = True,
    ) -> None:
        super().__init__(codec, momentum, nesterov, masking)
        phases = codec.codecs if isinstance(codec, Phases) else [codec]
        given = list(fusion) if isinstance(fusion, Sequence) else [fusion]
        fusions = [check_float("GMF", "fusion", f, 0.0, 1.0, open_high=True) for f in given]
        if isinstance(fusion, Sequence) and len(fusions) != len(phases):
            raise ValueError(
                f"GMF(fusion={fusion!r}): must be {len(phases)} numbers, one for each phase of codec={codec!r}"
            )
        self.fusion: float | list[float] = fusions if isinstance(fusion, Sequence) else fusions[0]
        self.global_momentum = check_float("GMF", "global_momentum", global_momentum, 0.0, 1.0, open_high=True)
        for choice in phases:
            if not isinstance(_selector(choice), TopK | BlockTopK):
                raise ValueError(f"GMF(codec={codec!r}): must choose elements by their size, as TopK and BlockTopK do")

    def in_phase(self, phase: int, codec: Compressor) -> GMF:
        """See :meth:`Memory.in_phase`; with the fusion of that phase."""
        fusion = self.fusion[phase] if isinstance(self.fusion, list) else self.fusion
        return GMF(codec, self.momentum, fusion, self.global_momentum, self.nesterov, self.masking)

    def load(self, signal: Tensor, state: dict[str, Tensor]) -> Tensor:
        """``v`` where the codec would choose if the score were the message, zero elsewhere."""
        codec = self.codec.last if isinstance(self.codec, Phases) else self.codec
        return self._chosen(super().load(signal, state), state["shared"], codec)

    def load_packed(self, signal: Tensor, state: dict[str, Tensor], packing: Packing) -> Tensor:
        """The same for each part of the message; what travels whole does so."""
        v, shared = super().load(signal, state), state["shared"]
        message = v.clone()
        for piece in packing.pieces:
            if not isinstance(piece.codec, Identity):
                piece.give(self._chosen(piece.take(v), piece.take(shared), piece.codec), message)
        return message

    def _chosen(self, v: Tensor, shared: Tensor, codec: Compressor) -> Tensor:
        fusion = self.fusion[-1] if isinstance(self.fusion, list) else self.fusion
        score, norm = v.abs(), float(shared.norm())
        if norm > 0:
            score.mul_(1.0 - fusion).add_(shared.abs(), alpha=fusion * float(v.norm()) / norm)
        return v * (_selector(codec).roundtrip(score) != 0)

    def received(self, mixed: Tensor, own: Tensor, signal: Tensor, state: dict[str, Tensor]) -> Tensor:
        """The mixed messages as they are; ``m`` takes them."""
        state["shared"].mul_(self.global_momentum).add_(mixed)
        return mixed


def _selector(codec: Compressor) -> Compressor:
    inner = codec.codec if isinstance(codec, DenseBelow) else codec
    return inner.first if isinstance(inner, Compose) else inner
