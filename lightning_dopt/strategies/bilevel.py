"""Strategies for modules with two levels: D-SOBA, SPARKLE, or a plan of one's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_dopt import bilevel
from lightning_dopt.bilevel.curvature import Difference, Order
from lightning_dopt.bilevel.engine import BilevelEngine, check_levels
from lightning_dopt.bilevel.level import Level, LevelName
from lightning_dopt.bilevel.losses import Losses
from lightning_dopt.bilevel.plan import BilevelPlan, Sweep
from lightning_dopt.comm.link import Link
from lightning_dopt.compress.base import Codec
from lightning_dopt.engine import Engine
from lightning_dopt.local import ExactDiffusion, Extra
from lightning_dopt.strategies import _private
from lightning_dopt.strategies.bilevel_module import BilevelModule
from lightning_dopt.strategies.collectives import StartMethod
from lightning_dopt.strategies.named import HALF_HOUR, BufferPolicy, Evaluate
from lightning_dopt.strategies.replica import ReplicaStrategy
from lightning_dopt.strategies.two_passes import muted
from lightning_dopt.topology.base import Topology

_LOWER, _UPPER = 0, 1


class BilevelStrategy(ReplicaStrategy):
    """Trains a :class:`BilevelModule` as a :class:`BilevelPlan` says.

    Args:
        plan: The method, for example ``bilevel.sparkle(Ring())``.
        evaluate: See :class:`ReplicaStrategy`, as for all that follow.
        buffers: See :class:`ReplicaStrategy`; averaged when the lower level's first sync runs.
        offload: See :class:`ReplicaStrategy`.
        measure_every: See :class:`ReplicaStrategy`.
        link: See :class:`ReplicaStrategy`.
        link_step_seconds: See :class:`ReplicaStrategy`.
        timeout: See :class:`ReplicaStrategy`.
        process_group_backend: See :class:`ReplicaStrategy`.
        start_method: See :class:`ReplicaStrategy`.

    Raises:
        ValueError: a plan that is not of two levels or does not suit the number of workers, when the strategy or the Trainer is
            made; a module whose losses, parameters or optimizers do not make two levels, when a fit starts.
    """

    plan: BilevelPlan

    def __init__(
        self,
        plan: BilevelPlan,
        evaluate: Evaluate = "consensus",
        buffers: BufferPolicy = "average",
        offload: bool = False,
        measure_every: int = 0,
        link: Link | None = None,
        link_step_seconds: float | None = None,
        timeout: timedelta = HALF_HOUR,
        process_group_backend: str | None = None,
        start_method: StartMethod = "popen",
    ) -> None:
        if not isinstance(plan, BilevelPlan):
            raise ValueError(f"{type(self).__name__}(plan={plan!r}): must be a BilevelPlan, such as bilevel.sparkle()")
        super().__init__(
            plan=plan,
            evaluate=evaluate,
            buffers=buffers,
            offload=offload,
            clock=_UPPER,
            measure_every=measure_every,
            link=link,
            link_step_seconds=link_step_seconds,
            timeout=timeout,
            process_group_backend=process_group_backend,
            start_method=start_method,
        )

    # ------------------------------------------------------------------ start

    def setup_optimizers(self, trainer: Any) -> None:
        """Make the optimizers, and refuse what does not make two levels."""
        module, name = self.lightning_module, type(self).__name__
        if not isinstance(module, BilevelModule):
            raise ValueError(f"{name}: needs a BilevelModule with two losses, got {type(module).__name__}")
        if getattr(self.precision_plugin, "scaler", None) is not None:
            raise ValueError("Trainer(precision='16-mixed'): second derivatives and differences need unscaled losses")
        levels = module_levels(module)
        super().setup_optimizers(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            if any(isinstance(config.scheduler, ReduceLROnPlateau) for config in self.lr_scheduler_configs):
                raise ValueError(
                    f"{name}: ReduceLROnPlateau follows a metric, which steps do not have; use another scheduler"
                )
            _check_optimizers(name, [_private.unwrap_optimizer(o) for o in self.optimizers], levels)
            for level, optimizer in zip(("lower", "upper"), self.optimizers, strict=True):
                _warn_of_momentum(self.plan, level, _private.unwrap_optimizer(optimizer))

    def _make_engine(self) -> Engine:
        module, world = self.lightning_module, self.world
        assert isinstance(module, BilevelModule)
        assert world is not None
        saved = module.state_dict(keep_vars=True)
        lower, upper = module_levels(module)
        return BilevelEngine(
            self.plan,
            lower,
            upper,
            world,
            self._index.lr,
            {n: b for n, b in module.named_buffers() if n in saved},
            self.buffer_policy == "average",
            self.offload,
        )

    # ------------------------------------------------------------------ the step

    def bilevel_step(self, lower_batch: Any, upper_batch: Any) -> tuple[Tensor, Tensor]:
        """One step of all variables, for :meth:`BilevelModule.training_step`.

        Returns:
            Lower and upper loss, as first evaluated.

        Raises:
            FloatingPointError: a direction is not finite.
            ValueError: a loss that cannot be differentiated as needed.
        """
        engine, module = self.engine, self.lightning_module
        assert isinstance(engine, BilevelEngine)
        assert isinstance(module, BilevelModule)
        losses = Losses(
            lambda: self._lower_loss(losses, lower_batch),
            lambda: module.upper_loss(upper_batch),
            engine.levels["lower"].parameters,
            engine.levels["upper"].parameters,
            list(module.buffers()),
        )
        engine.run(engine.descend(losses, _private.unwrap_optimizer(self.optimizers[_LOWER]).step))
        module.optimizers()[_UPPER].step()  # type: ignore[index]
        for config in self.lr_scheduler_configs:
            config.scheduler.step()  # type: ignore[call-arg]  # none of them follows a metric
        return losses.values["lower"], losses.values["upper"]

    def _lower_loss(self, losses: Losses, batch: Any) -> Tensor:
        module = self.lightning_module
        assert isinstance(module, BilevelModule)
        with muted(module) if losses.values.get("lower") is not None else nullcontext():
            return module.lower_loss(batch)


class DSOBAStrategy(BilevelStrategy):
    """D-SOBA: gossip at all levels of a :class:`BilevelModule`. See :func:`lightning_dopt.bilevel.dsoba`.

    Args:
        topology: With whom; ``None`` means the ring.
        order: ``"second"`` or ``"first"``: how products with second derivatives are had.
        theta: Weight of the new hypergradient in its moving average.
        codec: What is on the wire; a lossy compressor is wrapped in ``Difference``.
        sync_every: Steps between mixings.
        sweep: See :class:`BilevelPlan`.
        delta: See :class:`BilevelPlan`.
        difference: See :class:`BilevelPlan`.
        auxiliary_lr: Step size of the auxiliary variable; ``None``: the lower level's learning rate.
        evaluate: See :class:`ReplicaStrategy`, as for all that follow.
        buffers: See :class:`ReplicaStrategy`.
        measure_every: See :class:`ReplicaStrategy`.
        link: See :class:`ReplicaStrategy`.
        link_step_seconds: See :class:`ReplicaStrategy`.
        timeout: See :class:`ReplicaStrategy`.
        process_group_backend: See :class:`ReplicaStrategy`.
        start_method: See :class:`ReplicaStrategy`.
    """

    def __init__(
        self,
        topology: Topology | None = None,
        order: Order = "second",
        theta: float = 0.3,
        codec: Codec | None = None,
        sync_every: int = 1,
        sweep: Sweep = "gauss_seidel",
        delta: float = 1e-2,
        difference: Difference = "central",
        auxiliary_lr: float | None = None,
        evaluate: Evaluate = "consensus",
        buffers: BufferPolicy = "average",
        measure_every: int = 0,
        link: Link | None = None,
        link_step_seconds: float | None = None,
        timeout: timedelta = HALF_HOUR,
        process_group_backend: str | None = None,
        start_method: StartMethod = "popen",
    ) -> None:
        super().__init__(
            bilevel.dsoba(topology, order, theta, codec, sync_every, sweep, delta, difference, auxiliary_lr),
            evaluate=evaluate,
            buffers=buffers,
            measure_every=measure_every,
            link=link,
            link_step_seconds=link_step_seconds,
            timeout=timeout,
            process_group_backend=process_group_backend,
            start_method=start_method,
        )


class SparkleStrategy(BilevelStrategy):
    """SPARKLE: each level of a :class:`BilevelModule` with its own correction. See :func:`lightning_dopt.bilevel.sparkle`.

    Args:
        topology: With whom, where a level does not say; ``None`` means the ring.
        upper: ``"dsgd"``, ``"gt"``, ``"semi_gt"``, ``"non_atc_gt"``, ``"extra"``, ``"ed"``, or a :class:`Level`.
        lower: The same of the lower parameters.
        auxiliary: The same of the auxiliary variable.
        theta: Weight of the new hypergradient in its moving average (momentum ``1 - theta``).
        codec: What is on the wire, where a level does not say; a lossy compressor is wrapped in ``Difference``.
        sync_every: Steps between mixings, where a level does not say.
        order: ``"second"`` or ``"first"``: how products with second derivatives are had.
        sweep: See :class:`BilevelPlan`.
        delta: See :class:`BilevelPlan`.
        difference: See :class:`BilevelPlan`.
        auxiliary_lr: Step size of the auxiliary variable; ``None``: the lower level's learning rate.
        evaluate: See :class:`ReplicaStrategy`, as for all that follow.
        buffers: See :class:`ReplicaStrategy`.
        measure_every: See :class:`ReplicaStrategy`.
        link: See :class:`ReplicaStrategy`.
        link_step_seconds: See :class:`ReplicaStrategy`.
        timeout: See :class:`ReplicaStrategy`.
        process_group_backend: See :class:`ReplicaStrategy`.
        start_method: See :class:`ReplicaStrategy`.
    """

    def __init__(
        self,
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
        evaluate: Evaluate = "consensus",
        buffers: BufferPolicy = "average",
        measure_every: int = 0,
        link: Link | None = None,
        link_step_seconds: float | None = None,
        timeout: timedelta = HALF_HOUR,
        process_group_backend: str | None = None,
        start_method: StartMethod = "popen",
    ) -> None:
        plan = bilevel.sparkle(
            topology,
            upper,
            lower,
            auxiliary,
            theta,
            codec,
            sync_every,
            order,
            sweep,
            delta,
            difference,
            auxiliary_lr,
        )
        super().__init__(
            plan,
            evaluate=evaluate,
            buffers=buffers,
            measure_every=measure_every,
            link=link,
            link_step_seconds=link_step_seconds,
            timeout=timeout,
            process_group_backend=process_group_backend,
            start_method=start_method,
        )


# ---------------------------------------------------------------------- what makes two levels


def module_levels(module: BilevelModule) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The trainable parameters of the lower and of the upper level by name, in the module's order.

    Raises:
        ValueError: a level is empty, a parameter is on both levels or on none, or is not the module's.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    lower = _named(module, "lower", module.lower_parameters(), names)
    upper = _named(module, "upper", module.upper_parameters(), names)
    check_levels(lower, upper)
    lost = [n for n, p in module.named_parameters() if p.requires_grad and n not in lower and n not in upper]
    if lost:
        raise ValueError(f"{type(module).__name__}: parameter {lost[0]!r} is on no level; give it to one, or freeze it")
    return lower, upper


def _named(
    module: BilevelModule, level: str, parameters: Iterable[nn.Parameter], names: Mapping[int, str]
) -> dict[str, Tensor]:
    wanted = {id(p) for p in parameters}
    strange = wanted - set(names)
    if strange:
        raise ValueError(
            f"{type(module).__name__}: {level}_parameters gives {len(strange)} tensor(s) that are no parameters of the module"
        )
    return {n: p for n, p in module.named_parameters() if id(p) in wanted and p.requires_grad}


def _check_optimizers(owner: str, optimizers: list[Any], levels: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    """One optimizer per level, the lower one first.

    Raises:
        ValueError: otherwise.
    """
    if len(optimizers) != 2:
        raise ValueError(
            f"{owner}: configure_optimizers must return two optimizers, lower then upper, got {len(optimizers)}"
        )
    for level, optimizer, parameters in zip(("lower", "upper"), optimizers, levels, strict=True):
        held = {id(p) for g in optimizer.param_groups for p in g["params"] if p.requires_grad}
        if held != {id(p) for p in parameters.values()}:
            raise ValueError(
                f"{owner}: the {'first' if level == 'lower' else 'second'} optimizer must hold exactly the {len(parameters)} "
                f"{level} parameters (configure_optimizers returns lower, then upper)"
            )


def _warn_of_momentum(plan: BilevelPlan, level: str, optimizer: Any) -> None:
    """Corrections that compare displacements with gradients must know of momentum."""
    group = optimizer.param_groups[0]
    momentum = group.get("momentum", 0.0) or ("betas" in group and 0.9)
    for correction in plan.levels()[level].corrections:
        if momentum and isinstance(correction, (ExactDiffusion, Extra)) and correction.kappa == 1.0:
            name = type(correction).__name__
            rank_zero_warn(
                f"{level} level: {name}(kappa=1.0) is for plain SGD, not {type(optimizer).__name__} with momentum; use "
                f"{level}=Level({name}(kappa=0.1)), or 'gt'"
            )
