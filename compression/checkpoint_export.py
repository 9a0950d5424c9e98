"""The ragged form: a folder of GGUF blocks in safetensors, and the one loader for it.

`config.json` is the model's own with a `moefit` entry that holds the candidate;
`model.safetensors` holds each tensor under its GGUF name, quantized ones as
uint8 blocks. `compression.load(DIR)` gives a transformers model whose layers
have their own expert counts and top-k.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from compression import ggml
from compression.candidate_model import CandidateModel
from compression.checkpoint import Checkpoint
from compression.families import family
from compression.gguf_export import tensor_data
from spaces.architectures import describe_folder
from spaces.candidate import Candidate
from spaces.errors import MALFORMED, UserError
from spaces.inventory import Inventory, read_config
from spaces.quant_types import ladder

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def export_checkpoint(model: CandidateModel, candidate: Candidate, checkpoint: Checkpoint, path: Path) -> int:
    """Writes `candidate`, portable or ragged, as a folder; returns its weights' bytes.

    The folder is filled under a temporary name beside `path` and then renamed.

    Raises:
        UserError: Something that is no earlier export stands at `path`, or a layer
            keeps fewer experts than transformers' router can rank.
    """
    from safetensors.numpy import save_file

    path = path.resolve()
    _check_replaceable(path)
    least = 2 * model.inventory.groups  # a group is ranked by its two best experts
    for m in candidate.layers:
        if len(m.experts) < least:
            raise UserError(
                f"{path}: layer {m.layer} keeps {len(m.experts)} experts, transformers needs {least}"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        arrays = {
            t.name: np.ascontiguousarray(tensor_data(model, candidate, t.name))
            for t in model.inventory.tensors
        }
        save_file(arrays, folder / "model.safetensors", metadata={"format": "moefit"})
        config = read_config(checkpoint.path)
        config["moefit"] = {"version": 1, "candidate": json.loads(candidate.to_json())}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        for name in _TOKENIZER_FILES:
            if (checkpoint.path / name).exists():
                shutil.copyfile(checkpoint.path / name, folder / name)
        folder.chmod(0o755)
        if path.is_dir():
            old = folder.with_name(folder.name + ".old")
            os.replace(path, old)
            os.replace(folder, path)
            shutil.rmtree(old)
        else:
            os.replace(folder, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return (path / "model.safetensors").stat().st_size


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


def _check_arrays(arrays: dict[str, Any], inventory: Inventory, candidate: Candidate, file: Path) -> None:
    """Every tensor there, with the bytes its type and the kept experts call for."""
    infos = {info.name: info for info in inventory.infos(candidate.plan)}
    for tensor in inventory.tensors:
        info, array = infos[tensor.name], arrays.get(tensor.name)
        kind = np.uint8 if tensor.quantizable else np.float32
        if array is None or array.dtype != kind or array.nbytes != info.size:
            expected = f"{info.size} bytes of {kind.__name__}"
            raise UserError(f"{file}: tensor {tensor.name} is missing or does not have {expected}")
        if array.shape[:-1] != info.shape[:-1]:
            raise UserError(f"{file}: tensor {tensor.name} has shape {array.shape}, not {info.shape}")


def load(path: str | Path) -> Any:
    """The transformers model of a folder that `export_checkpoint` wrote, weights dequantized to float32.

    Raises:
        UserError: No such folder, or not one of ours.
    """
    import torch
    import transformers
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = Path(path)
    config = read_config(path)
    entry = config.get("moefit")
    if not isinstance(entry, dict) or entry.get("version") != 1 or "candidate" not in entry:
        raise UserError(f"{path}: config.json has no moefit entry of version 1; load it with transformers")
    text = json.dumps(config.pop("moefit")["candidate"])
    inventory = describe_folder(path)
    candidate = Candidate.from_json(text, f"{path / 'config.json'}")
    candidate.validate(inventory, f"{path / 'config.json'}")
    for name, type_name in candidate.types:
        if type_name not in ladder(inventory.by_name[name].row):
            raise UserError(f"{path / 'config.json'}: {name}: {type_name} is no type for weights")
    try:
        arrays = load_file(path / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path / 'model.safetensors'}: cannot be read ({error})") from error
    _check_arrays(arrays, inventory, candidate, path / "model.safetensors")
    settings = transformers.AutoConfig.for_model(**config)
    with torch.device("cpu"):
        model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    of_family, types = family(inventory), dict(candidate.types)
    for m in candidate.layers:
        of_family.shrink(model, m.layer, m.experts, m.top_k)
    for tensor in inventory.tensors:
        values = arrays[tensor.name]
        if tensor.quantizable:
            values = ggml.dequantize(values, types[tensor.name])
        of_family.view(model, tensor.name).copy_(torch.from_numpy(np.array(values)))
    return model.eval().requires_grad_(False)
