"""Headers and sizes are, byte for byte, those of the gguf library's own writer and reader."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spaces.gguf_layout import ALIGNMENT, TensorInfo, Value, file_size, header, padded
from spaces.quant_types import QUANT_TYPES, quant_type

KINDS = {
    "u32": gguf.GGUFValueType.UINT32,
    "i32": gguf.GGUFValueType.INT32,
    "u64": gguf.GGUFValueType.UINT64,
    "f32": gguf.GGUFValueType.FLOAT32,
    "bool": gguf.GGUFValueType.BOOL,
    "str": gguf.GGUFValueType.STRING,
}
SCALARS: dict[str, st.SearchStrategy[Any]] = {
    "u32": st.integers(0, 2**32 - 1),
    "i32": st.integers(-(2**31), 2**31 - 1),
    "u64": st.integers(0, 2**64 - 1),
    "f32": st.floats(width=32, allow_nan=False),
    "bool": st.booleans(),
    "str": st.text(max_size=12),
}


def values(kind: str) -> st.SearchStrategy[Value]:
    one = SCALARS[kind]
    many = st.lists(one, min_size=1, max_size=6).map(tuple)
    return st.one_of(one, many).map(lambda v: Value(kind, v))


NAMES = st.text("abcdefghijklmnop_.é0123456789", min_size=1, max_size=20)
METADATA = st.dictionaries(NAMES, st.sampled_from(sorted(KINDS)).flatmap(values), max_size=6)


@st.composite
def tensor_infos(draw: st.DrawFn) -> list[TensorInfo]:
    infos = []
    for name in draw(st.lists(NAMES, min_size=1, max_size=4, unique=True)):
        kind = quant_type(
            draw(st.sampled_from(["F32", "F16", "BF16", "Q8_0", "IQ4_NL", "Q4_K", "IQ1_S", "IQ2_XXS"]))
        )
        row = kind.block * draw(st.integers(1, 3))
        outer = draw(st.lists(st.integers(1, 4), max_size=2))
        rows = int(np.prod(outer, dtype=int))
        infos.append(TensorInfo(name, (*outer, row), kind.id, rows * kind.row_bytes(row)))
    return infos


def write(path: Path, metadata: Mapping[str, Value], tensors: Sequence[TensorInfo]) -> None:
    """The same file by the gguf library, its data zeros."""
    writer = gguf.GGUFWriter(path, "deepseek2")
    for key, item in metadata.items():
        if isinstance(item.value, tuple):
            writer.add_key_value(key, list(item.value), gguf.GGUFValueType.ARRAY, KINDS[item.kind])
        else:
            writer.add_key_value(key, item.value, KINDS[item.kind])
    by_id = {t.id: t for t in QUANT_TYPES.values()}
    for t in tensors:
        kind = by_id[t.type_id]
        blocks = np.zeros((*t.shape[:-1], kind.row_bytes(t.shape[-1])), np.uint8)
        writer.add_tensor(t.name, blocks, raw_dtype=gguf.GGMLQuantizationType(t.type_id))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(METADATA, tensor_infos())
def test_a_file_is_the_one_the_gguf_library_writes(
    metadata: dict[str, Value], tensors: list[TensorInfo]
) -> None:
    metadata = {"general.architecture": Value("str", "deepseek2"), **metadata}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write(path, metadata, tensors)
        content = path.read_bytes()
        head = header(metadata, tensors)
        assert content[: len(head)] == head
        assert len(content) == file_size(metadata, tensors)

        reader = gguf.GGUFReader(path)
        for key, item in metadata.items():
            expected = list(item.value) if isinstance(item.value, tuple) else item.value
            assert reader.fields[key].contents() == expected
        for read, t in zip(reader.tensors, tensors, strict=True):
            assert read.name == t.name
            assert tuple(int(n) for n in read.shape)[::-1] == t.shape
            assert read.tensor_type == t.type_id
            assert read.n_bytes == t.size
            assert read.data_offset % ALIGNMENT == 0


@given(st.integers(0, 10**12))
def test_padding_reaches_the_next_multiple_and_no_further(size: int) -> None:
    assert padded(size) % ALIGNMENT == 0
    assert size <= padded(size) < size + ALIGNMENT


@pytest.mark.parametrize("size", [1, 31, 32, 33])
def test_the_last_tensor_is_padded_too(size: int) -> None:
    tensors = [TensorInfo("a", (size,), QUANT_TYPES["I8"].id, size)]
    assert file_size({}, tensors) % ALIGNMENT == 0
    assert file_size({}, tensors) == len(header({}, tensors)) + padded(size)
