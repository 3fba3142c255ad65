"""What a training step logs, on all ranks of a pipeline, though its loss is computed on the last stage only."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import Metric

from lightning_dopt.pipeline import Pipeline
from lightning_dopt.pipeline.batches import samples
from lightning_dopt.strategies import _private

_LOG = inspect.signature(LightningModule.log)
_FIELDS = 3

Reduction = Literal["mean", "sum", "min", "max"]


@dataclass(frozen=True)
class _Kind:
    """What is told of a logged number once.

    Attributes:
        name: Its name.
        options: The other arguments of ``log``.
        reduction: How the values of micro-batches become one.
        dtype: Of the tensor that was logged; ``None`` for a number.
        metric: The name in the module of the metric that was logged, if it was one.
        sized: Whether ``batch_size`` was given.
    """

    name: str
    options: tuple[tuple[str, Any], ...]
    reduction: Reduction
    dtype: torch.dtype | None
    metric: str | None
    sized: bool


class StepLogs:
    """Records what the micro-batches of a step log where their loss is computed, and logs the whole of it on all ranks.

    Means count by the samples of the micro-batches; with ``reduce_fx`` of another kind it is that of the micro-batches.
    A metric object is updated where the loss is computed, and its states are summed over ranks at the end of an epoch as
    torchmetrics does; what it is worth in a step is the mean over micro-batches.

    Args:
        module: Whose step.
        pipeline: In which it is run.
        owners: The ranks that compute losses.
        apart: Takes the metrics (by ``id``) whose states differ between ranks.
    """

    def __init__(self, module: LightningModule, pipeline: Pipeline, owners: Sequence[int], apart: set[int]) -> None:
        self.module, self.pipeline, self.owners, self.apart = module, pipeline, list(owners), apart
        self.rank = pipeline.rank
        self._known: dict[int, tuple[bytes, list[_Kind]]] = {owner: (pickle.dumps([]), []) for owner in self.owners}
        self._rows: dict[_Kind, list[float]] = {}
        self._total, self._weight = 1, 1.0

    def begin(self, batch: Any = None) -> None:
        """A step begins; without a batch it is not cut."""
        self._total, self._weight, self._rows = samples(batch) if batch is not None else 1, 1.0, {}

    def microbatch(self, part: Any) -> None:
        """The loss of a micro-batch comes next."""
        self._weight = samples(part) / self._total

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Stands for ``LightningModule.log`` meanwhile."""
        options = dict(_LOG.bind(self.module, name, value, *args, **kwargs).arguments)
        for key in ("self", "name", "value"):
            options.pop(key)
        if isinstance(value, Mapping):
            raise ValueError(f"self.log({name!r}, <dictionary>): use log_dict in a module that is trained in stages")
        size = options.pop("batch_size", None)
        metric = self._name_of(value) if isinstance(value, Metric) else None
        number = _private.step_value(value) if isinstance(value, Metric) else value
        dtype = number.dtype if isinstance(number, Tensor) else None
        kind = _Kind(
            name, tuple(options.items()), _reduction(options.get("reduce_fx")), dtype, metric, size is not None
        )
        row = self._rows.setdefault(kind, [float("nan")] * _FIELDS)
        self._add(kind, row, _number(number), self._weight, float(size or 0))

    def _add(self, kind: _Kind, row: list[float], value: float, weight: float, size: float) -> None:
        if row[1] != row[1]:  # the first one
            row[:] = [value * weight if kind.reduction == "mean" else value, weight, size]
            return
        if kind.reduction == "mean":
            row[0] += value * weight
        elif kind.reduction == "sum":
            row[0] += value
        else:
            row[0] = (min if kind.reduction == "min" else max)(row[0], value)
        row[1] += weight
        row[2] += size

    def share(self) -> None:
        """The step is done: log what it logged, on all ranks. Collective."""
        merged: dict[_Kind, list[float]] = {}
        for owner in self.owners:
            for kind, row in self._told(owner).items():
                if kind not in merged:
                    merged[kind] = list(row)
                else:
                    value = row[0] / row[1] if kind.reduction == "mean" else row[0]
                    self._add(kind, merged[kind], value, row[1], row[2])
        for kind, (value, weight, size) in merged.items():
            self._log(kind, value / weight if kind.reduction == "mean" else value, round(size))

    def _told(self, owner: int) -> dict[_Kind, list[float]]:
        """What an owner has recorded: its numbers, and their names if they are not those of the step before."""
        told, kinds = self._known[owner]
        mine = owner == self.rank
        new = pickle.dumps(list(self._rows)) if mine else b""
        same = new == told
        numbers = torch.tensor(list(self._rows.values()), dtype=torch.float64).view(-1) if mine else torch.empty(0)
        head = torch.zeros(1 + _FIELDS * len(kinds), dtype=torch.float64)
        if mine and same:
            head[1:] = numbers
        elif mine:
            head[0] = len(new)
        head = self.pipeline.share(owner, head, "logs")
        length = int(head[0])
        if length:
            text = (
                torch.frombuffer(bytearray(new), dtype=torch.uint8) if mine else torch.empty(length, dtype=torch.uint8)
            )
            told = bytes(self.pipeline.share(owner, text, "logs").tolist())
            kinds = pickle.loads(told)
            self._known[owner] = told, kinds
            box = numbers if mine else torch.zeros(_FIELDS * len(kinds), dtype=torch.float64)
            numbers = self.pipeline.share(owner, box, "logs")
        else:
            numbers = head[1:]
        return dict(zip(kinds, numbers.view(-1, _FIELDS).tolist(), strict=True))

    def _log(self, kind: _Kind, value: float, size: int) -> None:
        options: dict[str, Any] = dict(kind.options)
        if kind.sized:
            options["batch_size"] = size
        number: Any = value
        if kind.dtype is not None:
            number = torch.tensor(value, dtype=kind.dtype, device=self.module.device)
        if kind.metric is not None:
            metric = self.module.get_submodule(kind.metric)
            assert isinstance(metric, Metric)
            self.apart.add(id(metric))
            metric.process_group = None  # not those with the same stages: all ranks
            _private.set_step_value(metric, number)
            number = metric
        self.module.log(kind.name, number, **options)

    def _name_of(self, metric: Metric) -> str:
        for name, child in self.module.named_modules():
            if child is metric:
                return name
        raise ValueError(f"{type(metric).__name__}: a metric that is logged must be an attribute of the module")


def _number(value: Any) -> float:
    """A logged value; 0 where a metric is worth nothing in a step."""
    return float(value.detach() if isinstance(value, Tensor) else value) if value is not None else 0.0


def _reduction(chosen: Any) -> Reduction:
    name = chosen if isinstance(chosen, str) else getattr(chosen, "__name__", "mean")
    kinds: dict[str, Reduction] = {"sum": "sum", "min": "min", "amin": "min", "max": "max", "amax": "max"}
    return kinds.get(name, "mean")
