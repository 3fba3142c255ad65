"""Which optimizer steps which parameter of a LightningModule."""

from __future__ import annotations

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer


class OptimizerIndex:
    """The trainable parameters of a module, by name and by optimizer.

    A tied parameter appears once, under its first name. A single optimizer that holds parameters of layers that have since
    been replaced (built before a callback changed the module) is given the module's present parameters.

    Args:
        module: The module.
        optimizers: Its optimizers, in order.
        clock: Index of the optimizer whose steps count.

    Raises:
        ValueError: no optimizer with that index, nothing to train, or optimizers that cannot work here.
    """

    def __init__(self, module: nn.Module, optimizers: list[Optimizer], clock: int) -> None:
        self.trainable: dict[str, Tensor] = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.optimizers = optimizers
        self.clock = clock
        if not self.trainable:
            raise ValueError("the module has no trainable parameters")
        if optimizers and clock >= len(optimizers):
            raise ValueError(f"clock={clock}: configure_optimizers returned {len(optimizers)} optimizer(s)")
        if any(isinstance(o, LBFGS) for o in optimizers):
            raise ValueError("LBFGS evaluates the loss a different number of times on each rank; use another optimizer")
        self._replace_stale()
        self._places = {
            id(p): (o, k) for o in optimizers for k, g in enumerate(o.param_groups) for p in g["params"]
        }  # not the groups themselves: restoring an optimizer replaces them
        names = {id(p): n for n, p in self.trainable.items()}
        self.groups = [
            [names[id(p)] for g in o.param_groups for p in g["params"] if id(p) in names] for o in optimizers
        ]
        self._check_disjoint()

    def _replace_stale(self) -> None:
        present = {id(p) for p in self.trainable.values()}
        frozen_or_known = present | {id(p) for o in self.optimizers for p in _frozen(o)}
        for optimizer in self.optimizers:
            held = [p for g in optimizer.param_groups for p in g["params"]]
            stale = [p for p in held if id(p) not in frozen_or_known]
            if not stale:
                continue
            if len(self.optimizers) > 1 or len(optimizer.param_groups) > 1 or optimizer.state:
                raise ValueError(
                    f"{type(optimizer).__name__} holds {len(stale)} parameters that are no longer part of the module: layers were "
                    "replaced after it was made; make the optimizer in configure_optimizers"
                )
            rank_zero_warn(
                f"{type(optimizer).__name__} held {len(stale)} parameters of layers that have been replaced; it now steps all "
                f"{len(self.trainable)} trainable parameters of the module"
            )
            optimizer.param_groups[0]["params"] = list(self.trainable.values())

    def _check_disjoint(self) -> None:
        seen: set[str] = set()
        for group in self.groups:
            twice = seen & set(group)
            if twice:
                raise ValueError(f"parameter {min(twice)!r} belongs to two optimizers; give each parameter to one")
            seen |= set(group)

    @property
    def several(self) -> bool:
        """Whether there is more than one optimizer."""
        return len(self.optimizers) > 1

    def position(self, optimizer: Optimizer) -> int:
        """Index of an optimizer."""
        return next(k for k, other in enumerate(self.optimizers) if other is optimizer)

    def lr(self, name: str) -> float:
        """Current learning rate of a parameter; 0 if no optimizer steps it."""
        optimizer, group = self._places.get(id(self.trainable[name]), (None, 0))
        return float(optimizer.param_groups[group]["lr"]) if optimizer is not None else 0.0

    def state(self, name: str, key: str) -> Tensor:
        """A state tensor of the clock optimizer.

        Raises:
            ValueError: it has no such state, listing what it has.
        """
        optimizer = self.optimizers[self.clock]
        state = optimizer.state.get(self.trainable[name], {})
        if not isinstance(state.get(key), Tensor):
            known = sorted(
                {k for s in optimizer.state.values() for k, v in s.items() if isinstance(v, Tensor) and v.dim()}
            )
            raise ValueError(f"OptimizerState(key={key!r}): {type(optimizer).__name__} keeps {known} for {name!r}")
        found: Tensor = state[key]
        return found


def _frozen(optimizer: Optimizer) -> list[Tensor]:
    return [p for g in optimizer.param_groups for p in g["params"] if not p.requires_grad]
