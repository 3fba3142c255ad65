"""Who owns which sample: pure functions that cut a data set into one part per worker.

Every function returns a list of sorted int64 index tensors that are disjoint, together cover all samples and are all
non-empty. They draw from a private generator, so equal arguments give equal parts on every worker without a message.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_dopt._checks import check_float, check_int


def iid(n_samples: int, parts: int, seed: int) -> list[Tensor]:
    """Parts drawn uniformly at random, whose sizes differ by at most one.

    Args:
        n_samples: samples in the data set.
        parts: number of workers.
        seed: seed of the permutation.

    Raises:
        ValueError: fewer samples than parts.
    """
    _check("iid", n_samples, parts, seed)
    order = torch.randperm(n_samples, generator=_generator(seed))
    return [part.sort().values for part in order.tensor_split(parts)]


def contiguous(n_samples: int, parts: int) -> list[Tensor]:
    """Consecutive stretches in the order of the data set, whose sizes differ by at most one.

    As different from each other as the data set's own order makes them: other authors, other files, other classes.

    Raises:
        ValueError: fewer samples than parts.
    """
    _check("contiguous", n_samples, parts)
    return list(torch.arange(n_samples).tensor_split(parts))


def dirichlet(labels: Tensor | Sequence[int], parts: int, alpha: float, seed: int) -> list[Tensor]:
    """Parts with skewed label mixes: each class is dealt to the workers in shares drawn from a Dirichlet distribution.

    For every class ``c`` the shares ``p_c ~ Dirichlet(alpha, ..., alpha)`` over the workers cut the shuffled samples of
    that class. ``alpha -> inf`` gives every worker the same mix, ``alpha -> 0`` gives each class to one worker. Sizes
    differ between workers too. A worker left with nothing gets one sample of the largest part.

    Args:
        labels: class of every sample, any integers, shape (n_samples,).
        parts: number of workers.
        alpha: concentration, above zero.
        seed: seed of the shares and of the shuffles.

    Raises:
        ValueError: fewer samples than parts, ``alpha`` not positive, or labels that are not one integer per sample.

    Source:
        Yurochkin et al., "Bayesian Nonparametric Federated Learning of Neural Networks", ICML 2019, section 4.
    """
    labels = torch.as_tensor(labels)
    if labels.dim() != 1 or labels.is_floating_point() or labels.is_complex():
        shape = tuple(labels.shape)
        raise ValueError(f"dirichlet(labels=<{labels.dtype}, shape {shape}>): must be one integer per sample")
    _check("dirichlet", len(labels), parts, seed)
    check_float("dirichlet", "alpha", alpha, 0.0, open_low=True, open_high=True)
    generator = _generator(seed)
    owner = torch.empty(len(labels), dtype=torch.int64)
    for label in sorted(set(labels.tolist())):
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        cuts = (_shares(parts, alpha, generator).cumsum(0)[:-1] * len(members)).round().long()
        for part, piece in enumerate(members.tensor_split(cuts)):
            owner[piece] = part
    _fill_empty(owner, parts)
    return [(owner == part).nonzero().flatten() for part in range(parts)]


def routed(routes: Tensor | Sequence[int], parts: int) -> list[Tensor]:
    """Parts by a route that every sample has: worker ``w`` gets samples of the route ``w mod R``, of ``R`` routes in all.

    Where several workers share a route each gets a stretch of its samples.

    Args:
        routes: route of every sample, from 0 on, shape (n_samples,).
        parts: number of workers, a multiple of the number of routes.

    Raises:
        ValueError: routes that are not one integer per sample or that leave a worker without samples, or another number of
            workers.
    """
    routes = torch.as_tensor(routes)
    if routes.dim() != 1 or routes.is_floating_point() or routes.is_complex():
        shape = tuple(routes.shape)
        raise ValueError(f"routed(routes=<{routes.dtype}, shape {shape}>): must be one integer per sample")
    _check("routed", len(routes), parts)
    count = int(routes.max()) + 1
    if int(routes.min()) < 0 or parts % count:
        raise ValueError(f"routed(parts={parts}): must be a multiple of the {count} routes, which count from 0")
    found = []
    for worker in range(parts):
        of_route = (routes == worker % count).nonzero().flatten()
        found.append(of_route.tensor_split(parts // count)[worker // count])
    empty = [worker for worker, part in enumerate(found) if not len(part)]
    if empty:
        raise ValueError(
            f"routed(parts={parts}): worker {empty[0]} gets no sample, route {empty[0] % count} has too few"
        )
    return found


def _shares(parts: int, alpha: float, generator: torch.Generator) -> Tensor:
    """One Dirichlet draw in float64, normalized in logarithms because gamma draws underflow for small ``alpha``.

    Uses ``Gamma(alpha) = Gamma(alpha + 1) * U^(1 / alpha)`` in distribution.
    """
    gamma = torch._standard_gamma(torch.full((parts,), alpha + 1.0, dtype=torch.float64), generator)
    uniform = 1.0 - torch.rand(parts, dtype=torch.float64, generator=generator)  # in (0, 1]
    return torch.softmax(gamma.log() + uniform.log() / alpha, 0)


def _fill_empty(owner: Tensor, parts: int) -> None:
    """Give every empty part one sample of the part that is largest at that moment."""
    sizes = torch.bincount(owner, minlength=parts)
    for part in (sizes == 0).nonzero().flatten():
        largest = sizes.argmax()
        owner[(owner == largest).nonzero()[0]] = part
        sizes[largest] -= 1
        sizes[part] += 1


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _check(owner: str, n_samples: int, parts: int, seed: int = 0) -> None:
    check_int(owner, "parts", parts, 1)
    check_int(owner, "seed", seed, 0)
    if n_samples < parts:
        raise ValueError(f"{owner}(parts={parts}): must be at most the number of samples, {n_samples}")
