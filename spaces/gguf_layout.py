"""The GGUF file format, version 3: the bytes before the tensors, and the size of the whole.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A file is the
header (magic, version, counts), the metadata, one info per tensor, padding to
the alignment, then each tensor's data padded to the alignment.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

ALIGNMENT = 32
_TYPE_IDS = {"u32": 4, "i32": 5, "f32": 6, "bool": 7, "str": 8, "array": 9, "u64": 10}
_PACKING = {"u32": "<I", "i32": "<i", "f32": "<f", "bool": "<?", "u64": "<Q"}


@dataclass(frozen=True)
class Value:
    """A metadata value: `kind` is one of u32, i32, f32, bool, str; a tuple is an array of it."""

    kind: str
    value: int | float | bool | str | tuple[int | float | bool | str, ...]


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
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _scalar(kind: str, value: int | float | bool | str) -> bytes:
    return _string(str(value)) if kind == "str" else struct.pack(_PACKING[kind], value)


def _metadata(metadata: Mapping[str, Value]) -> Iterable[bytes]:
    for key, item in metadata.items():
        yield _string(key)
        if isinstance(item.value, tuple):
            yield struct.pack("<IIQ", _TYPE_IDS["array"], _TYPE_IDS[item.kind], len(item.value))
            for value in item.value:
                yield _scalar(item.kind, value)
        else:
            yield struct.pack("<I", _TYPE_IDS[item.kind]) + _scalar(item.kind, item.value)


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
