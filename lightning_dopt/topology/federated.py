"""Rounds of a federation: a few clients are heard by all, groups keep to themselves, chains change hands."""

from __future__ import annotations

from functools import lru_cache

from lightning_dopt._checks import check_float, check_int
from lightning_dopt.topology._graph import random_bits
from lightning_dopt.topology.base import Topology
from lightning_dopt.topology.node_weights import check_ranks, checked_shares


class Sample(Topology):
    """Each round a random subset of the ranks takes part, drawn without a word; all ranks get the mean of its messages.

    In round ``k`` the ``max(1, round(fraction n))`` ranks with the smallest random numbers of ``(seed, k, rank)`` send, to
    everybody; the others send nothing. Every rank, taking part or not, ends with ``sum_S p_j m_j / sum_S p_j``: so all go on
    sharing the anchor and the outer optimizer's state, as if a server kept them. Training runs in lockstep, hence ranks that are
    not drawn compute as well; what they computed in that round is dropped when they take the result, and their codec
    memories and corrections wait for the next round that they are drawn for.

    Args:
        fraction: Share of the ranks that takes part in a round, in (0, 1].
        counts: Weight of each rank, such as its number of samples (``p_j`` is proportional to it); ``None`` weighs all alike.
        seed: Selects the draws, at least 0.

    Raises:
        ValueError: an argument out of range; from ``check``, another number of workers than counts.

    Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data" (FedAvg), arXiv
    1602.05629, algorithm 1.
    """

    directed = True
    agrees = True

    def __init__(self, fraction: float = 1.0, counts: list[int] | None = None, seed: int = 0) -> None:
        self.fraction = check_float("Sample", "fraction", fraction, 0.0, 1.0, open_low=True)
        self.counts = None if counts is None else list(counts)
        self._shares = None if counts is None else checked_shares("Sample", None, self.counts)
        self.seed = check_int("Sample", "seed", seed, 0)

    @property
    def partial(self) -> bool:  # type: ignore[override]
        """Whether a rank may be left out."""
        return self.fraction < 1.0

    def check(self, n: int) -> None:
        """Raise ``ValueError`` in one line unless there is one count for each of ``n`` workers, if there are any."""
        super().check(n)
        if self._shares is not None:
            check_ranks("Sample", "counts", len(self._shares), n)

    def drawn(self, n: int, step: int) -> list[int]:
        """The ranks that take part in round ``step``, ascending."""
        size = self._size(n)
        if size == n:
            return list(range(n))
        return sorted(sorted(range(n), key=lambda rank: random_bits(self.seed, step, rank))[:size])

    def _size(self, n: int) -> int:
        return max(1, round(self.fraction * n))

    def _weights(self, n: int, step: int) -> dict[int, float]:
        return {j: self._shares[j] if self._shares is not None else 1.0 / n for j in self.drawn(n, step)}

    def row(self, n: int, rank: int, step: int = 0) -> dict[int, float]:
        """The weights of the ranks that take part, the same on all ranks; zero for oneself if not drawn."""
        weights = self._weights(n, step)
        total = sum(weights.values())
        return {j: weight / total for j, weight in weights.items()}

    def receivers(self, n: int, rank: int, step: int = 0) -> list[int]:
        """Everybody else hears a rank that takes part, nobody one that does not."""
        return [j for j in range(n) if j != rank] if self.speaks(n, rank, step) else []

    def speaks(self, n: int, rank: int, step: int = 0) -> bool:
        """Whether ``rank`` takes part in round ``step``."""
        return rank in self.drawn(n, step)

    def share(self, n: int, step: int = 0) -> float:
        """The weight of all ranks that take part, of a total of one."""
        return 1.0 if self._size(n) == n else sum(self._weights(n, step).values())

    def period(self, n: int) -> int | None:
        """``None``; 1 where everybody takes part."""
        return 1 if self._size(n) == n else None

    def max_degree(self, n: int) -> int:
        """The number of ranks that take part, without oneself if all do."""
        return min(self._size(n), n - 1)

    def is_mean(self, n: int) -> bool:
        """Whether every round is the plain mean: everybody takes part with the same weight."""
        return self._size(n) == n and (self._shares is None or max(self._shares) == min(self._shares))

    def symmetric(self, n: int) -> bool:
        """Only where every round is the plain mean."""
        return self.is_mean(n)

    def doubly_stochastic(self, n: int) -> bool:
        """Only where every round is the plain mean; on average over the draws, if all weigh alike."""
        return self.is_mean(n)

    def stationary(self, n: int) -> list[float]:
        """The weights of the ranks, which rounds keep on average only."""
        return list(self._shares) if self._shares is not None else [1.0 / n] * n


class Groups(Topology):
    """Every rank belongs to one group and gets the mean of its group; groups never hear each other.

    With one sync for each part of a model and other groups in each, ranks share a part with some and another part with others:
    the modules of DiPaCo, or a body for all and a head for each region.

    Args:
        members: The ranks of each group; together every rank exactly once.
        counts: Weight of each rank in the mean of its group, such as its number of samples; ``None`` weighs all alike.

    Raises:
        ValueError: an empty group, one that repeats a rank, or counts that are not one positive number per rank; from
            ``check``, ranks that are missing or too many.
    """

    agrees = True

    def __init__(self, members: list[list[int]], counts: list[int] | None = None) -> None:
        self.members = [sorted(group) for group in members]
        ranks = [rank for group in self.members for rank in group]
        if not ranks or not all(self.members) or sorted(ranks) != list(range(len(ranks))):
            raise ValueError(f"Groups(members={members!r}): must name every rank from 0 on exactly once")
        self._of = {rank: group for group in self.members for rank in group}
        self.counts = None if counts is None else list(counts)
        self._shares = (
            [1.0 / len(ranks)] * len(ranks) if counts is None else checked_shares("Groups", None, self.counts)
        )
        if len(self._shares) != len(ranks):
            raise ValueError(f"Groups(counts={counts!r}): must have one number for each of {len(ranks)} ranks")

    def check(self, n: int) -> None:
        """Raise ``ValueError`` in one line unless the groups hold ``n`` ranks."""
        check_ranks("Groups", "members", len(self._of), n)

    def row(self, n: int, rank: int, step: int = 0) -> dict[int, float]:
        """The weights of everybody in the group, which sum to one."""
        group = self._of[rank]
        if self.counts is None:
            return dict.fromkeys(group, 1.0 / len(group))
        total = sum(self._shares[j] for j in group)
        return {j: self._shares[j] / total for j in group}

    def is_mean(self, n: int) -> bool:
        """Whether there is one group, of equal weights."""
        return len(self.members) == 1 and self._even

    @property
    def _even(self) -> bool:
        return all(self._shares[j] == self._shares[group[0]] for group in self.members for j in group)

    def symmetric(self, n: int) -> bool:
        """Whether weights within each group are equal."""
        return self._even

    def reversible(self, n: int) -> bool:
        """Always: a group's matrix is ``1 lambda^T``."""
        return True

    def doubly_stochastic(self, n: int) -> bool:
        """Whether weights within each group are equal."""
        return self._even

    def stationary(self, n: int) -> list[float]:
        """The weights of the ranks; each group keeps its own mean."""
        return list(self._shares)


class RandomGroups(Topology):
    """Each round fresh random groups of ``size`` ranks, which all take the mean of their group.

    What the number of workers leaves over is one smaller group; a single rank keeps its value. The draw depends on
    ``(seed, round)`` alone. Every matrix is symmetric, doubly stochastic and a projection. Groups of two are
    :class:`~lightning_dopt.topology.RandomPairs`.

    Args:
        size: Ranks in a group, at least 2.
        seed: Selects the draws, at least 0.

    Raises:
        ValueError: an argument out of range.

    Source: the groups of Kolehmainen et al., "NoLoCo", arXiv 2506.10911.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size = check_int("RandomGroups", "size", size, 2)
        self.seed = check_int("RandomGroups", "seed", seed, 0)

    def group(self, n: int, rank: int, step: int) -> list[int]:
        """The ranks that ``rank`` meets in round ``step``, itself included, ascending."""
        return _random_groups(self.seed, self.size, n, step)[rank]

    def row(self, n: int, rank: int, step: int = 0) -> dict[int, float]:
        """The same weight for everybody in the group."""
        group = self.group(n, rank, step)
        return dict.fromkeys(group, 1.0 / len(group))

    def period(self, n: int) -> int | None:
        """``None``, or 1 where one group holds everybody."""
        return 1 if n <= self.size else None

    def max_degree(self, n: int) -> int:
        """The others of a group."""
        return min(self.size, n) - 1

    def is_mean(self, n: int) -> bool:
        """Whether one group holds everybody."""
        return n <= self.size


@lru_cache(maxsize=256)
def _random_groups(seed: int, size: int, n: int, step: int) -> dict[int, list[int]]:
    """The group of every rank: order the ranks by a random key each and cut."""
    order = sorted(range(n), key=lambda rank: (random_bits(seed, step, rank), rank))
    groups = [sorted(order[start : start + size]) for start in range(0, n, size)]
    return {rank: group for group in groups for rank in group}


class Permute(Topology):
    """Each round a random permutation: every rank takes what one other holds, nothing is averaged.

    What a rank holds travels around as if a chain visited one data set after another. Depends on ``(seed, round)`` alone. The
    permutation is one cycle through all ranks, so that from two ranks on nobody keeps what it has.

    Args:
        seed: Selects the draws, at least 0.

    Raises:
        ValueError: a negative seed.
    """

    directed = True

    def __init__(self, seed: int = 0) -> None:
        self.seed = check_int("Permute", "seed", seed, 0)

    def _cycle(self, n: int, step: int) -> list[int]:
        return sorted(range(n), key=lambda rank: random_bits(self.seed, step, rank))

    def row(self, n: int, rank: int, step: int = 0) -> dict[int, float]:
        """All weight on the rank before this one in the cycle of round ``step``."""
        cycle = self._cycle(n, step)
        return {cycle[cycle.index(rank) - 1]: 1.0}

    def receivers(self, n: int, rank: int, step: int = 0) -> list[int]:
        """The next rank in the cycle."""
        cycle = self._cycle(n, step)
        return [] if n == 1 else [cycle[(cycle.index(rank) + 1) % n]]

    def period(self, n: int) -> int | None:
        """``None``; 1 with one or two workers."""
        return 1 if n < 3 else None

    def max_degree(self, n: int) -> int:
        """One other rank."""
        return min(1, n - 1)

    def symmetric(self, n: int) -> bool:
        """With one or two workers, who change places."""
        return n < 3
