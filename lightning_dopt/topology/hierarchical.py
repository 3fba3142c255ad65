"""Two levels: everybody inside a machine, a graph between machines."""

from __future__ import annotations

from lightning_dopt._checks import check_int
from lightning_dopt.topology.base import Topology


class Hierarchical(Topology):
    """Machines of ``local`` ranks each: the exact mean inside a machine, another topology between machines.

    Rank ``i`` is place ``i % local`` of machine ``i // local``. With ``W_m`` the matrix between machines and ``g`` the
    ranks per machine the matrix is the Kronecker product ``W_m x (1/g) 11'``: every round a machine forms the mean of
    its ranks, machines mix these means, and all ranks of a machine hold the result. The consensus rate is that of
    ``W_m``, and so are symmetry, stochasticity and period; nothing depends on how fast ranks of a machine agree.

    Messages: written as one matrix, as it is here, a rank hears all ranks of its own machine and of the machines that
    its machine hears, ``g (degree + 1) - 1`` messages per round, of which ``g degree`` cross machines. An executor with
    groups gets the same result with a reduce inside the machine, one exchange per link between machines and a
    broadcast inside.

    Args:
        local: ranks per machine, at least 1; consecutive ranks share a machine.
        between: the topology between machines, made for ``n / local`` of them.

    Raises:
        ValueError: an argument outside its range; from ``check``, a number of workers that ``local`` does not divide, or
            for which ``between`` does not exist.
    """

    def __init__(self, local: int, between: Topology) -> None:
        self.local = check_int("Hierarchical", "local", local, 1)
        if not isinstance(between, Topology):
            raise ValueError(f"Hierarchical(between={between!r}): must be a topology such as Ring()")
        self.between = between
        self.directed = between.directed

    def check(self, n: int) -> None:
        """Raise ``ValueError`` if ``n`` workers do not fill whole machines, or ``between`` refuses their number."""
        super().check(n)
        if n % self.local:
            raise ValueError(f"Hierarchical(local={self.local}): {n} workers do not fill machines of {self.local}")
        self.between.check(n // self.local)

    def period(self, n: int) -> int | None:
        """The period of the topology between machines."""
        return self.between.period(n // self.local)

    def row(self, n: int, rank: int, step: int = 0) -> dict[int, float]:
        """The machine's row, every weight shared evenly by the ranks of the machine it is for."""
        row = self.between.row(n // self.local, rank // self.local, step)
        return {j: weight / self.local for machine, weight in row.items() for j in self._ranks(machine)}

    def receivers(self, n: int, rank: int, step: int = 0) -> list[int]:
        """All other ranks of the own machine and of the machines that hear it."""
        machine = rank // self.local
        heard_by = sorted([machine, *self.between.receivers(n // self.local, machine, step)])
        return [j for other in heard_by for j in self._ranks(other) if j != rank]

    def _ranks(self, machine: int) -> range:
        return range(machine * self.local, (machine + 1) * self.local)

    def max_degree(self, n: int) -> int:
        """All other ranks of the own machine and of all machines heard."""
        return self.local * (self.between.max_degree(n // self.local) + 1) - 1

    def is_mean(self, n: int) -> bool:
        """Whether machines form their exact mean in every round."""
        return self.between.is_mean(n // self.local)

    def symmetric(self, n: int) -> bool:
        """Whether the matrices between machines are symmetric."""
        return self.between.symmetric(n // self.local)

    def reversible(self, n: int) -> bool:
        """As the inner topology."""
        return self.between.reversible(n // self.local)

    def stationary(self, n: int) -> list[float]:
        """The stationary weights of the machines, shared evenly by their ranks."""
        return [weight / self.local for weight in self.between.stationary(n // self.local) for _ in range(self.local)]

    def doubly_stochastic(self, n: int) -> bool:
        """Whether the matrices between machines are doubly stochastic."""
        return self.between.doubly_stochastic(n // self.local)

    def row_stochastic(self, n: int) -> bool:
        """Whether the rows of the matrices between machines sum to one."""
        return self.between.row_stochastic(n // self.local)

    def column_stochastic(self, n: int) -> bool:
        """Whether the columns of the matrices between machines sum to one."""
        return self.between.column_stochastic(n // self.local)
