"""Model families: one small file each. `README.md` in this folder shows how to add one."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from compression.families.base import Family
from compression.families.deepseek_v2 import DeepseekV2
from compression.families.deepseek_v3 import DeepseekV3
from compression.families.dots1 import Dots1
from compression.families.ernie4_5_moe import Ernie45Moe
from compression.families.glm4_moe import Glm4Moe
from compression.families.gpt_oss import GptOss
from compression.families.granitemoe import GraniteMoe
from compression.families.mixtral import Mixtral
from compression.families.olmoe import Olmoe
from compression.families.qwen2_moe import Qwen2Moe
from compression.families.qwen3_moe import Qwen3Moe
from compression.families.qwen3_next import Qwen3Next
from spaces.errors import UserError, unknown
from spaces.inventory import Inventory, published_targets, read_config

FAMILIES: dict[str, type[Family]] = {
    f.model_type: f
    for f in (
        DeepseekV2,
        DeepseekV3,
        Dots1,
        Ernie45Moe,
        Glm4Moe,
        GptOss,
        GraniteMoe,
        Mixtral,
        Olmoe,
        Qwen2Moe,
        Qwen3Moe,
        Qwen3Next,
    )
}

_MOST_LAYERS = 4096  # llama.cpp takes 512
_MOST_EXPERTS = 2**16
_KERNELS = re.compile("_*(attn|experts)_implementation|use_kernels")
"""Fields by which a config chooses its kernels; those of a hub's name transformers would fetch and run."""
_ALWAYS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_experts_per_tok")


def _family_class(config: Mapping[str, Any], name: str) -> type[Family]:
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UserError(f"{name}: config.json has no model_type; is it a transformers model?")
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    known = ", ".join(sorted(FAMILIES))
    if not any("expert" in key for key in config):
        raise UserError(
            f"{name}: {model_type!r} is not a Mixture-of-Experts model (its config names no experts); "
            f"known families: {known}"
        )
    error = unknown("model family", model_type, FAMILIES)
    raise UserError(
        f"{name}: {error}; a new one needs a file of its tensors' names and shapes and its GGUF metadata, "
        "see compression/families/README.md"
    )


def _check_rotation(config: Mapping[str, Any], name: str) -> None:
    """Refuses to rotate more of a head than there is: a table of that many frequencies would be made."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_rotation(value, name)
        elif key != "partial_rotary_factor" or value is None:
            continue
        elif not isinstance(value, int | float) or not 0 < value <= 1:
            raise UserError(f"{name}: config.json: {key} must be within 0..1, got {value!r}")


def family(config: Mapping[str, Any], name: str) -> Family:
    """The family of the model that `config` (of config.json) configures, called `name`.

    Raises:
        UserError: Not an MoE, an unknown family, or a field that is missing or wrong.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from transformers import AutoConfig

    kind = _family_class(config, name)
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > _MOST_LAYERS:
        raise UserError(
            f"{name}: config.json: num_hidden_layers must be at most {_MOST_LAYERS}, got {layers}"
        )
    _check_rotation(config, name)
    # Block scales are the reader's affair, and remote code is never run.
    fields = {
        k: v
        for k, v in config.items()
        if k not in ("quantization_config", "auto_map", "model_type") and not _KERNELS.match(k)
    }
    try:
        filled: Any = AutoConfig.for_model(kind.model_type, **copy.deepcopy(fields))  # which writes into them
    except Exception as error:  # the validators of configs raise many kinds
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{name}: config.json is not one of {kind.model_type} ({text[-1][:200]})") from error
    aliases = {v: k for k, v in (getattr(filled, "attribute_map", None) or {}).items()}
    forward = getattr(filled, "attribute_map", None) or {}
    for needed in (*_ALWAYS, kind.expert_field, *kind.positive):
        spellings = {needed, forward.get(needed), aliases.get(needed), aliases.get(forward.get(needed, ""))}
        if not spellings & set(config):
            own = forward.get(needed, needed)
            raise UserError(f"{name}: config.json lacks {own!r}, which {kind.model_type} needs")
    experts = getattr(filled, kind.expert_field)
    if isinstance(experts, int) and experts > _MOST_EXPERTS:
        raise UserError(f"{name}: config.json: {kind.expert_field} must be at most {_MOST_EXPERTS}")
    return kind(filled, name)


def family_of_gguf(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], name: str) -> Family:
    """The family of the model that a GGUF file holds, called `name`.

    Args:
        metadata: The file's, as `Value`s or plain.
        shapes: Shapes of its tensors by name, the row last.
        name: What errors call the model.

    Raises:
        UserError: No family reads such a file, or it lacks entries or has tensors that no part names.
    """
    plain = {key: getattr(value, "value", value) for key, value in metadata.items()}
    architecture = plain.get("general.architecture")
    # Entries of one number a layer that is the same in all say as much as one number.
    own = {
        key.removeprefix(f"{architecture}."): v[0] if isinstance(v, tuple | list) and len(set(v)) == 1 else v
        for key, v in plain.items()
        if not key.startswith("tokenizer.")
    }
    kinds = [f for f in FAMILIES.values() if f.architecture == architecture]
    if not kinds:
        known = ", ".join(sorted({f.architecture for f in FAMILIES.values()}))
        raise UserError(f"{name}: GGUF architecture {architecture!r} is not one of {known}")
    kind = next((f for f in kinds if f.reads(own, shapes)), None)
    if kind is None:
        known = " or ".join(f.model_type for f in kinds)
        raise UserError(
            f"{name}: a GGUF of architecture {architecture!r}, but no Mixture-of-Experts like {known}"
        )
    scaling = own.get("rope.scaling.type", "none")
    if scaling not in ("none", *kind.rope_types):
        raise UserError(f"{name}: rope.scaling.type = {scaling!r} is not read for {architecture}")
    try:
        found = family({**kind.config_of(own, shapes), "model_type": kind.model_type}, name)
        odd = {t for t, shape in shapes.items() if not found.holds(t, shape)}
    except KeyError as error:
        raise UserError(f"{name}: the GGUF lacks {error.args[0]}, which {architecture} needs") from error
    except (TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
        raise UserError(f"{name}: the GGUF's metadata has an entry of the wrong kind ({error})") from error
    if odd:
        tensor = min(odd)
        raise UserError(
            f"{name}: the GGUF holds {tensor} of shape {shapes[tensor]}, "
            f"which {kind.model_type} has no place for"
        )
    return found


def describe(config: Mapping[str, Any], name: str) -> Inventory:
    """The inventory of the model that `config` configures; raises what `family` and its checks raise."""
    return family(config, name).inventory()


def describe_folder(path: Path, name: str | None = None) -> Inventory:
    """The inventory of a checkpoint folder, called `name` or as the folder; errors name the folder."""
    config = read_config(path)
    try:
        return describe(config, name or path.resolve().name)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def open_inventory(target: str) -> Inventory:
    """The inventory of a published target's name or of a model folder."""
    if target in published_targets():
        path = resources.files("spaces").joinpath("configs", f"{target}.json")
        with resources.as_file(path) as file:
            return describe(read_config(file), target)
    path = Path(target)
    if not path.exists() and "/" not in target:
        raise unknown("--target", target, published_targets())
    return describe_folder(path)
