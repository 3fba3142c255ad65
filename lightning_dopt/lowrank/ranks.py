"""Which rank every layer gets: said by the user, or the largest ones that a budget of parameters allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

from torch import nn

Rank = int | float | list[int] | dict[str, int] | dict[str, float] | dict[str, list[int]] | None
"""One rank for all, a share of the smaller dimension, one per low-rank block, or any of these by pattern on names."""


class Site(NamedTuple):
    """A layer that gets a rank.

    Attributes:
        path: Its name in the model.
        name: Its name in its block.
        block: Number of its block, from 0.
        place: The same among the blocks of low rank; negative in others.
        linear: The layer.
    """

    path: str
    name: str
    block: int
    place: int
    linear: nn.Linear

    @property
    def full(self) -> int:
        """The largest rank that makes sense."""
        return min(self.linear.in_features, self.linear.out_features)


def given(rank: Any, sites: Sequence[Site], depth: int) -> list[int]:
    """The ranks a user has said, site by site.

    Args:
        rank: See :data:`Rank`.
        sites: The layers.
        depth: Number of low-rank blocks.

    Raises:
        ValueError: a rank out of range, a list of another length than ``depth``, a name no pattern matches, or a pattern
            that matches nothing.
    """
    if isinstance(rank, dict):
        names = {site.name for site in sites}
        for pattern in rank:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"convert(rank={rank!r}): {pattern!r} matches none of {sorted(names)}")
    return [_checked(_chosen(rank, site), rank, site, depth) for site in sites]


def _chosen(rank: Any, site: Site) -> Any:
    if not isinstance(rank, dict):
        return rank
    for pattern, value in rank.items():
        if fnmatchcase(site.name, pattern):
            return value
    raise ValueError(f"convert(rank={rank!r}): says nothing of {site.name!r}")


def _checked(value: Any, rank: Any, site: Site, depth: int) -> int:
    if isinstance(value, (list, tuple)):
        if len(value) != depth:
            raise ValueError(f"convert(rank={rank!r}): needs one rank for each of the {depth} low-rank blocks")
        value = value[site.place]
    elif isinstance(value, float) and value > 1 and value.is_integer():  # what a YAML file makes of {a: 64, b: 0.25}
        value = int(value)
    elif isinstance(value, float):
        if not 0 < value <= 1:
            raise ValueError(f"convert(rank={rank!r}): a share of the smaller dimension must be in (0, 1]")
        value = max(1, round(value * site.full))
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= site.full:
        shape = f"{site.linear.out_features} x {site.linear.in_features}"
        raise ValueError(f"convert(rank={rank!r}): {site.path} is {shape}, its rank must be from 1 to {site.full}")
    return value


def affordable(
    budget: int | float,
    profile: Literal["uniform", "middle"],
    sites: Sequence[Site],
    depth: int,
    dense: int,
    total: Callable[[Sequence[int]], int],
) -> list[int]:
    """The largest ranks with which the model has at most so many parameters.

    All layers get one rank ``r``, times the weight of their block, within what makes sense for each.

    Args:
        budget: Parameters of the whole model, or, below 1, a share of ``dense``.
        profile: ``"uniform"``: weight 1 for all; ``"middle"``: rising linearly from 0.5 at both ends to 1.5 in the middle.
        sites: The layers.
        depth: Number of low-rank blocks.
        dense: Parameters of the dense model.
        total: Parameters of the model with the given ranks.

    Raises:
        ValueError: a budget out of range, or too small for rank 1.
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not budget > 0:
        raise ValueError(f"convert(budget={budget!r}): must be a number of parameters, or a share of them in (0, 1)")
    if isinstance(budget, float) and budget >= 1:
        raise ValueError(
            f"convert(budget={budget!r}): a share must be below 1; write a number of parameters as an integer"
        )
    allowed = budget if isinstance(budget, int) else int(budget * dense)
    weights = [_weight(profile, site.place, depth) for site in sites]

    def ranks(r: int) -> list[int]:
        return [min(site.full, max(1, round(r * w))) for site, w in zip(sites, weights, strict=True)]

    low, high = 1, 2 * max(site.full for site in sites)
    if total(ranks(low)) > allowed:
        raise ValueError(f"convert(budget={budget!r}): even ranks of 1 need {total(ranks(low))} parameters")
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if total(ranks(middle)) <= allowed else (low, middle - 1)
    return ranks(low)


def _weight(profile: str, place: int, depth: int) -> float:
    if profile == "uniform" or depth == 1:
        return 1.0
    return 1.5 - abs(2 * place / (depth - 1) - 1)
