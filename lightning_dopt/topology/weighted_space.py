"""The geometry of weighted means: norms, rates and bounds in the space weighted by ``lambda``, and a report from them.

For node weights ``lambda`` (here always scaled to sum to ``n``, so that equal weights are all one), vectors ``X`` with one
row per rank have the inner product ``<X, Y> = sum_i lambda_i <x_i, y_i>``. A matrix that mixes rows is self-adjoint in
that space exactly if detailed balance ``lambda_i W[i, j] = lambda_j W[j, i]`` holds, as it does for
:class:`~lightning_dopt.topology.NodeWeighted`; a doubly stochastic matrix is not, unless weights are equal.

Two strategies minimise ``sum_i lambda_i f_i`` over a graph. I: weight the losses and mix with a doubly stochastic matrix.
II: leave the losses and mix with the row-stochastic matrix that ``lambda`` induces. The functions here measure what sets
them apart. Everything is dense, float64 and of cost ``O(n**3)``.

Source: Liu, Kong, Lu, Yuan, Zhao, "Row-Stochastic Matrices Can Provably Outperform Doubly Stochastic Matrices in
Decentralized Learning", arXiv 2511.19513. Theorem 7.1 and Corollary 7.3 are theirs; bounds named "derived" follow from
the definitions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dopt.topology.node_weights import NodeRule, NodeWeighted
from lightning_dopt.topology.spectrum import consensus_rate, lambda_min
from lightning_dopt.topology.weights import UndirectedGraph

Weights = Sequence[float] | Tensor
SLACK = 1.8e-3
"""``eta_0`` of Theorem 7.1 with which its claims were reproduced."""

# ---------------------------------------------------------------------- the space


def node_weights(lam: Weights) -> Tensor:
    """``lambda`` as float64, shape (n,), scaled to sum to ``n``; shares, counts and the like differ by scale only.

    Raises:
        ValueError: not a list of positive finite numbers.
    """
    weights = torch.as_tensor(lam, dtype=torch.float64)
    if weights.dim() != 1 or not len(weights) or not bool(((weights > 0) & weights.isfinite()).all()):
        raise ValueError(f"node_weights(lam={lam!r}): must be one positive number per rank")
    return weights * (len(weights) / weights.sum())


def inner(x: Tensor, y: Tensor, lam: Weights) -> float:
    """``sum_i lambda_i <x_i, y_i>``; ``x`` and ``y`` have one row per rank, shape (n, ...)."""
    weights = node_weights(lam)
    return float((weights * (x.double() * y.double()).reshape(len(weights), -1).sum(1)).sum())


def norm(x: Tensor, lam: Weights) -> float:
    """``sqrt(sum_i lambda_i ||x_i||^2)``; ``x`` has one row per rank, shape (n, ...)."""
    return inner(x, x, lam) ** 0.5


def operator_norm(M: Tensor, lam: Weights) -> float:
    """The largest factor by which ``M`` stretches a vector in the weighted norm: ``||D^1/2 M D^-1/2||_2``."""
    return float(torch.linalg.matrix_norm(_euclidean(M, lam), 2))


def adjoint(M: Tensor, lam: Weights) -> Tensor:
    """The matrix with ``<M x, y> = <x, adjoint y>`` in the weighted space: ``D^-1 M' D``."""
    weights = node_weights(lam)
    return M.double().T * weights / weights[:, None]


def self_adjoint_residual(W: Tensor, lam: Weights) -> float:
    """``||D W - W' D||_F``: 0 up to rounding exactly if detailed balance holds."""
    balance = node_weights(lam)[:, None] * W.double()
    return float(torch.linalg.matrix_norm(balance - balance.T))


def is_self_adjoint(W: Tensor, lam: Weights, tolerance: float = 1e-12) -> bool:
    """Whether ``W`` is reversible with weights ``lambda``: :func:`self_adjoint_residual` of at most ``tolerance``."""
    return self_adjoint_residual(W, lam) <= tolerance


def _euclidean(M: Tensor, lam: Weights) -> Tensor:
    """``D^1/2 M D^-1/2``, which does to plain vectors what ``M`` does in the weighted space."""
    root = node_weights(lam).sqrt()
    return root[:, None] * M.double() / root


# ---------------------------------------------------------------------- rates


def weighted_rate(W: Tensor, lam: Weights) -> float:
    """``rho_Lambda = ||W - 1 lambda' / n||`` in the weighted norm, the factor on weighted disagreement per round.

    For a ``W`` in detailed balance with ``lambda`` the second largest modulus of an eigenvalue.
    """
    return consensus_rate(W, node_weights(lam).tolist())


def plain_rate(W: Tensor) -> float:
    """``rho_J = ||W - 1 1' / n||_2``, the factor on plain disagreement per round, for a doubly stochastic ``W``."""
    return consensus_rate(W)


def kappa(lam: Weights) -> float:
    """``kappa_lambda = sqrt(max lambda / min lambda)``, at least 1: how far weighted and plain norm differ."""
    weights = node_weights(lam)
    return float((weights.max() / weights.min()).sqrt())


def transient_prefactor(W: Tensor, lam: Weights, t: int) -> float:
    """How far ``t`` rounds can be from pure decay in the weighted norm: ``||(W - 1 pi')^t|| / r^t``.

    ``pi`` are the stationary weights of ``W`` and ``r`` is the largest modulus of an eigenvalue of ``W - 1 pi'``. It is 1
    for all ``t`` if ``W`` is self-adjoint in that space. For a symmetric doubly stochastic ``W`` it lies in
    ``[1, kappa_lambda]`` and exceeds 1 for some ``t`` in general, even where single rounds shrink plain disagreement.

    Args:
        W: a row-stochastic mixing matrix with positive stationary weights, shape (n, n).
        lam: the node weights of the norm.
        t: number of rounds, at least 1.

    Raises:
        ValueError: ``t < 1``.
    """
    if t < 1:
        raise ValueError(f"transient_prefactor(t={t!r}): must be an integer of at least 1")
    decay, rate = _decay(W)
    if rate < 1e-12:  # gone after one round
        return 1.0
    return float(torch.linalg.matrix_norm(torch.linalg.matrix_power(_euclidean(decay / rate, lam), t), 2))


def worst_start(W: Tensor, lam: Weights, t: int) -> Tensor:
    """The starting values, shape (n,), weighted norm 1, that ``t`` rounds shrink least: :func:`transient_prefactor` is theirs."""
    decay, rate = _decay(W)
    power = torch.linalg.matrix_power(_euclidean(decay / max(rate, 1e-12), lam), t)
    return torch.linalg.svd(power).Vh[0] / node_weights(lam).sqrt()


def _decay(W: Tensor) -> tuple[Tensor, float]:
    """``W`` without its limit, and the largest modulus of the eigenvalues left."""
    w = W.double()
    n = len(w)
    system = torch.cat([w.T - torch.eye(n, dtype=torch.float64), torch.ones(1, n, dtype=torch.float64)])
    right = torch.zeros(n + 1, 1, dtype=torch.float64)
    right[-1] = 1.0
    decay = w - torch.linalg.lstsq(system, right).solution.T  # 1 pi'
    return decay, float(torch.linalg.eigvals(decay).abs().max())


# ---------------------------------------------------------------------- what sets the strategies apart


@dataclass(frozen=True)
class Penalties:
    """What weighted losses over a doubly stochastic matrix (Strategy I) pay beside Strategy II; all 1 for equal weights."""

    geometry: float
    """``kappa_lambda``, bound on the factor lost when plain contraction is measured in the weighted norm (derived)."""

    injection: float
    """``sqrt(max lambda)``, bound on the factor by which weighted gradients are longer in the weighted norm (derived)."""

    step: float
    """``max lambda``, the factor on the largest local learning rate: stability needs ``lr max(lambda) L < 2`` (derived)."""


def penalties(lam: Weights) -> Penalties:
    """The three penalties of Strategy I."""
    top = float(node_weights(lam).max())
    return Penalties(geometry=kappa(lam), injection=top**0.5, step=top)


@dataclass(frozen=True)
class BoundComparison:
    """Theorem 7.1: if ``left >= right``, the convergence bound of Strategy II is better than that of Strategy I.

    It compares bounds. Which strategy has the smaller error in a given run also depends on noise and heterogeneity.
    """

    left: float
    """``1 - rho_Lambda``, the gap of the row-stochastic matrix."""

    right: float
    """``max((1 + slack) kappa_lambda^(-1/3), max(lambda)^(-1/2)) (1 - rho_J)``."""

    @property
    def holds(self) -> bool:
        """Whether the condition holds (it is sufficient, not necessary)."""
        return self.left >= self.right


def compare_bounds(W: Tensor, doubly: Tensor, lam: Weights, slack: float = SLACK) -> BoundComparison:
    """Both sides of Theorem 7.1.

    Args:
        W: the row-stochastic matrix of Strategy II.
        doubly: the doubly stochastic matrix of Strategy I.
        lam: the node weights.
        slack: ``eta_0 > 0`` of the theorem.
    """
    factor = max((1 + slack) * kappa(lam) ** (-1 / 3), float(node_weights(lam).max()) ** -0.5)
    return BoundComparison(1.0 - weighted_rate(W, lam), factor * (1.0 - plain_rate(doubly)))


def degree_match(degrees: Sequence[int], lam: Weights) -> float:
    """How well links follow weights: ``min_i (lambda_i / d_i) / max_i (lambda_i / d_i)``, in (0, 1], 1 if proportional.

    Proportional weights and degrees are the best design (Corollary 7.3): give heavy ranks many neighbours.
    """
    ratio = node_weights(lam) / torch.as_tensor(degrees, dtype=torch.float64).clamp(min=1.0)
    return float(ratio.min() / ratio.max())


def gap_bound(W: Tensor, doubly: Tensor, lam: Weights) -> float:
    """A lower bound on ``1 - lambda_2(W)`` from the doubly stochastic matrix alone: ``tau / max(lambda) * (1 - lambda_2)``.

    ``tau`` is the largest number with ``L_s >= tau L_d`` (Loewner order) for the Laplacians of the conductances
    ``lambda_i W[i, j]`` and ``doubly[i, j]`` (derived, from the Rayleigh quotients of both gaps).

    Args:
        W: a matrix in detailed balance with ``lam``.
        doubly: a symmetric doubly stochastic matrix on a connected graph.
        lam: the node weights.
    """
    weights = node_weights(lam)
    n = len(weights)
    if n == 1:
        return 1.0
    weighted, plain = torch.diag(weights) - weights[:, None] * W.double(), torch.eye(n) - doubly.double()
    values, vectors = torch.linalg.eigh(plain)
    half = vectors[:, 1:] / values[1:].sqrt()  # off consensus, where both Laplacians vanish
    tau = float(torch.linalg.eigvalsh(half.T @ weighted @ half).min())
    return tau / float(weights.max()) * float(values[1])


# ---------------------------------------------------------------------- the report


@dataclass(frozen=True)
class WeightedReport:
    """What is known before training about weighting the losses (I) and about weighting the mixing (II) on one graph."""

    weights: list[float]
    """``lambda``, summing to ``n``."""

    rule: NodeRule
    """The rule of the row-stochastic matrix."""

    kappa: float
    """``sqrt(max lambda / min lambda)``."""

    weighted_rate: float
    """``rho_Lambda`` of the row-stochastic matrix: the factor on weighted disagreement per round."""

    plain_rate: float
    """``rho_J`` of the Metropolis-Hastings matrix: the factor on plain disagreement per round."""

    plain_step: float
    """The factor of one round of that matrix on weighted disagreement; above 1 it can grow."""

    plain_prefactor: float
    """The worst :func:`transient_prefactor` of that matrix over 50 rounds; 1 for the row-stochastic one."""

    weighted_lambda_min: float
    """Smallest eigenvalue of the row-stochastic matrix."""

    plain_lambda_min: float
    """Smallest eigenvalue of the doubly stochastic matrix."""

    degree_match: float
    """See :func:`degree_match`."""

    gap_bound: float
    """See :func:`gap_bound`."""

    penalties: Penalties
    """Of Strategy I."""

    bounds: BoundComparison
    """Theorem 7.1."""

    @property
    def recommendation(self) -> str:
        """Which strategy to try first and why, in a sentence about bounds and not about a given run."""
        if self.kappa - 1 < 1e-9:
            return "Weights are equal: nothing has to be weighted, plain gossip minimises the mean loss."
        gaps = f"gap {self.bounds.left:.3g} against {self.bounds.right:.3g}"
        if self.bounds.holds:
            doubt = (
                "."
                if self.degree_match > 0.999
                else (
                    f"; where links do not follow weights (degree match {self.degree_match:.2g}) weighted losses (I) can still end "
                    "closer."
                )
            )
            return f"Weighted mixing (II) has the better bound (Theorem 7.1: {gaps}); this compares bounds, not runs{doubt}"
        return (
            f"No bound favours weighted mixing (II) (Theorem 7.1: {gaps}): weighted losses (I) may agree better with plain "
            "SGD; with Adam or clipping only II keeps the weights. More links at heavy ranks help II."
        )


def weighted_report(
    graph: UndirectedGraph, n: int, lam: Weights, rule: NodeRule = "metropolis", laziness: float | None = None
) -> WeightedReport:
    """Compare both strategies on ``graph``: Metropolis-Hastings for I, :class:`NodeWeighted` for II.

    Args:
        graph: who is linked to whom.
        n: number of workers.
        lam: one positive number per rank, of any scale.
        rule: of the row-stochastic matrix, see :class:`NodeWeighted`.
        laziness: see :class:`NodeWeighted`.

    Raises:
        ValueError: weights that are not positive or not ``n``, a graph that does not exist for ``n`` workers or is not
            undirected.
    """
    weights = node_weights(lam)
    peers = NodeWeighted(graph, shares=(weights / weights.sum()).tolist(), rule=rule, laziness=laziness)
    mine, doubly = peers.matrix(n), graph.matrix(n)
    return WeightedReport(
        weights=weights.tolist(),
        rule=rule,
        kappa=kappa(weights),
        weighted_rate=weighted_rate(mine, weights),
        plain_rate=plain_rate(doubly),
        plain_step=operator_norm(doubly - 1.0 / n, weights),
        plain_prefactor=max(transient_prefactor(doubly, weights, t) for t in range(1, 51)),
        weighted_lambda_min=_smallest(mine, weights),
        plain_lambda_min=lambda_min(doubly),
        degree_match=degree_match([graph.degree(n, i) for i in range(n)], weights),
        gap_bound=gap_bound(mine, doubly, weights),
        penalties=penalties(weights),
        bounds=compare_bounds(mine, doubly, weights),
    )


def _smallest(W: Tensor, lam: Weights) -> float:
    """The smallest eigenvalue of a matrix in detailed balance, from the symmetric matrix similar to it."""
    return lambda_min(_euclidean(W, lam))
