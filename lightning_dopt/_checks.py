"""Argument checks that name the option, the value and what is allowed, in one line."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def check_int(owner: str, name: str, value: Any, minimum: int) -> int:
    """Return ``value`` if it is an integer of at least ``minimum``.

    Raises:
        ValueError: otherwise, naming ``owner(name=value)`` and the allowed range.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{owner}({name}={value!r}): must be an integer of at least {minimum}")
    return value


def check_float(
    owner: str,
    name: str,
    value: Any,
    low: float,
    high: float = float("inf"),
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> float:
    """Return ``value`` as a float if it lies in the interval from ``low`` to ``high`` (ends included unless open).

    Raises:
        ValueError: otherwise, naming ``owner(name=value)`` and the allowed interval.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    above = number and (value > low if open_low else value >= low)
    below = number and (value < high if open_high else value <= high)
    if not (above and below):
        left, right = "(" if open_low else "[", ")" if open_high or high == float("inf") else "]"
        raise ValueError(f"{owner}({name}={value!r}): must be a number in {left}{low:g}, {high:g}{right}")
    return float(value)


def check_choice(owner: str, name: str, value: Any, allowed: Iterable[str]) -> str:
    """Return ``value`` if it is one of ``allowed``.

    Raises:
        ValueError: otherwise, listing the allowed values.
    """
    choices = list(allowed)
    if value not in choices:
        raise ValueError(f"{owner}({name}={value!r}): must be one of {', '.join(map(repr, choices))}")
    return str(value)


def check_flag(owner: str, name: str, value: bool) -> bool:
    """Return ``value`` if it is a bool.

    Raises:
        ValueError: otherwise.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{owner}({name}={value!r}): must be True or False")
    return value
