"""Weighted gossip: workers that count unequally, by the mixing (row-stochastic) or by the losses."""

from __future__ import annotations

from typing import Literal

from lightning_dopt._checks import check_choice
from lightning_dopt.local import Correction, LossWeights
from lightning_dopt.plan import Plan
from lightning_dopt.plans.gossip import CorrectionName, Order, gossip
from lightning_dopt.topology import NodeWeighted, Ring
from lightning_dopt.topology.node_weights import NodeRule
from lightning_dopt.topology.weights import UndirectedGraph


def weighted_gossip(
    topology: UndirectedGraph | None = None,
    shares: list[float] | None = None,
    counts: list[int] | None = None,
    weighting: Literal["row_stochastic", "loss"] = "row_stochastic",
    rule: NodeRule = "metropolis",
    correction: CorrectionName = "none",
    order: Order | None = None,
) -> Plan:
    """Gossip for ``sum_i lambda_i f_i``: the weights are in the mixing (Strategy II) or in the losses (Strategy I).

    ``dopt topology NAME -n N --lambda ...`` tells which of the two suits a graph. Adaptive optimizers and clipping keep the
    weights with ``"row_stochastic"`` only.

    Args:
        topology: Who is linked to whom; ``None`` means the ring.
        shares: ``lambda``, positive and summing to one; neither shares nor counts means equal weights of two workers.
        counts: Instead of shares, one positive whole number per worker, such as its number of samples.
        weighting: ``"row_stochastic"`` mixes so that the weighted mean is kept; ``"loss"`` multiplies gradients by
            ``n lambda_i`` and keeps the plain mean.
        rule: Of the row-stochastic matrix, see :class:`~lightning_dopt.topology.NodeWeighted`.
        correction: As for :func:`gossip`.
        order: As for :func:`gossip`.

    Raises:
        ValueError: shares that do not sum to one, an unknown option, or ``rule`` where losses are weighted.

    Source: Liu, Kong, Lu, Yuan, Zhao, "Row-Stochastic Matrices Can Provably Outperform Doubly Stochastic Matrices in
    Decentralized Learning", arXiv 2511.19513.
    """
    check_choice("weighted_gossip", "weighting", weighting, ("row_stochastic", "loss"))
    graph = topology or Ring()
    if shares is None and counts is None:
        shares = [0.5, 0.5]
    if weighting == "row_stochastic":
        return gossip(NodeWeighted(graph, shares, counts, rule), correction=correction, order=order)
    if rule != "metropolis":
        raise ValueError(f"weighted_gossip(weighting='loss', rule={rule!r}): the rule is of the row-stochastic matrix")
    plan = gossip(graph, correction=correction, order=order)
    weights: list[Correction] = [LossWeights(shares, counts)]
    return Plan(plan.syncs, [*weights, *plan.corrections])
