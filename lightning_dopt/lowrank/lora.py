"""LoRA and ReLoRA, through ``peft``; and folding factors back into dense weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_dopt._checks import check_float, check_int
from lightning_dopt.lowrank.method import FactoredLinear, Factors, Method
from lightning_dopt.lowrank.peers import SparseLinear
from lightning_dopt.lowrank.ranks import Site


class LoRA(Method):
    """``y = W x + (alpha / rank) B A x + bias`` with a frozen ``W``: only the factors are trained, by the ``peft`` library.

    What is not replaced (norms, embeddings, heads) stays trainable as it was, and so do biases. ``A`` starts as a linear
    layer does, ``B`` at zero. :func:`merge` folds the factors into ``W``.

    Args:
        alpha: Scale of the low-rank part, times the rank.
        dropout: On its input.

    Raises:
        ValueError: an argument out of range.
        ModuleNotFoundError: in ``convert``, ``peft`` is not installed.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
    """

    def __init__(self, alpha: float = 32.0, dropout: float = 0.0) -> None:
        self.alpha = check_float(type(self).__name__, "alpha", alpha, 0.0, open_low=True)
        self.dropout = check_float(type(self).__name__, "dropout", dropout, 0.0, 1.0, open_high=True)

    def cost(self, linear: nn.Linear, rank: int, first: bool) -> int:
        """See :meth:`Method.cost`; the frozen weight counts."""
        return super().cost(linear, rank, first) + linear.weight.numel()

    def install(self, model: nn.Module, sites: Sequence[Site], ranks: Sequence[int]) -> None:
        """See :meth:`Method.install`."""
        peft = _peft()
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        config = peft.LoraConfig(
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=[site.path for site in sites],
            rank_pattern={f"^{re.escape(site.path)}$": r for site, r in zip(sites, ranks, strict=True)},
        )
        frozen = {id(site.linear.weight) for site in sites}
        peft.inject_adapter_in_model(config, model)  # freezes all but the factors
        for p in model.parameters():
            if id(p) in trained and id(p) not in frozen:
                p.requires_grad_()


class ReLoRA(LoRA):
    """LoRA that now and then folds its factors into ``W`` and begins anew, so that sums of low rank add up to a high one.

    :func:`restart` does it; the callback ``LowRank`` calls it every ``every`` optimizer steps. Let the learning rate rise
    again from zero afterwards: multiply the factor of your schedule by :func:`rewarm`.

    Args:
        alpha: See :class:`LoRA`.
        dropout: See :class:`LoRA`.
        every: Optimizer steps between restarts.
        keep: Share of the optimizer's moments of the factors that survive a restart, those of largest magnitude.

    Raises:
        ValueError: an argument out of range.
        ModuleNotFoundError: in ``convert``, ``peft`` is not installed.

    Source: Lialin et al., "ReLoRA: High-Rank Training Through Low-Rank Updates", arXiv 2307.05695.
    """

    def __init__(self, alpha: float = 32.0, dropout: float = 0.0, every: int = 1000, keep: float = 0.01) -> None:
        super().__init__(alpha, dropout)
        self.every = check_int("ReLoRA", "every", every, 1)
        self.keep = check_float("ReLoRA", "keep", keep, 0.0, 1.0)


def rewarm(step: int, every: int, warmup: int) -> float:
    """Factor on the learning rate: 1 before the first restart, then linear from 0 to 1 over ``warmup`` steps of each period.

    Args:
        step: Optimizer steps done.
        every: Steps between restarts.
        warmup: Steps of the ramp.

    Raises:
        ValueError: an argument out of range.
    """
    check_int("rewarm", "every", every, 1)
    check_int("rewarm", "warmup", warmup, 0)
    return 1.0 if step < every else min(1.0, step % every / max(1, warmup))


@torch.no_grad()
def restart(model: nn.Module, optimizers: Sequence[Optimizer] = (), keep: float = 0.01) -> None:
    """Fold the factors of a LoRA model into its weights, draw ``A`` anew, set ``B`` to zero: the output stays the same.

    Args:
        model: Converted by :class:`LoRA` or :class:`ReLoRA`.
        optimizers: Whose moments (``exp_avg``, ``exp_avg_sq``, ``momentum_buffer``) of the factors are pruned.
        keep: Share of each moment that stays, its elements of largest magnitude.

    Raises:
        ValueError: the model has no LoRA layers, or ``keep`` is out of range.
    """
    check_float("restart", "keep", keep, 0.0, 1.0)
    layers = _lora_layers(model)
    if not layers:
        raise ValueError(f"restart: {type(model).__name__} has no LoRA layers")
    for module in layers.values():
        module.merge()
        module.merged_adapters.clear()
        module.reset_lora_parameters("default", True)
        for p in (*module.lora_A.parameters(), *module.lora_B.parameters()):
            for optimizer in optimizers:
                for name in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
                    moment = optimizer.state.get(p, {}).get(name)
                    if isinstance(moment, Tensor):
                        _prune(moment, keep)


def _prune(moment: Tensor, keep: float) -> None:
    flat = moment.abs().flatten()
    count = round(keep * flat.numel())
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.topk(count).indices] = True
    moment.mul_(mask.view_as(moment))


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Fold low-rank parts into plain ``nn.Linear`` layers, in place: LoRA, ReLoRA, plain low rank and SLTrain.

    The result computes the same up to rounding and has the names of the model before ``convert``.

    Args:
        model: Converted by one of these methods.

    Returns:
        The model.

    Raises:
        ValueError: a layer that no dense weight can express (CR-Net and CoLA), or nothing to fold.
    """
    found: dict[str, nn.Linear] = {}
    for path, module in _lora_layers(model).items():
        module.merge()
        found[path] = module.get_base_layer()
        found[path].requires_grad_()
    for path, module in model.named_modules():
        if isinstance(module, (FactoredLinear, SparseLinear)):
            found[path] = _dense(module)
        elif isinstance(module, Factors):
            raise ValueError(f"merge: {path} is a {type(module).__name__}, which is no product of matrices alone")
    if not found:
        raise ValueError(f"merge: {type(model).__name__} has no low-rank layers")
    for path, linear in found.items():
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)
    return model


def _dense(module: FactoredLinear | SparseLinear) -> nn.Linear:
    weight = module.weight() if isinstance(module, SparseLinear) else module.b @ module.a
    linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    linear.weight, linear.bias = nn.Parameter(weight), module.bias
    return linear


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    """The layers that ``peft`` has made, by name; known by what they can do, so that peft need not be imported."""
    return {path: m for path, m in model.named_modules() if hasattr(m, "reset_lora_parameters") and hasattr(m, "merge")}


def _peft() -> Any:
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("LoRA needs the library peft: pip install 'lightning_dopt[lowrank]'") from error
    return peft
