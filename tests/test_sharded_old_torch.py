"""Sharded training on a torch whose fully_shard takes no collectives of others: one line, before anything starts."""

from __future__ import annotations

import pytest
import torch.distributed.fsdp as fsdp

from lightning_dopt.sharded import ShardCodecs


def test_old_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if hasattr(getattr(fsdp, "FSDPModule", None), "set_custom_all_gather"):
        ShardCodecs().check(2)
        monkeypatch.delattr(fsdp.FSDPModule, "set_custom_all_gather")
    with pytest.raises(ValueError, match=r"^ShardCodecs: needs torch 2\.9 or later(?: \(.*\))?, this is [^\n]*$"):
        ShardCodecs().check(2)
