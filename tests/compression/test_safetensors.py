"""What safetensors writes is read, what is written safetensors reads, and damage is named."""

from __future__ import annotations

import io
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from compression.safetensors_file import FLOATS, read, read_header, read_raw
from compression.safetensors_writer import Item, write
from spaces.errors import UserError
from tests.compression.support import refused

NUMPY = ("<f8", "<f4", "<f2", "<i8", "<i4", "<i2", "i1", "<u8", "<u4", "<u2", "u1", "?")
TORCH = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip
shapes = npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
arrays = st.sampled_from(NUMPY).flatmap(lambda kind: npst.arrays(kind, shapes))
folders = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60
)


@folders
@given(st.dictionaries(st.text(min_size=1).filter(lambda name: name != "__metadata__"), arrays, max_size=5))
def test_files_of_safetensors_are_read_back(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    file = tmp_path / "a.safetensors"
    safetensors.numpy.save_file(tensors, file, metadata={"any": "thing"})
    _, entries = read_header(file)
    assert set(entries) == set(tensors)
    for name, value in tensors.items():
        entry = entries[name]
        assert (entry.shape, entry.size) == (value.shape, value.nbytes)
        raw = read_raw(entry)
        assert raw.shape == (*value.shape, value.itemsize)
        assert raw.tobytes() == value.tobytes()
        if entry.kind in FLOATS:
            found = read(entry)
            assert found.dtype == np.float32
            with np.errstate(over="ignore"):
                assert np.array_equal(found, value.astype(np.float32), equal_nan=True)
        for i in range(value.shape[0] if value.ndim else 0):
            assert read_raw(entry, i).tobytes() == value[i].tobytes()


@pytest.mark.parametrize("kind", sorted(TORCH))
@folders
@given(data=st.binary(max_size=256))
def test_every_kind_is_read_as_torch_reads_it(tmp_path: Path, kind: str, data: bytes) -> None:
    width = torch.empty(0, dtype=TORCH[kind]).element_size()
    count = len(data) // width // 2 * 2
    raw = torch.tensor(list(data[: count * width]), dtype=torch.uint8)
    tensor = raw.view(TORCH[kind]).reshape(2, count // 2) if count else torch.empty(2, 0, dtype=TORCH[kind])
    safetensors.torch.save_file({"x": tensor}, tmp_path / "a.safetensors")
    entry = read_header(tmp_path / "a.safetensors")[1]["x"]
    assert entry.kind == kind
    with np.errstate(over="ignore"):
        assert np.array_equal(read(entry), tensor.float().numpy(), equal_nan=True)
        assert np.array_equal(read(entry, 1), tensor[1].float().numpy(), equal_nan=True)


def test_every_float8_and_every_bfloat16_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    tensors = {
        "eight": torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn),
        "sixteen": torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16),
    }
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    _, entries = read_header(tmp_path / "a.safetensors")
    for name, tensor in tensors.items():
        found, expected = read(entries[name]), tensor.float().numpy()
        assert np.isfinite(found).sum() > 200
        assert np.array_equal(found, expected, equal_nan=True)
        number = ~np.isnan(expected)
        assert np.array_equal(np.signbit(found)[number], np.signbit(expected)[number])


# Damage.

HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "U8", "shape": [0], "data_offsets": [32, 32]},
}
BODY = bytes(range(32))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4)
    | st.sampled_from(["F32", "BF16", "U8", "C64", [0, 24], [24, 32], [2, 3], [2**40, 2**40], [-1, -6]]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def packed(header: Any, body: bytes = BODY) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + body


@st.composite
def changed_headers(draw: st.DrawFn) -> bytes:
    """A good file with some entries or fields exchanged."""
    header: dict[str, Any] = json.loads(json.dumps(HEADER))
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from([*HEADER, "new"]))
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets", None]))
        value = draw(json_values)
        if field is None or not isinstance(header.get(name), dict):
            header[name] = value
        else:
            header[name][field] = value
    return packed(header, BODY[: draw(st.integers(0, 32))] if draw(st.booleans()) else BODY)


@st.composite
def changed_bytes(draw: st.DrawFn) -> bytes:
    """A good file with some bytes exchanged, or cut, or longer."""
    raw = bytearray(packed(HEADER))
    for _ in range(draw(st.integers(0, 3))):
        raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
    return bytes(raw[: draw(st.integers(0, len(raw)))]) + draw(st.binary(max_size=4))


@settings(folders, max_examples=300)
@given(st.one_of(changed_headers(), changed_bytes(), st.binary(max_size=64), json_values.map(packed)))
def test_a_damaged_file_is_refused_or_lies_within_its_bytes(tmp_path: Path, raw: bytes) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(raw)
    try:
        head, entries = read_header(file)
    except UserError:
        refused(lambda: read_header(file), file)
        return
    start = 8 + len(head)
    assert sum(entry.size for entry in entries.values()) == len(raw) - start
    for entry in entries.values():
        assert start <= entry.offset <= entry.offset + entry.size <= len(raw)
        assert read_raw(entry).size == entry.size


def test_the_undamaged_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(packed(HEADER))
    _, entries = read_header(tmp_path / "a.safetensors")
    assert set(entries) == {"a", "b", "c"}
    assert np.array_equal(read(entries["a"]), np.frombuffer(BODY, "<f4", 6).reshape(2, 3))


@pytest.mark.parametrize(
    "header",
    [
        {**HEADER, "b": {**HEADER["b"], "data_offsets": [20, 28]}},
        {**HEADER, "b": {**HEADER["b"], "data_offsets": [26, 34]}},
        {name: about for name, about in HEADER.items() if name != "b"},
        {**HEADER, "b": {"dtype": "BF16", "shape": [2**62, 2**62], "data_offsets": [24, 32]}},
        {**HEADER, "b": {"dtype": "BF16", "shape": [1] * 20 + [4], "data_offsets": [24, 32]}},
        {**HEADER, "b": {"dtype": "BF16", "shape": [True, 4], "data_offsets": [24, 32]}},
        {**HEADER, "b": {"dtype": "F4", "shape": [4], "data_offsets": [24, 32]}},
    ],
    ids=["overlap", "gap", "hole", "huge", "axes", "boolean", "kind"],
)
def test_headers_that_do_not_fit_together_are_refused(tmp_path: Path, header: Any) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(packed(header))
    refused(lambda: read_header(file), file, "download it again")


def test_a_file_that_shrank_since_its_header_was_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(packed(HEADER))
    _, entries = read_header(file)
    file.write_bytes(packed(HEADER)[:-20])
    refused(lambda: read(entries["b"]), file, "ended early")
    file.unlink()
    refused(lambda: read(entries["b"]), file, "cannot be read")


# Writing.


def item(name: str, kind: str, value: np.ndarray, pieces: int) -> Item:
    """An item given in so many pieces of its bytes."""
    flat = np.ascontiguousarray(value).reshape(-1)
    return Item(name, kind, value.shape, lambda: iter(np.array_split(flat, pieces)))


@folders
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(
            st.sampled_from([("F32", "<f4"), ("U8", "u1"), ("BF16", "<u2")]).flatmap(
                lambda kind: st.tuples(st.just(kind[0]), npst.arrays(kind[1], shapes))
            ),
            st.integers(1, 4),
        ),
        max_size=5,
    )
)
def test_what_is_written_safetensors_reads(
    tmp_path: Path, tensors: dict[str, tuple[tuple[str, np.ndarray], int]]
) -> None:
    file = tmp_path / "a.safetensors"
    with file.open("wb") as stream:
        write(stream, [item(n, kind, value, pieces) for n, ((kind, value), pieces) in tensors.items()])
    assert (file.stat().st_size - sum(v.nbytes for (_, v), _ in tensors.values())) % 8 == 0
    with safetensors.safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert set(opened.keys()) == set(tensors)
        for name, ((kind, value), _) in tensors.items():
            found = opened.get_tensor(name)
            assert tuple(found.shape) == value.shape
            bits = found.view(torch.uint16) if kind == "BF16" else found
            assert bits.numpy().tobytes() == value.tobytes()
    _, entries = read_header(file)
    assert {name: (entry.kind, entry.shape) for name, entry in entries.items()} == {
        name: (kind, value.shape) for name, ((kind, value), _) in tensors.items()
    }


def test_metadata_of_the_caller_is_written() -> None:
    stream = io.BytesIO()
    write(stream, [item("x", "F32", np.ones((2, 2), np.float32), 1)], {"format": "mine"})
    loaded = safetensors.torch.load(stream.getvalue())
    assert loaded["x"].tolist() == [[1, 1], [1, 1]]
    assert b'"format": "mine"' in stream.getvalue()


@pytest.mark.parametrize("size", [0, 5, 7, 12])
def test_data_of_another_size_than_announced_is_not_passed_over(size: int) -> None:
    def pieces() -> Iterator[np.ndarray]:
        yield np.zeros(size, np.uint8)

    with pytest.raises(RuntimeError, match=rf"x: {size} bytes where 6 were announced"):
        write(io.BytesIO(), [Item("x", "U8", (2, 3), pieces)])


def test_pieces_are_asked_for_one_by_one() -> None:
    """So that memory holds one piece, however large the tensor."""
    stream = io.BytesIO()
    sizes: list[int] = []

    def pieces() -> Iterator[np.ndarray]:
        for i in range(4):
            sizes.append(len(stream.getvalue()))
            yield np.full(1000, i, np.uint8)

    write(stream, [Item("x", "U8", (4, 1000), pieces)])
    assert np.diff(sizes).tolist() == [1000] * 3
    assert math.prod(safetensors.numpy.load(stream.getvalue())["x"].shape) == 4000
