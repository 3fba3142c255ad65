"""DIANA: unbiased compressors around a shift that learns the gradients."""

from __future__ import annotations

from torch import Tensor

from lightning_dopt._checks import check_float
from lightning_dopt.compress.base import Compressor, Shape
from lightning_dopt.compress.dense_below import DenseBelow
from lightning_dopt.compress.memory.base import Memory


class DIANA(Memory):
    """``c = C(s - h)``, result ``H + mean c``, then ``h <- h + alpha c`` and ``H <- H + alpha mean c``.

    The result is an unbiased estimate of the mean signal, unlike that of :class:`EF21`, and as ``h`` learns the signal
    the noise of the compressor vanishes: with full gradients it is exact on unequal data at a constant learning rate.

    Args:
        codec: an unbiased compressor, such as ``RandK``, ``Int8`` or ``QSGD``.
        alpha: share of the message that the shift takes, in (0, 1]; ``None`` means ``1 / (1 + omega)`` with the variance
            ``omega`` of the codec.

    Raises:
        ValueError: ``codec`` is no compressor, ``alpha`` outside (0, 1]; from its first use, a codec that is not unbiased.

    Source: Mishchenko, Gorbunov, Takac, Richtarik, "Distributed Learning with Compressed Gradient Differences",
    arXiv 1901.09269.
    """

    keys = ("own", "mean")
    needs_sum = True

    def __init__(self, codec: Compressor, alpha: float | None = None) -> None:
        super().__init__(codec)
        self.alpha = None if alpha is None else check_float("DIANA", "alpha", alpha, 0.0, 1.0, open_low=True)
        if codec.variance((4096,)) is None:
            raise ValueError(
                f"DIANA(codec={codec!r}): must be unbiased, such as RandK(...) or Int8(); for others use EF21"
            )

    def share(self, shape: Shape) -> float:
        """``alpha`` as a number, for signals of this shape; what is packed decides, not what travels whole."""
        noisy = self.codec.codec if isinstance(self.codec, DenseBelow) else self.codec
        return self.alpha if self.alpha is not None else 1.0 / (1.0 + (noisy.variance(shape) or 0.0))

    def scale(self, shape: Shape, codec: Compressor | None = None) -> float:
        """1: messages stay unbiased."""
        return 1.0

    def load(self, signal: Tensor, state: dict[str, Tensor]) -> Tensor:
        """``s - h``."""
        return signal - state["own"]

    def sent(self, own: Tensor, state: dict[str, Tensor]) -> None:
        """``h <- h + alpha c``."""
        state["own"].add_(own, alpha=self.share(own.shape))

    def received(self, mixed: Tensor, own: Tensor, signal: Tensor, state: dict[str, Tensor]) -> Tensor:
        """``H + mixed``; ``H <- H + alpha mixed``."""
        alpha, mean = self.share(mixed.shape), state["mean"]
        mean.add_(mixed, alpha=alpha)
        return mixed.mul_(1.0 - alpha).add_(mean)
