"""Writes a candidate as a GGUF file: the bank's blocks, gathered, nothing quantized again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from compression.checkpoint import Checkpoint
from compression.files import atomic, remove_parts
from compression.stored_model import StoredModel
from compression.tokenizer import gguf_tokenizer
from spaces.candidate import Candidate
from spaces.errors import UserError
from spaces.gguf_layout import ALIGNMENT, Value, header
from spaces.inventory import Inventory


def with_tokenizer(checkpoint: Checkpoint) -> Inventory:
    """The inventory with the tokenizer in its metadata: its sizes are then exact.

    Raises:
        UserError: llama.cpp's graph of the family would compute another function, without an error,
            or the tokenizer cannot be written.
    """
    inventory = checkpoint.inventory
    reasons = checkpoint.family.refusals()
    if reasons:
        raise UserError(
            f"{checkpoint.path}: {reasons[0]}, so a GGUF of this {inventory.model_type} model would compute "
            "another function; use --no-export to search without writing one"
        )
    metadata = {k: v for k, v in inventory.metadata.items() if not k.endswith(".vocab_size")}
    if checkpoint.gguf is None:
        values = gguf_tokenizer(checkpoint.path, inventory.vocabulary)
    else:
        values = {k: v for k, v in checkpoint.gguf.metadata.items() if k.startswith("tokenizer.")}
        metadata = _about(checkpoint.gguf.metadata) | metadata
    return replace(inventory, metadata=metadata | values, tokenizer_bytes=0)


def _about(metadata: Mapping[str, Value]) -> dict[str, Value]:
    """What a GGUF says of its model that stays true of a compressed one: licence, authors, languages."""
    changed = ("general.alignment", "general.file_type", "general.size_label", "general.quantized_by")
    return {k: v for k, v in metadata.items() if k.startswith("general.") and k not in changed}


def tensor_data(model: StoredModel, candidate: Candidate, name: str) -> Iterator[np.ndarray]:
    """What a candidate's file holds for a tensor, piece by piece, kept experts only.

    Yields:
        uint8 blocks where the tensor is quantized, else float32: the whole tensor, or one expert's
        slice after the other where it is stacked by expert.
    """
    tensor = model.inventory.by_name[name]
    kept = {m.layer: m.experts for m in candidate.layers}
    experts = kept[tensor.layer] if tensor.per_expert and tensor.layer is not None else None
    data = model.blocks(tensor, dict(candidate.types)[name]) if tensor.quantizable else model.plain(name)
    if experts is None:
        yield data
        return
    for e in experts:
        yield data[e]


def export_gguf(
    model: StoredModel,
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
    remove_parts(path.parent, path.name)
    with atomic(path) as stream:
        stream.write(header(inventory.plan_metadata(candidate.plan), infos))
        for info in infos:
            written = 0
            for piece in tensor_data(model, candidate, info.name):
                written += stream.write(np.ascontiguousarray(piece).data)
            if written != info.size:
                raise RuntimeError(f"{info.name}: {written} bytes where {info.size} were predicted")
            stream.write(b"\0" * (-info.size % ALIGNMENT))
            progress(stream.tell())
        size = stream.tell()
        if size != inventory.file_bytes(candidate.plan):
            raise RuntimeError(
                f"{path}: {size} bytes where {inventory.file_bytes(candidate.plan)} were predicted"
            )
    return size
