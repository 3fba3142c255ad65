"""Many virtual nodes with their own speeds in one process: the part that all simulated asynchronous methods share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_dopt._checks import check_float, check_int
from lightning_dopt.asynchronous.clock import EventClock
from lightning_dopt.slots import FlatTensors

Replica = dict[str, Tensor]
Backward = Callable[[int, Replica, int], None]


class VirtualNode:
    """One worker: real tensors in one flat buffer, and a real optimizer.

    Args:
        rank: Its number.
        tensors: Its parameters, ``{name: tensor}``, of one dtype and device.
        optimizer: Makes its optimizer.

    Raises:
        ValueError: no parameters, or parameters of several dtypes or devices.
    """

    def __init__(
        self, rank: int, tensors: Mapping[str, Tensor], optimizer: Callable[[list[Tensor]], Optimizer]
    ) -> None:
        self.rank = rank
        self.parameters: Replica = {k: t.detach().clone().requires_grad_() for k, t in tensors.items()}
        lanes = FlatTensors(self.parameters).lanes
        if len(lanes) != 1:
            raise ValueError(f"VirtualNode(tensors=<{len(lanes)} kinds>): needs parameters of one dtype and device")
        self.fields = lanes[0].fields
        self.x = lanes[0].live
        """All parameters as one vector; writing into it changes the parameters."""
        self.optimizer = optimizer(list(self.parameters.values()))
        self.gradients = 0
        """Gradients that have landed."""
        self.changes = 0
        """How often something else than this node's own gradients has changed ``x``."""
        self.changes_at_start = 0

    def displacement(self) -> Tensor:
        """``OPT(g)``: by how much one optimizer step with the stored gradients would move ``x``, which stays put.

        The gradients may be those of an older ``x``. Whatever else the step does (momentum, weight decay) acts on the
        present one.
        """
        before = self.x.clone()
        self.optimizer.step()
        moved = self.x - before
        self.x.copy_(before)
        return moved


class AsyncSimulation:
    """``n`` virtual nodes; each takes one gradient after the other at its own speed and never waits.

    A gradient is taken at the ``x`` that a node has when it begins, and lands ``seconds`` later on whatever ``x`` has
    become by then. A subclass says what else happens to ``x``.

    Args:
        n: Number of nodes.
        init: Makes the parameters of a node, ``{name: tensor}``.
        backward: Called with (rank, parameters, number of the gradient from 1 on), sets ``grad`` of the parameters;
            ``None``: nodes work without changing anything (consensus alone).
        optimizer: Makes the optimizer of a list of parameters.
        seconds: Virtual seconds per gradient, one number or one per node.
        seed: Seed of everything random.

    Raises:
        ValueError: ``n < 1``, speeds that are not positive, or the wrong number of them.
    """

    def __init__(
        self,
        n: int,
        init: Callable[[int], Mapping[str, Tensor]],
        backward: Backward | None,
        optimizer: Callable[[list[Tensor]], Optimizer],
        seconds: float | Sequence[float] = 1.0,
        seed: int = 0,
    ) -> None:
        owner = type(self).__name__
        self.n = check_int(owner, "n", n, 1)
        self.seconds = seconds_of(owner, seconds, n)
        self.clock = EventClock(seed)
        self.backward = backward
        self.nodes = [VirtualNode(rank, init(rank), optimizer) for rank in range(n)]
        self.staleness: Counter[int] = Counter()
        """How many gradients met how many outside changes of ``x`` between their beginning and their landing."""
        for node in self.nodes:
            self._begin(node)

    def _begin(self, node: VirtualNode) -> None:
        node.changes_at_start = node.changes
        node.optimizer.zero_grad()
        if self.backward is not None:
            self.backward(node.rank, node.parameters, node.gradients + 1)
        self.clock.after(self.seconds[node.rank], lambda: self._land(node))

    def _land(self, node: VirtualNode) -> None:
        with torch.no_grad():
            u = node.displacement() if self.backward is not None else None
            self.staleness[node.changes - node.changes_at_start] += 1
            node.gradients += 1
            self.landed(node, u)
        self._begin(node)

    def landed(self, node: VirtualNode, u: Tensor | None) -> None:
        """A gradient of ``node`` is done and asks for the displacement ``u`` (``None`` without gradients)."""
        if u is not None:
            node.x.add_(u)

    def settle(self) -> None:
        """Bring all nodes to the present moment; a subclass whose nodes also move between events does so here."""

    def run(self, seconds: float) -> AsyncSimulation:
        """Let virtual time pass."""
        self.clock.run(seconds)
        self.settle()
        return self

    def stacked(self, name: str = "x") -> Tensor:
        """One parameter of all nodes, shape (n, ...)."""
        return torch.stack([node.parameters[name].detach() for node in self.nodes])

    def distance(self) -> float:
        """Consensus distance ``sqrt(mean_i ||x_i - mean||^2)``."""
        x = torch.stack([node.x for node in self.nodes])
        return float((x - x.mean(0)).square().sum(1).mean().sqrt())

    @property
    def gradients(self) -> list[int]:
        """Gradients that each node has taken."""
        return [node.gradients for node in self.nodes]


def seconds_of(owner: str, seconds: float | Sequence[float], n: int) -> list[float]:
    """Seconds per gradient of each of ``n`` nodes.

    Raises:
        ValueError: a duration that is not positive, or the wrong number of them.
    """
    out = [float(seconds)] * n if isinstance(seconds, (int, float)) else list(seconds)
    if len(out) != n:
        raise ValueError(f"{owner}(seconds={seconds!r}): must be one number or {n} numbers")
    return [check_float(owner, "seconds", s, 0.0, open_low=True) for s in out]
