"""Stages of a traced model, and what crosses its cuts."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_dopt.pipeline.stage import Stage
from lightning_dopt.pipeline.trace import calls, free_of_data, is_metadata, is_size, tensor_of, values

Shape = tuple[int, ...]


class TracedStage(Stage):
    """A stretch of a traced model.

    Several activations that cross a cut, such as the two ends of a skip connection, travel as one tensor with a row for
    each sample. Masks, position tables and the like, which depend on sizes only, are computed by every stage that
    needs them.
    """

    def __init__(self, names: Sequence[str], model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(names)
        self.graph = fx.GraphModule(model, graph)
        persistent = set(model.state_dict())
        for name, _ in list(
            self.graph.named_buffers()
        ):  # as they are in the model; the graph has made them all persistent
            where, _, leaf = name.rpartition(".")
            if name not in persistent:
                self.graph.get_submodule(where)._non_persistent_buffers_set.add(leaf)

    def forward(self, x: Tensor) -> Tensor:
        """From what crosses the cut before it to what crosses the cut behind it."""
        output: Tensor = self.graph(x)
        return output

    def model_name(self, name: str) -> str:
        """Without ``"graph."``."""
        return name.partition(".")[2]


def split(model: nn.Module, graph: fx.Graph, starts: Sequence[int], example: Tensor | None) -> list[TracedStage]:
    """The stages of a model that begin with these numbers of its units."""
    nodes = [node for node in graph.nodes if node.op != "output"]
    heads = [calls(graph)[k] for k in starts]
    bounds = [0, *(nodes.index(head) for head in heads), len(nodes)]
    splitter = _Splitter(model, graph, nodes, bounds, [str(head.target) for head in heads], example)
    return [splitter.stage(k) for k in range(len(bounds) - 1)]


@dataclass(frozen=True)
class _Cargo:
    """What crosses one cut: the tensors, and their shapes without the batch if there are several."""

    nodes: list[fx.Node]
    shapes: list[Shape] | None


class _Splitter:
    def __init__(
        self,
        model: nn.Module,
        graph: fx.Graph,
        nodes: list[fx.Node],
        bounds: list[int],
        names: list[str],
        example: Tensor | None,
    ) -> None:
        self.model, self.graph, self.nodes, self.names, self.example = model, graph, nodes, names, example
        self.spans = list(pairwise(bounds))
        self.stage_of = {node: k for k, (a, b) in enumerate(self.spans) for node in nodes[a:b]}
        self.free = free_of_data(graph)
        (self.result,) = next(node for node in graph.nodes if node.op == "output").all_input_nodes
        self._probes: list[dict[fx.Node, Any]] | None = None
        self.cargo = [self._cargo(boundary) for boundary in range(len(self.spans) - 1)]

    def stage(self, k: int) -> TracedStage:
        """Stage ``k``: the input is unpacked, its nodes and what it needs of free ones are copied, the output packed."""
        graph = fx.Graph()
        made: dict[fx.Node, fx.Node] = {}
        x = graph.placeholder("x")
        if k == 0:
            made[next(node for node in self.nodes if node.op == "placeholder")] = x
        else:
            self._unpacked(graph, x, self.cargo[k - 1], made)
        first, last = self.spans[k]
        for node in self.nodes[first:last]:
            if node.op != "placeholder" and (node not in self.free or self._used(node, k)):
                self._copied(graph, node, made, k)
        if k == len(self.spans) - 1:
            graph.output(self._copied(graph, self.result, made, k))
        else:
            cargo = self.cargo[k]
            out = [made[node] for node in cargo.nodes]
            graph.output(out[0] if cargo.shapes is None else graph.call_function(pack, (out, cargo.shapes)))
        graph.lint()
        names = [str(n.target) for n in self.nodes[first:last] if n.op == "call_module"]
        return TracedStage(list(dict.fromkeys(names)), self.model, graph)

    def _used(self, node: fx.Node, k: int) -> bool:
        """Whether something of its own stage needs a free node that has just come along."""
        return any(self.stage_of.get(user) == k for user in node.users)

    def _copied(self, graph: fx.Graph, node: fx.Node, made: dict[fx.Node, fx.Node], k: int) -> fx.Node:
        """The copy of a node in this stage, with those of what it needs."""
        if node in made:
            return made[node]
        if (is_metadata(node) or is_size(node)) and not self._is_here(tensor_of(node), made, k):
            made[node] = self._known(graph, node, made, k)
            return made[node]
        for needed in node.all_input_nodes:
            self._copied(graph, needed, made, k)
        made[node] = graph.node_copy(node, lambda n: made[n])
        return made[node]

    def _is_here(self, node: fx.Node, made: dict[fx.Node, fx.Node], k: int) -> bool:
        """Whether a tensor has crossed the cut, or is computed in this stage."""
        return node in made or node in self.free or self.stage_of[node] == k

    def _unpacked(self, graph: fx.Graph, x: fx.Node, cargo: _Cargo, made: dict[fx.Node, fx.Node]) -> None:
        if cargo.shapes is None:
            made[cargo.nodes[0]] = x
            return
        parts = graph.call_function(unpack, (x, cargo.shapes))
        for number, node in enumerate(cargo.nodes):
            made[node] = graph.call_function(operator.getitem, (parts, number))

    def _cargo(self, boundary: int) -> _Cargo:
        """The tensors made before a cut and needed behind it."""
        crossing = []
        for node in self.nodes:
            if node in self.free or self.stage_of[node] > boundary:
                continue
            if any(self._reaches(user, boundary) for user in node.users) or node is self.result:
                crossing.append(node)
        if len(crossing) == 1:
            return _Cargo(crossing, None)
        shapes = []
        for node in crossing:
            seen = [probe[node] for probe in self._seen(boundary, f"{len(crossing)} tensors cross")]
            shapes.append(self._row(node, seen, boundary))
        return _Cargo(crossing, shapes)

    def _reaches(self, user: fx.Node, boundary: int) -> bool:
        """Whether a user of a tensor is behind the cut. Sizes of a tensor that is not there are known otherwise."""
        if user in self.free:
            return False
        return self.stage_of.get(user, len(self.spans)) > boundary

    def _row(self, node: fx.Node, seen: list[Any], boundary: int) -> Shape:
        where = f"cut(at={self.names[boundary]!r})"
        if not all(isinstance(value, tuple) and value and isinstance(value[-1], torch.dtype) for value in seen):
            raise ValueError(f"{where}: '{node.name}' crosses it and is no tensor")
        shapes, dtype = [value[0] for value in seen], seen[0][1]
        assert self.example is not None
        batches = [len(self.example), len(self.example) + 1]
        if not dtype.is_floating_point:
            raise ValueError(f"{where}: '{node.name}' crosses it and is not floating point but {dtype}")
        if [shape[:1] for shape in shapes] != [(n,) for n in batches] or shapes[0][1:] != shapes[1][1:]:
            raise ValueError(
                f"{where}: '{node.name}' crosses it with shape {shapes[0]}, which has no row for each sample of the batch"
            )
        return tuple(shapes[0][1:])

    def _seen(self, boundary: int, reason: str) -> list[dict[fx.Node, Any]]:
        """What all nodes are for the example, and for one with a sample more."""
        if self.example is None:
            raise ValueError(
                f"cut(example=None): {reason} the cut before {self.names[boundary]!r}, give an example of the input"
            )
        if self._probes is None:
            more = torch.cat([self.example, self.example[:1]])
            self._probes = [values(self.model, self.graph, x) for x in (self.example, more)]
        return self._probes

    def _known(self, graph: fx.Graph, node: fx.Node, made: dict[fx.Node, fx.Node], k: int) -> fx.Node:
        """A size, device or dtype of a tensor of an earlier stage, taken from what has crossed the cut."""
        carried = self.cargo[k - 1].nodes[0]
        if node.target is getattr and node.args[1] in ("device", "dtype", "ndim"):
            source = node.args[0]
            if node.args[1] == "device" or source is carried:
                return graph.call_function(getattr, (made[carried], node.args[1]))
            return graph.call_function(constant, (self._seen(k - 1, f"'{node.name}' is needed behind")[0][node],))
        dimension = self._dimension(node, carried, k) if is_size(node) else None
        if dimension is None:
            raise ValueError(
                f"cut(at={self.names[k - 1]!r}): '{node.name}' is needed behind it and is no size of what crosses it"
            )
        return graph.call_method("size", (made[carried], dimension))

    def _dimension(self, node: fx.Node, carried: fx.Node, k: int) -> int | None:
        """Which dimension of the first tensor that crosses the cut always has this size."""
        inputs = [*self._seen(k - 1, f"the size '{node.name}' is needed behind")]
        assert self.example is not None
        for d in range(
            1, self.example.dim()
        ):  # inputs that are shorter in one dimension, as far as the model takes them
            if self.example.shape[d] > 1:
                try:
                    inputs.append(values(self.model, self.graph, self.example.narrow(d, 0, self.example.shape[d] - 1)))
                except (RuntimeError, ValueError, AssertionError):
                    continue
        shapes = [seen[carried] for seen in inputs]
        for d in range(len(shapes[0][0])):
            if all(shape[0][d] == seen[node] for shape, seen in zip(shapes, inputs, strict=True)):
                return d
        return None


def pack(tensors: Sequence[Tensor], shapes: Sequence[Shape]) -> Tensor:
    """Tensors of shapes (batch, *shape) as one of shape (batch, elements).

    Raises:
        ValueError: A tensor has another shape than the example had.
    """
    for tensor, shape in zip(tensors, shapes, strict=True):
        if tuple(tensor.shape[1:]) != tuple(shape):
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} crosses a cut made for (batch, *{tuple(shape)})")
    return torch.cat([tensor.reshape(len(tensor), -1) for tensor in tensors], dim=1)


def unpack(packed: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """The tensors of :func:`pack`."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    parts = torch.split(packed, sizes, dim=1)
    return [part.reshape(len(packed), *shape) for part, shape in zip(parts, shapes, strict=True)]


def constant(value: object) -> object:
    """A value known when the model was cut."""
    return value
