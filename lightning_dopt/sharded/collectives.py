"""The two collectives of sharded training with packed messages, in the form that ``fully_shard`` asks for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dopt._random import key
from lightning_dopt.comm.ledger import Ledger, all_gather_bytes
from lightning_dopt.compress.base import Compressor
from lightning_dopt.sharded.message import Message, Parts

GATHERED, SECONDARY, REDUCED, REPLICATED = "weights", "secondary", "gradients", "replicas"


class Counter:
    """What all collectives of one model share: the step that seeds them, and the count of bytes.

    Args:
        seed: Of all random rounding.
        ledger: Where bytes are counted.
    """

    def __init__(self, seed: int, ledger: Ledger) -> None:
        self.seed, self.ledger = seed, ledger
        self.step = 0
        """Optimizer steps so far. Weights gathered twice within a step are rounded alike both times."""

    @contextmanager
    def sending(self, label: str, nbytes: int) -> Iterator[None]:
        """Count a collective in which this rank sends so many bytes, and the time it takes on the host."""
        start = time.perf_counter()
        yield
        self.ledger.sent(label, nbytes)
        self.ledger.stalled(label, time.perf_counter() - start)


class _Comm:
    def __init__(self, compressor: Compressor | None, counter: Counter, index: int) -> None:
        self.compressor, self.counter, self.index = compressor, counter, index

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer of torch's default allocator."""
        return torch.empty(*size, dtype=dtype, device=device)


class PackedAllGather(_Comm):
    """Every rank's share of the weights for all ranks: encoded by its owner, decoded by everybody, by its owner too.

    So all ranks compute with the same weights, ``decode(encode(w))``, while the shares themselves stay exact. The seed is a
    function of the optimizer step and the owner, so that backward sees the weights that forward saw.

    Args:
        compressor: ``None`` sends shares as they are.
        counter: See :class:`Counter`.
        index: Number of the group of parameters; part of the seed.
        parts: The make-up of a share.
        size: Ranks that share the weights. A gather over fewer is that of a secondary copy, which was decoded already and
            travels as it is.
    """

    def __init__(self, compressor: Compressor | None, counter: Counter, index: int, parts: Parts, size: int) -> None:
        super().__init__(compressor, counter, index)
        self.parts, self.size = parts, size

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """Fill ``output_tensor`` with the shares of all ranks, in rank order; complete when it returns."""
        size = group.size()
        if self.compressor is None or size != self.size:
            sent = all_gather_bytes(input_tensor.numel() * input_tensor.dtype.itemsize, size)
            with self.counter.sending(GATHERED if size == self.size else SECONDARY, sent):
                _newest("all_gather_single", "all_gather_into_tensor")(output_tensor, input_tensor, group=group)
            return
        check_parts(self.parts, input_tensor.numel())
        message = Message(self.compressor, self.parts, input_tensor.dtype)
        own = message.pack(input_tensor, self._seed(group.rank()))
        payloads = own.new_empty(size * own.numel())
        with self.counter.sending(GATHERED, all_gather_bytes(own.numel(), size)):
            _newest("all_gather_single", "all_gather_into_tensor")(payloads, own, group=group)
        output_tensor.zero_()
        for owner, (payload, share) in enumerate(
            zip(payloads.view(size, -1), output_tensor.view(size, -1), strict=True)
        ):
            message.unpack_add(payload, share, self._seed(owner))

    def _seed(self, owner: int) -> int:
        return key(self.counter.seed, 0, self.counter.step, self.index, owner)


class PackedReduceScatter(_Comm):
    """The mean of all ranks' gradients, each share at its owner: packed shares all to all, decoded and summed in float32.

    In one hop every gradient is encoded once and never again. In two hops shares are first summed within nodes, then the
    sums, encoded once more, across nodes. Each rank's own shares are encoded like all others.

    Args:
        compressor: ``None`` leaves it to torch's reduce-scatter.
        counter: See :class:`Counter`.
        index: Number of the group of parameters; part of the seed.
        parts: Called for the make-up of a share of the parameters that are trained now.
        hops: The groups of the two hops: of this rank's node, and of its peers in all nodes; ``None`` for one hop.
        replicas: Ranks that hold the same share (hybrid sharding), which torch averages over afterwards, uncompressed.
    """

    def __init__(
        self,
        compressor: Compressor | None,
        counter: Counter,
        index: int,
        parts: Callable[[], Parts],
        hops: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None,
        replicas: int = 1,
    ) -> None:
        super().__init__(compressor, counter, index)
        self.parts, self.hops, self.replicas = parts, hops, replicas
        self._last = (-1, 0)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp | dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> None:
        """Fill ``output_tensor`` with the sum or mean of this rank's share; complete when it returns."""
        size, itemsize = group.size(), input_tensor.dtype.itemsize
        if self.replicas > 1:
            shared = -(-2 * (self.replicas - 1) * output_tensor.numel() * itemsize // self.replicas)
            self.counter.ledger.sent(REPLICATED, shared)
        if self.compressor is None:
            with self.counter.sending(REDUCED, (size - 1) * output_tensor.numel() * itemsize):
                _newest("reduce_scatter_single", "reduce_scatter_tensor")(
                    output_tensor, input_tensor, group=group, op=op
                )
            return
        if op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
            raise ValueError(f"set_gradient_divide_factor: compressed gradients are summed or averaged, not {op}")
        parts = self.parts()
        if sum(n for n, _ in parts) != output_tensor.numel():  # a part of the module took no part in this step
            parts = [(output_tensor.numel(), False)]
        message, seed = Message(self.compressor, parts, input_tensor.dtype), self._seed()
        shares = input_tensor.view(size, -1)
        if self.hops is None:
            total = self._hop(message, shares[:, None], group, key(seed, 0), group.rank())[0]
        else:
            local, across = self.hops
            chunks = shares.view(across.size(), local.size(), -1).transpose(0, 1)
            sums = self._hop(message, chunks, local, key(seed, 1, across.rank()), local.rank()).to(input_tensor.dtype)
            total = self._hop(message, sums[:, None], across, key(seed, 2, local.rank()), across.rank())[0]
        output_tensor.copy_(total.div_(size) if op == dist.ReduceOp.AVG else total)

    def _hop(self, message: Message, chunks: Tensor, group: dist.ProcessGroup, seed: int, rank: int) -> Tensor:
        """Send ``chunks[i]`` (several shares) to rank ``i`` of the group; the float32 sums of what arrives."""
        size, count, length = chunks.shape
        own = torch.stack(
            [
                torch.cat([message.pack(chunks[to, c], key(seed, rank, to, c)) for c in range(count)])
                for to in range(size)
            ]
        )
        arrived = torch.empty_like(own)
        with self.counter.sending(REDUCED, (size - 1) * own.shape[1]):
            dist.all_to_all_single(arrived, own, group=group)
        sums = torch.zeros(count, length, dtype=torch.float32, device=chunks.device)
        for origin, payloads in enumerate(arrived):
            for c, payload in enumerate(payloads.view(count, -1)):
                message.unpack_add(payload, sums[c], key(seed, origin, rank, c))
        return sums

    def _seed(self) -> int:
        """Another one for every message, also for those of one step (gradient accumulation)."""
        step, number = self._last
        self._last = (self.counter.step, number + 1 if step == self.counter.step else 0)
        return key(self.counter.seed, 1, *self._last, self.index)


def _newest(name: str, older: str) -> Callable[..., object]:
    """A collective under the name it has had since torch 2.14, which warns of the older one."""
    return cast(Callable[..., object], getattr(dist, name, None) or getattr(dist, older))


def check_parts(parts: Parts, numel: int) -> None:
    """Raise ``RuntimeError`` if a message has not as many elements as the parameters it should hold."""
    known = sum(n for n, _ in parts)
    if known != numel:
        raise RuntimeError(f"a message of fully_shard has {numel} elements where its parameters have {known}")
