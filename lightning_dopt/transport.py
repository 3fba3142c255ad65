"""How messages travel over the complete graph: summed on the way, gathered whole, or averaged in chunks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from lightning_dopt._random import key
from lightning_dopt.combine import Combine
from lightning_dopt.comm.ledger import all_gather_bytes, all_reduce_bytes
from lightning_dopt.comm.link import Link
from lightning_dopt.comm.world import Talk
from lightning_dopt.compress import Budget, Identity
from lightning_dopt.compress.base import Codec, Compressor, Shape, Share, numel
from lightning_dopt.compress.memory import Memory, as_compressor
from lightning_dopt.compress.packing import Packing

Transport = Literal["auto", "all_reduce", "all_gather", "two_phase"]
Way = Literal["all_reduce", "all_gather", "two_phase", "neighbors"]
Swap = Callable[[Mapping[int, Tensor], Mapping[int, int], Mapping[int, Packing | None]], Talk[dict[int, Tensor]]]


@dataclass(frozen=True)
class Chunk:
    """The part of a message that one rank averages for all."""

    first: int
    last: int
    packing: Packing | None
    """How it is packed; ``None``: as it is."""
    nbytes: int

    def encode(self, value: Tensor, seed: int, own_seed: int) -> Tensor:
        """The bytes of a vector of the chunk's length."""
        if self.packing is None:
            return value.clone().view(torch.uint8)
        return self.packing.encode(value, seed, own_seed)

    def decode_add(self, payload: Tensor, out: Tensor, weight: float, seed: int) -> None:
        """Add ``weight`` times the scaled decoded bytes to a vector of the chunk's length."""
        if self.packing is None:
            out.add_(payload.view(out.dtype), alpha=weight)
        else:
            self.packing.decode_add(payload, out, weight, seed)


class TwoPhase:
    """The mean in two legs: every rank gets its chunk of all messages, and gives back its packed mean.

    Rank ``j`` decodes and combines chunk ``j`` of all messages in ascending order of their ranks, ``y = mean_i C(v_i)[j]``,
    packs it again, and sends it to all, ``2 (n - 1) / n p`` bytes per rank if chunks are equal. All ranks decode the same
    bytes, so their results are equal to the last bit. The second packing adds an error of its own, once, however many
    ranks there are. Under a memory that has a :meth:`Memory.relay` the owner of the chunk keeps what it left out,
    ``d = C(y + e)``, ``e <- y + e - d``, so that nothing is lost; unbiased compressors without a memory draw anew
    for the second leg and stay unbiased.

    A compressor that sees a message as one vector sees chunks of ``numel / n`` elements (rounded to multiples of eight), one
    that sees tensors sees whole tensors, which go to ranks in order, as evenly as they can. Nothing is padded.

    Source: the compressed mean of Tang et al., "1-bit Adam", arXiv 2102.02888, section 5, for any compressor and memory.

    Args:
        codec: The compressor, or a memory around one.
        parts: Which compressor sees which tensors, see :meth:`Compressor.parts`.
        shapes: Shapes of the tensors of the message.
        like: A vector of the message's length, for the type and device of the state.
        size: Number of ranks.
        rank: This rank.
        seal: Bytes that a checksum adds to each message.
    """

    def __init__(
        self,
        codec: Codec,
        parts: Sequence[Share],
        shapes: Sequence[Shape],
        like: Tensor,
        size: int,
        rank: int,
        seal: int = 0,
    ) -> None:
        compressor, memory = as_compressor(codec)
        self.size, self.rank, self.seal = size, rank, seal
        self.chunks = _chunks(compressor, memory, parts, shapes, like.dtype.itemsize, size)
        self.mine = self.chunks[rank]
        self.relay = memory.relay() if memory is not None else None
        self.state = self.relay.state(like[self.mine.first : self.mine.last]) if self.relay is not None else {}

    def encode(self, value: Tensor, seed: int) -> list[Tensor]:
        """This rank's message, chunk by chunk."""
        seeds = [key(seed, 2 * j) for j in range(self.size)]
        return [
            chunk.encode(value[chunk.first : chunk.last], s, key(s, self.rank))
            for chunk, s in zip(self.chunks, seeds, strict=True)
        ]

    def decode(self, payloads: Sequence[Tensor], seed: int, out: Tensor, leg: int = 0) -> Tensor:
        """Write what receivers make of a message, chunk by chunk, into ``out``."""
        out.zero_()
        for j, (chunk, payload) in enumerate(zip(self.chunks, payloads, strict=True)):
            if chunk.nbytes:
                chunk.decode_add(payload, out[chunk.first : chunk.last], 1.0, key(seed, 2 * j + leg))
        return out

    def talk(self, payloads: Sequence[Tensor], seed: int, combine: Combine, swap: Swap, out: Tensor) -> Talk[Tensor]:
        """Both legs; the result is in ``out``."""
        others = [j for j in range(self.size) if j != self.rank]
        filled = [j for j in others if self.chunks[j].nbytes]
        hears = others if self.mine.nbytes else []
        got = {self.rank: payloads[self.rank]}
        if self.size > 1:
            mine = self.mine
            got |= yield from swap(
                {j: payloads[j] for j in filled},
                dict.fromkeys(hears, mine.nbytes),
                dict.fromkeys(hears, mine.packing),
            )
        means = {self.rank: self._mean(got, seed, combine, out[self.mine.first : self.mine.last])}
        if self.size > 1:
            means |= yield from swap(
                dict.fromkeys(hears, means[self.rank]),
                {j: self.chunks[j].nbytes for j in filled},
                {j: self.chunks[j].packing for j in filled},
            )
        empty = means[self.rank][:0]
        return self.decode([means.get(j, empty) for j in range(self.size)], seed, out, leg=1)

    def _mean(self, got: Mapping[int, Tensor], seed: int, combine: Combine, out: Tensor) -> Tensor:
        """This rank's chunk of the mean, packed again; ``out`` is scratch of the chunk's length."""
        chunk = self.mine
        if not chunk.nbytes:
            return got[self.rank]
        before, after = key(seed, 2 * self.rank), key(seed, 2 * self.rank + 1)
        combine(
            [(1.0 / self.size, partial(_decode, chunk, got[j], before)) for j in range(self.size)],
            out.zero_(),
        )
        value = self.relay.load(out, self.state) if self.relay is not None else out
        packed = chunk.encode(value, after, key(after, self.rank))
        if self.relay is not None:
            own = torch.zeros_like(value)
            chunk.decode_add(packed, own, 1.0, after)
            self.relay.sent(own, self.state)
        return packed

    def sent_bytes(self, rank: int) -> tuple[int, int]:
        """Bytes that a rank sends in the first and in the second leg."""
        sizes = [chunk.nbytes + self.seal if chunk.nbytes else 0 for chunk in self.chunks]
        return sum(sizes) - sizes[rank], (self.size - 1) * sizes[rank]


def _decode(chunk: Chunk, payload: Tensor, seed: int, out: Tensor, weight: float) -> None:
    chunk.decode_add(payload, out, weight, seed)


def _chunks(
    compressor: Compressor,
    memory: Memory | None,
    parts: Sequence[Share],
    shapes: Sequence[Shape],
    itemsize: int,
    n: int,
) -> list[Chunk]:
    total = sum(numel(shape) for shape in shapes)
    if isinstance(compressor, Identity):
        return [Chunk(a, b, None, (b - a) * itemsize) for a, b in _even(total, n)]
    scale = memory.scale if memory is not None else None
    if len(parts) == 1 and not parts[0][0].layerwise:
        found = []
        for first, last in _even(total, n):
            packing = Packing([(parts[0][0], [0])], [(last - first,)], scale)
            found.append(Chunk(first, last, packing, packing.nbytes if last > first else 0))
        return found
    return _whole_tensors(parts, shapes, scale, n)


def _even(total: int, n: int) -> list[tuple[int, int]]:
    """``n`` stretches of multiples of eight elements, so that packed bits fill their bytes; the last ones may be shorter."""
    eighths = -(-total // 8)
    cuts = [min(8 * (eighths * j // n), total) for j in range(n + 1)]
    return list(pairwise(cuts))


def _whole_tensors(
    parts: Sequence[Share], shapes: Sequence[Shape], scale: Callable[[Shape, Compressor], float] | None, n: int
) -> list[Chunk]:
    """Tensors in order, a new rank whenever the bytes so far reach the next ``1 / n`` of all."""
    codec_of = {i: codec for codec, members in parts for i in members}
    cost = [codec_of[i].payload_bytes(shape) for i, shape in enumerate(shapes)]
    owner, before, total = [], 0, max(1, sum(cost))
    for nbytes in cost:
        owner.append(min(n - 1, (2 * before + nbytes) * n // (2 * total)))
        before += nbytes
    found, start = [], 0
    for j in range(n):
        mine = [i for i, o in enumerate(owner) if o == j]
        place = {i: k for k, i in enumerate(mine)}
        kept = [(codec, [place[i] for i in members if i in place]) for codec, members in parts]
        last = start + sum(numel(shapes[i]) for i in mine)
        packing = Packing([(c, m) for c, m in kept if m], [shapes[i] for i in mine], scale) if mine else None
        found.append(Chunk(start, last, packing, packing.nbytes if packing is not None else 0))
        start = last
    return found


# ---------------------------------------------------------------------- which one


def may_relay(codec: Codec) -> bool:
    """Whether the second leg is defined: no memory, or one with a :meth:`Memory.relay`."""
    memory = as_compressor(codec)[1]
    return memory is None or memory.relay() is not None


def sums(codec: Codec, combine: Combine) -> bool:
    """Whether messages may be summed on the way."""
    return as_compressor(codec)[0].linear and combine.linear


def is_plain(combine: Combine) -> bool:
    """Whether the rule is one exchange of messages and nothing else, so that chunks may be combined one by one."""
    return type(combine).talk is Combine.talk


def choose(
    transport: Transport,
    codec: Codec,
    combine: Combine,
    n: int,
    dense: int,
    bytes_sent: Mapping[str, int],
    link: Link | None = None,
) -> tuple[Way, str]:
    """What ``"auto"`` stands for and why, from sizes and the link alone, so that all ranks and all runs agree.

    Linear messages are summed. Others are gathered, which changes nothing about the method, or go in two legs where the second
    is sound: unbiased, or with its error fed back. Over a link of known speed the faster of both is taken,
    ``(n - 1) (latency + p / bandwidth)`` or ``2 latency`` and the bytes of both legs. Where the link is not known, messages are
    gathered as long as that takes no more bytes than the uncompressed all-reduce; where it does, it defeats its purpose, and the
    two legs are taken if they take fewer.

    Args:
        transport: As asked for; anything but ``"auto"`` is returned.
        codec: The sync's codec.
        combine: The sync's rule.
        n: Number of ranks.
        dense: Bytes of the uncompressed message.
        bytes_sent: Bytes that the busiest rank sends per message, by transport.
        link: Speed of each rank's link; ``None``, or one without limit and latency: not known.
    """
    if transport != "auto":
        return transport, "as told"
    if sums(codec, combine):
        return "all_reduce", "linear messages are summed"
    compressor, memory = as_compressor(codec)
    sound = may_relay(codec) if memory is not None else compressor.variance((4096,)) is not None
    gathered, legs = bytes_sent["all_gather"], bytes_sent["two_phase"]
    if n <= 2:
        return "all_gather", "two phases win nothing for two workers"
    if isinstance(compressor, Budget) or not combine.linear or not is_plain(combine):
        return "all_gather", "this budget or rule needs whole messages"
    if not sound:
        return "all_gather", "a second packing would bias the mean"
    if link is None or not (link.mbit or link.ms):
        most = all_reduce_bytes(dense, n)
        if gathered <= most:
            return "all_gather", f"a message takes no more than the {most:,} B of an uncompressed all-reduce"
        why = f"gathered a message takes more than the {most:,} B of an uncompressed all-reduce"
        return ("two_phase" if legs < gathered else "all_gather"), why
    whole, halves = (n - 1) * link.ms * 1e-3 + link.transfer(gathered), 2 * link.ms * 1e-3 + link.transfer(legs)
    why = f"over this link a message takes {_ms(whole)} gathered, {_ms(halves)} in two phases"
    return ("two_phase" if halves < whole else "all_gather"), why


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.3g} ms" if seconds < 1.0 else f"{seconds:,.3g} s"


def busiest(two_phase: TwoPhase, nbytes: int) -> dict[str, int]:
    """Bytes that the busiest rank sends for one message of ``nbytes``, gathered and in two legs."""
    legs = max(sum(two_phase.sent_bytes(rank)) for rank in range(two_phase.size))
    return {"all_gather": all_gather_bytes(nbytes, two_phase.size), "two_phase": legs}
