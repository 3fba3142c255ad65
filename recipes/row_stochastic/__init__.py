"""Weighted losses or weighted mixing? Decentralized least squares on graphs whose ranks count unequally.

``python -m recipes.row_stochastic`` runs both strategies, prints a table and draws pictures.
"""

from recipes.row_stochastic.least_squares import LeastSquares, recursion, simulated
from recipes.row_stochastic.strategies import Case, Outcome, cases, compare

__all__ = ["Case", "LeastSquares", "Outcome", "cases", "compare", "recursion", "simulated"]
