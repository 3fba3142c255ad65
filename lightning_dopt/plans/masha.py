"""MASHA1 and MASHA2: min-max problems and variational inequalities with compressed messages."""

from __future__ import annotations

from lightning_dopt._checks import check_float
from lightning_dopt.compress import Identity, RandK
from lightning_dopt.compress.base import Codec, Compressor
from lightning_dopt.compress.memory import ErrorFeedback
from lightning_dopt.local import Ascend, Extragradient
from lightning_dopt.plan import Plan, Sync
from lightning_dopt.schedules import Bernoulli, Either, Every, Until


def masha(codec: Codec | None = None, refresh: float = 0.1, maximise: str | None = None, seed: int = 0) -> Plan:
    """Extragradient steps that send compressed changes of the operator, and now and then the whole of it.

    Args:
        codec: Of the changes; ``None`` means ``RandK(0.1)``. An unbiased compressor is MASHA1, any other is wrapped in
            ``ErrorFeedback``, which is MASHA2. ``Identity()`` with ``refresh=1`` is the extragradient method.
        refresh: Probability of a dense refresh in a step, ``1 - tau`` in the papers, in (0, 1]; the share of the bytes that
            the codec leaves is a good choice.
        maximise: Pattern on the names of the maximising parameters, if there are any.
        seed: Of the coin, which all ranks share.

    Raises:
        ValueError: an option out of range.

    Source: Beznosikov, Richtarik, Diskin, Ryabinin, Gasnikov, "Distributed Methods with Compressed Communication for
    Solving Variational Inequalities, with Theoretical Guarantees", arXiv 2110.03313.
    """
    check_float("masha", "refresh", refresh, 0.0, 1.0, open_low=True)
    wire = codec if codec is not None else RandK(0.1)
    if isinstance(wire, Compressor) and not isinstance(wire, Identity) and wire.variance((4096,)) is None:
        wire = ErrorFeedback(wire)
    coin = Either(Until(1, Every(1)), Bernoulli(refresh, seed))
    players = [Ascend(maximise)] if maximise is not None else []
    syncs = [Sync(when=coin, what="reference"), Sync(what="gradients", codec=wire)]
    return Plan(syncs, [*players, Extragradient(1.0 - refresh)])
