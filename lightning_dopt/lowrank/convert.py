"""Turns a model with a stack of like blocks into one of low rank, in place."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn
from torch.nn.utils import parametrize

from lightning_dopt._checks import check_choice
from lightning_dopt.lowrank.method import Factors, Method
from lightning_dopt.lowrank.ranks import Rank, Site, affordable, given
from lightning_dopt.lowrank.registry import method as named


def convert(
    model: nn.Module,
    method: str | Method = "crnet",
    blocks: str = "model.layers",
    targets: Sequence[str] | None = None,
    rank: Rank = None,
    budget: int | float | None = None,
    profile: Literal["uniform", "middle"] = "uniform",
) -> nn.Module:
    """Replace the linear layers of a stack of blocks, in place, before an optimizer is made.

    Weights that a method has no use for are dropped: this is for training from scratch (LoRA keeps them). Random numbers come
    from torch's generator of the device, as those of any initialisation; a model on the meta device stays there.

    Args:
        model: Holds the stack.
        method: A :class:`Method`, or the name of one with its defaults: ``"crnet"``, ``"factored"``, ``"cola"``,
            ``"sltrain"``, ``"lora"``, ``"relora"``.
        blocks: Name of the stack, a ``ModuleList`` or ``Sequential`` whose members the model calls one after the other, each
            with the output of the one before as its first argument.
        targets: Names of layers within a block, or patterns such as ``"self_attn.*_proj"``; ``None`` takes all of type
            ``nn.Linear``.
        rank: One rank for all; a float in (0, 1] is a share of the smaller dimension of each layer; a list has one rank
            for each low-rank block; a dict says any of these by pattern on names of layers, where the first match counts.
        budget: Instead of ``rank``: parameters that the model may have, or, below 1, their share of those of the dense
            model. The largest ranks are taken that it allows.
        profile: How ``budget`` is shared out: ``"uniform"``, or ``"middle"``: more rank in the middle blocks, less at both
            ends, the better choice for CR-Net according to its paper (the shape is ours).

    Returns:
        The model.

    Raises:
        ValueError: an argument out of range, or a module that does not fit: it names the module and says why.
    """
    chosen = named(method)
    stack = _stack(model, blocks)
    members = {f"{blocks}.{child}" if blocks else child: block for child, block in stack._modules.items() if block}
    first, *_ = members.values()
    names = _targets(first, targets, next(iter(members)))
    skipped = int(chosen.first_dense)
    sites = [
        Site(f"{path}.{name}", name, k, k - skipped, _linear(block, path, name))
        for k, (path, block) in enumerate(members.items())
        for name in names
    ]
    _check_sites(sites, len(names))
    low = [site for site in sites if site.place >= 0]
    ranks = _ranks(model, chosen, sites[: len(sites) - len(low)], low, len(members) - skipped, rank, budget, profile)
    chosen.install(model, sites, [0] * (len(sites) - len(low)) + ranks)
    for k, block in enumerate(chosen.stack(list(members.values()), names)):
        stack[k] = block
    return model


def _stack(model: nn.Module, blocks: str) -> nn.ModuleList | nn.Sequential:
    try:
        stack = model.get_submodule(blocks)
    except AttributeError:
        found = [n for n, m in model.named_modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and n]
        raise ValueError(
            f"convert(blocks={blocks!r}): {type(model).__name__} has no such module; its stacks are {found}"
        ) from None
    if not isinstance(stack, (nn.ModuleList, nn.Sequential)):
        raise ValueError(f"convert(blocks={blocks!r}): {type(stack).__name__} is no ModuleList or Sequential")
    if not len(stack):
        raise ValueError(f"convert(blocks={blocks!r}): the stack is empty")
    if any(isinstance(m, Factors) for m in stack.modules()):
        raise ValueError(f"convert(blocks={blocks!r}): is converted already")
    return stack


def _targets(block: nn.Module, targets: Sequence[str] | None, path: str) -> list[str]:
    """The names of the layers to replace, in the order of the first block."""
    if isinstance(targets, str):
        raise ValueError(f"convert(targets={targets!r}): must be a list of names")
    modules = {name: m for name, m in block.named_modules() if name}
    if targets is None:
        names = [name for name, m in modules.items() if type(m) is nn.Linear]
        if not names:
            raise ValueError(f"convert: {path} has no layer of type nn.Linear")
        return names
    for pattern in targets:
        if not any(fnmatchcase(name, pattern) for name in modules):
            linears = [name for name, m in modules.items() if isinstance(m, nn.Linear)]
            raise ValueError(f"convert(targets={targets!r}): {path} has no {pattern!r}; its layers are {linears}")
    return [name for name in modules if any(fnmatchcase(name, pattern) for pattern in targets)]


def _linear(block: nn.Module, path: str, name: str) -> nn.Linear:
    try:
        module = block.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"convert: {path} has no {name!r}, which the first block has; leave it out of targets"
        ) from None
    if type(module) is not nn.Linear:
        kind = type(module).__name__
        raise ValueError(f"convert: {path}.{name} is of type {kind}, only nn.Linear itself can be replaced")
    if hasattr(module.weight, "device_mesh"):
        raise ValueError(f"convert: {path}.{name} is sharded; convert first, then shard")
    if parametrize.is_parametrized(module) or module._forward_hooks or module._forward_pre_hooks:
        raise ValueError(f"convert: {path}.{name} has hooks or parametrizations, which would be lost")
    return module


def _check_sites(sites: Sequence[Site], per_block: int) -> None:
    """Refuse layers that are shared, or unlike those of the first block."""
    seen: dict[int, str] = {}
    for k, site in enumerate(sites):
        like, weight = sites[k % per_block], site.linear.weight
        if site.linear.weight.shape != like.linear.weight.shape:
            shapes = f"{tuple(weight.shape)} and {tuple(like.linear.weight.shape)}"
            raise ValueError(f"convert: {site.path} and {like.path} have weights of different shapes, {shapes}")
        if (site.linear.bias is None) != (like.linear.bias is None):
            raise ValueError(f"convert: only one of {site.path} and {like.path} has a bias")
        if id(weight) in seen:
            raise ValueError(f"convert: {site.path} shares its weight with {seen[id(weight)]}")
        seen[id(weight)] = site.path


def _ranks(
    model: nn.Module,
    method: Method,
    dense: Sequence[Site],
    low: Sequence[Site],
    depth: int,
    rank: Rank,
    budget: int | float | None,
    profile: Literal["uniform", "middle"],
) -> list[int]:
    check_choice("convert", "profile", profile, ("uniform", "middle"))
    if (rank is None) == (budget is None):
        raise ValueError(f"convert(rank={rank!r}, budget={budget!r}): say one of the two")
    if budget is None:
        if profile != "uniform":
            raise ValueError(f"convert(profile={profile!r}): shares out a budget; with rank= give one rank per block")
        return given(rank, low, depth)
    if not low:
        return []
    parameters = sum(p.numel() for p in model.parameters())
    replaced = sum(p.numel() for site in (*dense, *low) for p in site.linear.parameters())
    fixed = parameters - replaced + sum(method.cost(site.linear, 0, True) for site in dense)

    def total(ranks: Sequence[int]) -> int:
        costs = (method.cost(site.linear, r, site.block == 0) for site, r in zip(low, ranks, strict=True))
        return fixed + sum(costs)

    return affordable(budget, profile, low, depth, parameters, total)
