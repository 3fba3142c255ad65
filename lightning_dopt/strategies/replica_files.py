"""Where the replicas' own checkpoints lie, beside the ordinary one.

``epoch=3.ckpt`` is an ordinary Lightning checkpoint with the consensus model. ``epoch=3.ckpt.replicas/<tag>/`` holds one
complete checkpoint per rank. The main file names the tag it belongs to and is written last, atomically; older tags are
removed only then. A kill at any moment therefore leaves either the previous checkpoint or the new one, whole.
"""

from __future__ import annotations

import os
import uuid
from typing import Any

import fsspec
from fsspec.core import url_to_fs

KEY = "lightning_dopt"
"""Entry of the main checkpoint that points to the replicas' files."""


def new_tag(global_step: int) -> str:
    """A folder name for the replicas of one save."""
    return f"step={global_step}-{uuid.uuid4().hex[:8]}"


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


def remove(path: str | os.PathLike[str]) -> None:
    """Remove all replicas' files of a checkpoint."""
    fs, root = url_to_fs(f"{path}.replicas")
    if fs.exists(root):
        fs.rm(root, recursive=True)


def pointer(tag: str, size: int, plan: str) -> dict[str, Any]:
    """What the main file says about the replicas."""
    return {"replicas": tag, "world_size": size, "plan": plan}


def _fs(path: str | os.PathLike[str]) -> fsspec.AbstractFileSystem:
    return url_to_fs(str(path))[0]


def _resolve(path: str | os.PathLike[str]) -> str:
    text = str(path)
    return os.path.realpath(text) if "://" not in text else text
