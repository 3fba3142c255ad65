"""Bad options are refused under the names of the method's own options, not of the parts they are for."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_REFUSED = re.compile(r"\w+\((\w+)=(.*?)\): (.*)")
"""What parts say of a bad argument: ``Class(option=value): what is allowed``."""


def own_names(method: Callable[P, R]) -> Callable[P, R]:
    """The same function, whose ``ValueError`` of one bad argument of a part names the option that it came from.

    ``TopK(ratio=2): must be ...`` becomes ``dgc(ratio=2): must be ...``. The option is the one of the same name and value, else
    the only one with that value that is not as by default; where neither exists the error stays as it is.
    """
    signature = inspect.signature(method)
    defaults = {name: parameter.default for name, parameter in signature.parameters.items()}

    @functools.wraps(method)
    def named(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(*args, **kwargs)
        except ValueError as error:
            told = _REFUSED.fullmatch(str(error))
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            option = told and _option(told[1], told[2], given.arguments, defaults)
            if not told or not option or type(error) is not ValueError:
                raise
            text = f"{method.__name__}({option}={given.arguments[option]!r}): {told[3]}"
            raise ValueError(text) from error

    return named


def _option(name: str, value: str, given: Mapping[str, object], defaults: Mapping[str, object]) -> str | None:
    """The option that an argument of a part, as printed, came from."""
    holders = [option for option, own in given.items() if value in _printed(own)]
    chosen = [option for option in holders if given[option] is not defaults[option]]
    if name in holders:
        return name
    return chosen[0] if len(chosen) == 1 else None


def _printed(own: object) -> list[str]:
    return [repr(own), *(repr(item) for item in own)] if isinstance(own, (list, tuple)) else [repr(own)]
