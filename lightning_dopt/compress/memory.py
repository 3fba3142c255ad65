"""What happens to what was not sent: error memories around a compressor.

One step of a memory, on a rank ``i`` with the signal ``s_i``, is ``load`` -> compress -> ``sent`` -> exchange ->
``received``. ``C_i`` is the decoded message of rank ``i`` times :meth:`Memory.scale`, and ``sum_j W_ij C_j`` what the
exchange gives. Memories are plain data; their tensors are owned by the engine, one dictionary per message.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from lightning_dopt._checks import check_float
from lightning_dopt.compress.base import Codec, Compressor, Shape


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

    def scale(self, shape: Shape) -> float:
        """Factor on decoded messages: ``1 / (1 + omega)`` if the compressor is unbiased and no contraction, else 1.

        That makes it a contraction with ``delta = 1 / (1 + omega)``, which every memory here needs to be stable.
        """
        omega = self.codec.variance(shape)
        return 1.0 if omega is None or self.codec.contraction(shape) is not None else 1.0 / (1.0 + omega)

    @abstractmethod
    def load(self, signal: Tensor, state: dict[str, Tensor]) -> Tensor:
        """What to compress. May be a state tensor itself; ``signal`` is not modified."""

    @abstractmethod
    def sent(self, own: Tensor, state: dict[str, Tensor]) -> None:
        """Take note of ``own = C_i``, the scaled decoded message of this rank as the receivers see it."""

    def localise(self, decoded: Tensor, signal: Tensor) -> Tensor:
        """If :attr:`relative`: the sender's value, from what was decoded and this rank's own ``signal``."""
        return decoded

    @abstractmethod
    def received(self, mixed: Tensor, signal: Tensor, state: dict[str, Tensor]) -> Tensor:
        """The result that stands for the mixed signals, given ``mixed = sum_j W_ij C_j``."""


class ErrorFeedback(Memory):
    """EF14: what was not sent is added to the next signal, ``v = decay e + s``, ``e = v - C(v)``, result ``mean C(v)``.

    With ``decay = 1`` nothing is lost: the sum of all messages plus the residual is the sum of all signals. The
    learning rate stays outside: the residual is in units of the signal. At a constant learning rate it converges on
    unequal data to a neighbourhood proportional to that rate.

    Source: Seide et al., Interspeech 2014; Karimireddy et al., "Error Feedback Fixes SignSGD", ICML 2019, algorithm 2.

    Args:
        codec: a contractive compressor, or an unbiased one (then scaled).
        decay: share of the residual kept from step to step, in (0, 1].

    Raises:
        ValueError: ``codec`` is no compressor or ``decay`` outside (0, 1].
    """

    keys: tuple[str, ...] = ("residual",)

    def __init__(self, codec: Compressor, decay: float = 1.0) -> None:
        super().__init__(codec)
        self.decay = check_float("ErrorFeedback", "decay", decay, 0.0, 1.0, open_low=True)

    def load(self, signal: Tensor, state: dict[str, Tensor]) -> Tensor:
        """``e <- decay e + s``, returned in place."""
        return state["residual"].mul_(self.decay).add_(signal)

    def sent(self, own: Tensor, state: dict[str, Tensor]) -> None:
        """``e <- e - C(e)``."""
        state["residual"].sub_(own)

    def received(self, mixed: Tensor, signal: Tensor, state: dict[str, Tensor]) -> Tensor:
        """The mixed messages as they are."""
        return mixed


class EF21(Memory):
    """EF21: sender and receivers keep an estimate ``h_i`` of the signal, and its changes are sent.

    ``c = C(s - h)``, ``h <- h + c`` on the sender, ``H <- H + mean c`` everywhere, result ``H``, which is the mean of
    all ``h_i`` at all times. Starts from ``h = 0``, so the first estimate is ``C(s)``. Exact on unequal data at a
    constant learning rate with full gradients; with small batches it is sensitive to noise.

    Source: Richtarik, Sokolov, Fatkhullin, "EF21", NeurIPS 2021, algorithm 2.

    Args:
        codec: a contractive compressor, or an unbiased one (then scaled).

    Raises:
        ValueError: ``codec`` is no compressor.
    """

    keys: tuple[str, ...] = ("own", "mean")
    needs_sum = True

    def load(self, signal: Tensor, state: dict[str, Tensor]) -> Tensor:
        """``s - h``."""
        return signal - state["own"]

    def sent(self, own: Tensor, state: dict[str, Tensor]) -> None:
        """``h <- h + c``."""
        state["own"].add_(own)

    def received(self, mixed: Tensor, signal: Tensor, state: dict[str, Tensor]) -> Tensor:
        """``H <- H + mixed``; returns a copy."""
        return state["mean"].add_(mixed).clone()


class EControl(EF21):
    """EControl: EF21 that also feeds back, with gain ``eta``, the sum ``e`` of what the estimates missed.

    ``c = C(eta e + s - h)``, ``h <- h + c``, ``e <- e + s - h``, ``H <- H + mean c``, result ``H``. ``eta = 0`` is
    :class:`EF21`; a larger gain averages gradient noise as error feedback does, but above about the ``delta`` of the
    compressor it is unstable: ``eta = 1`` diverges. A third of :meth:`Compressor.contraction` is a good start.

    Source: Gao, Islamov, Stich, "EControl", ICLR 2024, algorithm 2.

    Args:
        codec: a contractive compressor, or an unbiased one (then scaled).
        eta: gain, in [0, 1]; keep it at most ``delta``.

    Raises:
        ValueError: ``codec`` is no compressor or ``eta`` outside [0, 1].
    """

    keys = ("own", "mean", "error")

    def __init__(self, codec: Compressor, eta: float) -> None:
        super().__init__(codec)
        self.eta = check_float("EControl", "eta", eta, 0.0, 1.0)

    def load(self, signal: Tensor, state: dict[str, Tensor]) -> Tensor:
        """``eta e + s - h``; ``e`` takes ``s - h`` here already and the message in :meth:`sent`."""
        missing = signal - state["own"]
        message = missing.add(state["error"], alpha=self.eta)
        state["error"].add_(missing)
        return message

    def sent(self, own: Tensor, state: dict[str, Tensor]) -> None:
        """``h <- h + c``, ``e <- e - c``: together with :meth:`load` that is ``e + s - h`` with the new ``h``."""
        super().sent(own, state)
        state["error"].sub_(own)


class Difference(Memory):
    """CHOCO: gossip on public copies ``xh`` of the values, to which compressed differences are sent.

    ``c = C(x - xh)``, ``xh <- xh + c``, ``m <- m + sum_j W_ij c_j``, result ``x + gamma (m - xh)``. ``m`` equals
    ``sum_j W_ij xh_j`` at all times, provided that ``W`` does not change from round to round. With symmetric ``W`` the
    mean of ``x`` over the ranks is preserved exactly, whatever the compressor. The coarser the compressor, the smaller
    ``gamma`` must be; ``Identity`` with ``gamma = 1`` is plain gossip.

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
    codes_values = True
    needs_sum = True

    def __init__(self, codec: Compressor, gamma: float = 1.0) -> None:
        super().__init__(codec)
        self.gamma = check_float("Difference", "gamma", gamma, 0.0, 1.0, open_low=True)

    def load(self, signal: Tensor, state: dict[str, Tensor]) -> Tensor:
        """``x - xh``."""
        return signal - state["own"]

    def sent(self, own: Tensor, state: dict[str, Tensor]) -> None:
        """``xh <- xh + c``."""
        state["own"].add_(own)

    def received(self, mixed: Tensor, signal: Tensor, state: dict[str, Tensor]) -> Tensor:
        """``m <- m + mixed``; ``x + gamma (m - xh)``."""
        state["mixed"].add_(mixed)
        return torch.sub(state["mixed"], state["own"], out=mixed).mul_(self.gamma).add_(signal)


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
