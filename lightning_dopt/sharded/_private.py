"""What compressed sharding needs of torch beyond the public interface of ``fully_shard``, in one place.

``FSDPModule.set_custom_all_gather`` and ``set_custom_reduce_scatter`` are public since torch 2.9. What they do not tell is
which parameters lie in a message, and in which order: that is read from the state behind ``fully_shard``, so that vectors
can be told from matrices. The order is checked against the length of every message. Seen with torch 2.14.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def refusal() -> str | None:
    """Why this torch cannot compress the collectives of ``fully_shard``, or ``None`` if it can."""
    try:
        from torch.distributed.fsdp import FSDPModule
    except ImportError:
        return f"needs torch 2.9 or later, this is {torch.__version__}"
    if not hasattr(FSDPModule, "set_custom_all_gather") or not hasattr(FSDPModule, "set_custom_reduce_scatter"):
        return f"needs torch 2.9 or later (FSDPModule.set_custom_all_gather), this is {torch.__version__}"
    if not hasattr(FSDPModule, "_get_fsdp_state"):
        return f"does not know how torch {torch.__version__} orders parameters in a message"
    return None


def shard_modules(module: nn.Module) -> list[Any]:
    """All submodules that ``fully_shard`` was called on, which communicate one group of parameters each."""
    from torch.distributed.fsdp import FSDPModule

    return [m for m in module.modules() if isinstance(m, FSDPModule)]


def group_of(module: Any) -> Any | None:
    """The parameter group of one of them; ``None`` if all its parameters belong to modules inside it.

    Raises:
        ValueError: several groups over different meshes, which no custom collective can serve.
    """
    state = module._get_fsdp_state()
    groups = list(
        getattr(state, "_fsdp_param_groups", None) or filter(None, [getattr(state, "_fsdp_param_group", None)])
    )
    if len(groups) > 1:
        raise ValueError("fully_shard(shard_placement_fn=...): compressed collectives need one mesh for all parameters")
    return groups[0] if groups else None


def parameters_of(group: Any) -> list[Any]:
    """The sharded parameters (DTensors) of a group in the order in which they lie in messages."""
    return [p.sharded_param for p in group.fsdp_params]
