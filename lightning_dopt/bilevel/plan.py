"""A bilevel method as plain data: three plans, one per variable, and how directions are computed."""

from __future__ import annotations

from typing import Literal, get_args

from lightning_dopt._checks import check_choice, check_float, check_int
from lightning_dopt.bilevel.curvature import Difference, Order
from lightning_dopt.plan import OnNonfinite, Plan

Sweep = Literal["gauss_seidel", "jacobi"]
LEVELS = ("lower", "auxiliary", "upper")
_SLOTS = ("parameters", "gradients", "tracker")


class BilevelPlan(Plan):
    """Minimises ``mean_i F_i(x, y*(x))`` where ``y*(x)`` minimises ``mean_i G_i(x, y)``, in a single loop.

    Every step moves ``y`` along ``v = grad_y G``, ``z`` along ``p = G_yy z - grad_y F``, and ``x`` along
    ``u = grad_x F - G_xy z``, each as its own plan says: ``z`` solves ``mean G_yy z = mean grad_y F``, a third decentralized
    problem, and then the mean of ``u`` is the gradient of the upper loss (hypergradient).

    Args:
        lower: How ``y`` is mixed.
        auxiliary: How ``z`` is mixed.
        upper: How ``x`` is mixed.
        order: ``"second"``: products with second derivatives by autograd. ``"first"``: by differences of two gradients.
        sweep: ``"gauss_seidel"`` uses the new ``y`` for ``z`` and both for ``x``; ``"jacobi"`` the values at the start of the step
            everywhere, which takes one product instead of two.
        delta: Length of the difference in ``y``, for ``order="first"``.
        difference: ``"central"`` or ``"forward"``, for ``order="first"``.
        lower_steps: Steps of ``y`` per step of ``x``, on one batch; 1 is a single loop.
        auxiliary_steps: Steps of ``z`` per step of ``x``, on one batch.
        auxiliary_lr: Step size of ``z``; ``None``: the present learning rate of ``y``.

    Raises:
        ValueError: an argument out of range, several steps of the lower levels in a Jacobi sweep, or a plan that syncs other than
            parameters, gradients and trackers.
    """

    def __init__(
        self,
        lower: Plan,
        auxiliary: Plan,
        upper: Plan,
        order: Order = "second",
        sweep: Sweep = "gauss_seidel",
        delta: float = 1e-2,
        difference: Difference = "central",
        lower_steps: int = 1,
        auxiliary_steps: int = 1,
        auxiliary_lr: float | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.lower, self.auxiliary, self.upper = lower, auxiliary, upper
        check_directions(name, order, sweep, delta, difference, auxiliary_lr)
        self.order: Order = order
        self.sweep: Sweep = sweep
        self.difference: Difference = difference
        self.delta = float(delta)
        self.lower_steps = check_int(name, "lower_steps", lower_steps, 1)
        self.auxiliary_steps = check_int(name, "auxiliary_steps", auxiliary_steps, 1)
        self.auxiliary_lr = auxiliary_lr
        if sweep == "jacobi" and (lower_steps, auxiliary_steps) != (1, 1):
            raise ValueError(
                f"{name}(sweep='jacobi', lower_steps={lower_steps}, auxiliary_steps={auxiliary_steps}): takes one step of each"
            )
        for level, plan in self.levels().items():
            for sync in plan:
                if sync.what.slot not in _SLOTS:
                    raise ValueError(f"{name}({level}=...): a level syncs {', '.join(_SLOTS)}, not {sync.what.slot}")

    def levels(self) -> dict[str, Plan]:
        """The three plans by level, in the order in which they step."""
        return {level: getattr(self, level) for level in LEVELS}

    def steps(self, level: str) -> int:
        """Steps of a level per step of ``x``."""
        return {"lower": self.lower_steps, "auxiliary": self.auxiliary_steps, "upper": 1}[level]

    @property
    def overlaps(self) -> bool:
        """See :attr:`Plan.overlaps`."""
        return any(plan.overlaps for plan in self.levels().values())

    def guarded(
        self, checksum: bool = True, on_nonfinite: OnNonfinite = "raise", compare_every: int | None = None
    ) -> BilevelPlan:
        """See :meth:`Plan.guarded`."""
        guarded = {level: plan.guarded(checksum, on_nonfinite, compare_every) for level, plan in self.levels().items()}
        return BilevelPlan(**self.arguments() | guarded)

    def check(self, n: int) -> None:
        """See :meth:`Plan.check`.

        Raises:
            ValueError: also if the mixing of a level does not keep the plain mean: the levels would solve different problems.
        """
        super().check(n)
        for level, plan in self.levels().items():
            try:
                plan.check(n)
            except ValueError as error:
                raise ValueError(f"{level} level: {error}") from error
            if max(abs(share - 1 / n) for share in plan.means(n)) > 1e-9:
                peers = next(s.peers for s in plan if s.what.slot == "parameters")
                raise ValueError(
                    f"{level} level: {peers!r} with {n} workers keeps a weighted mean; bilevel methods need a doubly stochastic "
                    "topology"
                )


def check_directions(
    owner: str, order: Order, sweep: Sweep, delta: float, difference: Difference, auxiliary_lr: float | None
) -> None:
    """Check how directions are computed, under the name of who asks.

    Raises:
        ValueError: an argument out of range.
    """
    check_choice(owner, "order", order, get_args(Order))
    check_choice(owner, "sweep", sweep, get_args(Sweep))
    check_choice(owner, "difference", difference, get_args(Difference))
    check_float(owner, "delta", delta, 0.0, open_low=True, open_high=True)
    if auxiliary_lr is not None:
        check_float(owner, "auxiliary_lr", auxiliary_lr, 0.0, open_low=True, open_high=True)
