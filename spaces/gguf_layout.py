"""The GGUF file format, version 3: the bytes before the tensors, and the size of the whole.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A file is the
header (magic, version, counts), the metadata, one info per tensor, padding to
the alignment, then each tensor's data padded to the alignment.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ALIGNMENT = 32
TYPE_IDS = {
    "u8": 0, "i8": 1, "u16": 2, "i16": 3, "u32": 4, "i32": 5, "f32": 6, "bool": 7, "str": 8, "array": 9,
    "u64": 10, "i64": 11, "f64": 12,
}  # fmt: skip
"""GGUF's numbers of the kinds of metadata."""

PACKING = {
    "u8": "B", "i8": "b", "u16": "H", "i16": "h", "u32": "I", "i32": "i", "f32": "f", "bool": "?",
    "u64": "Q", "i64": "q", "f64": "d",
}  # fmt: skip
"""The letters `struct` has for the kinds of one size."""


@dataclass(frozen=True, slots=True)
class Value:
    """A metadata value.

    Attributes:
        kind: One of `TYPE_IDS`; of an array, that of its elements.
        value: A tuple is an array. The elements of kind `array` are Values that are arrays themselves.
            Bytes of a string that are not UTF-8 are lone surrogates, as `surrogateescape` makes them.
    """

    kind: str
    value: int | float | bool | str | tuple[Any, ...]


@dataclass(frozen=True)
class TensorInfo:
    """What the file says of a tensor before its data.

    Attributes:
        shape: Axes in numpy order, the row last (the file stores them reversed).
        type_id: ggml's number of the type.
        size: Bytes of the data, padding not counted.
    """

    name: str
    shape: tuple[int, ...]
    type_id: int
    size: int


def padded(size: int) -> int:
    """`size` rounded up to the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def _string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _array(item: Value) -> bytes:
    values = item.value
    if not isinstance(values, tuple):
        raise TypeError(f"an element of an array of arrays must be an array, got {type(values).__name__}")
    head = struct.pack("<IQ", TYPE_IDS[item.kind], len(values))
    if item.kind == "str":
        return head + b"".join(_string(str(v)) for v in values)
    if item.kind == "array":
        return head + b"".join(_array(v) for v in values)
    return head + struct.pack(f"<{len(values)}{PACKING[item.kind]}", *values)


def _metadata(metadata: Mapping[str, Value]) -> Iterable[bytes]:
    for key, item in metadata.items():
        yield _string(key)
        if isinstance(item.value, tuple):
            yield struct.pack("<I", TYPE_IDS["array"]) + _array(item)
        elif item.kind == "str":
            yield struct.pack("<I", TYPE_IDS["str"]) + _string(str(item.value))
        else:
            yield struct.pack(f"<I{PACKING[item.kind]}", TYPE_IDS[item.kind], item.value)


def header(metadata: Mapping[str, Value], tensors: Sequence[TensorInfo]) -> bytes:
    """Everything before the first tensor's data, padding included."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata)), *_metadata(metadata)]
    offset = 0
    for tensor in tensors:
        dimensions = tensor.shape[::-1]
        parts.append(_string(tensor.name))
        parts.append(struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions))
        parts.append(struct.pack("<IQ", tensor.type_id, offset))
        offset += padded(tensor.size)
    raw = b"".join(parts)
    return raw + b"\0" * (padded(len(raw)) - len(raw))


def file_size(metadata: Mapping[str, Value], tensors: Sequence[TensorInfo]) -> int:
    """Bytes of the file, exactly."""
    return len(header(metadata, tensors)) + sum(padded(t.size) for t in tensors)
