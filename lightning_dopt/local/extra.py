"""EXTRA: exact first-order gossip whose message travels during forward and backward."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lightning_dopt._checks import check_float
from lightning_dopt.local.base import BoundCorrection, Context, Correction
from lightning_dopt.local.control_variate import BoundControlVariate
from lightning_dopt.local.exact_diffusion import check_reversible, one_mixing
from lightning_dopt.schedules import Every
from lightning_dopt.slots import Lane
from lightning_dopt.topology.spectrum import lambda_min

if TYPE_CHECKING:
    from lightning_dopt.plan import Plan


class Extra(Correction):
    """EXTRA in gradient units: ``d = g - h``, ``x <- W x + OPT(d)``, ``h <- h + (W x - x) / (2 lr)``.

    With plain SGD these are the iterates of ``x^{k+2} = (I + W) x^{k+1} - (I + W) / 2 x^k - lr (g^{k+1} - g^k)``. As much is
    sent as by plain gossip of order ``"awc"``, whose bias under heterogeneous data it removes. It needs a fixed graph with
    symmetric weights, a mixing in every step, and usually a smaller learning rate than :class:`ExactDiffusion`.

    Args:
        kappa: 1 for plain SGD, ``1 - momentum`` for heavy-ball, at most 0.1 for Adam.

    Raises:
        ValueError: ``kappa`` outside (0, 1], a plan that does not mix in every step with ``Blocking(order="awc")``, or a
            matrix that changes, is not symmetric (or reversible), or has the eigenvalue -1.

    Source: Shi, Ling, Wu, Yin, "EXTRA", arXiv 1404.6264, with ``(I + W) / 2`` as the second matrix.
    """

    slots = frozenset({"parameters"})

    def __init__(self, kappa: float = 1.0) -> None:
        self.kappa = check_float("Extra", "kappa", kappa, 0.0, 1.0, open_low=True)

    def check(self, plan: Plan) -> None:
        """See :meth:`Correction.check`."""
        sync = one_mixing("Extra", plan)
        if getattr(sync.apply, "order", "") != "awc":
            raise ValueError(f"Extra: needs apply=Blocking(order='awc'), got {sync.apply!r}")
        if sync.when != Every(1):
            raise ValueError(
                f"Extra: needs a mixing in every step, when=Every(1), got {sync.when!r}; or ExactDiffusion"
            )

    def check_size(self, plan: Plan, n: int) -> None:
        """See :meth:`Correction.check_size`."""
        peers = one_mixing("Extra", plan).peers
        peers.check(n)
        check_reversible("Extra", peers, n)
        if peers.period(n) != 1:
            raise ValueError(
                f"Extra: needs one fixed graph, {peers!r} changes; use Ring() or similar, or GradientTracking"
            )
        if lambda_min(peers.matrix(n)) <= -1 + 1e-9:
            raise ValueError(
                f"Extra: the mixing matrix of {peers!r} with {n} workers has the eigenvalue -1, so (I + W) / 2 is not "
                "positive definite; use peers=Lazy(...)"
            )

    def bind(self, context: Context) -> BoundCorrection:
        """See :meth:`Correction.bind`."""
        return _BoundExtra(self.kappa, context)


class _BoundExtra(BoundControlVariate):
    slots = frozenset({"parameters"})

    def __init__(self, kappa: float, context: Context) -> None:
        super().__init__(context)
        self.kappa = kappa

    def on_applied(self, slot: str, lane: Lane, sent: Tensor, new: Tensor, steps: int) -> None:
        self.learn(lane, new - sent, self.kappa / 2, steps)
