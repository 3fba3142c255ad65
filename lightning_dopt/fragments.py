"""Fragments: the parameters cut into parts that are synchronised in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from lightning_dopt._checks import check_choice, check_int
from lightning_dopt.what import Parameters

Pattern = Literal["strided", "sequential", "balanced"]


class Fragment(Parameters):
    """Part ``p`` of ``of``: every parameter is in exactly one part, known from names and sizes alone.

    What stays together is a *block*: the parameters whose names agree up to their first number, such as those of
    ``transformer.h.3``. What has no number (embeddings, a head) goes, largest first, to the part that is lightest when all
    blocks have been dealt. If there are fewer numbered blocks than parts, modules count as blocks, and if there are fewer
    modules, single parameters.

    Args:
        p: Which part, from 0.
        of: Number of parts.
        pattern: ``"strided"`` deals blocks in turn (block ``k`` to part ``k mod of``), ``"sequential"`` gives each part a run of
            neighbours, ``"balanced"`` gives the largest block that is left to the lightest part, so that two parts differ
            by one block at most.
        match: Pattern on parameter names; what does not match is in no part.

    Raises:
        ValueError: ``p`` outside [0, of), an unknown pattern; when training starts, fewer parameters than parts.

    Source: strided and sequential fragments, Douillard et al., "Streaming DiLoCo with overlapping communication",
    arXiv 2501.18512.
    """

    def __init__(self, p: int, of: int, pattern: Pattern = "strided", match: str = "*") -> None:
        super().__init__(match)
        self.of = check_int("Fragment", "of", of, 1)
        self.p = check_int("Fragment", "p", p, 0)
        if p >= of:
            raise ValueError(f"Fragment(p={p}, of={of}): parts are numbered from 0 to {of - 1}")
        check_choice("Fragment", "pattern", pattern, ("strided", "sequential", "balanced"))
        self.pattern: Pattern = pattern

    @property
    def label(self) -> str:
        """See :attr:`What.label`."""
        return f"{super().label}[{self.p + 1}/{self.of}]"

    def select(self, sizes: Mapping[str, int]) -> list[str]:
        """The names of this part, in the order of ``sizes``.

        Raises:
            ValueError: fewer parameters than parts.
        """
        mine = fragments({name: size for name, size in sizes.items() if self.selects(name)}, self.of, self.pattern)
        return [name for name in sizes if name in mine[self.p]]


def fragments(sizes: Mapping[str, int], of: int, pattern: Pattern) -> list[set[str]]:
    """The names of every part; see :class:`Fragment`.

    Raises:
        ValueError: fewer names than parts.
    """
    if len(sizes) < of:
        raise ValueError(f"Fragment(of={of}): there are only {len(sizes)} parameters to share out")
    blocks, others = _blocks(sizes, of)
    weights = [sum(sizes[name] for name in block) for block in blocks]
    parts: list[set[str]] = [set() for _ in range(of)]
    loads = [0] * of
    if pattern == "balanced":
        blocks, others = [], blocks + others
    for k, (block, weight) in enumerate(zip(blocks, weights, strict=False)):
        part = k % of if pattern == "strided" else k * of // len(blocks)
        parts[part].update(block)
        loads[part] += weight
    for block in sorted(others, key=lambda block: -sum(sizes[name] for name in block)):  # stable
        part = min(range(of), key=lambda p: (bool(parts[p]), loads[p]))
        parts[part].update(block)
        loads[part] += sum(sizes[name] for name in block)
    return parts


def _blocks(sizes: Mapping[str, int], of: int) -> tuple[list[list[str]], list[list[str]]]:
    """What is dealt in order, and what is added where there is room."""
    numbered, others = _grouped(sizes, _numbered)
    if len(numbered) >= of:
        return numbered, others
    modules, _ = _grouped(sizes, lambda name: name.rpartition(".")[0] or name)
    return (modules, []) if len(modules) >= of else ([[name] for name in sizes], [])


def _grouped(sizes: Mapping[str, int], key: Callable[[str], str | None]) -> tuple[list[list[str]], list[list[str]]]:
    """Names with the same key in one group, groups in order of appearance; and modules of names without a key."""
    groups: dict[tuple[bool, str], list[str]] = {}
    for name in sizes:
        found = key(name)
        groups.setdefault((found is not None, found or name.rpartition(".")[0] or name), []).append(name)
    return [g for (known, _), g in groups.items() if known], [g for (known, _), g in groups.items() if not known]


def _numbered(name: str) -> str | None:
    """``"h.3"`` of ``"h.3.attn.weight"``; ``None`` if the name has no number between its dots."""
    words = name.split(".")
    place = next((k for k, word in enumerate(words[:-1]) if word.isdecimal()), None)
    return ".".join(words[: place + 1]) if place is not None else None
