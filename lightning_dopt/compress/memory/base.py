"""What happens to what was not sent: error memories around a compressor.

One step of a memory, on a rank ``i`` with the signal ``s_i``, is ``load`` -> compress -> ``sent`` -> exchange ->
``received``. ``C_i`` is the decoded message of rank ``i`` times :meth:`Memory.scale`, and ``sum_j W_ij C_j`` what the
exchange gives. Memories are plain data; their tensors are owned by the engine, one dictionary per message.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_dopt.compress.base import Codec, Compressor, Shape

if TYPE_CHECKING:
    from lightning_dopt.compress.packing import Packing


class Memory(Codec):
    """A compressor with a memory: state that makes up for what the compressor leaves out.

    Args:
        codec: the compressor.

    Raises:
        ValueError: ``codec`` is no compressor, e.g. another memory.
    """

    keys: tuple[str, ...]
    """Names of the state tensors."""

    codes_values: bool = False
    """Whether it makes lossy messages of whole values converge; others are for changes and gradients."""

    needs_sum: bool = False
    """Whether it needs the weighted sum of the messages, so that no other way to combine them will do."""

    relative: bool = False
    """Whether a message means something only beside the receiver's own value; see :meth:`localise`."""

    lr_inside: bool = False
    """Whether it holds gradients times the learning rate: what it is given and what it gives are steps then."""

    static: bool = False
    """Whether it needs a graph that does not change."""

    moved: tuple[str, float] | None = None
    """If all that :meth:`sent` does is to add ``own``, times a factor of 1 or -1, to one state tensor: its name and the factor.

    Messages may then be decoded right into that tensor, with the same result in every bit, and :meth:`received` may get an
    empty tensor in place of ``own``: it must not look at it. A subclass with a :meth:`sent` of its own is never treated so.
    """

    def __init__(self, codec: Compressor) -> None:
        if not isinstance(codec, Compressor):
            raise ValueError(f"{type(self).__name__}(codec={codec!r}): must be a compressor (memories do not nest)")
        self.codec = codec

    def state(self, like: Tensor) -> dict[str, Tensor]:
        """Fresh state for a signal like this: zeros of its shape and device, in float32 or its dtype if wider.

        Half-precision memory would lose small residuals once it holds large ones.
        """
        dtype = torch.promote_types(like.dtype, torch.float32)
        return {key: torch.zeros(like.shape, dtype=dtype, device=like.device) for key in self.keys}

    def scale(self, shape: Shape, codec: Compressor | None = None) -> float:
        """Factor on what ``codec`` decodes: ``1 / (1 + omega)`` if it is unbiased and no contraction, else 1.

        That makes it a contraction with ``delta = 1 / (1 + omega)``, which every memory here needs to be stable. ``codec``
        is what sees a tensor of this shape, by default :attr:`codec`; a compressor may leave tensors to others.
        """
        codec = codec if codec is not None else self.codec
        omega = codec.variance(shape)
        return 1.0 if omega is None or codec.contraction(shape) is not None else 1.0 / (1.0 + omega)

    def relay(self) -> Memory | None:
        """What the owner of a chunk keeps where means are packed a second time (``transport="two_phase"``).

        A memory for the messages ``y = mean C`` of that second leg, with :meth:`received` giving them as they are; ``None``
        if there is none with which this memory still works.
        """
        return None

    @abstractmethod
    def load(self, signal: Tensor, state: dict[str, Tensor]) -> Tensor:
        """What to compress. May be a state tensor itself; ``signal`` is not modified."""

    def sent(self, own: Tensor, state: dict[str, Tensor]) -> None:
        """Take note of ``own = C_i``, the scaled decoded message of this rank as the receivers see it.

        By default it is added to the tensor that :attr:`moved` names.
        """
        assert self.moved is not None, "a memory without `moved` needs a `sent` of its own"
        name, factor = self.moved
        state[name].add_(own, alpha=factor)

    def load_packed(self, signal: Tensor, state: dict[str, Tensor], packing: Packing) -> Tensor:
        """:meth:`load`, for memories to which it matters which tensors are packed how."""
        return self.load(signal, state)

    def sent_packed(self, own: Tensor, state: dict[str, Tensor], packing: Packing) -> None:
        """:meth:`sent`, for memories to which it matters which tensors are packed how."""
        self.sent(own, state)

    def in_phase(self, phase: int, codec: Compressor) -> Memory:
        """The same memory around the compressor of one phase of :class:`~lightning_dopt.compress.Phases`."""
        return type(self)(**{**self.arguments(), "codec": codec})

    def localise(self, decoded: Tensor, signal: Tensor) -> Tensor:
        """If :attr:`relative`: the sender's value, from what was decoded and this rank's own ``signal``."""
        return decoded

    @abstractmethod
    def received(self, mixed: Tensor, own: Tensor, signal: Tensor, state: dict[str, Tensor]) -> Tensor:
        """The result that stands for the mixed signals, given ``mixed = sum_j W_ij C_j`` and ``own = C_i``.

        May overwrite ``mixed``, neither of the others.
        """


def as_compressor(codec: Codec) -> tuple[Compressor, Memory | None]:
    """Split what stands in a sync's ``codec`` into its compressor and its memory, if it has one.

    Raises:
        ValueError: it is neither a compressor nor a memory.
    """
    if isinstance(codec, Memory):
        return codec.codec, codec
    if isinstance(codec, Compressor):
        return codec, None
    raise ValueError(f"codec={codec!r}: must be a compressor or a memory around one")
