"""Slots: flat buffers with the replica's tensors as views into them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_EVEN = 16  # elements; tensors whose size is a multiple come first, so that their views stay aligned


@dataclass(frozen=True)
class Field:
    """One named tensor inside a flat buffer."""

    name: str
    offset: int
    shape: torch.Size

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def of(self, flat: Tensor) -> Tensor:
        """This tensor's view of a flat buffer with the same layout."""
        return flat[self.offset : self.offset + self.numel].view(self.shape)


class Lane:
    """A stretch of one flat buffer (one dtype, one device) holding whole tensors back to back.

    Args:
        live: The 1-D buffer that the tensors are views of.
        fields: The tensors, offsets relative to ``live``.
    """

    def __init__(self, live: Tensor, fields: list[Field]) -> None:
        self.live = live
        self.fields = fields

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.live.numel()

    @property
    def message_dtype(self) -> torch.dtype:
        """Type in which messages are formed and accumulated: at least float32."""
        return torch.promote_types(self.live.dtype, torch.float32)

    def views(self, flat: Tensor) -> list[Tensor]:
        """The tensors as views of ``flat``, a buffer with this lane's layout."""
        return [f.of(flat) for f in self.fields]


FIRST_BUCKET = 2**20
"""Bytes of the bucket that backward completes first."""


def buckets(lane: Lane, nbytes: float) -> list[Lane]:
    """The lane cut, between tensors, into stretches of at most ``nbytes``; as it is if ``nbytes`` is 0.

    The last one, which backward completes first, has at most ``FIRST_BUCKET`` bytes, so that the link is busy early. A
    larger tensor is a stretch of its own.
    """
    if nbytes <= 0:
        return [lane]
    cuts, start, total = [0], 0, lane.numel
    first = total - min(nbytes, FIRST_BUCKET) / lane.live.itemsize
    for field in lane.fields:
        end = field.offset + field.numel
        full = (end - start) * lane.live.itemsize > nbytes
        tail = field.offset >= first > start
        if (full or tail) and field.offset > start:
            cuts.append(field.offset)
            start = field.offset
    bounds = zip(cuts, [*cuts[1:], lane.numel], strict=True)
    return [
        Lane(
            lane.live[a:b],
            [Field(f.name, f.offset - a, f.shape) for f in lane.fields if a <= f.offset < b or a == f.offset == b],
        )
        for a, b in bounds
    ]


def tracker_lane(lane: Lane) -> Lane:
    """A lane of zeros like ``lane``, in the type of its messages."""
    return Lane(torch.zeros(lane.numel, dtype=lane.message_dtype, device=lane.live.device), lane.fields)


class FlatTensors:
    """Named tensors moved into flat buffers, one per dtype and device, and kept there.

    Every tensor's storage is replaced by a view into the buffer (``tensor.data = view``), so that the module and its
    optimizer go on using the same tensor objects while a sync reads and writes one contiguous stretch. Tensors that
    the same syncs select lie together, so a selection is one or few lanes. Tied tensors must be passed once.

    Args:
        tensors: Names and tensors, in the order that all ranks share.
        selections: For each sync, the names it selects; used for the order only.
    """

    def __init__(self, tensors: Mapping[str, Tensor], selections: Iterable[Iterable[str]] = ()) -> None:
        self.tensors = dict(tensors)
        chosen = [frozenset(s) for s in selections]
        groups: dict[tuple[torch.dtype, torch.device, tuple[bool, ...]], list[str]] = {}
        for name, t in self.tensors.items():
            groups.setdefault((t.dtype, t.device, tuple(name in s for s in chosen)), []).append(name)
        self._groups: list[tuple[frozenset[str], Lane]] = []
        by_buffer: dict[tuple[torch.dtype, torch.device], list[list[str]]] = {}
        for (dtype, device, _), names in sorted(groups.items(), key=lambda g: (str(g[0][0]), str(g[0][1]), g[0][2])):
            by_buffer.setdefault((dtype, device), []).append(names)
        for (dtype, device), parts in by_buffer.items():
            self._lay_out(dtype, device, parts)

    def _lay_out(self, dtype: torch.dtype, device: torch.device, parts: list[list[str]]) -> None:
        total = sum(self.tensors[name].numel() for names in parts for name in names)
        flat = torch.empty(total, dtype=dtype, device=device)
        start = 0
        for names in parts:
            offset, fields = 0, []
            for name in sorted(names, key=lambda n: self.tensors[n].numel() % _EVEN != 0):  # stable
                field = Field(name, offset, self.tensors[name].shape)
                fields.append(field)
                offset += field.numel
            lane = Lane(flat[start : start + offset], fields)
            for field in fields:
                view = field.of(lane.live)
                view.copy_(self.tensors[field.name].detach())
                self.tensors[field.name].data = view
            self._groups.append((frozenset(names), lane))
            start += offset

    @property
    def lanes(self) -> list[Lane]:
        """All lanes."""
        return [lane for _, lane in self._groups]

    def select(self, names: Iterable[str]) -> list[Lane]:
        """The lanes that together hold exactly the given tensors.

        Raises:
            ValueError: the names were not among the selections given at construction.
        """
        wanted = set(names)
        picked = [(group, lane) for group, lane in self._groups if group <= wanted]
        if set().union(*(group for group, _ in picked)) != wanted:
            raise ValueError("FlatTensors.select: these tensors do not form whole lanes")
        return [lane for _, lane in picked]

    def part(self, names: Iterable[str]) -> FlatTensors:
        """Some of the tensors, in the same buffers.

        Raises:
            ValueError: as :meth:`select`.
        """
        wanted = set(names)
        self.select(wanted)
        found = FlatTensors({})
        found.tensors = {name: t for name, t in self.tensors.items() if name in wanted}
        found._groups = [(group, lane) for group, lane in self._groups if group <= wanted]
        return found

    def reclaim(self) -> None:
        """Move tensors whose storage somebody replaced back into the buffers, keeping their new values."""
        for lane in self.lanes:
            for field in lane.fields:
                tensor, view = self.tensors[field.name], field.of(lane.live)
                if tensor.data_ptr() != view.data_ptr():
                    view.copy_(tensor.detach())
                    tensor.data = view


class FlatGradients:
    """A flat copy of gradients, laid out like the parameters' lanes.

    Args:
        parameters: The parameters by name.
        lane: The lane of the parameters.
    """

    def __init__(self, parameters: Mapping[str, Tensor], lane: Lane) -> None:
        self.lane = Lane(torch.zeros_like(lane.live), lane.fields)
        self.parameters = [parameters[f.name] for f in lane.fields]
        self.views = self.lane.views(self.lane.live)
        self._absent: list[int] = []

    def gather(self) -> None:
        """Copy the gradients in; a parameter without one counts as zero."""
        with torch.no_grad():
            copies, sources, self._absent = [], [], []
            for k, (p, view) in enumerate(zip(self.parameters, self.views, strict=True)):
                if p.grad is None:
                    self._absent.append(k)
                elif p.grad.data_ptr() != view.data_ptr():
                    copies.append(view)
                    sources.append(p.grad)
            if copies:
                torch._foreach_copy_(copies, sources)
            for k in self._absent:
                self.views[k].zero_()

    def scatter(self) -> None:
        """Make the buffer's stretches the gradients, without copying.

        A parameter that had no gradient here gets one only if another rank had one, so that parameters nobody used
        stay without.
        """
        absent = {k for k in self._absent if not bool(self.views[k].any())}
        for k, (p, view) in enumerate(zip(self.parameters, self.views, strict=True)):
            p.grad = None if k in absent else view


class FlatBuffers:
    """Floating point buffers of a module as one message.

    BatchNorm's variances are combined by the law of total variance: for a ``running_var`` beside a ``running_mean``,
    the message carries ``var + mean^2``, and what comes back is turned into a variance again, so that mixing means
    ``E[var] + E[mean^2] - E[mean]^2``.

    Args:
        buffers: Names and floating point buffers.
    """

    def __init__(self, buffers: Mapping[str, Tensor]) -> None:
        self.buffers = {name: t for name, t in buffers.items() if t.is_floating_point() and t.numel()}
        fields, offset = [], 0
        for name, t in self.buffers.items():
            fields.append(Field(name, offset, t.shape))
            offset += t.numel()
        dtype = torch.float32
        for t in self.buffers.values():
            dtype = torch.promote_types(dtype, t.dtype)
        device = next(iter(self.buffers.values())).device if self.buffers else torch.device("cpu")
        self.lane = Lane(torch.zeros(offset, dtype=dtype, device=device), fields)
        self._variances = [
            (v, m)
            for v in self.buffers
            if v.endswith("running_var") and (m := v[: -len("var")] + "mean") in self.buffers
        ]

    def pack(self) -> None:
        """Copy the buffers into the message."""
        self._copy(into=True)
        for var, mean in self._moments():
            var.addcmul_(mean, mean)

    def unpack(self) -> None:
        """Copy the message back into the buffers."""
        for var, mean in self._moments():
            var.addcmul_(mean, mean, value=-1.0).clamp_(min=0.0)
        self._copy(into=False)

    def _copy(self, into: bool) -> None:
        for field, view in zip(self.lane.fields, self.lane.views(self.lane.live), strict=True):
            if into:
                view.copy_(self.buffers[field.name])
            else:
                self.buffers[field.name].copy_(view)

    def _moments(self) -> list[tuple[Tensor, Tensor]]:
        views = {f.name: f.of(self.lane.live) for f in self.lane.fields}
        return [(views[v], views[m]) for v, m in self._variances]
