"""safetensors files: the header checked before any data is touched, tensors read as float32.

Format: 8 bytes length, a JSON header of {name: {dtype, shape, data_offsets}}, then
the data without gaps (https://github.com/huggingface/safetensors, README). Data
is read, not mapped, so that a process' memory is what it holds.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from compression.files import read_part
from spaces.errors import MALFORMED, UserError
from spaces.json_text import parse_once

_MAX_HEADER = 32 * 2**20  # a header of DeepSeek-V3 in one file would have 12 MB
_MAX_LISTS = 2**20  # a tensor's entry has three; Python needs twenty times the bytes of an empty one
_MAX_NUMBER = 2**63 - 1
_MAX_DIMENSIONS = 8
_WIDTHS = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8, "BOOL": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1,
}  # fmt: skip
FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3"})
"""Kinds that `read` turns into float32."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: its file, kind, shape and first byte."""

    file: Path
    kind: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        return math.prod(self.shape) * _WIDTHS[self.kind]


def read_header(file: Path) -> tuple[bytes, dict[str, Entry]]:
    """The raw header of a file and its tensors.

    Raises:
        UserError: Not a safetensors file, cut short, or a header whose kinds, shapes and offsets do not
            fit together or the file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise UserError(f"{file}: not a safetensors file, or cut short; download it again")
            raw = stream.read(length)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    try:
        fields = _fields(raw)
        entries = {name: _entry(file, 8 + length, about) for name, about in fields.items()}
    except MALFORMED as error:
        raise UserError(f"{file}: its safetensors header is damaged ({error}); download it again") from error
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].size)):
        if entry.offset != end:
            raise UserError(f"{file}: tensor {name} overlaps another or leaves a gap; download it again")
        end += entry.size
    if size != end:
        raise UserError(
            f"{file}: has {size:,} bytes where its header tells of {end:,}; "
            "the shard is truncated or damaged, download it again"
        )
    return raw, entries


def _fields(raw: bytes) -> dict[str, dict[str, object]]:
    """What the header says of each tensor; what safetensors' own reader refuses is refused here too."""
    if not raw.startswith(b"{"):
        raise ValueError("it must begin with {")
    if raw.count(b"[") + raw.count(b"{") > _MAX_LISTS:
        raise ValueError(f"more than {_MAX_LISTS} lists and objects")
    fields: dict[str, dict[str, object]] = parse_once(raw.decode("utf-8"))
    about = fields.pop("__metadata__", None)
    for text in about.values() if about is not None else ():
        if not isinstance(text, str):
            raise TypeError("__metadata__ must hold texts")
        text.encode()  # half of a surrogate pair is no character
    return fields


def _entry(file: Path, start: int, about: dict[str, object]) -> Entry:
    kind, shape, offsets = about["dtype"], about["shape"], about["data_offsets"]
    if kind not in _WIDTHS:
        raise ValueError(f"dtype {kind!r} is not known")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS or not isinstance(offsets, list):
        raise TypeError("shape and data_offsets must be lists")
    if any(type(n) is not int or n < 0 for n in [*shape, *offsets]) or len(offsets) != 2:
        raise TypeError("shape and data_offsets must hold whole numbers, two offsets")
    # What overflows in safetensors' own reader, whatever its order of multiplying.
    if math.prod(n for n in shape if n) > _MAX_NUMBER or max(offsets) > _MAX_NUMBER:
        raise OverflowError("a shape or an offset beyond 64 bits")
    entry = Entry(file, str(kind), tuple(shape), start + offsets[0])
    if offsets[1] - offsets[0] != entry.size:
        raise ValueError(f"{entry.size} bytes of shape {shape} in {offsets[1] - offsets[0]} bytes of file")
    return entry


def read_raw(entry: Entry, index: int | None = None) -> np.ndarray:
    """A tensor's bytes as (..., width of a number) uint8, or those of one index of its first axis."""
    shape, offset = entry.shape, entry.offset
    if index is not None:
        shape = shape[1:]
        offset += index * math.prod(shape) * _WIDTHS[entry.kind]
    count = math.prod(shape) * _WIDTHS[entry.kind]
    try:
        data = read_part(entry.file, offset, count)
    except OSError as error:
        raise UserError(f"{entry.file}: cannot be read ({error.strerror}); check the disk") from error
    if len(data) != count:
        raise UserError(f"{entry.file}: ended early; was it changed while it was read?")
    return data.reshape(*shape, _WIDTHS[entry.kind])


def read(entry: Entry, index: int | None = None) -> np.ndarray:
    """A tensor as float32, or one index of its first axis; its kind must be in `FLOATS`."""
    raw = read_raw(entry, index)
    shape = raw.shape[:-1]
    if entry.kind == "BF16":
        # bfloat16 is the upper half of float32.
        out = np.empty(shape, np.float32)
        bits = out.view(np.uint32)
        bits[...] = raw.view("<u2").reshape(shape)
        bits <<= 16
        return out
    if entry.kind == "F8_E4M3":
        return _float8()[raw.reshape(shape)]
    kind = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[entry.kind]
    with np.errstate(over="ignore"):  # what no float32 holds becomes infinite
        return raw.view(kind).reshape(shape).astype(np.float32, copy=False)


@cache
def _float8() -> np.ndarray:
    """float32 of each E4M3 byte: sign, 4 bits of exponent (bias 7), 3 of mantissa; 0x7f and 0xff are NaN."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    small, normal = mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0)
    value = np.where(exponent == 0, small, normal) * np.where(code & 128, -1, 1)
    value[[0x7F, 0xFF]] = np.nan
    return value.astype(np.float32)
