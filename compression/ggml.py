"""ggml's own quantizers, called through the C symbols of the llama.cpp runtime's wheel.

Upstream's code makes the blocks, so a bank's bytes are those `llama-quantize`
would write. ggml aborts the process on bad input instead of reporting it;
everything it cannot take is refused here first.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
from functools import cache
from pathlib import Path

import numpy as np

from spaces.quant_types import REQUIRES_IMATRIX, WEIGHT_TYPES, quant_type

PACKAGE = "xllamacpp"
# Scales are stored as fp16 and multiplied by up to 16: beyond this they overflow.
_LARGEST = 3e4
_LARGEST_SQUARE = 1e25


class _Traits(ctypes.Structure):
    """`struct ggml_type_traits` of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    )


_TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


@cache
def version() -> str:
    """What names the quantizers: the wheel's version and the start of its library's SHA-256.

    Banks of another version are not reused. The hash tells libraries apart that were built anew under
    one version.
    """
    with _library_file().open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return f"{PACKAGE} {importlib.metadata.version(PACKAGE)} {digest[:12]}"


def _library_file() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(f"the package {PACKAGE} is missing; install moefit's dependencies")
    return next(Path(spec.submodule_search_locations[0]).glob(f"{PACKAGE}.abi3.*"))


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_library_file()))
    pointer, integer, wide = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [integer, pointer, pointer, wide, wide, wide, pointer]
    library.ggml_quantize_init.argtypes = [integer]
    library.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    library.ggml_get_type_traits.argtypes = [integer]
    return library


def _traits(type_name: str) -> _Traits:
    """Traits of a type, checked against the sizes that `spaces` counts with."""
    kind = quant_type(type_name)
    if type_name not in WEIGHT_TYPES:
        raise ValueError(f"{type_name} is no type for weights")
    traits: _Traits = _library().ggml_get_type_traits(kind.id).contents
    if (traits.blck_size, traits.type_size) != (kind.block, kind.size):
        raise RuntimeError(f"{version()}: layout of {type_name} differs from the gguf package's")
    return traits


def quantize(weights: np.ndarray, type_name: str, imatrix: np.ndarray | None = None) -> np.ndarray:
    """Packs rows of weights into blocks. Releases the GIL while it works.

    Args:
        weights: (..., row) float32.
        type_name: GGUF type.
        imatrix: (row,) mean squared input per column, or None.

    Returns:
        (..., row bytes) uint8.

    Raises:
        ValueError: Rows the type does not take, no imatrix where one is needed,
            an imatrix of another length, or weights that are not finite or too large.
    """
    weights = np.ascontiguousarray(weights, np.float32)
    row = weights.shape[-1]
    row_bytes = quant_type(type_name).row_bytes(row)
    if not np.isfinite(weights).all() or (weights.size and np.abs(weights).max() > _LARGEST):
        raise ValueError(f"weights must be finite and at most {_LARGEST:g} in size")
    if imatrix is not None:
        imatrix = np.ascontiguousarray(imatrix, np.float32)
        if imatrix.shape != (row,) or not np.isfinite(imatrix).all() or (imatrix < 0).any():
            raise ValueError(f"imatrix must be {row} finite, non-negative numbers, got {imatrix.shape}")
        if imatrix.max(initial=0.0) > _LARGEST_SQUARE:
            raise ValueError(f"imatrix must be at most {_LARGEST_SQUARE:g}: its sums overflow float32")
    elif type_name in REQUIRES_IMATRIX:
        raise ValueError(f"{type_name} needs an imatrix")
    if type_name == "F32":
        return weights.view(np.uint8).reshape(*weights.shape[:-1], row_bytes)
    _traits(type_name)
    rows = weights.size // row
    out = np.empty((rows, row_bytes), np.uint8)
    library, kind = _library(), quant_type(type_name)
    library.ggml_quantize_init(kind.id)
    written = library.ggml_quantize_chunk(
        kind.id, weights.ctypes.data, out.ctypes.data, 0, rows, row,
        None if imatrix is None else imatrix.ctypes.data,
    )  # fmt: skip
    if written != out.size:
        raise RuntimeError(f"{type_name}: ggml wrote {written} bytes where {out.size} were expected")
    return out.reshape(*weights.shape[:-1], row_bytes)


def dequantize(blocks: np.ndarray, type_name: str) -> np.ndarray:
    """(..., row bytes) uint8 blocks to (..., row) float32."""
    kind = quant_type(type_name)
    blocks = np.ascontiguousarray(blocks).view(np.uint8)
    row = blocks.shape[-1] // kind.size * kind.block
    if type_name == "F32":
        return blocks.view(np.float32)
    out = np.empty((*blocks.shape[:-1], row), np.float32)
    _TO_FLOAT(_traits(type_name).to_float)(blocks.ctypes.data, out.ctypes.data, out.size)
    return out
