"""A module whose network is cut: which of its tensors are trained here, and where the others are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from lightning_dopt.pipeline.mail import on_host


class StagesOfModule:
    """The parameters and buffers of a module by the stage that they belong to.

    Of the stages that this rank does not hold, values are freed: one number (NaN) stands for all elements of a tensor, so
    names and shapes, and with them optimizers and checkpoints, stay those of the whole module on all ranks, and use of a
    tensor that is elsewhere does not go unnoticed.

    Args:
        module: The whole module.
        stages: All stages of a network in it, which share its tensors.
        holders: For each stage the ranks of the default group that hold it; the first one speaks for its tensors.
        rank: This rank in the default group.
        ranks: The ranks that hold one whole model for all; the first one has all values before, and is given all of them for
            checkpoints.
    """

    def __init__(
        self,
        module: nn.Module,
        stages: Sequence[nn.Module],
        holders: Sequence[Sequence[int]],
        rank: int,
        ranks: Sequence[int],
    ) -> None:
        self.module, self.rank, self.ranks, self.zero = module, rank, ranks, ranks[0]
        self.by_host = dist.is_initialized() and "nccl" not in dist.get_backend()  # gloo sends from the host only
        places: dict[int, list[int]] = {}
        shared: set[int] = set()
        for stage, row in zip(stages, holders, strict=True):
            for tensor in (*stage.parameters(), *stage.buffers()):
                shared |= {id(tensor)} if id(tensor) in places and places[id(tensor)] != [*row] else set()
                places[id(tensor)] = list(dict.fromkeys([*places.get(id(tensor), []), *row]))
        self.holders = {name: places[id(t)] for name, t in _named(module) if id(t) in places}
        """The ranks that hold each parameter and buffer of the network, by its name in the module, in one order on all ranks."""
        self.tied = [name for name, p in module.named_parameters() if id(p) in shared]
        """Parameters in stages of several ranks."""

    @property
    def foreign(self) -> list[str]:
        """Names of what other ranks hold."""
        return [name for name, ranks in self.holders.items() if self.rank not in ranks]

    @property
    def own(self) -> list[nn.Parameter]:
        """The parameters that are trained here."""
        foreign, parameters = set(self.foreign), dict(self.module.named_parameters())
        return [p for n, p in parameters.items() if n in self.holders and n not in foreign and p.requires_grad]

    @property
    def freed(self) -> bool:
        """Whether values of other stages are not here."""
        tensors = dict(_named(self.module))
        return any(is_placeholder(tensors[name]) for name in self.holders)

    def missing(self) -> list[str]:
        """Names of what should be here and is not."""
        foreign, tensors = set(self.foreign), dict(_named(self.module))
        return [name for name in self.holders if name not in foreign and is_placeholder(tensors[name])]

    def spread(self) -> None:
        """Give every stage's holders, and what is outside of all stages to all, the values of the rank ``zero``. Collective."""
        with torch.no_grad():
            for name, tensor in _once(self.module):
                if name not in self.holders:
                    dist.broadcast(tensor.data, self.zero)
                    continue
                for peer in self.holders[name]:
                    self._move(tensor.data, self.zero, peer)

    def free(self) -> None:
        """Let go of the values of all other stages."""
        foreign = set(self.foreign)
        for name, tensor in _once(self.module):
            if name in foreign:
                tensor.data = _placeholder(tensor)

    def fill(self) -> None:
        """Make the module whole again, on every rank. Collective."""
        with torch.no_grad():
            for name, tensor in _once(self.module):
                if name in self.holders:
                    if is_placeholder(tensor):
                        tensor.data = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
                    dist.broadcast(tensor.data, self.holders[name][0])

    def state_dict(self) -> dict[str, Any]:
        """The module's own, on the rank ``zero`` with the values of all stages, elsewhere with its own. Collective."""
        state: dict[str, Any] = self.module.state_dict()
        for name, value in state.items():
            source = self.holders[name][0] if name in self.holders else self.zero
            if source == self.zero or not isinstance(value, Tensor):
                continue
            if self.rank == self.zero:
                value = torch.empty(value.shape, dtype=value.dtype, device=value.device)
                state[name] = value
            self._move(value, source, self.zero)
        return state

    def load_state_dict(self, state: Mapping[str, Any], strict: bool) -> None:
        """Load what is held here.

        Raises:
            RuntimeError: With ``strict``, if names are missing, or some are unknown.
        """
        foreign = set(self.foreign)
        mine = {name: value for name, value in state.items() if name not in foreign}
        result = self.module.load_state_dict(mine, strict=False)
        missing = [name for name in result.missing_keys if name not in foreign or name not in state]
        if strict and (missing or result.unexpected_keys):
            raise RuntimeError(
                f"the checkpoint does not fit {type(self.module).__name__}: it lacks {missing}, and has "
                f"{list(result.unexpected_keys)} beyond it"
            )

    def collect(self, mine: Any) -> list[Any]:
        """On the first of ``ranks`` what each of them gave, in their order; elsewhere nothing. Collective."""
        if self.rank not in self.ranks:
            return []
        mine = move_data_to_device(mine, "cpu")  # or each tensor would come back on its sender's GPU
        if self.rank != self.zero:
            dist.send_object_list([mine], self.zero)
            return []
        answers = []
        for peer in self.ranks:
            box: list[Any] = [mine]
            if peer != self.zero:
                dist.recv_object_list(box, peer)
            answers.append(box[0])
        return answers

    def _move(self, tensor: Tensor, source: int, target: int) -> None:
        if source == target:
            return
        here = self.by_host and not on_host(tensor)
        if self.rank == source:
            dist.send(tensor.cpu() if here else tensor.contiguous(), target)
        elif self.rank == target:
            box = torch.empty(tensor.shape, dtype=tensor.dtype) if here else tensor
            dist.recv(box, source)
            if here:
                tensor.copy_(box)


def is_placeholder(tensor: Tensor) -> bool:
    """Whether one number stands for all elements of a tensor."""
    return tensor.numel() > 1 and all(s == 0 for s in tensor.stride())


def _placeholder(tensor: Tensor) -> Tensor:
    value = float("nan") if tensor.is_floating_point() else 0
    return torch.full((), value, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


def _named(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _once(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()
    for name, tensor in _named(module):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor
