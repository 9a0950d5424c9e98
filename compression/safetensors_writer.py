"""Writes a safetensors file piece by piece, so that no tensor need be whole in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np

_WIDTHS = {"F32": 4, "BF16": 2, "U8": 1}


@dataclass(frozen=True)
class Item:
    """A tensor to write: its name, kind (F32, BF16 or U8), shape and what yields its data in order."""

    name: str
    kind: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[np.ndarray]]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * _WIDTHS[self.kind]


def write(stream: IO[bytes], items: Sequence[Item], about: dict[str, str] | None = None) -> None:
    """Writes a whole file; `about` becomes its `__metadata__`."""
    fields: dict[str, object] = {"__metadata__": about or {"format": "pt"}}
    offset = 0
    for item in items:
        fields[item.name] = {
            "dtype": item.kind, "shape": list(item.shape), "data_offsets": [offset, offset + item.size],
        }  # fmt: skip
        offset += item.size
    header = json.dumps(fields).encode()
    header += b" " * (-len(header) % 8)
    stream.write(len(header).to_bytes(8, "little") + header)
    for item in items:
        written = sum(stream.write(np.ascontiguousarray(piece).data) for piece in item.pieces())
        if written != item.size:
            raise RuntimeError(f"{item.name}: {written} bytes where {item.size} were announced")
