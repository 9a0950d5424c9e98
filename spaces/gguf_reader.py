"""Reads what a GGUF file says of itself, trusting none of it. No tensor data is touched.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3 (they differ
only in that version 3 allows big-endian files, which are refused here). The rules beyond it are
ggml's own (`gguf_init_from_reader` in gguf.cpp), which ends the process where they do not hold
or refuses the file.
"""

from __future__ import annotations

import math
import os
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NoReturn

from spaces.errors import UserError
from spaces.gguf_layout import ALIGNMENT, PACKING, TYPE_IDS, TensorInfo, Value
from spaces.quant_types import QUANT_TYPES

MAX_METADATA_BYTES = 2**27
"""Bytes before the tensors. Tokenizers take tens of MB; this much is no model's."""
MAX_STRING_BYTES = 2**24
"""Of one string. Chat templates take some 10**5; one character beyond Latin quadruples it in memory."""
MAX_VALUES = 2**22
"""Numbers and strings of all arrays together; the largest vocabularies need some 10**6."""
MAX_ENTRIES = 2**16
MAX_TENSORS = 2**17
MAX_NAME_BYTES = 63
MAX_KEY_BYTES = 2**16 - 1
MAX_DIMENSIONS = 4
MAX_NESTING = 4

_KINDS = {number: kind for kind, number in TYPE_IDS.items()}
_TYPES = {t.id: t for t in QUANT_TYPES.values()}
# Fewest bytes: key length, a letter, kind, one byte; name length, a letter, count, axis, type, offset.
_LEAST_ENTRY, _LEAST_TENSOR = 8 + 1 + 4 + 1, 8 + 1 + 4 + 8 + 4 + 8
_REMEDY = "download or convert the file again"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file has it.

    Attributes:
        shape: Axes in numpy order, the row last.
        type_name: GGUF type.
        size: Bytes of the data.
        file: The file that holds the data.
        offset: Where the data begins, from the start of that file.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    size: int
    file: Path
    offset: int

    @property
    def row_bytes(self) -> int:
        return QUANT_TYPES[self.type_name].row_bytes(self.shape[-1])

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(self.name, self.shape, QUANT_TYPES[self.type_name].id, self.size)


@dataclass(frozen=True)
class Header:
    """What one file says: metadata and tensors in file order, sizes in bytes."""

    version: int
    metadata: dict[str, Value]
    tensors: tuple[StoredTensor, ...]
    alignment: int
    data_start: int
    file_size: int


def read_header(path: Path) -> Header:
    """Reads and checks all that stands before the tensors' data.

    Raises:
        UserError: The file cannot be read or breaks a rule of the format.
    """
    try:
        # Asked before it is opened: opening a pipe would wait for someone to write to it.
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path}: not a file; give the path of a .gguf file")
        with path.open("rb") as stream:
            return _Cursor(path, stream, os.fstat(stream.fileno()).st_size).header()
    except (OSError, RuntimeError) as error:  # before 3.13 a loop of links is a RuntimeError
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}); check the path") from error
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{str(path)!r}: no path ({error}); check it") from error


class _Cursor:
    """A place in the header, from which only bytes that are there can be taken."""

    def __init__(self, path: Path, stream: IO[bytes], size: int) -> None:
        self.path, self.stream, self.size = path, stream, size
        self.at = 0
        self.values = 0

    def fail(self, rule: str) -> NoReturn:
        raise UserError(f"{self.path}: {rule}; {_REMEDY}")

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.at:
            self.fail(f"the file ends within {what} (it has {self.size} bytes)")
        if self.at + count > MAX_METADATA_BYTES:
            self.fail(f"metadata larger than {MAX_METADATA_BYTES >> 20} MiB, at {what}")
        raw = self.stream.read(count)
        if len(raw) != count:
            self.fail(f"the file ends within {what}, it got shorter while being read")
        self.at += count
        return raw

    def number(self, letter: str, what: str) -> Any:
        packing = "<" + letter
        return struct.unpack(packing, self.take(struct.calcsize(packing), what))[0]

    def count(self, least: int, limit: int, what: str) -> int:
        """A count of things that take `least` bytes each, so that it says nothing the file cannot hold."""
        count = int(self.number("Q", f"the number of {what}"))
        if count > limit or count * least > self.size - self.at:
            self.fail(
                f"says it has {count} {what}, more than "
                + (f"the {limit} taken here" if count > limit else f"its {self.size} bytes can hold")
            )
        return count

    def text(self, what: str) -> str:
        size = self.number("Q", what)
        if size > MAX_STRING_BYTES and size <= self.size - self.at:
            self.fail(f"{what} is longer than {MAX_STRING_BYTES >> 20} MiB")
        return self.take(size, what).decode("utf-8", "surrogateescape")

    def name(self, what: str, longest: int) -> str:
        """A key or a tensor's name, which unlike other strings must be readable."""
        size = self.number("Q", f"the length of {what}")
        if not 0 < size <= longest:
            self.fail(f"{what} must be 1 to {longest} bytes long, it says {size}")
        try:
            return self.take(size, what).decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8")

    def kind(self, what: str) -> str:
        number = self.number("I", f"the kind of {what}")
        if number not in _KINDS:
            self.fail(f"{what} is of the unknown kind {number}")
        return _KINDS[number]

    def array(self, what: str, depth: int) -> Value:
        if depth > MAX_NESTING:
            self.fail(f"{what}: arrays within arrays, more than {MAX_NESTING} deep")
        kind = self.kind(f"the elements of {what}")
        least = {"str": 8, "array": 12}.get(kind) or struct.calcsize(PACKING[kind])
        count = self.count(least, MAX_VALUES, f"elements of {what}")
        self.values += count
        if self.values > MAX_VALUES:
            self.fail(f"{what}: more than {MAX_VALUES} array elements in all")
        if kind == "array":
            return Value(kind, tuple(self.array(what, depth + 1) for _ in range(count)))
        if kind == "str":
            element = f"an element of {what}"
            return Value(kind, tuple(self.text(element) for _ in range(count)))
        raw = self.take(count * least, what)
        if kind == "bool" and raw.strip(b"\0\1"):
            self.fail(f"{what} has a boolean that is neither 0 nor 1")
        return Value(kind, struct.unpack(f"<{count}{PACKING[kind]}", raw))

    def value(self, what: str) -> Value:
        kind = self.kind(what)
        if kind == "array":
            return self.array(what, 1)
        if kind == "str":
            return Value(kind, self.text(what))
        if kind == "bool" and (byte := self.number("B", what)) in (0, 1):
            return Value(kind, byte == 1)
        if kind == "bool":
            self.fail(f"{what} is neither 0 nor 1")
        return Value(kind, self.number(PACKING[kind], what))

    def metadata(self, count: int) -> dict[str, Value]:
        found: dict[str, Value] = {}
        for number in range(count):
            key = self.name(f"the key of metadata entry {number}", MAX_KEY_BYTES)
            if key in found:
                self.fail(f"metadata key {key[:80]!r} stands twice")
            found[key] = self.value(f"metadata {key[:80]!r}")
        return found

    def alignment(self, metadata: dict[str, Value]) -> int:
        key = "general.alignment"
        kind, value = (v := metadata.get(key, Value("u32", ALIGNMENT))).kind, v.value
        # ggml asks for a power of two, the format for a multiple of 8.
        if kind != "u32" or not isinstance(value, int) or value < 8 or value.bit_count() != 1:
            self.fail(f"{key} must be a power of two (u32) from 8 on, got {kind} {str(value)[:40]}")
        return value

    def tensor(self, number: int) -> Callable[[int], StoredTensor]:
        """One tensor's entry; it becomes a tensor where the data begins, which is known after the last."""
        name = self.name(f"the name of tensor {number}", MAX_NAME_BYTES)
        what = f"tensor {name!r}"
        axes = self.number("I", f"the number of axes of {what}")
        if not 1 <= axes <= MAX_DIMENSIONS:
            self.fail(f"{what} must have 1 to {MAX_DIMENSIONS} axes, it says {axes}")
        shape = struct.unpack(f"<{axes}Q", self.take(8 * axes, f"the shape of {what}"))[::-1]
        if 0 in shape:
            self.fail(f"{what} is empty: its shape is {list(shape)}")
        type_id = self.number("I", f"the type of {what}")
        if type_id not in _TYPES:
            raise UserError(
                f"{self.path}: {what} is of type {type_id}, unknown here; use a file of another type, "
                "or a newer moefit"
            )
        kind = _TYPES[type_id]
        if not kind.fits(shape[-1]):
            self.fail(
                f"{what}: {kind.name} packs blocks of {kind.block} weights, but its rows have {shape[-1]}"
            )
        # Python's integers do not overflow, so this comparison also covers what would overflow in C.
        size = math.prod(shape[:-1]) * kind.row_bytes(shape[-1])
        if size > self.size:
            self.fail(f"{what} would take {size} bytes of a file of {self.size}")
        offset = self.number("Q", f"the offset of {what}")
        return lambda start: StoredTensor(name, shape, kind.name, size, self.path, start + offset)

    def header(self) -> Header:
        if not self.size:
            self.fail("the file is empty")
        if self.take(min(4, self.size), "the magic number") != b"GGUF":
            raise UserError(f"{self.path}: not a GGUF file; give a .gguf file that llama.cpp can load")
        version = self.number("I", "the version")
        if version in (2 << 24, 3 << 24):
            raise UserError(f"{self.path}: a big-endian GGUF file; convert it to little-endian first")
        if version not in (2, 3):
            raise UserError(
                f"{self.path}: GGUF version must be 2 or 3, got {version}; convert the model again"
            )
        # The tensors' number comes first but can only be held against the size once both are read.
        tensors = self.count(_LEAST_TENSOR, MAX_TENSORS, "tensors")
        metadata = self.metadata(self.count(_LEAST_ENTRY, MAX_ENTRIES, "metadata entries"))
        alignment = self.alignment(metadata)
        pending = [self.tensor(number) for number in range(tensors)]
        start = -(-self.at // alignment) * alignment
        found = tuple(make(start) for make in pending)
        self.check_layout(found, start, alignment)
        return Header(version, metadata, found, alignment, start, self.size)

    def check_layout(self, tensors: tuple[StoredTensor, ...], start: int, alignment: int) -> None:
        """No name twice; every tensor's data aligned, in the file, and its own."""
        names: set[str] = set()
        for t in tensors:
            if t.name in names:
                self.fail(f"tensor {t.name!r} stands twice")
            names.add(t.name)
            if (t.offset - start) % alignment:
                self.fail(f"tensor {t.name!r}: its offset must be a multiple of {alignment}")
            if t.offset + t.size > self.size:
                self.fail(
                    f"tensor {t.name!r} ends at byte {t.offset + t.size}, but the file has {self.size}: "
                    "it is cut short"
                )
        ordered = sorted(tensors, key=lambda t: t.offset)
        for left, right in pairwise(ordered):
            if left.offset + left.size > right.offset:
                self.fail(f"tensors {left.name!r} and {right.name!r} overlap")
