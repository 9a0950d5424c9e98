"""Tensors come back as they were written, from one file or from the parts of a split one."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from compression.ggml import dequantize, quantize
from compression.gguf_file import GgufFile
from spaces.gguf_layout import ALIGNMENT, TensorInfo, Value, header, padded
from spaces.quant_types import quant_type
from tests.compression.support import refused

TYPES = {"one": "F32", "two": "Q8_0", "three": "Q4_K", "four": "BF16", "five": "F16", "six": "MXFP4"}


def _weights() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    shapes = [(7,), (3, 64), (4, 2, 256), (2, 5), (3, 4, 8), (2, 2, 32)]
    return {
        n: generator.normal(0, 1, s).astype(np.float32) for n, s in zip(TYPES, shapes, strict=True)
    }  # fmt: skip


def _write(path: Path, names: list[str], metadata: dict[str, Value]) -> Path:
    weights = _weights()
    blocks = {n: quantize(weights[n], TYPES[n]) for n in names}
    infos = [TensorInfo(n, weights[n].shape, quant_type(TYPES[n]).id, b.nbytes) for n, b in blocks.items()]
    body = b"".join(b.tobytes() + bytes(padded(b.nbytes) - b.nbytes) for b in blocks.values())
    path.write_bytes(header({"general.architecture": Value("str", "olmoe")} | metadata, infos) + body)
    return path


def _split(folder: Path, parts: list[list[str]], stem: str = "model") -> list[Path]:
    total = sum(map(len, parts))
    return [
        _write(
            folder / f"{stem}-{number:05}-of-{len(parts):05}.gguf",
            names,
            {
                "split.no": Value("u16", number - 1),
                "split.count": Value("u16", len(parts)),
                "split.tensors.count": Value("i32", total),
            },
        )
        for number, names in enumerate(parts, 1)
    ]


PARTS = [["one", "two"], ["three"], ["four", "five", "six"]]


def _check(file: GgufFile) -> None:
    weights = _weights()
    assert list(file.tensors) == list(TYPES)
    for name, type_name in TYPES.items():
        expected = quantize(weights[name], type_name)
        raw = file.raw(name)
        assert (file.tensors[name].type_name, file.tensors[name].shape) == (type_name, weights[name].shape)
        assert file.tensors[name].size == raw.nbytes
        np.testing.assert_array_equal(raw, expected)
        np.testing.assert_array_equal(file.float32(name), dequantize(expected, type_name))
        if raw.ndim > 1:
            last = len(raw) - 1
            np.testing.assert_array_equal(file.raw(name, last), expected[last])
            np.testing.assert_array_equal(file.float32(name, last), dequantize(expected[last], type_name))


def test_one_file(tmp_path: Path) -> None:
    file = GgufFile.open(_write(tmp_path / "model.gguf", list(TYPES), {"b": Value("u8", 1)}))
    _check(file)
    assert (file.architecture, file.files) == ("olmoe", (tmp_path / "model.gguf",))
    assert dict(file.metadata) == {"general.architecture": Value("str", "olmoe"), "b": Value("u8", 1)}


def test_a_split_model_opens_by_any_of_its_parts(tmp_path: Path) -> None:
    paths = _split(tmp_path, PARTS, "model-00009-of-00010.gguf")  # a stem that looks like a part
    for path in paths:
        file = GgufFile.open(path)
        _check(file)
        assert (file.path, file.files) == (paths[0], tuple(paths))
        assert set(file.metadata) == {"general.architecture"}


def test_parts_the_gguf_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "olmoe", split_max_tensors=2)
    weights = _weights()
    for name in weights:
        raw = quantize(weights[name], TYPES[name])
        if TYPES[name] == "F32":
            writer.add_tensor(name, weights[name])
        else:
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[TYPES[name]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _check(GgufFile.open(tmp_path / "model-00002-of-00003.gguf"))


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    paths = _split(tmp_path, PARTS)
    paths[1].unlink()
    refused(lambda: GgufFile.open(paths[2]), paths[1], "missing")
    paths[0].rename(tmp_path / "other.gguf")
    refused(lambda: GgufFile.open(tmp_path / "other.gguf"), "other.gguf", "NAME-00001-of-00003.gguf")


def test_parts_of_another_model_are_refused(tmp_path: Path) -> None:
    paths = _split(tmp_path, PARTS)
    paths[1].write_bytes(paths[2].read_bytes())
    refused(lambda: GgufFile.open(paths[0]), paths[1], "split.no must be 1 and split.count 3", "2 and 3")
    first, *_ = _split(tmp_path, [["one", "two"], ["one"], ["four"]])
    refused(lambda: GgufFile.open(first), paths[1], "'one' stands in", first.name)
    first, *_ = _split(tmp_path, PARTS)
    content = first.read_bytes()
    _split(tmp_path, [["four"], ["three"], ["five"]])
    first.write_bytes(content)
    refused(lambda: GgufFile.open(first), "hold 4 tensors, not 6")


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    paths = _split(tmp_path, PARTS)
    os.truncate(paths[2], 200)
    refused(lambda: GgufFile.open(paths[0]), paths[2], "the file")


def test_a_model_without_architecture_or_tensor(tmp_path: Path) -> None:
    file = GgufFile.open(_write(tmp_path / "model.gguf", ["one"], {}))
    refused(lambda: file.raw("nine"), file.path, "'nine'")
    for metadata in ({}, {"general.architecture": Value("u32", 1)}):
        with pytest.raises(ValueError, match=r"general\.architecture is missing"):
            assert replace(file, metadata=metadata).architecture


def test_any_slice_and_any_bytes_of_a_tensor_are_read_alone(tmp_path: Path) -> None:
    for file in (
        GgufFile.open(_write(tmp_path / "model.gguf", list(TYPES), {})),
        GgufFile.open(_split(tmp_path, PARTS)[0]),
    ):
        for name in ("two", "three", "six"):
            whole, weights = file.raw(name), file.float32(name)
            for index in range(len(whole)):
                np.testing.assert_array_equal(file.raw(name, index), whole[index])
                np.testing.assert_array_equal(file.float32(name, index), weights[index])
            np.testing.assert_array_equal(file.part(name, 0, whole.nbytes), whole.ravel())
            np.testing.assert_array_equal(file.part(name, 5, 21), whole.ravel()[5:26])
        with pytest.raises(ValueError, match="one has one axis"):
            file.float32("one", 0)


def test_integers_are_no_weights(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(header({}, [TensorInfo("table", (2, 4), 26, 32)]) + bytes(ALIGNMENT))
    file = GgufFile.open(path)
    assert file.raw("table").shape == (2, 16)
    refused(lambda: file.float32("table"), path, "I32")


def test_a_file_cut_after_it_was_opened_is_a_user_error(tmp_path: Path) -> None:
    file = GgufFile.open(_write(tmp_path / "model.gguf", list(TYPES), {}))
    os.truncate(file.path, 700)
    refused(lambda: file.float32("six"), file.path, "changed while it was being read")

    file.path.unlink()
    refused(lambda: file.raw("one"), file.path, "cannot be read")
