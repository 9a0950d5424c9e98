"""The ragged form: a folder of GGUF blocks in safetensors, and the one loader for it.

`config.json` is the model's own with a `moefit` entry that holds the candidate;
`moefit.safetensors` holds each tensor under its GGUF name, quantized ones as
uint8 blocks. `compression.load(DIR)` gives a transformers model whose layers
have their own expert counts and top-k.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compression import ggml
from compression.checkpoint import Checkpoint, load_tokenizer
from compression.families import family
from compression.files import locked_folder, naming, remove_parts
from compression.gguf_export import tensor_data
from compression.safetensors_file import Entry, read, read_header, read_raw
from compression.safetensors_writer import Item, write
from compression.shell import Shell
from compression.stored_model import StoredModel
from spaces.candidate import Candidate
from spaces.errors import MALFORMED, UserError
from spaces.gguf_layout import TensorInfo
from spaces.inventory import Inventory, read_config
from spaces.quant_types import WEIGHT_TYPES

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


WEIGHTS = "moefit.safetensors"
"""Not transformers' own name: it would take the folder for a model and fill it with random weights."""


def export_checkpoint(model: StoredModel, candidate: Candidate, checkpoint: Checkpoint, path: Path) -> int:
    """Writes `candidate`, portable or ragged, as a folder; returns its weights' bytes.

    The folder is filled under a temporary name beside `path` and then renamed.

    Raises:
        UserError: Something that is no earlier export stands at `path`, or the family's router
            cannot choose among the experts kept.
    """
    path = path.resolve()
    _check_replaceable(path)
    candidate.validate(model.inventory, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_parts(path.parent, path.name)
    with locked_folder(path) as folder:
        with naming(path / WEIGHTS), (folder / WEIGHTS).open("wb") as stream:
            items = [_item(model, candidate, info) for info in model.inventory.infos(candidate.plan)]
            write(stream, items, {"format": "moefit"})
        config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
        config["moefit"] = {"version": 1, "candidate": json.loads(candidate.to_json())}
        with naming(path):
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
            _write_tokenizer(checkpoint, folder)
        folder.chmod(0o755)
        if path.is_dir():
            with locked_folder(path) as old:
                os.replace(path, old)
                try:
                    os.replace(folder, path)
                except OSError:
                    os.replace(old, path)
                    raise
        else:
            os.replace(folder, path)
    return (path / WEIGHTS).stat().st_size


def _item(model: StoredModel, candidate: Candidate, info: TensorInfo) -> Item:
    """A tensor as the folder stores it: quantized rows as bytes, others as transformers holds them."""
    tensor = model.inventory.by_name[info.name]
    if not tensor.quantizable:
        kept = {m.layer: list(m.experts) for m in candidate.layers}

        def values() -> Iterator[np.ndarray]:
            whole = model.parameter(info.name)
            yield whole[kept[tensor.layer]] if tensor.per_expert and tensor.layer is not None else whole

        return Item(info.name, "F32", info.shape, values)
    rows = math.prod(info.shape[:-1])
    shape = (*info.shape[:-1], info.size // rows)
    return Item(info.name, "U8", shape, lambda: tensor_data(model, candidate, info.name))


def _write_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """The tokenizer's files, as they are or made of the GGUF's metadata; none where there are none."""
    if checkpoint.gguf is not None:
        if checkpoint.gguf.metadata.get("tokenizer.ggml.tokens") is not None:
            load_tokenizer(checkpoint.path).save_pretrained(folder)
        return
    for name in _TOKENIZER_FILES:
        if (checkpoint.path / name).exists():
            shutil.copyfile(checkpoint.path / name, folder / name)


def _check_replaceable(path: Path) -> None:
    """Only a folder that this module wrote is ever replaced."""
    if not path.exists():
        return
    try:
        ours = "moefit" in json.loads((path / "config.json").read_text("utf-8"))
    except MALFORMED:
        ours = False
    if not ours:
        raise UserError(f"{path}: exists and is no exported model, so it is left alone; choose another path")


def _check_entries(
    entries: Mapping[str, Entry], inventory: Inventory, candidate: Candidate, file: Path
) -> None:
    """Every tensor there, with the bytes its type and the kept experts call for."""
    for info in inventory.infos(candidate.plan):
        quantizable, entry = inventory.by_name[info.name].quantizable, entries.get(info.name)
        kind = "U8" if quantizable else "F32"
        if entry is None or entry.kind != kind or entry.size != info.size:
            raise UserError(f"{file}: tensor {info.name} is missing or is not {info.size} bytes of {kind}")
        if entry.shape[:-1] != info.shape[:-1]:
            raise UserError(f"{file}: tensor {info.name} has shape {entry.shape}, not {info.shape}")


def load(path: str | Path) -> Any:
    """The transformers model of a folder that `export_checkpoint` wrote, weights dequantized to float32.

    Raises:
        UserError: No such folder, or not one of ours.
    """
    path = Path(path)
    config = read_config(path)
    entry = config.get("moefit")
    if not isinstance(entry, dict) or entry.get("version") != 1 or "candidate" not in entry:
        raise UserError(f"{path}: config.json has no moefit entry of version 1; load it with transformers")
    source = f"{path / 'config.json'}"
    text = json.dumps(config.pop("moefit")["candidate"])
    of_family = family(config, str(path))
    inventory = of_family.inventory()
    candidate = Candidate.from_json(text, source)
    candidate.validate(inventory, source)
    types: dict[str, str | None] = dict(candidate.types)
    for name, chosen in candidate.types:
        if chosen not in WEIGHT_TYPES:
            raise UserError(f"{source}: {name}: {chosen} is no type for weights")
    file = path / WEIGHTS
    if not file.is_file():
        raise UserError(f"{file}: missing; the folder is not whole")
    _, entries = read_header(file)
    _check_entries(entries, inventory, candidate, file)
    shell = Shell(of_family)
    for m in candidate.layers:
        shell.shrink(m.layer, len(m.experts), m.top_k)
    for part in of_family.parts:
        entry, type_name = entries[part.name], types.get(part.name)
        for e in range(entry.shape[0]) if part.stacked else (None,):
            raw = read(entry, e) if type_name is None else read_raw(entry, e)[..., 0]
            values = raw if type_name is None else ggml.dequantize(raw, type_name)
            if not np.isfinite(values).all():
                raise UserError(f"{file}: tensor {part.name} holds NaN or infinite values")
            (shell.place if type_name is None else shell.write)(part, values, e)
    return shell.model
