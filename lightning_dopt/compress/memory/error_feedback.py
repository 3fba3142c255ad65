"""Memories for gradients and changes: a residual that the sender keeps, or an estimate that all share."""

from __future__ import annotations

from torch import Tensor

from lightning_dopt._checks import check_float
from lightning_dopt.compress.base import Compressor
from lightning_dopt.compress.memory.base import Memory


class ErrorFeedback(Memory):
    """EF14: what was not sent is added to the next signal, ``v = decay e + s``, ``e = v - C(v)``, result ``mean C(v)``.

    With ``decay = 1`` nothing is lost: the sum of all messages plus the residual is the sum of all signals. At a constant
    learning rate it converges on unequal data to a neighbourhood proportional to that rate.

    *The learning rate* may stay outside, then the residual is a gradient and takes part at the rate of the step in
    which it is sent. Or inside, as in the theory: ``v = decay e + lr g``, and the optimizer is given ``mean C(v) / lr``, so
    that with plain SGD ``x`` moves by ``mean C(v)`` and what was left out keeps the rate of its own step. They differ only
    where the rate changes: once it has fallen tenfold, residuals of before weigh ten times as much inside. Either way
    what is sent in a step with a rate of 0 is lost.

    Source: Seide et al., Interspeech 2014; Karimireddy et al., "Error Feedback Fixes SignSGD", ICML 2019, algorithm 2
    (inside).

    Args:
        codec: a contractive compressor, or an unbiased one (then scaled).
        decay: share of the residual kept from step to step, in (0, 1].
        lr_inside: whether the residual holds gradients times the learning rate; for gradients only.

    Raises:
        ValueError: ``codec`` is no compressor or ``decay`` outside (0, 1]; from the sync, ``lr_inside`` for parameters.
    """

    keys: tuple[str, ...] = ("residual",)
    moved = ("residual", -1.0)

    def __init__(self, codec: Compressor, decay: float = 1.0, lr_inside: bool = False) -> None:
        super().__init__(codec)
        self.decay = check_float("ErrorFeedback", "decay", decay, 0.0, 1.0, open_low=True)
        self.lr_inside = lr_inside

    def load(self, signal: Tensor, state: dict[str, Tensor]) -> Tensor:
        """``e <- decay e + s``, returned in place."""
        residual = state["residual"] if self.decay == 1.0 else state["residual"].mul_(self.decay)
        return residual.add_(signal)

    def relay(self) -> Memory:
        """The same: what the second packing leaves out is added to the next mean."""
        return self

    def received(self, mixed: Tensor, own: Tensor, signal: Tensor, state: dict[str, Tensor]) -> Tensor:
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
    moved = ("own", 1.0)
    needs_sum = True

    def load(self, signal: Tensor, state: dict[str, Tensor]) -> Tensor:
        """``s - h``."""
        return signal - state["own"]

    def relay(self) -> Memory:
        """A residual ``e`` of the changes of ``H``: ``H + e`` is the mean of all ``h_i``, at all times.

        That is EF21-BC, whose second leg sends ``C(mean h_i - H)``: Fatkhullin et al., "EF21 with Bells & Whistles",
        arXiv 2110.03294, algorithm 5.
        """
        return ErrorFeedback(self.codec)

    def received(self, mixed: Tensor, own: Tensor, signal: Tensor, state: dict[str, Tensor]) -> Tensor:
        """``H <- H + mixed``; returns a copy."""
        return mixed.copy_(state["mean"].add_(mixed))


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
