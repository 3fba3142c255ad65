"""Exact diffusion: removes the bias of gossip under heterogeneous data without a second message."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lightning_dopt._checks import check_float
from lightning_dopt.local.base import BoundCorrection, Context, Correction
from lightning_dopt.local.control_variate import BoundControlVariate
from lightning_dopt.slots import Lane
from lightning_dopt.topology.base import Topology
from lightning_dopt.topology.spectrum import lambda_min
from lightning_dopt.topology.weights import Lazy

if TYPE_CHECKING:
    from lightning_dopt.plan import Plan, Sync


class ExactDiffusion(Correction):
    """Exact Diffusion (also NIDS, D2) in gradient units.

    Each rank keeps ``h`` with ``sum_i h_i = 0``. The inner optimizer steps with ``g - h``; after mixing ``psi`` (the
    value sent) into ``x``, ``h <- h + kappa (x - psi) / (lr K)``, ``K`` steps after the last mixing. At a fixed point all
    ranks agree and ``h_i`` is rank ``i``'s own gradient, so heterogeneous data leave no bias. Being in gradient units, it
    survives changes of the learning rate.

    The mixing matrix must be symmetric, or reversible with weights ``lambda`` (then ``sum_i lambda_i h_i = 0``), with
    smallest eigenvalue above -1/3. Over :class:`~lightning_dopt.topology.Lazy` peers this is Exact Diffusion and NIDS,
    over others D2. A changing topology must be lazy: nothing is proven there, but only lazy ones converged in tests. Clip
    gradients with care: clipping acts on ``g - h``.

    Args:
        kappa: 1 for plain SGD, ``1 - momentum`` for heavy-ball, at most 0.1 for Adam.

    Raises:
        ValueError: ``kappa`` outside (0, 1], a plan without exactly one sync of the parameters by value, or peers
            whose matrix does not suit.

    Source: Yuan, Ying, Zhao, Sayed, "Exact Diffusion for Distributed Optimization and Learning"; Tang et al., "D2",
    arXiv 1803.07068; Li, Shi, Yan, "NIDS", arXiv 1704.07807.
    """

    slots = frozenset({"parameters"})

    def __init__(self, kappa: float = 1.0) -> None:
        self.kappa = check_float("ExactDiffusion", "kappa", kappa, 0.0, 1.0, open_low=True)

    def check(self, plan: Plan) -> None:
        """See :meth:`Correction.check`."""
        sync = one_mixing("ExactDiffusion", plan)
        if sync.apply.delay or getattr(sync.apply, "order", "atc") != "atc":
            raise ValueError(f"ExactDiffusion: needs apply=Blocking(order='atc'), got {sync.apply!r}")

    def check_size(self, plan: Plan, n: int) -> None:
        """See :meth:`Correction.check_size`."""
        peers = one_mixing("ExactDiffusion", plan).peers
        peers.check(n)
        check_reversible("ExactDiffusion", peers, n)
        period = peers.period(n)
        if period == 1 and lambda_min(peers.matrix(n)) <= -1 / 3 + 1e-9:
            raise ValueError(
                f"ExactDiffusion: the mixing matrix of {peers!r} with {n} workers has the eigenvalue "
                f"{lambda_min(peers.matrix(n)):.3g}, must be above -1/3; use peers=Lazy(...)"
            )
        if period != 1 and not isinstance(peers, Lazy):
            raise ValueError(
                f"ExactDiffusion: diverges over a changing graph that is not lazy, such as {peers!r} with {n} workers; use "
                "peers=Lazy(...)"
            )

    def bind(self, context: Context) -> BoundCorrection:
        """See :meth:`Correction.bind`."""
        return _BoundExactDiffusion(self.kappa, context)


class _BoundExactDiffusion(BoundControlVariate):
    slots = frozenset({"parameters"})

    def __init__(self, kappa: float, context: Context) -> None:
        super().__init__(context)
        self.kappa = kappa

    def on_applied(self, slot: str, lane: Lane, sent: Tensor, new: Tensor, steps: int) -> None:
        self.learn(lane, lane.live.to(lane.message_dtype) - sent, self.kappa, steps)


def one_mixing(owner: str, plan: Plan) -> Sync:
    """The plan's only sync of the parameters before the end.

    Raises:
        ValueError: there is not exactly one, or it does not send plain values.
    """
    syncs = [s for s in plan if s.what.slot == "parameters" and not s.when.at_end]
    if len(syncs) != 1 or syncs[0].signal != "value" or syncs[0].outer is not None:
        raise ValueError(f"{owner}: needs a plan with exactly one sync of the parameters, by value, without outer")
    return syncs[0]


def check_reversible(owner: str, peers: Topology, n: int) -> None:
    """Refuse a matrix that is not self-adjoint.

    Raises:
        ValueError: it is not, in one line.
    """
    if not peers.reversible(n):
        raise ValueError(
            f"{owner}: needs symmetric mixing weights, {peers!r} with {n} workers has none; use an undirected "
            "topology such as Ring() or OnePeerHypercube(), or GradientTracking"
        )
