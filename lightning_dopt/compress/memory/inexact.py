"""Values sent as inexactly as they are packed, for methods that tolerate it."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dopt._checks import check_float
from lightning_dopt.compress.base import Compressor, Shape
from lightning_dopt.compress.memory.base import Memory


class Direct(Memory):
    """No memory: values are packed, sent and mixed as they come out; what was lost or added stays.

    Plain gossip and gradient tracking do not converge with it, not even to a neighbourhood if the error is random:
    it is for methods that damp what the wire does, such as ``RobustTracking`` with ``combine=Damped(...)``.

    Args:
        codec: a compressor, best an unbiased one.

    Raises:
        ValueError: ``codec`` is no compressor.
    """

    keys = ()
    codes_values = True

    def scale(self, shape: Shape, codec: Compressor | None = None) -> float:
        """1: values must not shrink."""
        return 1.0

    def load(self, signal: Tensor, state: dict[str, Tensor]) -> Tensor:
        """``x`` itself."""
        return signal

    def sent(self, own: Tensor, state: dict[str, Tensor]) -> None:
        """Nothing is kept."""

    def received(self, mixed: Tensor, own: Tensor, signal: Tensor, state: dict[str, Tensor]) -> Tensor:
        """The mixed messages as they are."""
        return mixed


class Averaged(Memory):
    """Values sent so that receivers average the errors of all messages: extrapolated by the sender, averaged on arrival.

    The sender transmits ``m = (x - (1 - b_k) x_previous) / b_k``, receivers keep ``xh <- (1 - b_k) xh + b_k C(m)`` with
    ``b_k = max(floor, 2 / (k + 1))``. With exact messages ``xh = x`` always; errors of the wire enter ``xh`` as an average
    over all rounds, and fade like ``1 / k``, as long as they do not grow with the message. The graph must not change.

    Args:
        codec: a compressor whose error does not grow with the message, such as ``GaussianNoise``, or a mild one.
        floor: the smallest ``b_k``, in (0, 1]; keeps messages from growing without end.

    Raises:
        ValueError: ``codec`` is no compressor or ``floor`` outside (0, 1]; from the plan, a changing topology.

    Source: the extrapolation of Tang et al., "Communication Compression for Decentralized Training" (ECD-PSGD), arXiv
    1803.06443, as the variance-reduced estimate that VRA-DGT and VRA-DSGT call for; their own recursion may differ.
    """

    keys = ("last", "mixed")
    codes_values = True
    needs_sum = True
    static = True

    def __init__(self, codec: Compressor, floor: float = 0.01) -> None:
        super().__init__(codec)
        self.floor = check_float("Averaged", "floor", floor, 0.0, 1.0, open_low=True)

    def scale(self, shape: Shape, codec: Compressor | None = None) -> float:
        """1: values must not shrink."""
        return 1.0

    def state(self, like: Tensor) -> dict[str, Tensor]:
        """Zeros, and the number of rounds so far."""
        return super().state(like) | {"rounds": torch.zeros(1, dtype=torch.float64)}

    def _share(self, state: dict[str, Tensor]) -> float:
        return max(self.floor, 2.0 / (float(state["rounds"]) + 1.0))

    def load(self, signal: Tensor, state: dict[str, Tensor]) -> Tensor:
        """``(x - (1 - b) x_previous) / b``; ``x`` is remembered."""
        state["rounds"] += 1
        b = self._share(state)
        message = signal.sub(state["last"], alpha=1.0 - b).div_(b)
        state["last"].copy_(signal)
        return message

    def sent(self, own: Tensor, state: dict[str, Tensor]) -> None:
        """Nothing more: this rank uses its estimate of itself as the others do."""

    def received(self, mixed: Tensor, own: Tensor, signal: Tensor, state: dict[str, Tensor]) -> Tensor:
        """``sum_j W_ij xh_j``, averaged as a whole."""
        state["mixed"].lerp_(mixed, self._share(state))
        return mixed.copy_(state["mixed"])
