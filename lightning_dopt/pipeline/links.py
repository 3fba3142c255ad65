"""Links: what happens to an activation, or to its gradient, on its way from one stage to the next."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_dopt._checks import check_choice, check_float
from lightning_dopt._part import Part
from lightning_dopt.compress import EF21, Compressor
from lightning_dopt.compress._wire import as_bytes, section
from lightning_dopt.compress.base import numel
from lightning_dopt.pipeline.lazy import Batch, LazyLoader

Memory = dict[int, Tensor]
"""What one end of a link remembers, by micro-batch or by sample."""


@dataclass(frozen=True)
class Spec:
    """Shape, dtype and device of what a message stands for; known to both ends."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor itself."""
        return numel(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Note:
    """What both ends of a link know of a message.

    Attributes:
        microbatch: Number of the micro-batch.
        fresh: Whether the batch is a new one; ``False`` if it is the one of the step before.
        samples: The number in the data set of each sample of the micro-batch, shape (rows,), if they are known.
        seed: Seed for the codec, another one for every message.
    """

    microbatch: int
    fresh: bool = True
    samples: Tensor | None = None
    seed: int = 0


class Link(Part, ABC):
    """How a tensor is sent over a boundary between two stages.

    Plain data: the memories of both ends belong to the runtime. Both ends call :meth:`decode` on the same messages in the
    same order, so their memories are equal in every bit.

    Args:
        codec: A compressor. Unbiased compressors that are no contractions are scaled by ``1 / (1 + omega)`` where a memory
            needs a contraction.

    Raises:
        ValueError: ``codec`` is no compressor, or one that changes during training.
    """

    by_sample: bool = False
    """Whether it needs the numbers of the samples."""

    def __init__(self, codec: Compressor) -> None:
        if not isinstance(codec, Compressor):
            raise ValueError(
                f"{type(self).__name__}(codec={codec!r}): must be a compressor (links have memories of their own)"
            )
        if codec.adaptive:
            raise ValueError(f"{type(self).__name__}(codec={codec!r}): must not change during training")
        self.codec = codec

    @abstractmethod
    def payload_bytes(self, spec: Spec, memory: Memory, note: Note) -> int:
        """Length of the message that comes next."""

    @abstractmethod
    def message(self, x: Tensor, memory: Memory, note: Note) -> Tensor:
        """The message for ``x``, ``uint8``; changes nothing."""

    @abstractmethod
    def decode(self, payload: Tensor, spec: Spec, memory: Memory, note: Note) -> Tensor:
        """What the receiver takes for ``x``; updates the memory of the end that calls it."""

    def encode(self, x: Tensor, memory: Memory, note: Note) -> Tensor:
        """The message for ``x``, after which the sender's memory is the receiver's."""
        payload = self.message(x, memory, note)
        self.decode(payload, Spec(tuple(x.shape), x.dtype, x.device), memory, note)
        return payload


class Plain(Link):
    """The tensor itself, in its own dtype: exact."""

    def __init__(self) -> None:
        """Takes no codec."""

    def payload_bytes(self, spec: Spec, memory: Memory, note: Note) -> int:
        """Bytes of the tensor."""
        return spec.nbytes

    def message(self, x: Tensor, memory: Memory, note: Note) -> Tensor:
        """Its bytes, as they lie in memory."""
        return as_bytes(x.detach())

    def decode(self, payload: Tensor, spec: Spec, memory: Memory, note: Note) -> Tensor:
        """A view of the message."""
        return _dense(payload, spec)

    def encode(self, x: Tensor, memory: Memory, note: Note) -> Tensor:
        """See :meth:`message`; there is no memory to update."""
        return self.message(x, memory, note)


class Direct(Link):
    """``C(x)``: packed and sent, without a memory.

    An unbiased error of an activation is a biased error of the gradient behind a nonlinear stage, so a coarse codec may
    keep a pipeline from converging.
    """

    def payload_bytes(self, spec: Spec, memory: Memory, note: Note) -> int:
        """Those of the codec."""
        return self.codec.payload_bytes(spec.shape)

    def message(self, x: Tensor, memory: Memory, note: Note) -> Tensor:
        """``C(x)``."""
        return self.codec.encode(x.detach(), note.seed)

    def decode(self, payload: Tensor, spec: Spec, memory: Memory, note: Note) -> Tensor:
        """What the codec makes of it."""
        return self.codec.decode(payload, spec.shape, spec.dtype, note.seed)

    def encode(self, x: Tensor, memory: Memory, note: Note) -> Tensor:
        """See :meth:`message`; there is no memory to update."""
        return self.message(x, memory, note)


class Clapping(Link):
    """Changes against a shared buffer, one per micro-batch and link (Clapping, arXiv 2509.19029).

    Both ends keep ``xh``. The sender transmits ``C(x - xh)`` and both set ``xh <- xh + C(x - xh)``, which the receiver
    computes with. That converges because batches are *sampled lazily*: a new one is drawn with ``probability`` and the
    last one is used again otherwise, so that ``x`` changes little between steps. Give the loader that :meth:`lazy` makes
    to the training loop. Memory is independent of the number of samples, unlike :class:`AQSGD`.

    The paper's algorithm could not be obtained in full; variants and the first message are options for that reason.

    Args:
        variant: ``"FU"``: the first message of a new batch is not compressed. ``"FC"``: it is compressed like all others,
            as a change against the last batch's buffer.
        probability: Probability of a new batch, in (0, 1]; about 0.5 is suggested for ``"FU"``, small ones for ``"FC"``.
        codec: The compressor.
        init: The first message ever, and the first of another shape: ``"dense"``, or with ``"FC"`` also ``"zero"``: it is
            compressed as a change against zeros.

    Raises:
        ValueError: An argument out of range.
    """

    def __init__(
        self,
        variant: Literal["FC", "FU"],
        probability: float,
        codec: Compressor,
        init: Literal["dense", "zero"] = "dense",
    ) -> None:
        super().__init__(codec)
        check_choice("Clapping", "variant", variant, ("FC", "FU"))
        check_choice("Clapping", "init", init, ("dense", "zero"))
        if init == "zero" and variant == "FU":
            raise ValueError("Clapping(init='zero'): needs variant='FC', the first message of 'FU' is dense")
        self.variant, self.init = variant, init
        self.probability = check_float("Clapping", "probability", probability, 0.0, 1.0, open_low=True)

    def lazy(self, loader: Iterable[Batch], seed: int = 0) -> LazyLoader[Batch]:
        """The loader that repeats its batches as this link needs it."""
        return LazyLoader(loader, self.probability, seed)

    def _is_dense(self, shape: tuple[int, ...], memory: Memory, note: Note) -> bool:
        known = note.microbatch in memory and tuple(memory[note.microbatch].shape) == tuple(shape)
        return (self.variant == "FU" and note.fresh) or (not known and self.init == "dense")

    def payload_bytes(self, spec: Spec, memory: Memory, note: Note) -> int:
        """Those of the codec, or of the tensor itself."""
        return spec.nbytes if self._is_dense(spec.shape, memory, note) else self.codec.payload_bytes(spec.shape)

    def message(self, x: Tensor, memory: Memory, note: Note) -> Tensor:
        """``C(x - xh)``, or ``x`` itself."""
        x = x.detach()
        if self._is_dense(tuple(x.shape), memory, note):
            return as_bytes(x)
        held = memory.get(note.microbatch)
        known = held is not None and held.shape == x.shape
        return self.codec.encode(x - held if known and held is not None else x, note.seed)

    def decode(self, payload: Tensor, spec: Spec, memory: Memory, note: Note) -> Tensor:
        """``xh`` after the update."""
        m = note.microbatch
        if self._is_dense(spec.shape, memory, note):
            value = _dense(payload, spec)
            memory[m] = value.to(_wide(spec.dtype), copy=True)
            return value
        if m not in memory or tuple(memory[m].shape) != tuple(spec.shape):
            memory[m] = torch.zeros(spec.shape, dtype=_wide(spec.dtype), device=spec.device)
        self.codec.decode_add(payload, memory[m], _scale(self.codec, spec.shape), note.seed)
        return memory[m].to(spec.dtype, copy=True)


class AQSGD(Link):
    """Changes against what was last sent for the *same sample* (AQ-SGD, arXiv 2206.01299); for activations.

    The first visit of a sample is not compressed, every later one sends ``C(x - xh[sample])``. Needs the numbers of the
    samples, and **memory for the activations of every sample of the data set** at both ends of every boundary. In a single epoch
    every visit is a first one and nothing is saved. The paper packs the gradients of activations without a memory: take
    ``Direct`` for those.

    Args:
        codec: The compressor; it sees the rows of all samples met before as one tensor.

    Raises:
        ValueError: ``codec`` is no compressor, or one that changes during training.
    """

    by_sample = True

    def _split(self, shape: tuple[int, ...], memory: Memory, note: Note) -> tuple[list[int], list[int], list[int]]:
        """Rows of new samples, rows of samples met before, and all numbers."""
        if note.samples is None:
            raise ValueError("AQSGD: needs the number in the data set of every sample, step(..., samples=...)")
        ids = [int(i) for i in note.samples.tolist()]
        if not shape or shape[0] != len(ids):
            raise ValueError(f"AQSGD: an activation of shape {tuple(shape)} has no row for each of {len(ids)} samples")
        row = tuple(shape[1:])
        met = [k for k, i in enumerate(ids) if i in memory and tuple(memory[i].shape) == row]
        return sorted(set(range(len(ids))) - set(met)), met, ids

    def payload_bytes(self, spec: Spec, memory: Memory, note: Note) -> int:
        """The rows of new samples, and what the codec makes of the others."""
        new, met, _ = self._split(spec.shape, memory, note)
        dense = Spec((len(new), *spec.shape[1:]), spec.dtype, spec.device).nbytes
        return dense + (self.codec.payload_bytes((len(met), *spec.shape[1:])) if met else 0)

    def message(self, x: Tensor, memory: Memory, note: Note) -> Tensor:
        """``x`` of new samples, ``C(x - xh)`` of the others."""
        x = x.detach()
        new, met, ids = self._split(tuple(x.shape), memory, note)
        parts = [as_bytes(x[new])]
        if met:
            parts.append(self.codec.encode(x[met] - torch.stack([memory[ids[k]] for k in met]), note.seed))
        return torch.cat(parts)

    def decode(self, payload: Tensor, spec: Spec, memory: Memory, note: Note) -> Tensor:
        """``xh`` of these samples after the update."""
        new, met, ids = self._split(spec.shape, memory, note)
        dense = Spec((len(new), *spec.shape[1:]), spec.dtype, spec.device)
        value = torch.empty(spec.shape, dtype=_wide(spec.dtype), device=spec.device)
        value[new] = _dense(payload[: dense.nbytes], dense).to(value.dtype)
        if met:
            rows = torch.stack([memory[ids[k]] for k in met])
            self.codec.decode_add(payload[dense.nbytes :], rows, _scale(self.codec, rows.shape), note.seed)
            value[met] = rows
        for k, i in enumerate(ids):
            memory[i] = value[k].clone()
        return value.to(spec.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _dense(payload: Tensor, spec: Spec) -> Tensor:
    return section(payload, 0, numel(spec.shape), spec.dtype).view(spec.shape)


def _scale(codec: Compressor, shape: Iterable[int]) -> float:
    return EF21(codec).scale(tuple(shape))
