"""What a low-rank method is: which module takes the place of a linear layer, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_dopt._checks import check_flag
from lightning_dopt._part import Part
from lightning_dopt.lowrank.ranks import Site


class Method(Part):
    """Says what takes the place of the linear layers of a stack of blocks. Plain data, as the parts of plans are.

    Attributes:
        first_dense: The layers of the first block stay dense.
    """

    first_dense: bool = False

    def layer(self, linear: nn.Linear, rank: int, name: str, first: bool) -> nn.Module:
        """The module for a layer; new tensors are on the device and of the dtype of ``linear.weight``.

        Args:
            linear: What it replaces, of which only shapes and the bias are used unless the method says otherwise.
            rank: From 1 to the smaller dimension of the layer; of no meaning for a first block that stays dense.
            name: Of the layer within its block, the same for all blocks.
            first: Whether the block is the first.
        """
        raise NotImplementedError

    def cost(self, linear: nn.Linear, rank: int, first: bool) -> int:
        """Parameters of :meth:`layer`, trainable or not."""
        weight = linear.weight.numel() if first and self.first_dense else rank * sum(linear.weight.shape)
        return weight + (0 if linear.bias is None else linear.out_features)

    def install(self, model: nn.Module, sites: Sequence[Site], ranks: Sequence[int]) -> None:
        """Put :meth:`layer` into the place of every site.

        Args:
            model: The whole model.
            sites: The layers, block by block.
            ranks: Of each; of no meaning in a first block that stays dense.
        """
        for site, rank in zip(sites, ranks, strict=True):
            parent, _, child = site.path.rpartition(".")
            setattr(model.get_submodule(parent), child, self.layer(site.linear, rank, site.name, site.block == 0))

    def stack(self, blocks: Sequence[nn.Module], names: Sequence[str]) -> list[nn.Module]:
        """The blocks, after their layers ``names`` were replaced, as the stack shall hold them."""
        return list(blocks)


class Factors(nn.Module):
    """Two thin matrices ``a`` of shape (rank, in) and ``b`` of shape (out, rank), and the bias of the layer they replace.

    Both are normal with variance ``1 / (sqrt(rank) sqrt(in + out))``, so that entries of ``b a`` have variance
    ``1 / (in + out)``, as those of a dense matrix under Glorot's rule have up to a factor of two.

    Source of the initialisation: the published code of CoLA (Liu et al., arXiv 2502.10940).
    """

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = linear.in_features, linear.out_features, rank
        like = linear.weight
        std = (math.sqrt(rank) * math.sqrt(linear.in_features + linear.out_features)) ** -0.5
        self.a = nn.Parameter(torch.empty(rank, self.in_features, device=like.device, dtype=like.dtype))
        self.b = nn.Parameter(torch.empty(self.out_features, rank, device=like.device, dtype=like.dtype))
        nn.init.normal_(self.a, std=std)
        nn.init.normal_(self.b, std=std)
        self.bias = linear.bias

    def extra_repr(self) -> str:
        """Shape and rank."""
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}"


class FactoredLinear(Factors):
    """``y = b (a x) + bias``."""

    def forward(self, x: Tensor) -> Tensor:
        """From (..., in) to (..., out)."""
        return nn.functional.linear(nn.functional.linear(x, self.a), self.b, self.bias)


class Factored(Method):
    """Plain low rank: every layer is a product of two thin matrices, ``W = B A``, and nothing else.

    Args:
        first_dense: Leave the first block dense, as CR-Net does.

    Raises:
        ValueError: ``first_dense`` is no bool.
    """

    def __init__(self, first_dense: bool = False) -> None:
        self.first_dense = check_flag("Factored", "first_dense", first_dense)

    def layer(self, linear: nn.Linear, rank: int, name: str, first: bool) -> nn.Module:
        """See :meth:`Method.layer`."""
        return linear if first and self.first_dense else FactoredLinear(linear, rank)
