"""Where the replicas' own checkpoints lie, beside the ordinary one.

``epoch=3.ckpt`` is an ordinary Lightning checkpoint with the consensus model. ``epoch=3.ckpt.replicas/<tag>/`` holds one
complete checkpoint per rank. The main file names the tag it belongs to and is written last, atomically; older tags are
removed only then. A kill at any moment therefore leaves either the previous checkpoint or the new one, whole.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable
from typing import Any

import fsspec
import torch
from fsspec.core import url_to_fs

KEY = "lightning_dopt"
"""Entry of the main checkpoint that points to the replicas' files."""


def new_run() -> str:
    """A name that tells the saves of one fit from those of others."""
    return uuid.uuid4().hex[:8]


def new_tag(global_step: int, run: str | None = None) -> str:
    """A folder name for the replicas of one save (of the fit ``run``)."""
    return f"step={global_step}-{run or new_run()}"


def folder(path: str | os.PathLike[str], tag: str) -> str:
    """The folder of the replicas' files of the checkpoint at ``path`` (links are followed)."""
    return f"{_resolve(path)}.replicas/{tag}"


def file(path: str | os.PathLike[str], tag: str, rank: int, size: int) -> str:
    """The file of one replica."""
    return f"{folder(path, tag)}/{rank:05d}-of-{size:05d}.ckpt"


def missing(path: str | os.PathLike[str], tag: str, size: int) -> list[int]:
    """The ranks whose files are not there."""
    fs = _fs(path)
    return [r for r in range(size) if not fs.exists(url_to_fs(file(path, tag, r, size))[1])]


def prune(path: str | os.PathLike[str], keep: str) -> None:
    """Remove the replicas of earlier saves to the same path."""
    fs, root = url_to_fs(f"{_resolve(path)}.replicas")
    if not fs.exists(root):
        return
    for entry in fs.ls(root, detail=False):
        if os.path.basename(str(entry).rstrip("/")) != keep:
            fs.rm(entry, recursive=True)


def prune_before(path: str | os.PathLike[str], tag: str) -> None:
    """Remove the replicas of saves before ``tag``: of other fits, and of earlier steps of the same fit."""
    fs, root = url_to_fs(f"{_resolve(path)}.replicas")
    step, run = _parsed(tag)
    for entry in fs.ls(root, detail=False):
        other_step, other_run = _parsed(os.path.basename(str(entry).rstrip("/")))
        if other_run != run or other_step < step:
            fs.rm(entry, recursive=True)


def replace(path: str | os.PathLike[str], write: Callable[[str], None]) -> None:
    """Let ``write`` make a file under another name, then give it the name ``path`` at once: it is whole or not there."""
    fs, target = url_to_fs(str(path))
    part = f"{_resolve(path)}.part"
    if "://" not in str(path):
        os.makedirs(os.path.dirname(part) or ".", exist_ok=True)
    write(part)
    if "://" not in str(path):
        with open(part, "rb") as written:
            os.fsync(written.fileno())
        os.replace(part, _resolve(path))
    else:
        fs.mv(url_to_fs(part)[1], target)


def remove(path: str | os.PathLike[str]) -> None:
    """Remove all replicas' files of a checkpoint."""
    fs, root = url_to_fs(f"{path}.replicas")
    if fs.exists(root):
        fs.rm(root, recursive=True)


def pointer(tag: str, size: int, plan: str, means: list[float] | None = None) -> dict[str, Any]:
    """What the main file says about the replicas; with ``means``, the weights of a mean model that it does not hold."""
    return {"replicas": tag, "world_size": size, "plan": plan} | ({"means": means} if means is not None else {})


def mean(states: Iterable[dict[str, Any]], weights: list[float]) -> dict[str, Any]:
    """The weighted mean of the replicas' state dicts; what is not a floating point tensor is the first one's.

    Variances of BatchNorm follow the law of total variance.
    """
    total: dict[str, Any] = {}
    for state, weight in zip(states, weights, strict=True):
        for name, value in _moments(state, 1.0).items():
            if name not in total or not (torch.is_tensor(value) and value.is_floating_point()):
                floating = torch.is_tensor(value) and value.is_floating_point()
                total.setdefault(name, value.double() * weight if floating else value)
            else:
                total[name] += value.double() * weight
        dtypes = {name: value.dtype for name, value in state.items() if torch.is_tensor(value)}
    total = _moments(total, -1.0)
    return {name: value.to(dtypes[name]) if name in dtypes else value for name, value in total.items()}


def _moments(state: dict[str, Any], sign: float) -> dict[str, Any]:
    """A state dict with ``var + sign mean^2`` in place of each running variance."""
    changed = dict(state)
    for name in state:
        mean_name = name[: -len("var")] + "mean"
        if name.endswith("running_var") and mean_name in state:
            changed[name] = (state[name].double() + sign * state[mean_name].double().square()).clamp(min=0.0)
    return changed


def _parsed(tag: str) -> tuple[int, str]:
    step, _, run = tag.removeprefix("step=").partition("-")
    return int(step), run


def _fs(path: str | os.PathLike[str]) -> fsspec.AbstractFileSystem:
    return url_to_fs(str(path))[0]


def _resolve(path: str | os.PathLike[str]) -> str:
    text = str(path)
    return os.path.realpath(text) if "://" not in text else text
