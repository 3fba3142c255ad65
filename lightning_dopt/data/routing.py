"""Routes of samples: which path of a modular model is to learn which of them."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dopt._checks import check_int


def kmeans_routes(features: Tensor, routes: int, seed: int = 0, iterations: int = 25) -> Tensor:
    """Clusters of the samples by k-means, as routes for ``partition="routed"``; int64, shape (n_samples,).

    Starts from samples drawn in turn with probabilities in proportion to the squared distance to the nearest one drawn
    (k-means++). Equal arguments give equal routes on every worker of one kind of machine; compute them once and save them
    where machines differ.

    Args:
        features: what tells samples apart, such as the mean embedding of a sequence, shape (n_samples, d).
        routes: number of clusters.
        seed: seed of the start.
        iterations: at most so many passes.

    Raises:
        ValueError: fewer samples than routes, or an argument out of range.

    Source: the first stage of routing in Douillard et al., "DiPaCo", arXiv 2403.10616; Arthur, Vassilvitskii, "k-means++",
    2007.
    """
    check_int("kmeans_routes", "routes", routes, 1)
    check_int("kmeans_routes", "iterations", iterations, 1)
    if features.dim() != 2 or len(features) < routes:
        raise ValueError(f"kmeans_routes(routes={routes}): needs at least as many rows, not {tuple(features.shape)}")
    points = features.detach().to(torch.float64)
    generator = torch.Generator().manual_seed(seed)
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    for _ in range(1, routes):
        far = torch.cdist(points, centres).square().amin(1)
        weights = far if float(far.sum()) > 0 else torch.ones_like(far)
        centres = torch.cat([centres, points[torch.multinomial(weights, 1, generator=generator)]])
    nearest = torch.cdist(points, centres).argmin(1)
    for _ in range(iterations):
        for k in range(routes):
            if bool((nearest == k).any()):
                centres[k] = points[nearest == k].mean(0)
        moved = torch.cdist(points, centres).argmin(1)
        if torch.equal(moved, nearest):
            break
        nearest = moved
    return nearest
