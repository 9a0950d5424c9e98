"""A GGUF model to read tensors from: one file, or the parts that llama-gguf-split makes of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from compression.files import read_part
from compression.ggml import dequantize
from spaces.errors import UserError
from spaces.gguf_layout import Value
from spaces.gguf_reader import Header, StoredTensor, read_header
from spaces.quant_types import WEIGHT_TYPES

_PART = re.compile(r"(?P<stem>.*)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)
_NUMBER, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"
_AGAIN = "download or split the model again"


@dataclass(frozen=True)
class GgufFile:
    """An opened model; its header is checked, its data is read when asked for.

    Attributes:
        path: The file it was opened with; the first part of a split model.
        files: All files, in order.
        metadata: In file order, as it stands in the first file, without `split.*`.
        tensors: By name, in file order.
    """

    path: Path
    files: tuple[Path, ...]
    metadata: Mapping[str, Value]
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Opens a model by its file, or by any of its parts.

        Raises:
            UserError: The file or a part is missing, damaged, or not of this model.
        """
        headers = _parts(path)
        tensors: dict[str, StoredTensor] = {}
        for file, header in headers.items():
            for tensor in header.tensors:
                if tensor.name in tensors:
                    other = tensors[tensor.name].file.name
                    raise UserError(f"{file}: tensor {tensor.name!r} stands in {other} too; {_AGAIN}")
                tensors[tensor.name] = tensor
        first = next(iter(headers))
        stored = headers[first].metadata
        total = _integer(stored, _TENSORS)
        if len(headers) > 1 and total is not None and total != len(tensors):
            raise UserError(f"{first}: the parts hold {len(tensors)} tensors, not {total}; {_AGAIN}")
        metadata = {k: v for k, v in stored.items() if not k.startswith("split.")}
        return cls(first, tuple(headers), metadata, tensors)

    @cached_property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture.

        Raises:
            UserError: The file does not say.
        """
        value = self.metadata.get("general.architecture")
        if value is None or not isinstance(value.value, str) or not value.value:
            raise UserError(f"{self.path}: general.architecture is missing; give a model's .gguf file")
        return value.value

    def tensor(self, name: str) -> StoredTensor:
        """The entry called `name`; a missing one is a UserError."""
        if name not in self.tensors:
            raise UserError(f"{self.path}: has no tensor {name!r}; is it of another model?")
        return self.tensors[name]

    def raw(self, name: str, index: int | None = None) -> np.ndarray:
        """The stored blocks, (..., row bytes) uint8; of one index of the first axis without that axis.

        Raises:
            UserError: As `part`.
        """
        t = self.tensor(name)
        if index is None:
            return self.part(name, 0, t.size).reshape(*t.shape[:-1], t.row_bytes)
        size = t.size // t.shape[0]
        return self.part(name, index * size, size).reshape(*t.shape[1:-1], t.row_bytes)

    def part(self, name: str, start: int, size: int) -> np.ndarray:
        """(size,) uint8 of the stored bytes of a tensor, from byte `start` of it on.

        Raises:
            UserError: No such tensor, or the file cannot be read or got shorter since it was opened.
        """
        t = self.tensor(name)
        try:
            data = read_part(t.file, t.offset + start, size)
        except OSError as error:
            raise UserError(f"{t.file}: cannot be read ({error.strerror}); check the disk") from error
        if len(data) != size:
            raise UserError(f"{t.file}: ended early, so it changed while it was being read; start again")
        return data

    def float32(self, name: str, index: int | None = None) -> np.ndarray:
        """The weights, dequantized; whether they are finite is for the caller to check.

        Args:
            name: Tensor.
            index: Only this slice of the first axis (one expert of a stacked tensor).

        Returns:
            (..., row) float32 of the tensor's shape, or without its first axis.

        Raises:
            UserError: No such tensor, or it holds no weights (a table of integers, say).
        """
        t = self.tensor(name)
        if t.type_name not in WEIGHT_TYPES:
            raise UserError(f"{t.file}: tensor {name!r} is {t.type_name}, no type for weights")
        if index is not None and len(t.shape) < 2:
            raise ValueError(f"{name} has one axis, so no slices of it can be dequantized")
        return dequantize(self.raw(name, index), t.type_name)


def _integer(metadata: Mapping[str, Value], key: str) -> int | None:
    """A whole number of the metadata; llama.cpp's own tools differ in the kind they write."""
    value = metadata.get(key)
    if value is None or isinstance(value.value, bool) or not isinstance(value.value, int):
        return None
    return value.value


def _parts(path: Path) -> dict[Path, Header]:
    """The headers of the file or of all parts of its model, in order.

    The naming is llama.cpp's `llama_split_path`: NAME-00001-of-00003.gguf.
    """
    header = read_header(path)
    count = _integer(header.metadata, _COUNT) or 0
    if count <= 1:
        return {path: header}
    match = _PART.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise UserError(
            f"{path}: a part of a model split in {count}; call the parts "
            f"NAME-00001-of-{count:05}.gguf to NAME-{count:05}-of-{count:05}.gguf"
        )
    files = [path.with_name(f"{match['stem']}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    headers: dict[Path, Header] = {}
    for number, file in enumerate(files):
        if not file.exists():
            raise UserError(f"{file}: this part of the model is missing; put all {count} parts in one folder")
        headers[file] = read_header(file)
        said = headers[file].metadata
        if (_integer(said, _NUMBER), _integer(said, _COUNT)) != (number, count):
            raise UserError(
                f"{file}: {_NUMBER} must be {number} and {_COUNT} {count}, they are "
                f"{_integer(said, _NUMBER)} and {_integer(said, _COUNT)}; {_AGAIN}"
            )
    return headers
