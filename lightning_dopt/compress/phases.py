"""A compressor that changes with the rounds: warm-up of a ratio, a dense start."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_dopt._checks import check_int
from lightning_dopt.compress.base import Compressor, Rounds, Shape, Share


class Phases(Compressor):
    """One compressor after the other: ``codecs[k]`` for ``rounds[k]`` rounds, the last one from then on.

    ``Phases([TopK(0.25), TopK(0.05), TopK(0.01)], [500, 500])`` lowers a ratio in steps, ``Phases([Identity(), LowRank(4)],
    [1000])`` sends everything at first. A round is one send of the sync. All ranks count the rounds alike, so they change
    in the same one; a message that is under way is decoded as it was packed, and the memory around it is kept.

    Asked without a round, it is its last compressor: sizes and constants are those of the long run.

    Args:
        codecs: at least one compressor; none of them changes itself.
        lengths: how many rounds each but the last is used, at least 1.

    Raises:
        ValueError: something else than compressors, or not one number for each but the last.
    """

    adaptive = True

    def __init__(self, codecs: Sequence[Compressor], lengths: Sequence[int]) -> None:
        self.codecs = list(codecs)
        if not self.codecs or not all(isinstance(c, Compressor) and not c.adaptive for c in self.codecs):
            raise ValueError(
                f"Phases(codecs={self.codecs!r}): must be compressors (phases do not nest and hold no budgets)"
            )
        self.lengths = [check_int("Phases", "lengths", length, 1) for length in lengths]
        if len(self.lengths) != len(self.codecs) - 1:
            raise ValueError(
                f"Phases(lengths={self.lengths!r}): must be {len(self.codecs) - 1} numbers, one less than codecs"
            )

    def phase(self, round_: int) -> int:
        """Which of the compressors round ``round_`` (0 is the first) uses."""
        for k, length in enumerate(self.lengths):
            if round_ < length:
                return k
            round_ -= length
        return len(self.lengths)

    @property
    def last(self) -> Compressor:
        """The compressor of the long run."""
        return self.codecs[-1]

    @property
    def linear(self) -> bool:  # type: ignore[override]
        """See :class:`Compressor`."""
        return self.last.linear

    @property
    def private(self) -> bool:  # type: ignore[override]
        """See :class:`Compressor`."""
        return self.last.private

    @property
    def layerwise(self) -> bool:  # type: ignore[override]
        """Whether any of them is."""
        return any(codec.layerwise for codec in self.codecs)

    def parts(self, shapes: Sequence[Shape]) -> list[Share]:
        """Those of the last."""
        return self.last.parts(shapes)

    def payload_bytes(self, shape: Shape) -> int:
        """Those of the last."""
        return self.last.payload_bytes(shape)

    def encode(self, x: Tensor, seed: int = 0) -> Tensor:
        """As the last does."""
        return self.last.encode(x, seed)

    def decode_add(self, payload: Tensor, out: Tensor, weight: float = 1.0, seed: int = 0) -> None:
        """As the last does."""
        self.last.decode_add(payload, out, weight, seed)

    def contraction(self, shape: Shape) -> float | None:
        """That of the last."""
        return self.last.contraction(shape)

    def variance(self, shape: Shape) -> float | None:
        """That of the last."""
        return self.last.variance(shape)

    def rounds(self, x: Tensor, state: dict[str, Tensor], seed: int, size: int) -> Rounds:
        """Those of the last."""
        return self.last.rounds(x, state, seed, size)
