"""Opens a model, a folder or a GGUF file: its family, its weights and what identifies it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from compression.families import family, family_of_gguf, open_inventory
from compression.families.base import Family
from compression.gguf_file import GgufFile
from compression.gguf_weights import GgufWeights
from compression.panics import panics_raised
from compression.tokenizer_trial import try_tokenizer
from compression.weights import FolderWeights, Weights, shards
from spaces.errors import UserError
from spaces.inventory import Inventory, read_config

_WHOLE = 2**30
_SAMPLES, _SAMPLE = 64, 2**20


@dataclass(frozen=True)
class Checkpoint:
    """A model that can be read.

    Attributes:
        path: Its folder or GGUF file, absolute.
        family: What its tensors are called and where they go.
        weights: Reads them.
        inventory: Its tensors.
        config: The fields of its config.json, or those that its GGUF metadata stands for.
        fingerprint: Hash of config, headers and weights (of 64 MiB of them in files above 1 GiB).
    """

    path: Path
    family: Family
    weights: Weights
    inventory: Inventory
    config: Mapping[str, Any]
    fingerprint: str

    @cached_property
    def gguf(self) -> GgufFile | None:
        """The GGUF file it was read from, None for a folder."""
        return self.weights.file if isinstance(self.weights, GgufWeights) else None


def is_gguf(path: Path) -> bool:
    """Whether a path names a GGUF file, not a folder."""
    return path.suffix == ".gguf" and not path.is_dir()


def _sample(file: Path) -> bytes:
    """A hash of a file's bytes, of evenly spread samples where it is large."""
    digest = hashlib.sha256()
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= _WHOLE:
            return hashlib.file_digest(stream, "sha256").digest()
        for i in range(_SAMPLES):
            stream.seek(i * (size - _SAMPLE) // (_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE))
    return digest.digest()


def open_checkpoint(path: Path, name: str | None = None) -> Checkpoint:
    """Describes the model at `path`, called `name` or as the file, without loading weights.

    Args:
        path: A folder with config.json and safetensors, or a GGUF file (any part of a split one).
        name: What files call the model.

    Raises:
        UserError: The folder, config or a weight file is missing or damaged, or the
            model is not an MoE family that is known.
    """
    return _open_gguf(path, name) if is_gguf(path) else _open_folder(path, name)


def _open_folder(path: Path, name: str | None) -> Checkpoint:
    config = read_config(path)
    try:
        of_family = family(config, name or path.resolve().name)
        inventory = of_family.inventory()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    weights = FolderWeights(path, of_family, config)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for raw, file in zip(weights.headers, shards(path), strict=True):
        digest.update(raw)
        digest.update(_sample(file))
    return Checkpoint(path.resolve(), of_family, weights, inventory, config, digest.hexdigest()[:16])


def _open_gguf(path: Path, name: str | None) -> Checkpoint:
    file = GgufFile.open(path)
    shapes = {n: t.shape for n, t in file.tensors.items()}
    try:
        of_family = family_of_gguf(file.metadata, shapes, name or path.stem)
        inventory = of_family.inventory()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    digest = hashlib.sha256(repr(list(file.tensors.values())).encode())
    for part in file.files:
        digest.update(_sample(part))
    config = {**of_family.config.to_dict(), "model_type": of_family.model_type}
    weights = GgufWeights(file, of_family)
    return Checkpoint(path.resolve(), of_family, weights, inventory, config, digest.hexdigest()[:16])


def open_target(target: str) -> Inventory:
    """The inventory of a published target's name, a folder with config.json or a GGUF file of any MoE."""
    path = Path(target)
    if is_gguf(path) and path.exists():
        from compression.gguf_inventory import describe_gguf

        return describe_gguf(GgufFile.open(path))
    return open_inventory(target)


def load_model(checkpoint: Checkpoint) -> Any:
    """The transformers model in float32, ready for inference.

    Raises:
        UserError: The config asks for what the family does not place, or weights cannot be read.
    """
    from compression.shell import Shell

    shell = Shell(checkpoint.family)
    for part in checkpoint.family.parts:
        shell.fill(part, checkpoint.weights)
    return shell.model


def load_tokenizer(path: Path) -> Any:
    """The fast tokenizer of a folder or of a GGUF file.

    Raises:
        UserError: There is none, or it cannot be loaded.
    """
    if is_gguf(path):
        from compression.tokenizer_from_gguf import fast_tokenizer

        try:
            return fast_tokenizer(GgufFile.open(path).metadata)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
    file = next((path / n for n in ("tokenizer.json", "tokenizer.model") if (path / n).is_file()), None)
    if file is None:
        raise UserError(f"{path / 'tokenizer.json'}: missing; a tokenizer is needed to score the model")
    try_tokenizer(file)
    from transformers import AutoTokenizer

    try:
        with panics_raised():
            # Left out, transformers would ask on the terminal whether to run code of the checkpoint.
            return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{path}: its tokenizer is code of the checkpoint's own (auto_map), which is never run; "
                "use a checkpoint with a tokenizer that transformers itself has"
            ) from error
        raise UserError(f"{path}: its tokenizer cannot be loaded ({str(error)[:200]})") from error
