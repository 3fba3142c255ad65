"""ShardCodecs: how the collectives of ``fully_shard`` are packed, and their installation in a sharded module."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal, cast

import torch.distributed as dist
from torch import nn

from lightning_dopt._checks import check_int
from lightning_dopt._part import Part
from lightning_dopt.comm.ledger import Ledger
from lightning_dopt.compress.base import Compressor
from lightning_dopt.compress.dense import Identity
from lightning_dopt.compress.quantize import Int4, Int8
from lightning_dopt.compress.shift import RandomShift
from lightning_dopt.sharded import _private
from lightning_dopt.sharded.collectives import Counter, PackedAllGather, PackedReduceScatter
from lightning_dopt.sharded.message import Parts


class ShardCodecs(Part):
    """How the messages of fully sharded training are packed.

    Parameters with fewer than two dimensions (norms, biases) always travel as they are.

    Args:
        weights: Of the all-gathers before forward and backward; ``None`` sends weights as they are.
        gradients: Of the reduce-scatters after backward, which becomes an all-to-all of packed shares; ``None`` leaves
            them to torch.
        hops: 2 sums gradients within nodes first, then across nodes, which encodes them a second time.
        node_size: Ranks per node, consecutive ones; for two hops.
        seed: Of random rounding.

    Raises:
        ValueError: a codec with a memory or one that sees tensors one by one; weights of which parts would be zero;
            ``hops`` and ``node_size`` that do not go together.
    """

    def __init__(
        self,
        weights: Compressor | None = None,
        gradients: Compressor | None = None,
        hops: Literal[1, 2] = 1,
        node_size: int = 0,
        seed: int = 0,
    ) -> None:
        name = type(self).__name__
        self.weights = _checked(name, "weights", weights)
        self.gradients = _checked(name, "gradients", gradients)
        if self.weights is not None and _leaves_zeros(self.weights):
            raise ValueError(f"{name}(weights={weights!r}): weights that are not sent would be zero; use RandomShift()")
        if hops not in (1, 2) or isinstance(hops, bool):
            raise ValueError(f"{name}(hops={hops!r}): must be 1 or 2")
        self.hops: Literal[1, 2] = hops
        self.node_size = check_int(name, "node_size", node_size, 0)
        self.seed = check_int(name, "seed", seed, 0)
        if hops == 2 and node_size < 2:
            raise ValueError(f"{name}(hops=2, node_size={node_size!r}): needs the number of ranks per node, at least 2")
        if hops == 2 and gradients is None:
            raise ValueError(f"{name}(hops=2, gradients=None): two hops are for packed gradients; give a compressor")
        if hops == 1 and node_size:
            raise ValueError(f"{name}(node_size={node_size!r}): has no effect with hops=1; leave it out or use hops=2")

    def check(self, size: int) -> None:
        """Raise ``ValueError`` if it cannot work with so many ranks, or with this torch (before 2.9)."""
        if (reason := _private.refusal()) is not None:
            raise ValueError(f"ShardCodecs: {reason}")
        if self.hops == 2 and (size % self.node_size or size == self.node_size):
            raise ValueError(
                f"ShardCodecs(node_size={self.node_size!r}): must divide the number of ranks, {size}, into several nodes"
            )

    def attach(self, module: nn.Module, ledger: Ledger | None = None) -> Counter:
        """Install it in all parts of a module that ``fully_shard`` was called on. Collective with two hops.

        Args:
            module: With at least one part that was sharded.
            ledger: Where bytes are counted; ``None`` makes one.

        Returns:
            The counter: its ``ledger`` counts bytes, its ``step`` must be set to the number of optimizer steps done, on
            all ranks, before the next forward.

        Raises:
            ValueError: nothing is sharded, or trained parameters are not; two hops with hybrid sharding; a torch without
                custom collectives (before 2.9).
        """
        self.check(dist.get_world_size())
        shards = _private.shard_modules(module)
        _check_all_sharded(module, bool(shards))
        counter = Counter(self.seed, ledger if ledger is not None else Ledger())
        hops = self._groups()
        for index, shard in enumerate(shards):
            group = _private.group_of(shard)
            if group is None:
                continue
            first = _private.parameters_of(group)[0]
            size, replicas = _mesh_sizes(first)
            if hops is not None and size != dist.get_world_size():
                raise ValueError(
                    "ShardCodecs(hops=2): needs parameters that are sharded over all ranks, without replicas"
                )
            gather = PackedAllGather(self.weights, counter, index, _parts(group, size), size)
            shard.set_custom_all_gather(gather)
            shard.set_custom_reduce_scatter(
                PackedReduceScatter(
                    self.gradients,
                    counter,
                    index,
                    partial(_parts, group, size, trained=True),
                    hops,
                    replicas,
                )
            )
        return counter

    def _groups(self) -> tuple[dist.ProcessGroup, dist.ProcessGroup] | None:
        if self.hops == 1:
            return None
        from torch.distributed.device_mesh import init_device_mesh

        size = dist.get_world_size()
        device = "cuda" if "nccl" in dist.get_backend() else "cpu"
        mesh = init_device_mesh(device, (size // self.node_size, self.node_size), mesh_dim_names=("across", "local"))
        return mesh.get_group("local"), mesh.get_group("across")


def qsdp(bits: int = 8, block: int = 1024, seed: int = 0) -> ShardCodecs:
    """QSDP: weights on a grid with random shift, gradients rounded at random, both unbiased.

    Source: Markov et al., "Quantized Distributed Training of Large Models with Convergence Guarantees", ICML 2023
    (arXiv:2302.02390); 8 bits and buckets of 1024 as published. Gradients are scaled by the largest element of a bucket
    instead of its range.

    Args:
        bits: Per weight and per gradient element, 4 or 8.
        block: Elements that share a scale.
        seed: Of the shifts and of rounding.
    """
    rounding = Int8(block, stochastic=True) if bits == 8 else Int4(block, stochastic=True)
    return ShardCodecs(RandomShift(bits, block), rounding, seed=seed)


def zeropp(node_size: int = 0, weight_block: int = 2048, gradient_block: int = 256) -> ShardCodecs:
    """ZeRO++'s qwZ and qgZ: int8 weights and int4 gradients in blocks, rounded to nearest.

    Its hpZ is an option of sharding, not of messages: ``ShardedStrategy(after_forward="node")``, or
    ``fully_shard(reshard_after_forward=node_size)``.

    Source: Wang et al., "ZeRO++: Extremely Efficient Collective Communication for Giant Model Training", 2023
    (arXiv:2306.10209), sections 4.1 and 4.3.

    Args:
        node_size: Ranks per node for the published two hops; 0 for one hop.
        weight_block: Weights that share a scale.
        gradient_block: Gradient elements that share a scale.
    """
    return ShardCodecs(Int8(weight_block), Int4(gradient_block), 2 if node_size else 1, node_size)


def _checked(owner: str, option: str, codec: Any) -> Compressor | None:
    if codec is None:
        return None
    if not isinstance(codec, Compressor):
        raise ValueError(f"{owner}({option}={codec!r}): must be a compressor without a memory, or None")
    if codec.layerwise:
        raise ValueError(f"{owner}({option}={codec!r}): sees tensors one by one, shares are flat; use Int8() or Int4()")
    return codec


def _leaves_zeros(codec: Compressor) -> bool:
    """Whether it sends some coefficients only (sparsifiers, sketches)."""
    return codec.values_at((4096,)) is not None or (codec.linear and not isinstance(codec, Identity))


def _mesh_sizes(parameter: Any) -> tuple[int, int]:
    """Over how many ranks a parameter is sharded, and how many hold the same share."""
    mesh, sharded = parameter.device_mesh, 1
    for placement, length in zip(parameter.placements, mesh.shape, strict=True):
        sharded *= length if placement.is_shard() else 1
    return sharded, math.prod(mesh.shape) // sharded


def _parts(group: Any, size: int, trained: bool = False) -> Parts:
    """The make-up of a share, padding included: ``ceil(rows / size)`` rows of each parameter."""
    parts = []
    for parameter in _private.parameters_of(group):
        if parameter.requires_grad or not trained:
            dim = next(cast(Any, p).dim for p in parameter.placements if p.is_shard())
            length = -(-parameter.shape[dim] // size)
            parts.append((parameter.numel() // max(1, parameter.shape[dim]) * length, parameter.ndim < 2))
    return parts


def _check_all_sharded(module: nn.Module, some: bool) -> None:
    from torch.distributed.tensor import DTensor

    if not some:
        raise ValueError(f"{type(module).__name__}: no part of it was given to fully_shard")
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            raise ValueError(f"{type(module).__name__}: {name} is trained but in no part that was given to fully_shard")
