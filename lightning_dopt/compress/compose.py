"""Two compressors in a row: the values that the first sends are packed by the second."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dopt._random import key
from lightning_dopt.compress._wire import as_bytes, check_length, section
from lightning_dopt.compress.base import Compressor, Shape


class Compose(Compressor):
    """``Compose(TopK(0.01), Int8())``: positions by the first compressor, the values at them by the second.

    The first must set all other coefficients of an orthonormal basis to zero (:meth:`Compressor.values_at`):
    :class:`TopK`, :class:`BlockTopK`, :class:`Threshold`, :class:`DCTTopK`, or another of its kind. The second sees its values
    as one vector in the order of the message. The message is that of the first with the values in the second's
    packing, at the end, in place of ``4 k`` bytes.

    With ``v`` the values kept, the error is ``||x||^2 - ||v||^2 + ||C2(v) - v||^2``, which makes it a contraction with
    the product of both constants. A second that is unbiased with ``omega >= 1`` could add more error than it takes
    away; its values are scaled by ``1 / (1 + omega)``, so that its constant is ``1 / (1 + omega)``.

    Args:
        first: which elements.
        second: how their values are packed; any compressor of vectors.

    Raises:
        ValueError: ``first`` or ``second`` is no compressor that fits.
    """

    def __init__(self, first: Compressor, second: Compressor) -> None:
        if not isinstance(first, Compressor) or first.values_at((1,)) is None:
            raise ValueError(
                f"Compose(first={first!r}): must be a compressor that sends some elements: TopK, BlockTopK, Threshold or DCTTopK"
            )
        if not isinstance(second, Compressor) or second.adaptive:
            raise ValueError(
                f"Compose(second={second!r}): must be a compressor (memories, phases and budgets go around it)"
            )
        self.first = first
        self.second = second

    @property
    def private(self) -> bool:  # type: ignore[override]
        """Whether either rounds at random."""
        return self.first.private or self.second.private

    @property
    def layerwise(self) -> bool:  # type: ignore[override]
        """Whether the first needs tensors in their own shape."""
        return self.first.layerwise

    def payload_bytes(self, shape: Shape) -> int:
        """Bytes of the first without its values, and bytes of the second."""
        _, count = self._values(shape)
        return self.first.payload_bytes(shape) - 4 * count + self.second.payload_bytes((count,))

    def contraction(self, shape: Shape) -> float | None:
        """``delta_1 delta_2``, or ``delta_1 / (1 + omega_2)``; ``None`` if a constant is unknown."""
        delta, (_, count) = self.first.contraction(shape), self._values(shape)
        omega, inner = self.second.variance((count,)), self.second.contraction((count,))
        if inner is None and omega is not None:
            inner = 1.0 / (1.0 + omega)
        return None if delta is None or inner is None else delta * inner

    def encode(self, x: Tensor, seed: int = 0) -> Tensor:
        """The first's message without its values, then the second's."""
        message, (start, count) = self.first.encode(x, seed), self._values(x.shape)
        values = section(message, start, count, torch.float32)
        packed = self.second.encode(values, key(seed, 1))
        return torch.cat([message[:start], message[start + 4 * count :], packed])

    def decode_add(self, payload: Tensor, out: Tensor, weight: float = 1.0, seed: int = 0) -> None:
        """See :meth:`Compressor.decode_add`.

        Raises:
            ValueError: the message does not have the length that the shape of ``out`` calls for, or is damaged.
        """
        check_length(self, payload, out.shape)
        start, count = self._values(out.shape)
        rest = self.first.payload_bytes(out.shape) - 4 * count
        values = torch.zeros(count, device=payload.device)
        self.second.decode_add(payload[rest:], values, self._scale(count), key(seed, 1))
        message = torch.cat([payload[:start], as_bytes(values), payload[start:rest]])
        self.first.decode_add(message, out, weight, seed)

    def values_at(self, shape: Shape) -> tuple[int, int] | None:
        """The values of the second, where it has any."""
        _, count = self._values(shape)
        inner = self.second.values_at((count,))
        return inner and (self.first.payload_bytes(shape) - 4 * count + inner[0], inner[1])

    def floats_at(self, shape: Shape) -> tuple[int, int] | None:
        """The scales or values of the second, where it has any."""
        _, count = self._values(shape)
        inner = self.second.floats_at((count,))
        return inner and (self.first.payload_bytes(shape) - 4 * count + inner[0], inner[1])

    def _values(self, shape: Shape) -> tuple[int, int]:
        place = self.first.values_at(shape)
        assert place is not None
        return place

    def _scale(self, count: int) -> float:
        omega = self.second.variance((count,))
        return 1.0 if omega is None or self.second.contraction((count,)) is not None else 1.0 / (1.0 + omega)
