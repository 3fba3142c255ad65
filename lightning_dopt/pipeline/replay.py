"""An untouched ``training_step`` in two halves: what comes before its network, and what comes after."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


class _ReachedNetwork(BaseException):
    """Ends a step where it calls its network; no ``except Exception`` of the step may catch it."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.given, self.named = args, kwargs


class Replay:
    """Finds a network's input, and the loss of its output, by running a module's own step around it.

    ``inputs`` runs the step until it calls the network and returns what it would be given; ``loss`` runs it with an
    output in the network's place. Both fit the arguments of the same names of a pipeline, so that a module written for
    Lightning trains in stages as it is. Meanwhile its ``log`` and ``log_dict`` do nothing, or what ``on_log`` says.

    The step must call the network exactly once, with one tensor, and its loss must be a mean over samples that depends on
    the batch and the network's output only (a penalty on weights would be lost).

    Args:
        module: The module with the step, such as a ``LightningModule``.
        network: The name of the network in it, ``""`` for the module itself; all parameters that are trained must be inside.
        step: The name of the step.

    Raises:
        ValueError: The module has no such network or step, or trains parameters outside of the network.
    """

    def __init__(self, module: nn.Module, network: str = "model", step: str = "training_step") -> None:
        found = dict(module.named_modules()).get(network)
        if found is None:
            raise ValueError(f"Replay(network={network!r}): {type(module).__name__} has no such module")
        if not callable(getattr(module, step, None)):
            raise ValueError(f"Replay(step={step!r}): {type(module).__name__} has no such method")
        inside = set(found.parameters())
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and parameter not in inside:
                raise ValueError(f"Replay(network={network!r}): '{name}' is outside of it and would not be trained")
        self.module, self.network, self.name, self.step = module, found, network, step
        self.batch_idx = 0
        """The number of the batch that the step is told, if it asks for one."""
        self.on_log: Callable[..., None] = _nothing
        """Called in the place of the module's ``log`` while a loss is computed; by default nothing is logged."""

    def inputs(self, batch: Any) -> Tensor:
        """What the step gives to the network for this batch.

        Raises:
            ValueError: The step does not call the network, or not with one tensor.
        """

        def stop(*args: Any, **kwargs: Any) -> Any:
            raise _ReachedNetwork(args, kwargs)

        try:
            with self._network_is(stop), torch.no_grad():
                self._run(batch)
        except _ReachedNetwork as reached:
            given = [*reached.given, *reached.named.values()]
            if len(given) != 1 or not isinstance(given[0], Tensor):
                told = f"{self._where()}: must call {self._called()} with one tensor and nothing else"
                raise ValueError(told) from None
            return given[0]
        raise ValueError(f"{self._where()}: does not call {self._called()}")

    def loss(self, output: Tensor, batch: Any) -> Tensor:
        """The loss of the step if the network gave this output.

        Raises:
            ValueError: The step does not call the network exactly once, or does not return a loss.
        """
        calls = 0

        def answer(*args: Any, **kwargs: Any) -> Tensor:
            nonlocal calls
            calls += 1
            return output

        with self._network_is(answer, self.on_log):
            result = self._run(batch)
        if calls != 1:
            raise ValueError(f"{self._where()}: must call {self._called()} once, not {calls} times")
        value = result.get("loss") if isinstance(result, dict) else result
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError(
                f"{self._where()}: must return a loss, or a dictionary with 'loss', not {type(value).__name__}"
            )
        return value

    def _run(self, batch: Any) -> Any:
        step = getattr(self.module, self.step)
        names = list(inspect.signature(step).parameters)
        return step(batch, self.batch_idx) if len(names) > 1 else step(batch)

    def _called(self) -> str:
        return repr(self.name) if self.name else "the module itself"

    def _where(self) -> str:
        return f"{type(self.module).__name__}.{self.step}"

    def _network_is(
        self, forward: Callable[..., Any], log: Callable[..., None] = _nothing
    ) -> AbstractContextManager[None]:
        return stand_in(self.module, self.network, forward, log)


@contextmanager
def stand_in(
    module: nn.Module, network: nn.Module, forward: Callable[..., Any], log: Callable[..., None] = _nothing
) -> Iterator[None]:
    """With another forward of a module's network, and another ``log`` of the module; ``log_dict`` calls that for each entry."""

    def log_dict(dictionary: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        for name, value in dictionary.items():
            log(name, value, *args, **kwargs)

    replaced: list[tuple[nn.Module, str, Callable[..., Any]]] = [(network, "forward", forward)]
    for name, function in (("log", log), ("log_dict", log_dict)):
        replaced += [(module, name, function)] if hasattr(module, name) else []
    before = [vars(owner).get(name) for owner, name, _ in replaced]
    for owner, name, function in replaced:
        vars(owner)[name] = function
    try:
        yield
    finally:
        for (owner, name, _), old in zip(replaced, before, strict=True):
            if old is None:
                del vars(owner)[name]
            else:
                vars(owner)[name] = old
