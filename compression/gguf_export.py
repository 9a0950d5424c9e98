"""Writes a candidate as a GGUF file: the bank's blocks, gathered, nothing quantized again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from compression.candidate_model import CandidateModel
from compression.checkpoint import Checkpoint
from compression.files import atomic
from compression.tokenizer import gguf_tokenizer
from spaces.candidate import Candidate
from spaces.errors import UserError
from spaces.gguf_layout import ALIGNMENT, header
from spaces.inventory import Inventory, read_config


def with_tokenizer(checkpoint: Checkpoint) -> Inventory:
    """The inventory with the tokenizer in its metadata: its sizes are then exact."""
    inventory = checkpoint.inventory
    _check_expressible(read_config(checkpoint.path), checkpoint.path)
    values = gguf_tokenizer(checkpoint.path, inventory.vocabulary)
    metadata = {k: v for k, v in inventory.metadata.items() if not k.endswith(".vocab_size")}
    return replace(inventory, metadata=metadata | values, tokenizer_bytes=0)


def _check_expressible(config: dict[str, Any], path: Path) -> None:
    """Refuses what llama.cpp's graph of the family would compute differently, without an error."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    odd = {
        "rope_parameters": None if kind == "default" else kind,
        "rope_interleave": None if config.get("rope_interleave", True) else False,
        "hidden_act": None if config.get("hidden_act", "silu") == "silu" else config["hidden_act"],
        "tie_word_embeddings": True if config.get("tie_word_embeddings") else None,
    }
    for field, value in odd.items():
        if value is not None:
            raise UserError(
                f"{path / 'config.json'}: {field} = {value!r} cannot be written to GGUF yet: llama.cpp would "
                "compute another function; use --no-export"
            )


def tensor_data(model: CandidateModel, candidate: Candidate, name: str) -> np.ndarray:
    """The bytes a candidate's file holds for a tensor: uint8 blocks, or float32 where not quantized."""
    tensor = model.inventory.by_name[name]
    experts = {m.layer: m.experts for m in candidate.layers}.get(-1 if tensor.layer is None else tensor.layer)
    types = dict(candidate.types)
    data = model.bank.blocks(tensor, types[name]) if tensor.quantizable else model.plain(name)
    return data[list(experts)] if tensor.per_expert and experts is not None else data


def export_gguf(
    model: CandidateModel,
    candidate: Candidate,
    path: Path,
    progress: Callable[[int], None] = lambda size: None,
) -> int:
    """Writes `candidate` to `path`; returns the file's size, which equals the predicted one.

    Args:
        model: Holds the bank; its inventory must carry the tokenizer.
        candidate: A portable candidate.
        path: Where the file goes; written to a temporary name first.
        progress: Called with the bytes written so far.

    Raises:
        UserError: The candidate is ragged, which no llama.cpp loads.
    """
    if not candidate.portable:
        raise UserError(
            f"{path}: this candidate's expert counts or top-k differ by layer, which llama.cpp cannot "
            "load; export a portable trial, or a folder instead of a .gguf file"
        )
    inventory = model.inventory
    infos = inventory.infos(candidate.plan)
    with atomic(path) as stream:
        stream.write(header(inventory.plan_metadata(candidate.plan), infos))
        for info in infos:
            data = np.ascontiguousarray(tensor_data(model, candidate, info.name))
            if data.nbytes != info.size:
                raise RuntimeError(f"{info.name}: {data.nbytes} bytes where {info.size} were predicted")
            stream.write(data.data)
            stream.write(b"\0" * (-info.size % ALIGNMENT))
            progress(stream.tell())
        size = stream.tell()
        if size != inventory.file_bytes(candidate.plan):
            raise RuntimeError(
                f"{path}: {size} bytes where {inventory.file_bytes(candidate.plan)} were predicted"
            )
    return size
