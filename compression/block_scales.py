"""Scales of GGUF blocks: multiplied in place, the bytes stay as many.

Every block type but the plain floats holds one or two fp16 factors that all its
weights are proportional to (layouts: ggml-common.h of llama.cpp). IQ1_M spreads
its fp16 over the upper nibbles of four 16-bit words.
"""

from __future__ import annotations

import numpy as np

from spaces.quant_types import quant_type

_OFFSETS: dict[str, tuple[int, ...]] = {
    "Q4_0": (0,), "Q5_0": (0,), "Q8_0": (0,), "Q4_1": (0, 2), "Q5_1": (0, 2),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "IQ1_S": (0,), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,),
    "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip
_SPREAD = {"IQ1_M": 48}

SCALED = frozenset(_OFFSETS) | frozenset(_SPREAD)
"""Types whose blocks have a scale."""


def scale_blocks(blocks: np.ndarray, type_name: str, factors: np.ndarray) -> np.ndarray:
    """Blocks whose weights are `factors` times as large, but for the rounding of fp16.

    Args:
        blocks: (..., row bytes) uint8.
        type_name: GGUF type, one of `SCALED`.
        factors: (..., blocks per row) positive.

    Raises:
        ValueError: A type without scales, or factors of another shape.
    """
    if type_name not in SCALED:
        raise ValueError(f"blocks of {type_name} have no scale")
    size = quant_type(type_name).size
    shape = (*blocks.shape[:-1], blocks.shape[-1] // size)
    if factors.shape != shape:
        raise ValueError(f"factors must have shape {shape}, got {factors.shape}")
    out = np.array(blocks).reshape(*shape, size)
    if type_name in _SPREAD:
        words = out[..., _SPREAD[type_name] :].view(np.uint16)
        shifts = np.array([12, 8, 4, 0])
        parts = (words.astype(np.uint32) >> 12) << (12 - shifts)
        scale = parts.sum(-1).astype(np.uint16).view(np.float16)
        moved = _scaled(scale, factors).view(np.uint16)
        nibbles = (moved[..., None] >> (12 - shifts).astype(np.uint16)) & 0xF
        words[...] = (words & 0x0FFF) | (nibbles << 12).astype(np.uint16)
    for offset in _OFFSETS.get(type_name, ()):
        field = np.ascontiguousarray(out[..., offset : offset + 2]).view(np.float16)[..., 0]
        out[..., offset : offset + 2] = _scaled(field, factors)[..., None].view(np.uint8)
    return out.reshape(blocks.shape)


def _scaled(scale: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """fp16 scales times factors, kept finite."""
    return np.clip(scale.astype(np.float32) * factors, -65504, 65504).astype(np.float16)
