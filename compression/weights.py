"""A model's weights as GGUF lays them out, read part by part from wherever they lie."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from compression.families.base import Family
from compression.families.parts import Part
from compression.safetensors_file import FLOATS, Entry, read, read_header, read_raw
from spaces.errors import MALFORMED, UserError
from spaces.json_text import parse_once, read_text

_LONGEST_NAME = 255  # what file systems take
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")
_MXFP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


class Weights(Protocol):
    """Where weights come from."""

    def read(self, part: Part, expert: int | None = None) -> np.ndarray:
        """A part in GGUF's shape, float32; for `expert` that slice of the first axis.

        Raises:
            UserError: Unreadable, or values that are not finite.
        """

    def parameter(self, part: Part, expert: int | None = None) -> np.ndarray:
        """As `read`, in GGUF's order too, but the values that transformers' parameter holds."""
        return part.decode(self.read(part, expert))


def shards(path: Path) -> list[Path]:
    """Weight files of a checkpoint folder, every one the index names present.

    Raises:
        UserError: A file is missing, or the index is none.
    """
    index = path / "model.safetensors.index.json"
    if not index.exists():
        files = [path / "model.safetensors"]
    else:
        try:
            names = sorted(set(parse_once(read_text(index))["weight_map"].values()))
            if any(Path(name).name != name or len(name.encode()) > _LONGEST_NAME for name in names):
                raise ValueError(f"shards must lie beside it, their names of {_LONGEST_NAME} bytes at most")
            files = [path / name for name in names]
        except MALFORMED as error:
            raise UserError(f"{index}: not a safetensors index ({error}); download it again") from error
    for file in files:
        if not file.is_file():
            pickled = any(path.glob("*.bin")) or any(path.glob("*.pt*"))
            instead = ", and pickled weights (.bin, .pt, .pth) can run code, so they are never read"
            raise UserError(
                f"{file}: missing; the model's weights must be there as safetensors{instead * pickled}"
            )
    return files


class FolderWeights(Weights):
    """The safetensors of a checkpoint folder, as its publisher ships them.

    Block-scaled float8 (`weight_scale_inv`, DeepSeek-V3) and MXFP4 (`_blocks` and
    `_scales`, gpt-oss) are dequantized as they are read.
    """

    def __init__(self, path: Path, family: Family, config: Mapping[str, Any]) -> None:
        self.path, self.family = path, family
        self.entries: dict[str, Entry] = {}
        self.headers: list[bytes] = []
        for file in shards(path):
            raw, entries = read_header(file)
            self.headers.append(raw)
            twice = self.entries.keys() & entries.keys()
            if twice:
                raise UserError(f"{file}: tensor {min(twice)} stands in another shard too; download it again")
            self.entries |= entries
        about = config.get("quantization_config") or {}
        self.fp8_block: tuple[int, int] = (128, 128)
        if isinstance(about, dict) and about.get("weight_block_size") is not None:
            try:
                rows, columns = (int(n) for n in about["weight_block_size"])
                self.fp8_block = rows, columns
            except MALFORMED:
                rows = columns = 0
            if rows < 1 or columns < 1:
                raise UserError(f"{path / 'config.json'}: weight_block_size must be two positive numbers")
        self._check_index(path / "model.safetensors.index.json")
        for part in family.parts:
            self._check(part)
        self._check_layers()

    def _check_layers(self) -> None:
        """No decoder layers beyond those the config counts, but for the ones that predict further tokens."""
        c = self.family.config
        known = c.num_hidden_layers + (getattr(c, "num_nextn_predict_layers", None) or 0)
        for name in self.entries:
            match = _LAYER.match(name)
            if match and int(match[1]) >= known:
                raise UserError(
                    f"{self.path}: the shards hold {name}, but config.json has {c.num_hidden_layers} layers; "
                    "does it belong to these weights?"
                )

    def _check_index(self, index: Path) -> None:
        """Every tensor the index names is in the shard it names."""
        if not index.exists():
            return
        for name, file in json.loads(index.read_text("utf-8"))["weight_map"].items():
            if name not in self.entries or self.entries[name].file.name != file:
                raise UserError(f"{index}: says that {file} holds {name}, but it does not; download it again")

    def _spellings(self, part: Part) -> tuple[str, ...]:
        tied = part.name == "token_embd.weight" and self.family.tied
        return (part.path, *part.aliases, *(("lm_head.weight",) if tied else ()))

    def _where(self, part: Part) -> tuple[str, bool] | None:
        """(name or pattern on disk, whether each expert has its own), None where it is missing."""
        for name in self._spellings(part):
            if name in self.entries or f"{name}_blocks" in self.entries:
                return name, False
        for pattern in part.each:
            if pattern.format(0) in self.entries:
                return pattern, True
        return None

    @cached_property
    def _places(self) -> dict[str, tuple[str, bool]]:
        return {}

    def _check(self, part: Part) -> None:
        """The part is there, in a kind that can be read and a shape that gives GGUF's."""
        found = self._where(part)
        if found is None:
            raise UserError(
                f"{self.path}: the shards lack {part.path} ({part.name}); "
                "does config.json belong to these weights?"
            )
        self._places[part.name] = found
        name, each = found
        shape = part.tensor.shape
        wanted: dict[str, tuple[int, ...] | None]
        if each:
            wanted = {name.format(e): shape[1:] for e in range(self.family.expert_count)}
        elif f"{name}_blocks" in self.entries:
            return self._check_mxfp4(name, part)
        else:
            wanted = {name: None}
        for key, expected in wanted.items():
            entry = self.entries.get(key)
            if entry is None:
                raise UserError(
                    f"{self.path}: the shards lack {key}; does config.json belong to these weights?"
                )
            if entry.kind not in FLOATS:
                raise UserError(
                    f"{entry.file}: {key} is stored as {entry.kind}, which is not read; "
                    "give the checkpoint in BF16, F16, F32 or block-scaled F8_E4M3"
                )
            if entry.kind == "F8_E4M3":
                self._check_scales(key, entry)
            if not (entry.shape == expected if expected is not None else _gives(part, entry.shape)):
                raise UserError(
                    f"{entry.file}: {key} has shape {entry.shape}, which config.json does not lead to "
                    f"({part.name} is {shape}); does it belong to these weights?"
                )

    def _check_scales(self, key: str, entry: Entry) -> None:
        scales = self._scales(key)
        if scales is None:
            raise UserError(f"{entry.file}: {key} is F8_E4M3 but {key}_scale_inv is missing")
        blocks = tuple(-(-n // b) for n, b in zip(entry.shape[-2:], self.fp8_block, strict=False))
        wanted = (*entry.shape[:-2], *blocks)
        if scales.kind not in FLOATS or scales.shape != wanted or len(entry.shape) < 2:
            raise UserError(
                f"{scales.file}: {key}_scale_inv is {scales.kind} of shape {scales.shape}; "
                f"blocks of {self.fp8_block} ask for numbers of shape {wanted}"
            )

    def _check_mxfp4(self, name: str, part: Part) -> None:
        blocks, scales = self.entries[f"{name}_blocks"], self.entries.get(f"{name}_scales")
        if (
            scales is None
            or {blocks.kind, scales.kind} != {"U8"}
            or blocks.shape != (*scales.shape, 16)
            or len(scales.shape) < 2
        ):
            raise UserError(f"{blocks.file}: {name}_blocks and _scales must be MXFP4 of 16 bytes a block")
        *outer, rows, count = scales.shape
        if not _gives(part, (*outer, count * 32, rows)):
            raise UserError(
                f"{blocks.file}: {name}_blocks has shape {blocks.shape}, which config.json does not lead to "
                f"({part.name} is {part.tensor.shape}); does it belong to these weights?"
            )

    def _scales(self, key: str) -> Entry | None:
        return self.entries.get(f"{key}_scale_inv")

    def _dense(self, key: str, index: int | None = None) -> np.ndarray:
        """A tensor on disk as float32, float8 blocks scaled."""
        entry = self.entries[key]
        values = read(entry, index)
        if entry.kind == "F8_E4M3":
            scales = self._scales(key)
            assert scales is not None
            scale = read(scales, index)
            for axis, block in ((-2, self.fp8_block[0]), (-1, self.fp8_block[1])):
                scale = np.repeat(scale, block, axis).take(np.arange(values.shape[axis]), axis)
            values *= scale
        return values

    def _mxfp4(self, name: str, index: int | None) -> np.ndarray:
        """(experts, inputs, outputs) of MXFP4 blocks (experts, outputs, inputs / 32, 16), OCP MX v1.0."""
        blocks = read_raw(self.entries[f"{name}_blocks"], index)[..., 0]
        scales = read_raw(self.entries[f"{name}_scales"], index)[..., 0]
        values = np.empty((*blocks.shape[:-1], 32), np.float32)
        values[..., 0::2] = _MXFP4[blocks & 15]
        values[..., 1::2] = _MXFP4[blocks >> 4]
        values = np.ldexp(values, scales[..., None].astype(np.int32) - 127)
        return values.reshape(*blocks.shape[:-2], -1).swapaxes(-1, -2)

    def read(self, part: Part, expert: int | None = None) -> np.ndarray:
        return part.encode(self.parameter(part, expert))

    def parameter(self, part: Part, expert: int | None = None) -> np.ndarray:
        name, each = self._places[part.name]
        shape = part.tensor.shape if expert is None else part.tensor.shape[1:]
        if each:
            if expert is None:
                out = np.empty(shape, np.float32)
                for e in range(shape[0]):
                    out[e] = self.parameter(part, e)
                return out
            values = self._dense(name.format(expert))
        else:
            mxfp4 = f"{name}_blocks" in self.entries
            stored = self._mxfp4(name, expert) if mxfp4 else self._dense(name, expert)
            # A layout of stacked experts takes any slice of the first axis.
            views = part.views(stored if expert is None else stored[None])
            values = views[0] if len(views) == 1 else np.concatenate([v.reshape(-1) for v in views])
            values = np.ascontiguousarray(values).reshape(shape)
        if not np.isfinite(values).all():
            name = name.format(expert) if each else name
            raise UserError(f"{self.path}: tensor {name} holds NaN or infinite values; download it again")
        return values


def _gives(part: Part, shape: tuple[int, ...]) -> bool:
    """Whether a parameter of `shape` has GGUF's shape after the part's layout."""
    import torch

    try:
        views = part.views(torch.empty(shape, device="meta"))
        wanted = part.tensor.shape
        return sum(v.numel() for v in views) == part.tensor.parameters and (
            len(views) > 1 or views[0].dim() != len(wanted) or tuple(views[0].shape) == wanted
        )
    except (RuntimeError, IndexError, TypeError, ZeroDivisionError):
        return False
