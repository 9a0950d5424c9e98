"""Reads what the gguf library writes, and answers anything else with one clear line."""

from __future__ import annotations

import os
import random
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spaces.errors import UserError
from spaces.gguf_layout import TensorInfo, Value, file_size, header
from spaces.gguf_reader import MAX_STRING_BYTES, MAX_VALUES, Header, read_header
from spaces.quant_types import QUANT_TYPES
from tests.compression.support import refused
from tests.spaces.test_gguf_layout import NAMES, tensor_infos, write

RANGES = {"u8": (0, 255), "i8": (-128, 127), "u16": (0, 2**16 - 1), "i16": (-(2**15), 2**15 - 1),
          "u32": (0, 2**32 - 1), "i32": (-(2**31), 2**31 - 1), "u64": (0, 2**64 - 1),
          "i64": (-(2**63), 2**63 - 1)}  # fmt: skip
SCALARS: dict[str, st.SearchStrategy[Any]] = {
    **{kind: st.integers(*ends) for kind, ends in RANGES.items()},
    "f32": st.floats(width=32, allow_nan=False),
    "f64": st.floats(allow_nan=False),
    "bool": st.booleans(),
    # Any bytes, as a string of the format may be.
    "str": st.binary(max_size=12).map(lambda raw: raw.decode("utf-8", "surrogateescape")),
}


def arrays(kind: str) -> st.SearchStrategy[Value]:
    return st.lists(SCALARS[kind], max_size=6).map(lambda v: Value(kind, tuple(v)))


FLAT = st.sampled_from(sorted(SCALARS)).flatmap(arrays)
NESTED = st.lists(
    st.one_of(FLAT, st.lists(FLAT, max_size=2).map(lambda v: Value("array", tuple(v)))), max_size=3
)
ANY = st.one_of(
    FLAT,
    NESTED.map(lambda v: Value("array", tuple(v))),
    st.sampled_from(sorted(SCALARS)).flatmap(lambda k: SCALARS[k].map(lambda v: Value(k, v))),
)
METADATA = st.dictionaries(NAMES, ANY, max_size=6)


def entry(key: str, kind: int, payload: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + payload


def tensor(name: str = "a", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    head = struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(shape))
    return head + struct.pack(f"<{len(shape)}Q", *shape) + struct.pack("<IQ", kind, offset)


def build(entries: list[bytes], tensors: list[bytes], data: int = 4096, version: int = 3) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(entries))
    head += b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


def read(content: bytes, folder: Path) -> Header:
    path = folder / "model.gguf"
    path.write_bytes(content)
    return read_header(path)


@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(METADATA, tensor_infos(), st.sampled_from([2, 3]))
def test_what_the_header_writes_is_read_back(
    metadata: dict[str, Value], infos: list[TensorInfo], version: int
) -> None:
    head = bytearray(header(metadata, infos))
    struct.pack_into("<I", head, 4, version)
    with tempfile.TemporaryDirectory() as folder:
        found = read(bytes(head) + bytes(file_size(metadata, infos) - len(head)), Path(folder))
    assert (found.version, found.metadata, list(found.metadata)) == (version, metadata, list(metadata))
    assert [t.info for t in found.tensors] == infos
    assert found.data_start == len(head)
    assert header(found.metadata, [t.info for t in found.tensors])[8:] == head[8:]


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(
    tensor_infos(),
    st.sampled_from([8, 32, 128]),
    st.text(min_size=1, max_size=9),
    st.lists(st.integers(-9, 9), min_size=1),
)
def test_what_the_gguf_library_writes_is_read(
    infos: list[TensorInfo], alignment: int, text: str, numbers: list[int]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        writer = gguf.GGUFWriter(path, "olmoe")
        writer.add_custom_alignment(alignment)
        writer.add_string("text", text)
        writer.add_array("numbers", numbers)
        writer.add_key_value("wide", 2**40, gguf.GGUFValueType.INT64)
        for t in infos:
            kind = next(q for q in QUANT_TYPES.values() if q.id == t.type_id)
            blocks = np.zeros((*t.shape[:-1], kind.row_bytes(t.shape[-1])), np.uint8)
            writer.add_tensor(t.name, blocks, raw_dtype=gguf.GGMLQuantizationType(t.type_id))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        found, reader = read_header(path), gguf.GGUFReader(path)
    assert found.metadata == {
        "general.architecture": Value("str", "olmoe"),
        "general.alignment": Value("u32", alignment),
        "text": Value("str", text),
        "numbers": Value("i32", tuple(numbers)),
        "wide": Value("i64", 2**40),
    }
    assert [t.info for t in found.tensors] == infos
    assert [t.offset for t in found.tensors] == [int(t.data_offset) for t in reader.tensors]
    assert found.alignment == alignment


def _valid(folder: Path) -> bytes:
    metadata: dict[str, Value] = {
        "general.architecture": Value("str", "deepseek2"),
        "deepseek2.expert_count": Value("u32", 8),
        "tokens": Value("str", ("a", "bc", "é")),
        "flags": Value("bool", (True, False)),
        "scale": Value("f32", 2.5),
    }
    infos = [TensorInfo("blk.0.a.weight", (2, 3, 32), 8, 204), TensorInfo("b", (5,), 0, 20)]
    write(folder / "valid.gguf", metadata, infos)
    return (folder / "valid.gguf").read_bytes()


def _mutations(tmp_path: Path, count: int, seed: int) -> None:
    """Valid headers with some bytes overwritten, removed or added: either still valid, or a UserError."""
    generator, content = random.Random(seed), _valid(tmp_path)
    end = read(content, tmp_path).data_start
    refusals = 0
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(generator.choice([1, 1, 2, 4])):
            at = generator.randrange(end)
            match generator.randrange(4):
                case 0:
                    changed[at] = generator.randrange(256)
                case 1:
                    changed[at] ^= 1 << generator.randrange(8)
                case 2:
                    wide = generator.choice([0, 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1])
                    changed[at : at + 8] = struct.pack("<Q", wide)
                case _:
                    changed[at : at + generator.randrange(1, 9)] = generator.randbytes(generator.randrange(9))
        if not generator.randrange(6):
            del changed[generator.randrange(len(changed)) :]
        try:
            read(bytes(changed), tmp_path)
        except UserError as error:
            message = str(error)
        else:
            continue
        assert "\n" not in message
        assert "model.gguf: " in message
        refusals += 1
    assert count // 2 < refusals < count


def test_a_damaged_header_is_a_user_error(tmp_path: Path) -> None:
    _mutations(tmp_path, 4000, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_a_damaged_header_is_a_user_error_many_times(tmp_path: Path, seed: int) -> None:
    _mutations(tmp_path, 40000, seed)


def test_a_file_cut_anywhere_is_a_user_error(tmp_path: Path) -> None:
    content = _valid(tmp_path)
    last = read(content, tmp_path).tensors[-1]
    for size in [*range(last.offset), last.offset + last.size - 1]:
        refused(lambda size=size: read(content[:size], tmp_path), tmp_path / "model.gguf")
    read(content[: last.offset + last.size], tmp_path)  # only the padding is gone


STRING, ARRAY, U32, U8, BOOL = 8, 9, 4, 0, 7
NUMBER = entry("n", U32, bytes(4))


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"", "empty"),
        (b"GG", "not a GGUF file"),
        (b"PK\3\4" + bytes(99), "not a GGUF file"),
        (build([], [], version=1), "version must be 2 or 3, got 1"),
        (build([], [], version=4), "version must be 2 or 3, got 4"),
        (build([], [], version=3 << 24), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), "9223372036854775808 tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**64 - 1), "metadata entries"),
        (b"GGUF" + struct.pack("<IQQ", 3, 10**5, 0) + bytes(999), "100000 tensors"),
        (build([entry("", U32, bytes(4))], []), "must be 1 to 65535 bytes long"),
        (build([NUMBER, NUMBER], []), "'n' stands twice"),
        (build([entry("n", 13, bytes(4))], []), "unknown kind 13"),
        (build([entry("n", STRING, struct.pack("<Q", 2**63))], []), "the file ends within"),
        (build([entry("n", BOOL, b"\2")], []), "neither 0 nor 1"),
        (build([entry("n", ARRAY, struct.pack("<IQ", BOOL, 3) + b"\0\1\2")], []), "neither 0 nor 1"),
        (build([entry("n", ARRAY, struct.pack("<IQ", U8, 2**60))], []), "more than"),
        (build([entry("n", ARRAY, struct.pack("<IQ", STRING, 10**6))], []), "bytes can hold"),
        (build([entry("n", ARRAY, struct.pack("<IQ", ARRAY, 1) * 5)], []), "more than 4 deep"),
        (build([entry("general.alignment", U32, struct.pack("<I", 24))], []), "power of two"),
        (build([entry("general.alignment", U32, struct.pack("<I", 0))], []), "power of two"),
        (build([entry("general.alignment", STRING, struct.pack("<Q", 0))], []), "power of two"),
        (build([], [tensor("")]), "must be 1 to 63 bytes long"),
        (build([], [tensor("a" * 64)]), "must be 1 to 63 bytes long"),
        (build([], [tensor(shape=())]), "1 to 4 axes, it says 0"),
        (build([], [tensor(shape=(1,) * 5)]), "1 to 4 axes, it says 5"),
        (build([], [tensor(shape=(32, 0))]), "is empty"),
        (build([], [tensor(shape=(2**32, 2**32, 2**32))]), "would take"),
        (build([], [tensor(shape=(2**64 - 32, 2**63), kind=8)]), "would take"),
        (build([], [tensor(kind=4)]), "type 4, unknown"),
        (build([], [tensor(kind=2**32 - 1)]), "type 4294967295, unknown"),
        (build([], [tensor(shape=(33,), kind=8)]), "blocks of 32 weights, but its rows have 33"),
        (build([], [tensor(offset=16)]), "multiple of 32"),
        (build([], [tensor(offset=2**64 - 32)]), "ends at byte"),
        (build([], [tensor(offset=4096)]), "cut short"),
        (build([], [tensor(), tensor(offset=128)]), "'a' stands twice"),
        (build([], [tensor(), tensor("b", offset=96)]), "overlap"),
        (build([], [tensor(offset=96), tensor("b")]), "overlap"),
    ],
)  # fmt: skip
def test_a_broken_rule_is_named(content: bytes, rule: str, tmp_path: Path) -> None:
    refused(lambda: read(content, tmp_path), tmp_path / "model.gguf", rule)


def test_a_name_that_is_not_utf8_is_refused_and_a_string_is_kept(tmp_path: Path) -> None:
    refused(lambda: read(build([], [tensor().replace(b"a", b"\xff")]), tmp_path), "not UTF-8")
    found = read(build([entry("n", STRING, struct.pack("<Q", 2) + b"\xff\xfe")], []), tmp_path)
    assert header(found.metadata, []).count(b"\xff\xfe") == 1


def test_counts_that_a_large_sparse_file_could_hold_are_refused_too(tmp_path: Path) -> None:
    """A terabyte of holes costs nothing to send; it must not be believed to be an array or a string."""
    path = tmp_path / "bomb.gguf"
    for payload in (struct.pack("<IQ", U8, 2**39), struct.pack("<IQ", STRING, 2**30), None):
        one = entry("n", ARRAY, payload) if payload else entry("n", STRING, struct.pack("<Q", 2**39))
        path.write_bytes(build([one], []))
        os.truncate(path, 2**40)
        refused(lambda: read_header(path), path, str(MAX_VALUES) if payload else "longer than 16 MiB")


def test_metadata_of_many_large_strings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.gguf"
    with path.open("wb") as stream:
        stream.write(struct.pack("<4sIQQ", b"GGUF", 3, 0, 9))
        for number in range(9):
            stream.write(entry(f"n{number}", STRING, struct.pack("<Q", MAX_STRING_BYTES)))
            stream.seek(MAX_STRING_BYTES, os.SEEK_CUR)
        stream.truncate()
    refused(lambda: read_header(path), path, "larger than 128 MiB")


def _folder(path: Path) -> None:
    path.mkdir()


def _loop(path: Path) -> None:
    path.symlink_to(path)


def _nothing(path: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (_folder, "not a file"),
        (_loop, "cannot be read"),
        (_nothing, "cannot be read"),
        (os.mkfifo, "not a file"),
    ],
)
def test_what_is_no_file_is_refused(make: Callable[[Path], None], rule: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    make(path)
    refused(lambda: read_header(path), path, rule)


def test_a_path_no_system_takes_is_refused() -> None:
    refused(lambda: read_header(Path("a\0b.gguf")), "no path")
