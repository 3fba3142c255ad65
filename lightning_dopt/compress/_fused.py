"""What compressors do to all elements, each in one pass: plain expressions, which ``torch.compile`` turns into loops.

Off unless the environment variable ``DOPT_COMPILE`` is 1. The tiles of the compressors give the same bits without a compiler; the
expressions are written so that no result depends on the order of a sum, and compiled without contraction.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

_LEAST = 1 << 16
"""Elements below which the calls cost more than the passes."""
EXPONENT = 0x7F800000
"""Bits of the exponent in a float32."""
FAR = 1.5 * 2**23
"""Between this many and a few more steps from zero a float32 can be no fraction of a step."""
_state = {"broken": False}
_compiled: dict[Callable[..., None], Callable[..., None]] = {}


def enabled() -> bool:
    """Whether the user asked for compiled loops and they could be made so far.

    Raises:
        ValueError: ``DOPT_COMPILE`` is neither 0 nor 1.
    """
    asked = os.environ.get("DOPT_COMPILE", "0")
    if asked not in ("", "0", "1"):
        raise ValueError(f"DOPT_COMPILE={asked}: must be 0 or 1")
    return asked == "1" and not _state["broken"]


def rows_of(flat: Tensor, width: int) -> int:
    """How many rows of ``width`` elements go through compiled loops; 0 where tiles are to do it."""
    d = flat.numel()
    usable = d >= _LEAST and d >= 2 * width and flat.device.type == "cpu" and flat.dtype == torch.float32
    return d // width if usable and enabled() else 0


def run(loop: Callable[..., None], *arguments: Tensor) -> None:
    """Run a function of this module compiled, for any first dimension but 1.

    If it cannot be compiled that is said once, and it and all after it run as they are.
    """
    if _state["broken"]:
        loop(*arguments)
        return
    for tensor in arguments:
        if tensor.ndim and len(tensor) > 1:
            torch._dynamo.mark_dynamic(tensor, 0)
            torch._dynamo.mark_static(tensor, list(range(1, tensor.ndim)))
    if loop not in _compiled:
        _compiled[loop] = torch.compile(loop, fullgraph=True)
    try:
        with torch.no_grad():
            _compiled[loop](*arguments)
    except (RuntimeError, OSError, NotImplementedError) as error:
        _state["broken"] = True
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        warnings.warn(f"DOPT_COMPILE=1: compressors run uncompiled, as compiling failed: {reason}", stacklevel=2)
        loop(*arguments)


# The functions below take ``x`` in rows (or tiles of rows), one factor for each row, and the codes to be written.


def peaks(x: Tensor, out: Tensor) -> None:
    """The largest magnitude of each row."""
    out.copy_(x.abs().amax(-1))


def rounded(x: Tensor, factors: Tensor, codes: Tensor) -> None:
    """``round(factor x)``."""
    codes.copy_((x * factors[..., None]).round())


def dithered(x: Tensor, factors: Tensor, noise: Tensor, turns: Tensor, top: Tensor, codes: Tensor) -> None:
    """``round(factor x + u)`` between plus and minus ``top``, with ``u`` the noise of a tile turned by its own amount."""
    u = noise + turns[:, None, None]
    codes.copy_((x * factors[..., None] + (u - u.round())).round().clamp(-top, top))


def cast(x: Tensor, factors: Tensor, codes: Tensor) -> None:
    """``factor x`` in the type of the codes."""
    codes.copy_(x * factors[..., None])


def powers(x: Tensor, factors: Tensor, codes: Tensor) -> None:
    """``factor x`` rounded to signed powers of two, the codes of ``E3M0``."""
    values = x * factors[..., None]
    _round_to_powers(values, _gaps(values), codes)


def dithered_powers(x: Tensor, factors: Tensor, noise: Tensor, turns: Tensor, codes: Tensor) -> None:
    """The same at random, see :func:`dithered`."""
    values, u = x * factors[..., None], noise + turns[:, None, None]
    gaps = _gaps(values)
    _round_to_powers(values + (u - u.round()) * gaps, gaps, codes)


def _gaps(values: Tensor) -> Tensor:
    return (values.view(torch.int32) & EXPONENT).view(torch.float32).clamp(min=2.0**-6)


def _round_to_powers(values: Tensor, gaps: Tensor, codes: Tensor) -> None:
    _places((((values + FAR * gaps) - FAR * gaps) * 2.0**-120).view(torch.int32), codes)


def naturals(x: Tensor, factor: Tensor, noise: Tensor, turns: Tensor, codes: Tensor) -> None:
    """``factor x`` rounded at random to signed powers of two, the codes of ``Natural``."""
    largest = 2.0**127
    whole = ((noise + turns[:, None]) & 0xFFFF) << 7
    _places((x.clamp(-largest, largest) * factor).view(torch.int32) + whole, codes)


def _places(bits: Tensor, codes: Tensor) -> None:
    place, sign = (bits >> 23) & 255, bits >> 31
    codes.copy_((place ^ sign) - sign)


def add_codes(flat: Tensor, codes: Tensor, factors: Tensor) -> None:
    """``flat += factor code``."""
    flat.add_(codes.to(torch.float32) * factors[:, None])


def add_powers(flat: Tensor, codes: Tensor, factors: Tensor) -> None:
    """``flat += factor sign(code) 2^(|code| - 127)``, nothing for the code 0."""
    _add_powers(flat, codes, factors, 1.0)


def add_e3m0(flat: Tensor, codes: Tensor, factors: Tensor) -> None:
    """``flat += factor sign(code) 2^(|code| - 7)``, nothing for the code 0."""
    _add_powers(flat, codes, factors, 2.0**120)


def add_e4m3(flat: Tensor, codes: Tensor, factors: Tensor) -> None:
    """``flat += factor 2^-8 code`` for the bits of finite ``float8_e4m3fn``."""
    _add_small(flat, codes, factors, 3, 120, 2.0**-8)


def add_e5m2(flat: Tensor, codes: Tensor, factors: Tensor) -> None:
    """``flat += factor code`` for the bits of finite ``float8_e5m2``."""
    _add_small(flat, codes, factors, 2, 112, 1.0)


def _add_small(flat: Tensor, codes: Tensor, factors: Tensor, mantissa: int, bias: int, unit: float) -> None:
    """With so many bits of mantissa, and exponents counted from so much further down than those of float32."""
    whole = codes.to(torch.int32)
    size = whole & 127
    normal = ((size << (23 - mantissa)) + (bias << 23)).view(torch.float32)
    value = torch.where(size < 1 << mantissa, size.to(torch.float32) * 2.0 ** (bias - 126 - mantissa), normal)
    flat.add_(torch.where(whole < 0, -value, value) * unit * factors[:, None])


def _add_powers(flat: Tensor, codes: Tensor, factors: Tensor, unit: float) -> None:
    whole = codes.to(torch.int32)
    size = (whole.abs() << 23).view(torch.float32)
    flat.add_(torch.where(whole < 0, -size, size) * unit * factors[:, None])
