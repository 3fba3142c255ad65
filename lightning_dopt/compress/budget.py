"""Every tensor gets its own ratio, rank or number of bits: the fewest bytes for an error, or the least error for the bytes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from lightning_dopt._checks import check_choice, check_float, check_int
from lightning_dopt.compress.alternatives import alternatives
from lightning_dopt.compress.base import Compressor, Rounds, Shape, Share
from lightning_dopt.compress.dense import Identity
from lightning_dopt.compress.knapsack import allocate


class Budget(Compressor):
    """A compressor whose setting differs from tensor to tensor and is chosen anew every so many rounds.

    In the last round of each period every rank measures, for each tensor and each choice, the squared error that the message of
    this round would have had. One all-reduce adds these tables up, and every rank solves the same problem; the choice
    holds from the next round on. Linear if all choices are. A single tensor (:meth:`encode`) is packed by ``codec``.

    Args:
        codec: the reference, in force until the first choice and always one of the choices.
        choices: what a tensor may be packed by; ``None`` takes coarser and finer settings of ``codec``.
        every: rounds of a period.

    Raises:
        ValueError: ``codec`` or a choice is no compressor or has a budget itself, there is nothing to choose from, or
            ``every`` is below 1.
    """

    layerwise = True
    adaptive = True

    weighs: bool = False
    """Whether the table of errors has a last column, the squared norms of the tensors."""
    falling: bool = False
    """Whether no tensor is ever given more bytes than it has."""

    def __init__(self, codec: Compressor, choices: Sequence[Compressor] | None = None, every: int = 1000) -> None:
        name = type(self).__name__
        for option, values in (("codec", [codec]), ("choices", choices or [])):
            for value in values:
                if not isinstance(value, Compressor) or value.adaptive:
                    raise ValueError(
                        f"{name}({option}={value!r}): must be a compressor without a budget (memories go around it)"
                    )
        self.codec = codec
        self.choices = None if choices is None else list(choices)
        self.every = check_int(name, "every", every, 1)
        if choices is not None and not choices:
            raise ValueError(f"{name}(choices={choices!r}): must name at least one compressor")
        if choices is None and len(self.options) == 1:
            raise ValueError(f"{name}(codec={codec!r}): has no ratio, rank, levels or bits to vary; say choices=[...]")

    @property
    def options(self) -> list[Compressor]:
        """What a tensor may be packed by, each once; the reference is among them."""
        found = alternatives(self.codec) if self.choices is None else self.choices
        return list(dict.fromkeys(found if self.codec in found else [*found, self.codec]))

    @abstractmethod
    def first(self, sizes: Tensor, share: float) -> list[int]:
        """The choice before anything was measured, by the bytes of each tensor (row) with each option (column).

        ``share`` is the part of all tensors of a round that are in this message.

        Raises:
            ValueError: no choice keeps to the budget.
        """

    @abstractmethod
    def choose(self, sizes: Tensor, squared: Tensor, share: float) -> list[int] | None:
        """The choice under measured squared errors, a table like ``sizes``; ``None`` keeps the old one."""

    def due(self, round_: int) -> bool:
        """Whether errors are measured in this round, counted from 0."""
        return (round_ + 1) % self.every == 0

    def parts_of(self, shapes: Sequence[Shape], choice: Sequence[int]) -> list[Share]:
        """Every tensor with its choice; those that are sent as they are go together."""
        options = self.options
        each = [options[c].parts([shape])[0][0] for shape, c in zip(shapes, choice, strict=True)]
        dense = [i for i, codec in enumerate(each) if isinstance(codec, Identity)]
        rest: list[Share] = [(codec, [i]) for i, codec in enumerate(each) if not isinstance(codec, Identity)]
        return [(Identity(), dense), *rest] if dense else rest

    @property
    def linear(self) -> bool:  # type: ignore[override]
        """Whether all options are."""
        return all(option.linear for option in self.options)

    @property
    def private(self) -> bool:  # type: ignore[override]
        """Whether ``codec`` is."""
        return self.codec.private

    def payload_bytes(self, shape: Shape) -> int:
        """That of ``codec``."""
        return self.codec.payload_bytes(shape)

    def encode(self, x: Tensor, seed: int = 0) -> Tensor:
        """By ``codec``."""
        return self.codec.encode(x, seed)

    def decode_add(self, payload: Tensor, out: Tensor, weight: float = 1.0, seed: int = 0) -> None:
        """By ``codec``."""
        self.codec.decode_add(payload, out, weight, seed)

    def rounds(self, x: Tensor, state: dict[str, Tensor], seed: int, size: int) -> Rounds:
        """By ``codec``."""
        return (yield from self.codec.rounds(x, state, seed, size))

    def contraction(self, shape: Shape) -> float | None:
        """The least of the options, ``None`` if one is unknown."""
        known = [option.contraction(shape) for option in self.options]
        found = [delta for delta in known if delta is not None]
        return min(found) if len(found) == len(known) else None

    def variance(self, shape: Shape) -> float | None:
        """The largest of the options, ``None`` if one is biased."""
        known = [option.variance(shape) for option in self.options]
        found = [omega for omega in known if omega is not None]
        return max(found) if len(found) == len(known) else None


class LGreCo(Budget):
    """The fewest bytes at no more error than ``codec`` makes on all tensors alike: L-GreCo.

    Minimises the bytes of the message subject to ``sum_l E_l(c_l) <= alpha sum_l E_l(codec)``, where ``E_l(c)`` is the
    error of tensor ``l`` packed by ``c``, by dynamic programming over 10,000 steps of error. If that would take more bytes
    than ``codec`` for all (errors are rounded up), it is ``codec`` for all; with ``alpha < 1`` and no choice that good,
    nothing changes.

    The paper's errors are norms and add up as such (``metric="l2"``). Under an error memory the squares add up, ``||v - C(v)||^2``
    being their sum over the tensors: ``metric="l2sq"``. It measures the gradient averaged over the last steps on one
    rank; here it is what the message says, memory included, on all ranks.

    Source: Alimohammadi, Markov, Frantar, Alistarh, "L-GreCo: Layerwise-Adaptive Gradient Compression for Efficient and
    Accurate Deep Learning", arXiv 2210.17357.

    Args:
        codec: the uniform setting that defines the error, in force until the first choice.
        choices: what a tensor may be packed by; ``None`` takes coarser and finer settings of ``codec``.
        every: rounds between choices; the paper chooses once per epoch.
        alpha: error allowed, relative to that of ``codec`` for all tensors; positive.
        metric: ``"l2"`` adds norms, ``"l2sq"`` their squares.

    Raises:
        ValueError: an argument out of range, or nothing to choose from.
    """

    def __init__(
        self,
        codec: Compressor,
        choices: Sequence[Compressor] | None = None,
        every: int = 1000,
        alpha: float = 1.0,
        metric: Literal["l2", "l2sq"] = "l2",
    ) -> None:
        super().__init__(codec, choices, every)
        self.alpha = check_float("LGreCo", "alpha", alpha, 0.0, open_low=True, open_high=True)
        self.metric = check_choice("LGreCo", "metric", metric, ("l2", "l2sq"))

    def first(self, sizes: Tensor, share: float) -> list[int]:
        """``codec`` for all."""
        return [self.options.index(self.codec)] * len(sizes)

    def choose(self, sizes: Tensor, squared: Tensor, share: float) -> list[int] | None:
        """See :meth:`Budget.choose`."""
        errors = squared.sqrt() if self.metric == "l2" else squared
        uniform = self.options.index(self.codec)
        limit = self.alpha * float(errors[:, uniform].sum())
        found = allocate(sizes, errors, limit) if limit > 0 else None
        if found is not None and self.alpha >= 1 and _sum(sizes, found) > float(sizes[:, uniform].sum()):
            return [uniform] * len(sizes)
        return found


class KeepEnergy(Budget):
    """Each tensor with the fewest bytes that keep a share of its energy: ``||v - C(v)||^2 <= (1 - share) ||v||^2``.

    The fewest bytes are never raised again (``falling``), and a tensor of which no choice keeps the share stays with
    ``codec``. With ranks to choose from this is the effective rank of what is sent, up to the grain of the choices: DiLoCoX
    lets the rank follow that of the mean change over a window of rounds. Here it is that of the messages (memory included) in
    the last round of a window, each rank's own, their energies added up.

    Args:
        codec: the setting to begin with, the finest.
        share: of the energy that must arrive, in (0, 1).
        choices: what a tensor may be packed by; ``None`` takes coarser settings of ``codec``.
        every: rounds of a window.

    Raises:
        ValueError: an argument out of range, or nothing to choose from.

    Source: after Qi et al., "DiLoCoX", arXiv 2506.21263, whose exact rule could not be checked.
    """

    weighs = True
    falling = True

    def __init__(
        self, codec: Compressor, share: float = 0.9, choices: Sequence[Compressor] | None = None, every: int = 10
    ) -> None:
        super().__init__(codec, choices, every)
        self.share = check_float("KeepEnergy", "share", share, 0.0, 1.0, open_low=True, open_high=True)

    @property
    def options(self) -> list[Compressor]:
        """``codec`` and, unless choices were given, what is coarser."""
        found = super().options
        return found if self.choices is not None else found[: found.index(self.codec) + 1]

    def first(self, sizes: Tensor, share: float) -> list[int]:
        """``codec`` for all."""
        return [self.options.index(self.codec)] * len(sizes)

    def choose(self, sizes: Tensor, squared: Tensor, share: float) -> list[int] | None:
        """See :meth:`Budget.choose`; the last column of ``squared`` is the energy."""
        errors, allowed = squared[:, :-1], (1.0 - self.share) * squared[:, -1:]
        cost = sizes.masked_fill(errors >= allowed, float("inf"))  # nothing is known of a tensor of zeros
        uniform = self.options.index(self.codec)
        cheapest = cost.argmin(1).tolist()
        return [c if cost[k, c] < float("inf") else uniform for k, c in enumerate(cheapest)]


class ByteBudget(Budget):
    """The least squared error that ``nbytes`` per round can buy.

    Minimises ``sum_l ||v_l - C_l(v_l)||^2`` subject to ``sum_l bytes_l <= nbytes`` by the dynamic programme of
    :class:`LGreCo`, the other way round. No message ever exceeds the budget, those before the first choice included: they
    take the finest option that fits for all tensors alike. A sync that sends several messages in a round (buckets, tensors
    of several types) gives each its share of elements.

    Args:
        codec: whose settings may be chosen.
        nbytes: bytes of one rank's messages in one round, each counted once, however many ranks hear it.
        choices: what a tensor may be packed by; ``None`` takes coarser and finer settings of ``codec``.
        every: rounds between choices.

    Raises:
        ValueError: an argument out of range, or nothing to choose from; in a run, a budget below the smallest message.
    """

    def __init__(
        self, codec: Compressor, nbytes: int, choices: Sequence[Compressor] | None = None, every: int = 1000
    ) -> None:
        super().__init__(codec, choices, every)
        self.nbytes = check_int("ByteBudget", "nbytes", nbytes, 1)

    def first(self, sizes: Tensor, share: float) -> list[int]:
        """The finest option for all tensors alike that fits, else the smallest of each tensor."""
        limit = self._limit(share)
        totals = sizes.sum(0)
        fitting = [c for c in range(sizes.shape[1]) if float(totals[c]) <= limit]
        if fitting:
            return [max(fitting, key=lambda c: float(totals[c]))] * len(sizes)
        least = float(sizes.amin(1).sum())
        if least > limit:
            raise ValueError(
                f"ByteBudget(nbytes={self.nbytes}): the smallest message takes {least:.0f} bytes where {limit} are its share; "
                "allow more or give coarser choices"
            )
        smallest: list[int] = sizes.argmin(1).tolist()
        return smallest

    def choose(self, sizes: Tensor, squared: Tensor, share: float) -> list[int] | None:
        """See :meth:`Budget.choose`."""
        found = allocate(squared, sizes, self._limit(share))
        alike = self.first(sizes, share)
        return alike if found is None or _sum(squared, found) > _sum(squared, alike) else found

    def _limit(self, share: float) -> int:
        return int(self.nbytes * share)


def _sum(table: Tensor, choice: Sequence[int]) -> float:
    return sum(float(row[c]) for row, c in zip(table, choice, strict=True))
