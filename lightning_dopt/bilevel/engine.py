"""The engine of a bilevel plan: three engines, one per variable, and the directions they move along."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_dopt.bilevel.curvature import Curvature, FirstOrder, SecondOrder, all_finite
from lightning_dopt.bilevel.losses import Losses, Tensors
from lightning_dopt.bilevel.plan import BilevelPlan
from lightning_dopt.comm.world import Talk, World
from lightning_dopt.engine import Engine
from lightning_dopt.plan import Plan
from lightning_dopt.slots import FlatTensors

_DIRECTIONS = {"lower": "lower gradient", "auxiliary": "auxiliary direction", "upper": "hypergradient"}


class BilevelEngine(Engine):
    """Runs a bilevel plan on one replica. Call it around the upper optimizer's step of any loop.

    .. code-block:: python

        engine = BilevelEngine(plan, lower, upper, world, lr=lr)
        for batch in data:
            engine.run(engine.before_step())
            losses = Losses(lambda: lower_loss(batch), lambda: upper_loss(batch), lower, upper)
            engine.run(engine.descend(losses, lower_optimizer.step))
            upper_optimizer.step()
            engine.run(engine.after_step())
        engine.run(engine.finish())

    Lower parameters are moved by the caller's optimizer, within :meth:`descend`; the auxiliary variable by plain SGD. All
    ranks must start from the same values; ``z`` starts at zero.

    Args:
        plan: What to do.
        lower: ``y``: parameters of the lower level by name, in the same order on all ranks.
        upper: ``x``: parameters of the upper level.
        world: With whom.
        buffers: Buffers by name; averaged when the lower level's first sync runs.
        lr: Gives the current learning rate of a parameter by name.
        sync_buffers: Whether buffers are averaged.
        offload: See :class:`Engine`.

    Raises:
        ValueError: a level without parameters, one parameter on both levels, a plan that does not suit the number of workers, or
            a correction that needs a second pass.
    """

    plan: BilevelPlan

    def __init__(
        self,
        plan: BilevelPlan,
        lower: Mapping[str, Tensor],
        upper: Mapping[str, Tensor],
        world: World,
        lr: Callable[[str], float],
        buffers: Mapping[str, Tensor] | None = None,
        sync_buffers: bool = True,
        offload: bool = False,
    ) -> None:
        check_levels(lower, upper)
        plan.check(world.size)
        parameters = {**lower, **upper}
        parts = [_selections(plan.lower, lower), _selections(plan.upper, upper)]
        flat = FlatTensors(parameters, [*parts[0], *parts[1], lower, upper])
        super().__init__(
            plan,
            parameters,
            world,
            buffers,
            lr,
            gradient_groups=[list(lower), list(upper)],
            sync_buffers=False,
            offload=offload,
            flat=flat,
        )
        self.auxiliary = {name: torch.zeros_like(t, dtype=_at_least_float32(t)) for name, t in lower.items()}
        """``z`` by the names of ``y``, in single precision at least."""
        self.levels = {
            "lower": Engine(
                plan.lower, lower, world, buffers, lr, None, None, sync_buffers, offload, flat.part(lower), "lower"
            ),
            "auxiliary": Engine(
                plan.auxiliary, self.auxiliary, world, None, self._auxiliary_lr, offload=offload, name="auxiliary"
            ),
            "upper": Engine(plan.upper, upper, world, None, lr, None, None, False, offload, flat.part(upper), "upper"),
        }
        """The engines of the three variables."""
        if any(engine.passes == 2 for engine in self.levels.values()):
            raise ValueError("BilevelEngine: a level's correction needs a second pass, which bilevel steps do not take")

    def _auxiliary_lr(self, name: str) -> float:
        return self.plan.auxiliary_lr if self.plan.auxiliary_lr is not None else self.lr(name)

    # ------------------------------------------------------------------ the step

    def before_step(self) -> Talk[None]:
        """See :meth:`Engine.before_step`: messages that may travel while directions are computed leave here."""
        yield from super().before_step()
        for engine in self.levels.values():
            yield from engine.before_step()

    def descend(self, losses: Losses, step_lower: Callable[[], object]) -> Talk[None]:
        """Move ``y`` and ``z``, and leave the direction of ``x`` in the gradients of the upper parameters.

        Args:
            losses: Of this step.
            step_lower: The lower optimizer's step.

        Raises:
            FloatingPointError: a direction of this rank is not finite; its parameters are as before it.
            ValueError: a loss that cannot be differentiated as needed.
        """
        work = self._jacobi if self.plan.sweep == "jacobi" else self._gauss_seidel
        direction = yield from work(losses, step_lower)
        self._set("upper", direction)
        yield from self.levels["upper"].on_gradients()

    def _gauss_seidel(self, losses: Losses, step_lower: Callable[[], object]) -> Talk[Tensors]:
        for _ in range(self.plan.lower_steps):
            yield from self._move("lower", losses.lower_gradient(), step_lower)
        curvature, z = self._curvature(losses), list(self.auxiliary.values())
        upper, lower = losses.upper_gradients()
        for _ in range(self.plan.auxiliary_steps):
            torch._foreach_sub_(product := curvature.hessian(z), lower)
            yield from self._move("auxiliary", product, self._step_auxiliary)
        torch._foreach_sub_(upper, curvature.cross(z))
        return upper

    def _jacobi(self, losses: Losses, step_lower: Callable[[], object]) -> Talk[Tensors]:
        curvature = self._curvature(losses)
        gradient = curvature.lower_gradient()
        product, cross = curvature.both(list(self.auxiliary.values()))
        upper, lower = losses.upper_gradients()
        torch._foreach_sub_(product, lower)
        torch._foreach_sub_(upper, cross)
        yield from self._move("lower", gradient, step_lower)
        yield from self._move("auxiliary", product, self._step_auxiliary)
        return upper

    def _curvature(self, losses: Losses) -> Curvature:
        if self.plan.order == "second":
            return SecondOrder(losses, trusted=self.step > 0)
        return FirstOrder(losses, self.plan.delta, self.plan.difference)

    def _move(self, level: str, direction: Tensors, step: Callable[[], object]) -> Talk[None]:
        """One step of a level along a direction."""
        engine = self.levels[level]
        yield from engine.before_step()
        self._set(level, direction)
        yield from engine.on_gradients()
        step()
        self._clear(level)
        yield from engine.after_step()

    def _set(self, level: str, direction: Tensors) -> None:
        if not all_finite(direction):
            raise FloatingPointError(
                f"step {self.step + 1}: the {_DIRECTIONS[level]} of rank {self.world.rank} is not finite; lower the learning rates "
                "(the upper one first), or look for a loss that overflows"
            )
        for parameter, part in zip(self.levels[level].parameters.values(), direction, strict=True):
            parameter.grad = part.to(parameter.dtype)

    def _clear(self, level: str) -> None:
        for parameter in self.levels[level].parameters.values():
            parameter.grad = None

    def _step_auxiliary(self) -> None:
        for name, z in self.auxiliary.items():
            if z.grad is not None:
                z.sub_(z.grad, alpha=self._auxiliary_lr(name))

    def after_step(self) -> Talk[None]:
        """See :meth:`Engine.after_step`."""
        self._clear("upper")
        yield from self.levels["upper"].after_step()
        yield from super().after_step()

    def finish(self) -> Talk[None]:
        """See :meth:`Engine.finish`."""
        for engine in self.levels.values():
            yield from engine.finish()

    # ------------------------------------------------------------------ what others ask

    def _steps_of(self, level: str, step: int | None) -> range:
        """The steps that a level takes in a step."""
        each, step = self.plan.steps(level), self.step + 1 if step is None else step
        return range((step - 1) * each + 1, step * each + 1)

    def communicates(self, step: int | None = None) -> bool:
        """See :meth:`Engine.communicates`."""
        return any(e.communicates(k) for level, e in self.levels.items() for k in self._steps_of(level, step))

    def meets(self, step: int | None = None) -> bool:
        """See :meth:`Engine.meets`."""
        return any(e.meets(k) for level, e in self.levels.items() for k in self._steps_of(level, step))

    def skip(self, steps: int) -> None:
        """Levels cannot leave out steps.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"Engine.skip(steps={steps}): bilevel steps cannot be left out")

    def close(self) -> None:
        """See :meth:`Engine.close`."""
        for engine in self.levels.values():
            engine.close()

    def land(self) -> Talk[None]:
        """See :meth:`Engine.land`."""
        for engine in self.levels.values():
            yield from engine.land()

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`Engine.state_dict`; with the auxiliary variable."""
        levels = {level: engine.state_dict() for level, engine in self.levels.items()}
        return super().state_dict() | {"levels": levels, "auxiliary": dict(self.auxiliary)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`Engine.load_state_dict`."""
        super().load_state_dict(state)
        for level, engine in self.levels.items():
            engine.load_state_dict(state["levels"][level])
        for name, z in self.auxiliary.items():
            z.copy_(state["auxiliary"][name])


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def check_levels(lower: Mapping[str, Tensor], upper: Mapping[str, Tensor]) -> None:
    """Refuse parameters that do not make two levels.

    Raises:
        ValueError: a level is empty, or a parameter is on both.
    """
    for level, parameters in (("lower", lower), ("upper", upper)):
        if not parameters:
            raise ValueError(
                f"the {level} level has no trainable parameters: {level}_parameters must give at least one"
            )
    shared = {id(t) for t in lower.values()} & {id(t) for t in upper.values()}
    twice = [name for name, t in lower.items() if id(t) in shared] + sorted(set(lower) & set(upper))
    if twice:
        raise ValueError(f"parameter {twice[0]!r} is on both levels; give it to one")


def _selections(plan: Plan, parameters: Mapping[str, Tensor]) -> list[list[str]]:
    sizes = {name: t.numel() for name, t in parameters.items()}
    return [sync.what.select(sizes) for sync in plan]  # type: ignore[attr-defined]
