"""Memories for gossip: they make lossy messages of whole values converge, and keep the mean over the ranks."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from lightning_dopt._checks import check_float
from lightning_dopt.compress.base import Compressor
from lightning_dopt.compress.memory.base import Memory
from lightning_dopt.compress.modulo import Modulo, check_bits


class Difference(Memory):
    """CHOCO: gossip on public copies ``xh`` of the values, to which compressed differences are sent.

    ``c = C(x - xh)``, ``xh <- xh + c``, ``m <- m + sum_j W_ij c_j``, result ``x + gamma (m - xh)``. ``m`` equals
    ``sum_j W_ij xh_j`` at all times. Over a graph that changes a pair of copies is kept for every rank ever met,
    brought up to date at each meeting. With columns of ``W`` that sum to one (for a fixed ``W``:
    symmetric) the mean of ``x`` over the ranks is preserved exactly, whatever the compressor. The coarser the
    compressor, the smaller ``gamma`` must be; ``Identity`` with ``gamma = 1`` is plain gossip.

    Source: Koloskova, Stich, Jaggi, "Decentralized Stochastic Optimization and Gossip Algorithms with Compressed
    Communication", ICML 2019, algorithm 6.

    Args:
        codec: a contractive compressor, or an unbiased one (then scaled).
        gamma: step towards the neighbours' copies, in (0, 1]. On a ring of 8 with the largest 10 % sent, 0.2 converges
            fast and 0.4 diverges.

    Raises:
        ValueError: ``codec`` is no compressor or ``gamma`` outside (0, 1].
    """

    keys = ("own", "mixed")
    moved = ("own", 1.0)
    codes_values = True
    needs_sum = True

    def __init__(self, codec: Compressor, gamma: float = 1.0) -> None:
        super().__init__(codec)
        self.gamma = check_float("Difference", "gamma", gamma, 0.0, 1.0, open_low=True)

    def load(self, signal: Tensor, state: dict[str, Tensor]) -> Tensor:
        """``x - xh``."""
        return signal - state["own"]

    def received(self, mixed: Tensor, own: Tensor, signal: Tensor, state: dict[str, Tensor]) -> Tensor:
        """``m <- m + mixed``; ``x + gamma (m - xh)``."""
        state["mixed"].add_(mixed)
        return torch.sub(state["mixed"], state["own"], out=mixed).mul_(self.gamma).add_(signal)


class DeepSqueeze(Memory):
    """Gossip on compressed values, each rank remembering what its own message left out.

    ``v = x + e``, ``c = C(v)``, ``e <- v - c``, result ``x + eta (sum_j W_ij c_j - c_i)``. Nothing is kept of the
    neighbours, so the graph may change from round to round. Wherever ``W`` preserves a mean of plain values, that mean
    of ``x`` is preserved exactly, whatever the compressor. The ranks come only near each other: the distance that
    remains falls with ``eta``, about as ``eta^2`` if squared, while the time to get there grows. A ring of 8 that sends
    the largest 10 % of normal vectors ends at 5e-2, 5e-3 and 1e-3 of the initial squared distance with ``eta`` 0.3, 0.1
    and 0.05. :class:`Difference` goes to zero, but needs a copy per neighbour where the graph changes.

    Args:
        codec: a contractive compressor, or an unbiased one (then scaled).
        eta: step towards the neighbours' messages, in (0, 1].

    Raises:
        ValueError: ``codec`` is no compressor or ``eta`` outside (0, 1].

    Source: Tang et al., "DeepSqueeze: Decentralization Meets Error-Compensated Compression", arXiv 1907.07346.
    """

    keys = ("error",)
    codes_values = True
    needs_sum = True

    def __init__(self, codec: Compressor, eta: float) -> None:
        super().__init__(codec)
        self.eta = check_float("DeepSqueeze", "eta", eta, 0.0, 1.0, open_low=True)

    def load(self, signal: Tensor, state: dict[str, Tensor]) -> Tensor:
        """``e <- x + e``, returned in place."""
        return state["error"].add_(signal)

    def sent(self, own: Tensor, state: dict[str, Tensor]) -> None:
        """``e <- e - c``."""
        state["error"].sub_(own)

    def received(self, mixed: Tensor, own: Tensor, signal: Tensor, state: dict[str, Tensor]) -> Tensor:
        """``x + eta (mixed - c)``."""
        return mixed.sub_(own).mul_(self.eta).add_(signal)


class MoniQua(Memory):
    """Modulo quantisation: only remainders are sent, and receivers complete them by their own values. No state.

    While no coordinate of two neighbours differs by more than ``theta``, a rank that gets ``q_j``, which is ``x_j / B``
    modulo one in ``bits`` bits, knows ``x_j`` up to ``B 2^-(bits + 1)``: it is the number nearest its own among those
    with that remainder, ``B = 2 theta / (1 - 2^-bits)``. The result is ``x_i + sum_j W_ij (y_ij - y_ii)`` with ``y_ij`` what
    ``i`` makes of the message of ``j``. All receivers find the same number, so the mean of ``x`` is preserved to rounding;
    the ranks stay about a quantum ``B / 2^bits`` apart. The graph may change from round to round.

    With too small a ``theta`` nothing blows up: numbers are completed wrongly and the ranks do not come together. So each
    message heard is looked at in up to 1024 coordinates, and a warning is given when one of them seems to be more than
    0.9 ``theta`` away, which happens soon after it is too small, and never while all are within that. Ranks must be within
    ``theta`` from the start.

    Args:
        bits: bits per coordinate, 1 to 16.
        theta: largest difference of a coordinate between neighbours, in its own units; positive.

    Raises:
        ValueError: ``bits`` outside 1 to 16, or ``theta`` not positive.

    Source: Lu, De Sa, "Moniqua: Modulo Quantized Communication in Decentralized SGD", arXiv 2002.11787.
    """

    keys = ()
    codes_values = True
    relative = True

    def __init__(self, bits: int, theta: float) -> None:
        self.bits = check_bits("MoniQua", bits)
        self.theta = check_float("MoniQua", "theta", theta, 0.0, open_low=True, open_high=True)

    @property
    def codec(self) -> Compressor:  # type: ignore[override]
        """The packing of remainders."""
        return Modulo(self.bits)

    @property
    def modulus(self) -> float:
        """``B = 2 theta / (1 - 2^-bits)``, in the units of the coordinates."""
        return 2.0 * self.theta / (1.0 - 2.0**-self.bits)

    def load(self, signal: Tensor, state: dict[str, Tensor]) -> Tensor:
        """``x / B`` modulo one, in the precision of ``x``."""
        share = signal / self.modulus
        return share.sub_(share.round())

    def sent(self, own: Tensor, state: dict[str, Tensor]) -> None:
        """Nothing is kept."""

    def localise(self, decoded: Tensor, signal: Tensor) -> Tensor:
        """``B (q + k)`` with the whole number ``k`` that brings it nearest ``signal``."""
        value = (signal / self.modulus).sub_(decoded).round_().add_(decoded).mul_(self.modulus)
        self._look(value, signal)
        return value

    def received(self, mixed: Tensor, own: Tensor, signal: Tensor, state: dict[str, Tensor]) -> Tensor:
        """``x + mixed - y_ii``."""
        return mixed.sub_(self.localise(own, signal)).add_(signal)

    def _look(self, value: Tensor, signal: Tensor) -> None:
        """Warn if a coordinate is farther than 0.9 ``theta`` and the error of rounding."""
        stride = max(1, value.numel() // 1024)
        farthest = float((value[::stride] - signal[::stride]).abs().amax()) if value.numel() else 0.0
        if farthest > 0.9 * self.theta + self.modulus * 2.0 ** -(self.bits + 1):
            warnings.warn(
                f"{self!r}: a coordinate is {farthest:.3g} from a neighbour's, and beyond theta={self.theta:g} ranks do not "
                "come together; use a larger theta, or bring the ranks together first",
                stacklevel=2,
            )
