"""The order in which a model runs its modules, as a graph: traced through no more of the model than must be cut.

``torch.fx`` with all modules as leaves but those that a cut goes through. The alternatives, ``torch.export`` and the
tracer of ``torch.distributed.pipelining`` that builds on it, trace down to single operations: the training flag of
dropout and batch normalization, and often the size of the batch, become constants of the graph, modules lose their identity, and
whatever in a block cannot be traced makes the whole model fail.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_dopt.pipeline.stage import Unit

METADATA = ("shape", "device", "dtype", "ndim")
_RANDOM = ("dropout", "rand", "bernoulli", "normal", "multinomial")


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, opened: set[str]) -> None:
        super().__init__()
        self.opened = opened

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.opened


def trace(model: nn.Module, at: Sequence[str]) -> fx.Graph:
    """The graph of a model in which the modules ``at`` are whole, and so is all that contains none of them.

    Containers (``nn.Sequential`` and ``nn.ModuleList``) of the model itself are opened, too.

    Raises:
        ValueError: The model cannot be traced, takes several tensors, or does not compute the same when it is evaluated.
    """
    opened = _opened(model, at)
    owner = type(model).__name__
    for name in ["", *sorted(opened)]:
        module = model.get_submodule(name)
        if module._forward_hooks or module._forward_pre_hooks:
            raise ValueError(f"cut(model={owner}): the hooks of '{name or owner}' would not run, a cut goes through it")
    graphs = []
    for training in (False, True):
        with _mode(model, training):
            try:
                graphs.append(_Tracer(opened).trace(model, concrete_args=_defaults(model)))
            except Exception as error:
                reason = " ".join(str(error).split())
                raise ValueError(
                    f"cut(model={owner}): cannot be traced ({type(error).__name__}: {reason[:200]}); cut before whole modules "
                    "of its own, or tell where its blocks are with register_family"
                ) from error
    if str(graphs[0]) != str(graphs[1]):
        raise ValueError(
            f"cut(model={owner}): what a cut goes through computes something else in training than in evaluation; cut "
            "before a whole module"
        )
    _without_defaults(graphs[1])
    inputs = [node.name for node in graphs[1].nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise ValueError(f"cut(model={owner}): must take one tensor, not {', '.join(inputs) or 'none'}")
    return graphs[1]


def units_of(model: nn.Module, graph: fx.Graph) -> list[Unit]:
    """The modules that a graph calls, in order."""
    return [(str(node.target), model.get_submodule(str(node.target))) for node in calls(graph)]


def calls(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that call modules for the first time."""
    found: dict[str, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            found.setdefault(str(node.target), node)
    return list(found.values())


def free_of_data(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that depend on the sizes of the input at most, not on its values: every stage can compute them itself."""
    free: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr" or is_metadata(node):
            free.add(node)
        elif node.op in ("call_function", "call_method"):
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
            if all(n in free for n in node.all_input_nodes) and not any(word in name for word in _RANDOM):
                free.add(node)
    return free


def is_metadata(node: fx.Node) -> bool:
    """Whether a node asks a tensor for a size, its device or dtype."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in METADATA
    return node.op == "call_method" and node.target in ("size", "dim")


def is_size(node: fx.Node) -> bool:
    """Whether a node is one size of a tensor."""
    if node.op == "call_function" and node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, fx.Node) and is_metadata(source) and isinstance(node.args[1], int)
    return node.op == "call_method" and node.target == "size" and len(node.args) == 2


def tensor_of(node: fx.Node) -> fx.Node:
    """The tensor whose size, device or dtype a node is."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source if is_metadata(node) else tensor_of(source)


class Values(fx.Interpreter):
    """The shapes and numbers that a graph computes for one input: ``run`` fills ``seen``."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, graph=graph)
        self.seen: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Of a tensor shape, dtype and whether it is floating point, of all else the value."""
        value = super().run_node(n)
        kept = (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value
        self.seen[n] = kept
        return value


def values(model: nn.Module, graph: fx.Graph, example: Tensor) -> dict[fx.Node, Any]:
    """What each node is for an example: ``(shape, dtype)`` of a tensor, or the value."""
    interpreter = Values(model, graph)
    with _mode(model, False), torch.no_grad():
        interpreter.run(example)
    return interpreter.seen


def _opened(model: nn.Module, at: Sequence[str]) -> set[str]:
    """Modules that are traced through: those that contain a cut, and containers right in the model."""
    opened: set[str] = set()
    for name in at:
        parts = name.split(".")
        opened |= {".".join(parts[:k]) for k in range(1, len(parts))}
    open_now = [name for name, child in model.named_children() if isinstance(child, (nn.Sequential, nn.ModuleList))]
    while open_now:
        name = open_now.pop()
        opened.add(name)
        children = model.get_submodule(name).named_children()
        open_now += [f"{name}.{k}" for k, child in children if isinstance(child, (nn.Sequential, nn.ModuleList))]
    return opened - set(at)


def _defaults(model: nn.Module) -> dict[str, Any]:
    parameters = inspect.signature(model.forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _without_defaults(graph: fx.Graph) -> None:
    """Take out arguments that have their defaults, and the assertions that they do."""
    gone = {n for n in graph.nodes if n.op == "placeholder" and n.args}
    for node in reversed(list(graph.nodes)):
        checks = node.op == "call_function" and getattr(node.target, "__name__", "") in ("_assert", "_assert_is_none")
        comparison = node.op == "call_function" and node.target is operator.eq and node.args[0] in gone
        if (checks or comparison or node in gone) and not node.users:
            graph.erase_node(node)


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was in before:
            module.training = was
