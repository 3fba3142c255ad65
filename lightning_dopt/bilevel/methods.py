"""Published bilevel methods, each a small function that returns a :class:`BilevelPlan`."""

from __future__ import annotations

from lightning_dopt._checks import check_float, check_int
from lightning_dopt.bilevel.curvature import Difference, Order
from lightning_dopt.bilevel.level import Level, LevelName, level_of
from lightning_dopt.bilevel.plan import LEVELS, BilevelPlan, Sweep, check_directions
from lightning_dopt.compress.base import Codec
from lightning_dopt.topology import Complete
from lightning_dopt.topology.base import Topology

_DSGD = dict.fromkeys(LEVELS, Level("dsgd"))


def dsoba(
    topology: Topology | None = None,
    order: Order = "second",
    theta: float = 0.3,
    codec: Codec | None = None,
    sync_every: int = 1,
    sweep: Sweep = "gauss_seidel",
    delta: float = 1e-2,
    difference: Difference = "central",
    auxiliary_lr: float | None = None,
) -> BilevelPlan:
    """D-SOBA: all three variables move by decentralized SGD; one message of each per step.

    Over heterogeneous data it ends at a distance from the optimum that is proportional to the step sizes and grows as the graph
    gets sparser; :func:`sparkle` removes it.

    Args:
        topology: With whom, for all levels; ``None`` means the ring.
        order: ``"second"`` (D-SOBA-SO) or ``"first"`` (D-SOBA-FO), see :class:`BilevelPlan`.
        theta: Weight of the new hypergradient in its moving average.
        codec: What is on the wire; a lossy compressor is wrapped in ``Difference``.
        sync_every: Steps between mixings.
        sweep: See :class:`BilevelPlan`.
        delta: See :class:`BilevelPlan`.
        difference: See :class:`BilevelPlan`.
        auxiliary_lr: Step size of the auxiliary variable; ``None``: the lower level's.

    Raises:
        ValueError: an option out of range.

    Source: Kong, Zhu, Lu, Huang, Yuan, "Decentralized Bilevel Optimization over Graphs: Loopless Algorithmic Update and
    Transient Iteration Complexity", arXiv 2402.03167.
    """
    return _made(
        "dsoba",
        _DSGD,
        topology,
        theta,
        codec,
        sync_every,
        (order, sweep, delta, difference),
        auxiliary_lr,
    )


def sparkle(
    topology: Topology | None = None,
    upper: LevelName | Level = "ed",
    lower: LevelName | Level = "ed",
    auxiliary: LevelName | Level = "ed",
    theta: float = 0.3,
    codec: Codec | None = None,
    sync_every: int = 1,
    order: Order = "second",
    sweep: Sweep = "gauss_seidel",
    delta: float = 1e-2,
    difference: Difference = "central",
    auxiliary_lr: float | None = None,
) -> BilevelPlan:
    """SPARKLE: each variable has its own correction against the bias of heterogeneous data, and its own graph if need be.

    Args:
        topology: With whom, where a level has no topology of its own; ``None`` means the ring.
        upper: ``"dsgd"``, ``"gt"``, ``"semi_gt"``, ``"non_atc_gt"``, ``"extra"``, ``"ed"``, or a :class:`Level`.
        lower: The same of ``y``.
        auxiliary: The same of ``z``.
        theta: Weight of the new hypergradient in its moving average (momentum ``1 - theta``).
        codec: What is on the wire, where a level has no codec of its own; a lossy compressor is wrapped in ``Difference``.
        sync_every: Steps between mixings, where a level does not say.
        order: See :class:`BilevelPlan`.
        sweep: See :class:`BilevelPlan`.
        delta: See :class:`BilevelPlan`.
        difference: See :class:`BilevelPlan`.
        auxiliary_lr: Step size of the auxiliary variable; ``None``: the lower level's.

    Raises:
        ValueError: an unknown level, or an option out of range.

    Source: Zhu, Kong, Lu, Huang, Yuan, "SPARKLE: A Unified Single-Loop Primal-Dual Framework for Decentralized Bilevel
    Optimization", arXiv 2411.14166.
    """
    given = {"lower": lower, "auxiliary": auxiliary, "upper": upper}
    levels = {name: level_of("sparkle", name, level) for name, level in given.items()}
    numbers: tuple[Order, Sweep, float, Difference] = (order, sweep, delta, difference)
    return _made("sparkle", levels, topology, theta, codec, sync_every, numbers, auxiliary_lr)


def soba(theta: float = 0.3, order: Order = "second", auxiliary_lr: float | None = None) -> BilevelPlan:
    """SOBA on the mean of all workers' directions: D-SOBA over the complete graph, the centralized baseline.

    Args:
        theta: Weight of the new hypergradient in its moving average; 1 is SOBA as published.
        order: See :class:`BilevelPlan`.
        auxiliary_lr: Step size of the auxiliary variable; ``None``: the lower level's.

    Raises:
        ValueError: an option out of range.

    Source: Dagréou, Ablin, Vaiter, Moreau, "A framework for bilevel optimization that enables stochastic and global variance
    reduction algorithms", arXiv 2201.13409.
    """
    numbers: tuple[Order, Sweep, float, Difference] = (order, "gauss_seidel", 1e-2, "central")
    return _made("soba", _DSGD, Complete(), theta, None, 1, numbers, auxiliary_lr)


def double_loop(
    topology: Topology | None = None,
    lower_steps: int = 10,
    auxiliary_steps: int = 10,
    lower: LevelName | Level = "dsgd",
    auxiliary: LevelName | Level = "dsgd",
    upper: LevelName | Level = "dsgd",
    theta: float = 1.0,
    order: Order = "second",
    auxiliary_lr: float | None = None,
) -> BilevelPlan:
    """Gossip with inner loops: several mixed steps of ``y`` and of ``z`` before each step of ``x``; a baseline.

    With ``theta < 1`` the moving average of MA-DSBO: its structure, not its choice of samples, as all steps of an inner loop are on
    one batch. Every inner step sends a message.

    Args:
        topology: With whom; ``None`` means the ring.
        lower_steps: Steps of ``y`` per step of ``x``.
        auxiliary_steps: Steps of ``z`` per step of ``x``, towards the solution of its linear system.
        lower: See :func:`sparkle`; ``"gt"`` at all levels is the form with gradient tracking.
        auxiliary: The same of ``z``.
        upper: The same of ``x``.
        theta: Weight of the new hypergradient in its moving average; 1 keeps none.
        order: See :class:`BilevelPlan`.
        auxiliary_lr: Step size of the auxiliary variable; ``None``: the lower level's.

    Raises:
        ValueError: an option out of range.

    Source: Chen, Huang, Ma, Balasubramanian, "Decentralized Stochastic Bilevel Optimization with Improved per-Iteration
    Complexity", arXiv 2210.12839 (MA-DSBO), for the moving average; Yang, Zhang, Wang, "Decentralized Gossip-Based Stochastic
    Bilevel Optimization over Communication Networks", arXiv 2206.10870, for inner loops with gossip.
    """
    check_int("double_loop", "lower_steps", lower_steps, 1)
    check_int("double_loop", "auxiliary_steps", auxiliary_steps, 1)
    given = {"lower": lower, "auxiliary": auxiliary, "upper": upper}
    levels = {name: level_of("double_loop", name, level) for name, level in given.items()}
    numbers: tuple[Order, Sweep, float, Difference] = (order, "gauss_seidel", 1e-2, "central")
    return _made("double_loop", levels, topology, theta, None, 1, numbers, auxiliary_lr, (lower_steps, auxiliary_steps))


def _made(
    owner: str,
    levels: dict[str, Level],
    topology: Topology | None,
    theta: float,
    codec: Codec | None,
    sync_every: int,
    numbers: tuple[Order, Sweep, float, Difference],
    auxiliary_lr: float | None,
    steps: tuple[int, int] = (1, 1),
) -> BilevelPlan:
    check_float(owner, "theta", theta, 0.0, 1.0, open_low=True)
    check_int(owner, "sync_every", sync_every, 1)
    check_directions(owner, *numbers, auxiliary_lr)
    plans = {
        name: level.plan(owner, name, topology, codec, sync_every, theta if name == "upper" else 1.0)
        for name, level in levels.items()
    }
    return BilevelPlan(plans["lower"], plans["auxiliary"], plans["upper"], *numbers, *steps, auxiliary_lr=auxiliary_lr)
