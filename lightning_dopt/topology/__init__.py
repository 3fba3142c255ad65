"""Who hears whom, and with which weight: communication graphs, their matrices, spectra and pictures."""

from lightning_dopt.topology.base import Topology
from lightning_dopt.topology.custom import FromAdjacency, FromMatrix
from lightning_dopt.topology.directed import Directed, Sharing
from lightning_dopt.topology.directed_dynamic import CycleThrough, InnerOuter, RandomPull
from lightning_dopt.topology.dynamic import (
    AlternatingRing,
    BipartiteExponential,
    MatchingsOf,
    OnePeerHypercube,
    RandomPairs,
    RoundRobin,
)
from lightning_dopt.topology.equi import DEquiStatic, ODEquiDyn, OUEquiDyn, UEquiStatic
from lightning_dopt.topology.exponential import DirectedRing, Exponential, OnePeerExponential
from lightning_dopt.topology.federated import Groups, Permute, RandomGroups, Sample
from lightning_dopt.topology.finite_time import BaseGraph, HyperHypercube, MoshpitGrid
from lightning_dopt.topology.from_file import FromFile
from lightning_dopt.topology.hierarchical import Hierarchical
from lightning_dopt.topology.lattice import Grid, Torus
from lightning_dopt.topology.node_weights import NodeRule, NodeWeighted, WeightedMean
from lightning_dopt.topology.plot import draw
from lightning_dopt.topology.random_graphs import ErdosRenyi, RandomRegular, SmallWorld
from lightning_dopt.topology.rates import EdgeRates, optimal_rates, rates
from lightning_dopt.topology.registry import by_name, names
from lightning_dopt.topology.spectrum import (
    MatrixCheck,
    Product,
    TopologySummary,
    check_matrix,
    consensus_rate,
    lambda_min,
    product,
    spectral_gap,
    summary,
)
from lightning_dopt.topology.static import Chain, Complete, Hypercube, Ring, Star, SymmetricExponential, Tree
from lightning_dopt.topology.switch import Switch
from lightning_dopt.topology.thinned import Thinned
from lightning_dopt.topology.weighted_space import WeightedReport, weighted_report
from lightning_dopt.topology.weights import Lazy, UndirectedGraph, WeightRule

__all__ = [  # noqa: RUF022  (grouped as they are read: contract, graphs, wrappers, tools)
    "Topology",
    "UndirectedGraph",
    "WeightRule",
    "Complete",
    "Ring",
    "DirectedRing",
    "Chain",
    "Grid",
    "Torus",
    "Tree",
    "Star",
    "Hypercube",
    "Exponential",
    "SymmetricExponential",
    "ErdosRenyi",
    "RandomRegular",
    "SmallWorld",
    "Hierarchical",
    "DEquiStatic",
    "UEquiStatic",
    "OnePeerExponential",
    "OnePeerHypercube",
    "HyperHypercube",
    "BaseGraph",
    "MoshpitGrid",
    "RandomGroups",
    "RandomPairs",
    "RoundRobin",
    "AlternatingRing",
    "BipartiteExponential",
    "MatchingsOf",
    "ODEquiDyn",
    "OUEquiDyn",
    "RandomPull",
    "CycleThrough",
    "InnerOuter",
    "Switch",
    "Directed",
    "Sharing",
    "FromAdjacency",
    "FromMatrix",
    "FromFile",
    "Lazy",
    "Thinned",
    "NodeWeighted",
    "NodeRule",
    "WeightedMean",
    "Sample",
    "Groups",
    "Permute",
    "by_name",
    "names",
    "consensus_rate",
    "spectral_gap",
    "lambda_min",
    "check_matrix",
    "product",
    "rates",
    "optimal_rates",
    "EdgeRates",
    "summary",
    "weighted_report",
    "WeightedReport",
    "MatrixCheck",
    "Product",
    "TopologySummary",
    "draw",
]
