"""Opens a checkpoint folder: checks its files before anything reads weights, loads it with transformers."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spaces.architectures import describe_folder
from spaces.errors import MALFORMED, UserError
from spaces.inventory import Inventory, read_config

_MAX_HEADER = 100 * 2**20


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json, safetensors shards and a tokenizer.

    Attributes:
        path: The folder, absolute.
        inventory: Its tensors.
        fingerprint: Hash of config, headers and the shards' first and last bytes.
    """

    path: Path
    inventory: Inventory
    fingerprint: str


def _shards(path: Path) -> list[Path]:
    """Weight files of a checkpoint, every one the index names present."""
    index = path / "model.safetensors.index.json"
    if not index.exists():
        files = [path / "model.safetensors"]
    else:
        try:
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
            files = [path / name for name in names]
        except MALFORMED as error:
            raise UserError(f"{index}: not a safetensors index ({error}); download it again") from error
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: missing; the model's weights must be there as safetensors")
    return files


def _check_shard(file: Path) -> bytes:
    """The header of a safetensors file whose size agrees with it."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise UserError(f"{file}: not a safetensors file, or cut short; download it again")
        header = stream.read(length)
    try:
        tensors: dict[str, Any] = json.loads(header)
        tensors.pop("__metadata__", None)
        ends = [t["data_offsets"][1] for t in tensors.values()]
        if any(type(end) is not int for end in ends):
            raise TypeError("offsets must be whole numbers")
        end = max(ends, default=0)
    except MALFORMED as error:
        raise UserError(f"{file}: its safetensors header is damaged; download it again") from error
    if size != 8 + length + end:
        raise UserError(
            f"{file}: has {size:,} bytes where its header tells of {8 + length + end:,}; "
            "the shard is truncated or damaged, download it again"
        )
    return header


def open_checkpoint(path: Path, name: str | None = None) -> Checkpoint:
    """Describes the model in folder `path`, called `name` or as the folder, without loading weights.

    Raises:
        UserError: The folder, config or a shard is missing or damaged, or the
            model is not an MoE family that is known.
    """
    config = read_config(path)
    inventory = describe_folder(path, name)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for file in _shards(path):
        digest.update(_check_shard(file))
        with file.open("rb") as stream:
            stream.seek(-min(2**20, file.stat().st_size), 2)
            digest.update(stream.read())
    if not (path / "tokenizer.json").exists():
        raise UserError(f"{path / 'tokenizer.json'}: missing; a tokenizer is needed to score the model")
    return Checkpoint(path.resolve(), inventory, digest.hexdigest()[:16])


def load_model(checkpoint: Checkpoint) -> Any:
    """The transformers model in float32, ready for inference.

    Raises:
        UserError: transformers cannot make the model of these files.
    """
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint.path, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        model, report = loaded
    except Exception as error:  # transformers and its validators raise many kinds
        raise UserError(f"{checkpoint.path}: cannot be loaded ({str(error)[:300]})") from error
    missing = sorted(report["missing_keys"]) + sorted(str(k) for k in report["mismatched_keys"])
    if missing:
        raise UserError(
            f"{checkpoint.path}: the shards lack or misshape {len(missing)} tensors, {missing[0]} first; "
            "does config.json belong to these weights?"
        )
    return model.eval().requires_grad_(False)


def load_tokenizer(path: Path) -> Any:
    """The checkpoint's fast tokenizer."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UserError(f"{path}: its tokenizer cannot be loaded ({str(error)[:200]})") from error
