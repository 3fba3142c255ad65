"""Sequences of rounds whose product is the exact mean for any number of workers: base-(k+1) graphs and grids."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from lightning_dopt._checks import check_int
from lightning_dopt.topology.base import Topology
from lightning_dopt.topology.lattice import check_dims, check_sides, sides

_Edges = dict[tuple[int, int], float]
"""The weights of one round's links, by their ends (lower rank first)."""


class _Rounds(Topology):
    """A list of symmetric rounds, given by their links and repeated for ever; what links leave to one is the own weight."""

    def edges(self, n: int) -> tuple[_Edges, ...]:
        """The links of every round of a period."""
        raise NotImplementedError

    def period(self, n: int) -> int:
        """Rounds to the exact mean, at least 1."""
        return max(1, len(self.edges(n)))

    def row(self, n: int, rank: int, step: int = 0) -> dict[int, float]:
        """The links of ``rank`` in the round, and what they leave to one for ``rank`` itself."""
        rows = _rows(self, n)
        return dict(rows[step % len(rows)][rank])

    def max_degree(self, n: int) -> int:
        """The most partners that a rank has in any round."""
        return max(len(row) - 1 for rows in _rows(self, n) for row in rows)

    def is_mean(self, n: int) -> bool:
        """Whether one round is enough."""
        return self.period(n) == 1


class HyperHypercube(_Rounds):
    """A hypercube with sides of any length: the exact mean after one round per side, in groups of at most ``k + 1``.

    ``n`` is split into factors of at most ``k + 1`` (the largest first, then in ascending order); a rank's number in
    this mixed radix has one digit per factor. In round ``l`` the ranks that agree in all digits but digit ``l`` form
    their mean. Every matrix is symmetric and doubly stochastic. For ``k = 1`` this is :class:`OnePeerHypercube`.

    Source: Takezawa et al., "Beyond Exponential Graph: Communication-Efficient Topologies for Decentralized Learning
    via Finite-time Convergence" (2023), Algorithm 1.

    Args:
        k: the most partners that a rank may have in a round, at least 1.

    Raises:
        ValueError: an argument outside its range; from ``check``, a number of workers with a prime factor above
            ``k + 1``.
    """

    def __init__(self, k: int = 1) -> None:
        self.k = check_int("HyperHypercube", "k", k, 1)

    def check(self, n: int) -> None:
        """Raise ``ValueError`` if ``n`` has a prime factor above ``k + 1``."""
        super().check(n)
        if _factors(n, self.k + 1) is None:
            raise ValueError(
                f"HyperHypercube(k={self.k}): {n} workers have a prime factor above {self.k + 1}; use a larger k, or "
                "BaseGraph, which takes any number"
            )

    def edges(self, n: int) -> tuple[_Edges, ...]:
        """One round per factor."""
        return tuple(_hypercube(range(n), self.k + 1))


class BaseGraph(_Rounds):
    """The base-(k+1) graph: the exact mean in finitely many rounds for any number of workers, at most ``k`` partners each.

    A period has at most ``2 log_{k+1}(n) + 2`` rounds. Every matrix is symmetric and doubly stochastic, links carry
    unequal weights. Ranks are split into blocks as ``n`` is written in base ``k + 1``; blocks average inside as a
    :class:`HyperHypercube`, then each block in turn gives every later rank one partner per digit, with weights such
    that the later ranks hold the overall mean, and averages once more inside. If ``n`` has a divisor with small primes
    only, groups may do this in parallel and finish as a hypercube; the shorter sequence is taken.

    Source: Takezawa et al., "Beyond Exponential Graph: Communication-Efficient Topologies for Decentralized Learning
    via Finite-time Convergence" (2023), Algorithms 2 and 3.

    Args:
        k: the most partners that a rank may have in a round, at least 1.

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(self, k: int = 1) -> None:
        self.k = check_int("BaseGraph", "k", k, 1)

    def edges(self, n: int) -> tuple[_Edges, ...]:
        """The sequence of rounds."""
        return _base_graph(n, self.k)


class MoshpitGrid(_Rounds):
    """Groups on a grid: in round ``t`` the ranks that share all coordinates but number ``t mod d`` form their mean.

    The grid is full, so one round per dimension gives the exact mean; every rank hears the rest of its group, one side
    of the grid less one. Sides of length one are left out, so that a prime ``n`` has one round with everybody.

    Source: Ryabinin et al., "Moshpit SGD: Communication-Efficient Decentralized Training on Heterogeneous Unreliable
    Devices" (2021).

    Args:
        dims: the number of dimensions, at least 1, with sides as equal as the divisors of ``n`` allow, or the list of
            all sides.

    Raises:
        ValueError: an argument outside its range; from ``check``, a number of workers that given sides do not hold.
    """

    def __init__(self, dims: int | list[int] = 2) -> None:
        self.dims = check_dims("MoshpitGrid", dims)

    def check(self, n: int) -> None:
        """Raise ``ValueError`` if ``n`` workers do not fill the grid."""
        super().check(n)
        check_sides(self, self.dims, n)

    def edges(self, n: int) -> tuple[_Edges, ...]:
        """One round per side longer than one."""
        return tuple(_digit_groups(range(n), [side for side in sides(self.dims, n) if side > 1]))


@lru_cache(maxsize=64)
def _rows(topology: _Rounds, n: int) -> tuple[tuple[dict[int, float], ...], ...]:
    """The rows of every rank in every round of a period, own weight included."""
    found = []
    for edges in topology.edges(n) or ({},):
        rows: list[dict[int, float]] = [{} for _ in range(n)]
        for (i, j), weight in edges.items():
            rows[i][j] = rows[j][i] = weight
        for i, row in enumerate(rows):
            row[i] = 1.0 - sum(row.values())
        found.append(tuple(rows))
    return tuple(found)


def _factors(n: int, top: int) -> list[int] | None:
    """``n`` as a product of factors of at most ``top``, the largest chosen first, ascending; ``None`` if impossible."""
    found = []
    for factor in range(top, 1, -1):
        while n % factor == 0:
            found.append(factor)
            n //= factor
    return sorted(found) if n == 1 else None


def _even(group: Sequence[int]) -> _Edges:
    """The mean of a group."""
    return {(a, b): 1.0 / len(group) for a in group for b in group if a < b}


def _digit_groups(nodes: Sequence[int], factors: Sequence[int]) -> list[_Edges]:
    """One round per factor: the mean of the nodes whose places agree in all digits but one (lowest digit first)."""
    rounds, stride = [], 1
    for factor in factors:
        edges: _Edges = {}
        for place in range(len(nodes)):
            if place // stride % factor == 0:
                edges |= _even([nodes[place + digit * stride] for digit in range(factor)])
        rounds.append(edges)
        stride *= factor
    return rounds


def _hypercube(nodes: Sequence[int], base: int) -> list[_Edges]:
    return _digit_groups(nodes, _factors(len(nodes), base) or [])


@lru_cache(maxsize=64)
def _base_graph(n: int, k: int) -> tuple[_Edges, ...]:
    base = k + 1
    simple = _simple(range(n), base)
    groups = max(p for p in range(1, n + 1) if n % p == 0 and _factors(p, base) is not None)
    size = n // groups
    inside = [_simple(range(g * size, (g + 1) * size), base) for g in range(groups)]
    across = [_hypercube(range(place, n, size), base) for place in range(size)]
    split = [_union(edges) for part in (inside, across) for edges in zip(*part, strict=True)]
    return tuple(split if len(split) < len(simple) else simple)


def _union(parts: Sequence[_Edges]) -> _Edges:
    return {ends: weight for edges in parts for ends, weight in edges.items()}


def _simple(nodes: range, base: int) -> list[_Edges]:
    """The simple base-(k+1) graph of consecutive nodes."""
    if _factors(len(nodes), base) is not None:
        return _hypercube(nodes, base)
    blocks = _blocks(nodes, base)
    inside = [_hypercube(block, base) for block, _ in blocks]
    again = [[_hypercube(part, base) for part in _split(block, count)] for block, count in blocks]
    first, length = len(inside[0]), len(inside[0]) + 1 + len(again[0][0])
    rounds = []
    for t in range(length):
        edges: _Edges = {}
        turn = t - first  # the block that hands on its value; earlier ones average inside, later ones receive
        for number, (own, parts) in enumerate(zip(inside, again, strict=True)):
            if turn < 0:
                edges |= own[t % len(own)] if own else {}
            elif number == turn < len(blocks) - 1:
                edges |= _hand_on(blocks, number, base)
            elif number < turn and number < len(blocks) - 1:
                edges |= _union([part[(turn - number - 1) % len(part)] for part in parts if part])
        rounds.append(edges)
    return rounds


def _blocks(nodes: range, base: int) -> list[tuple[range, int]]:
    """Consecutive blocks of ``digit * base**power`` nodes, one per digit of ``len(nodes)``, with their digits."""
    found, start, power = [], nodes.start, 1
    while power * base <= len(nodes):
        power *= base
    while start < nodes.stop:
        digit = (nodes.stop - start) // power
        if digit:
            found.append((range(start, start + digit * power), digit))
            start += digit * power
        power //= base
    return found


def _split(block: range, count: int) -> list[range]:
    size = len(block) // count
    return [block[q * size : (q + 1) * size] for q in range(count)]


def _hand_on(blocks: list[tuple[range, int]], turn: int, base: int) -> _Edges:
    """Every rank behind the block gets one unused partner in each of the block's parts; the rest average in groups."""
    block, count = blocks[turn]
    later = [node for other, _ in reversed(blocks[turn + 1 :]) for node in other]
    theta = len(block) / (len(block) + len(later))
    free = [list(part) for part in _split(block, count)]
    edges = {(part.pop(), node): theta / count for node in later for part in free}
    idle = [node for part in free for node in part]
    return edges | _union([_even(idle[i : i + base]) for i in range(0, len(idle), base)])
