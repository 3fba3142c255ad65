"""How a worker's work is packed on its way to a hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_dopt.asynchronous.hub_rules import HubRule
from lightning_dopt.compress import Budget, Identity, Phases
from lightning_dopt.compress.base import Codec, Compressor
from lightning_dopt.compress.memory import ErrorFeedback, Memory, as_compressor
from lightning_dopt.compress.packing import Packing
from lightning_dopt.slots import Lane


class Pack:
    """The codec of all lanes, with the sender's memory.

    Args:
        lanes: The parameters.
        codec: A compressor, or ``ErrorFeedback`` around one; ``None``: as they are.
        rule: What the hub does with messages.

    Raises:
        ValueError: a memory that the receiver takes part in, a compressor that changes, or one for whole models.
    """

    def __init__(self, lanes: Sequence[Lane], codec: Codec | None, rule: HubRule) -> None:
        self.lanes, self.rule = list(lanes), rule
        self.codec = codec
        compressor, self.memory = check_codec("AsyncLocal", codec, rule)
        scale = self.memory.scale if self.memory is not None else None
        shapes = [[field.shape for field in lane.fields] for lane in self.lanes]
        self.packings = [Packing(compressor.parts(s), s, scale) for s in shapes]
        self._state = [
            self.memory.state(torch.empty(lane.numel, dtype=lane.message_dtype)) if self.memory is not None else {}
            for lane in self.lanes
        ]

    def messages(self, base: Sequence[Tensor]) -> list[Tensor]:
        """What there is to say: what was done since the reference was given, or where this worker is."""
        live = [lane.live.to("cpu", lane.message_dtype, copy=True) for lane in self.lanes]
        if self.rule.signal == "value":
            return live
        return [x.neg_().add_(b) for x, b in zip(live, base, strict=True)]

    def encode(self, messages: Sequence[Tensor], seed: int) -> list[Tensor]:
        """The bytes of every lane."""
        if self.codec is None:
            return [message.view(torch.uint8) for message in messages]
        payloads = []
        for message, packing, state in zip(messages, self.packings, self._state, strict=True):
            if self.memory is None:
                payloads.append(packing.encode(message, seed, seed))
                continue
            value = self.memory.load(message, state)
            payload = packing.encode(value, seed, seed)
            own = torch.zeros_like(message)
            packing.decode_add(payload, own, 1.0, seed)
            self.memory.sent(own, state)
            payloads.append(payload)
        return payloads

    def boxes(self) -> list[Tensor]:
        """Room for the bytes of every lane."""
        if self.codec is None:
            return [torch.empty(lane.numel * lane.message_dtype.itemsize, dtype=torch.uint8) for lane in self.lanes]
        return [torch.empty(packing.nbytes, dtype=torch.uint8) for packing in self.packings]

    def decode(self, payloads: Sequence[Tensor], seed: int) -> list[Tensor]:
        """The messages as the hub sees them.

        Raises:
            ValueError: bytes that are damaged, as far as that can be seen.
        """
        if self.codec is None:
            pairs = zip(payloads, self.lanes, strict=True)
            return [payload.view(lane.message_dtype) for payload, lane in pairs]
        messages = [torch.zeros(lane.numel, dtype=lane.message_dtype) for lane in self.lanes]
        for message, packing, payload in zip(messages, self.packings, payloads, strict=True):
            packing.check(payload)
            packing.decode_add(payload, message, 1.0, seed)
        return messages

    def state_dict(self) -> dict[str, Any]:
        """The memory's tensors."""
        return {"codec": repr(self.codec), "lanes": [{k: t.clone() for k, t in s.items()} for s in self._state]}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken.

        Raises:
            ValueError: it belongs to another codec.
        """
        if state["codec"] != repr(self.codec):
            raise ValueError(f"AsyncLocal(codec={self.codec!r}): the state was saved with {state['codec']}")
        for own, saved in zip(self._state, state["lanes"], strict=True):
            for name, tensor in own.items():
                tensor.copy_(saved[name])


def check_codec(owner: str, codec: Codec | None, rule: HubRule) -> tuple[Compressor, Memory | None]:
    """The compressor and the memory of a codec that a hub can use.

    Raises:
        ValueError: a memory that the receiver takes part in, a compressor that changes, or one for whole models.
    """
    compressor, memory = as_compressor(codec if codec is not None else Identity())
    if isinstance(compressor, Budget | Phases):
        raise ValueError(f"{owner}(codec={codec!r}): changes with common rounds, and there are none with a hub")
    if memory is not None and not isinstance(memory, ErrorFeedback):
        raise ValueError(f"{owner}(codec={codec!r}): must be a compressor, or ErrorFeedback(...) around one")
    if rule.signal == "value" and not isinstance(compressor, Identity):
        raise ValueError(f"{owner}(codec={codec!r}): packs changes, and {rule!r} sends whole models; use codec=None")
    return compressor, memory
