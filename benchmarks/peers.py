"""Quantizers of other libraries, for ``benchmarks.compressors``: what is installed, and what is missing."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK = 256


@dataclass(frozen=True)
class Peer:
    """One quantizer: packs a vector of float32, and makes a vector of what it packed."""

    name: str
    encode: Callable[[Tensor], tuple[Any, ...]]
    decode: Callable[[tuple[Any, ...]], Tensor]
    nbytes: Callable[[tuple[Any, ...]], int]


def peers() -> tuple[list[Peer], list[str]]:
    """All that can be had here, and what cannot, with the reason."""
    found: list[Peer] = []
    missing: list[str] = []
    for library, make in (("bitsandbytes", _bitsandbytes), ("torchao", _torchao)):
        try:
            found += make()
        except (ImportError, AttributeError, RuntimeError, OSError) as error:
            missing.append(f"{library}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
    return found, missing


def _bitsandbytes() -> list[Peer]:
    functional = importlib.import_module("bitsandbytes.functional")

    def eight(x: Tensor) -> tuple[Any, ...]:
        return tuple(functional.quantize_blockwise(x, blocksize=BLOCK))

    def four(x: Tensor) -> tuple[Any, ...]:
        return tuple(functional.quantize_4bit(x, blocksize=BLOCK // 2, quant_type="fp4"))

    def nbytes(packed: tuple[Any, ...]) -> int:
        return int(packed[0].nbytes + packed[1].absmax.nbytes)

    return [
        Peer(
            "bitsandbytes quantize_blockwise, 8 bits",
            eight,
            lambda p: _tensor(functional.dequantize_blockwise(*p)),
            nbytes,
        ),
        Peer("bitsandbytes quantize_4bit, fp4", four, lambda p: _tensor(functional.dequantize_4bit(*p)), nbytes),
    ]


def _torchao() -> list[Peer]:
    tools = importlib.import_module("torchao.quantization.quant_primitives")
    block = (1, BLOCK)

    def encode(x: Tensor) -> tuple[Any, ...]:
        rows = x[: x.numel() // BLOCK * BLOCK].view(-1, BLOCK)
        scale, zero = tools.choose_qparams_affine(rows, tools.MappingType.SYMMETRIC, block, torch.int8, eps=1e-30)
        return tools.quantize_affine(rows, block, scale, zero, torch.int8), scale, zero

    def decode(packed: tuple[Any, ...]) -> Tensor:
        return _tensor(tools.dequantize_affine(packed[0], block, packed[1], packed[2], torch.int8))

    return [Peer("torchao quantize_affine, int8 blocks", encode, decode, lambda p: int(p[0].nbytes + p[1].nbytes))]


def _tensor(value: Any) -> Tensor:
    assert isinstance(value, Tensor)
    return value
