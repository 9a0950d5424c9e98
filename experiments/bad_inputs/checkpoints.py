"""Checkpoint folders that are damaged, incomplete or of something else."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from experiments.bad_inputs.case import Case, Make, World, search
from experiments.bad_inputs.search_places import PNG

_CONFIG, _WEIGHTS, _TOKENIZER = "model/config.json", "model/model.safetensors", "model/tokenizer.json"
_EMBEDDING = "model.embed_tokens.weight"


def content(name: str, new: bytes | str) -> Make:
    """A checkpoint with one file of another content."""

    def make(world: World) -> None:
        world.own_model()
        world.put(name, new)

    return make


def without(*names: str) -> Make:
    """A checkpoint without some files."""

    def make(world: World) -> None:
        world.own_model()
        for name in names:
            (world.folder / name).unlink()

    return make


def config(**fields: Any) -> Make:
    """A checkpoint whose config says something else; None takes a field out."""

    def make(world: World) -> None:
        world.own_model()
        about = json.loads((world.folder / _CONFIG).read_text("utf-8")) | fields
        world.put(_CONFIG, json.dumps({k: v for k, v in about.items() if v is not None}))

    return make


def tokenizer(change: Callable[[dict[str, Any]], None]) -> Make:
    """A checkpoint with a changed tokenizer.json."""

    def make(world: World) -> None:
        world.own_model()
        about = json.loads((world.folder / _TOKENIZER).read_text("utf-8"))
        change(about)
        world.put(_TOKENIZER, json.dumps(about))

    return make


def header(change: Callable[[dict[str, Any]], None]) -> Make:
    """A checkpoint whose safetensors file has another header and the same data."""

    def make(world: World) -> None:
        world.own_model()
        raw = (world.folder / _WEIGHTS).read_bytes()
        (size,) = struct.unpack("<Q", raw[:8])
        about = json.loads(raw[8 : 8 + size])
        change(about)
        new = json.dumps(about).encode()
        world.put(_WEIGHTS, struct.pack("<Q", len(new)) + new + raw[8 + size :])

    return make


def weights(change: Callable[[bytes], bytes]) -> Make:
    """A checkpoint whose safetensors file has other bytes."""

    def make(world: World) -> None:
        world.own_model()
        world.edit(_WEIGHTS, change)

    return make


def index(places: dict[str, str]) -> Make:
    """A checkpoint with an index of shards."""
    return content("model/model.safetensors.index.json", json.dumps({"weight_map": places}))


def pickled(world: World) -> None:
    """Weights as a pickle alone."""
    without(_WEIGHTS)(world)
    world.put("model/pytorch_model.bin", b"\x80\x02}q\0.")


def not_a_number(raw: bytes) -> bytes:
    """All weights at the end are NaN in BF16."""
    return raw[:-4096] + b"\xff\x7f" * 2048


def _reshape(about: dict[str, Any]) -> None:
    about[_EMBEDDING]["shape"].reverse()


def _retype(about: dict[str, Any]) -> None:
    about[_EMBEDDING]["dtype"] = "I16"


def _overlap(about: dict[str, Any]) -> None:
    first, second = sorted(n for n in about if n.endswith("down_proj.weight"))[:2]
    about[first]["data_offsets"] = about[second]["data_offsets"]


def _beyond(about: dict[str, Any]) -> None:
    about[_EMBEDDING]["data_offsets"] = [2**40, 2**40 + 2 * 4096 * 256]


def _lose(about: dict[str, Any]) -> None:
    about["another.weight"] = about.pop(_EMBEDDING)


def _add_layer(about: dict[str, Any]) -> None:
    about["model.layers.7.input_layernorm.weight"] = {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}


CONFIGS: tuple[Case, ...] = (
    search("a checkpoint without config.json", "", _CONFIG, "cannot be read", make=without(_CONFIG)),
    search("a config.json that is empty", "", _CONFIG, "cannot be read as JSON", make=content(_CONFIG, "")),
    search("a config.json cut short", "", _CONFIG, "cannot be read as JSON", make=content(_CONFIG, '{"a": ')),
    search(
        "a config.json that is a list", "", _CONFIG, "must hold a JSON object", make=content(_CONFIG, "[1]"),
    ),
    search("a config.json that is a picture", "", _CONFIG, "cannot be read", make=content(_CONFIG, PNG)),
    search(
        "a config.json nested 10^5 deep", "", _CONFIG, "cannot be read", make=content(_CONFIG, "[" * 10**5),
    ),
    search("a config without model_type", "", "model", "has no model_type", make=config(model_type=None)),
    search(
        "a config of an unknown architecture", "", "model", "'moe9000'", make=config(model_type="moe9000"),
    ),
    search(
        "a config of a dense model", "", "model", "is not a Mixture-of-Experts model",
        make=content(_CONFIG, json.dumps({"model_type": "llama", "hidden_size": 64})),
    ),
    search("a config with no experts", "", "config.json", "experts", make=config(n_routed_experts=0)),
    search("a config with a negative width", "", "hidden_size", "-256", make=config(hidden_size=-256)),
    search("a config with a width in words", "", "config.json", make=config(hidden_size="wide")),
    search("a config with a width of 2^62", "", "config.json", make=config(hidden_size=2**62)),
    search("a config with 10^9 layers", "", "config.json", make=config(num_hidden_layers=10**9)),
    search("a config with infinite layers", "", "config.json", make=config(num_hidden_layers=float("inf"))),
    search("a config with half an expert", "", "config.json", make=config(n_routed_experts=7.5)),
    search(
        "a config with more active experts than there are", "", "config.json",
        make=config(num_experts_per_tok=9),
    ),
    search("a config with a NaN for the norm", "", "rms_norm_eps", make=config(rms_norm_eps=float("nan"))),
    search("a config with groups that do not divide", "", "config.json", "groups", make=config(n_group=3)),
    search("a config of a wider model", "", "config.json", make=config(hidden_size=512)),
    search("a config of a deeper model", "", "model", "config.json", make=config(num_hidden_layers=4)),
    search(
        "a config of a shallower model", "", "model", "config.json has 2 layers",
        make=config(num_hidden_layers=2, num_nextn_predict_layers=0),
    ),
)  # fmt: skip

SHARDS: tuple[Case, ...] = (
    search("a checkpoint without weights", "", _WEIGHTS, "missing", make=without(_WEIGHTS)),
    search("weights as a pickle alone", "", _WEIGHTS, "safetensors", make=pickled),
    search("weights that are empty", "", _WEIGHTS, make=content(_WEIGHTS, "")),
    search("weights that are a picture", "", _WEIGHTS, make=content(_WEIGHTS, PNG * 9)),
    search("weights cut short", "", _WEIGHTS, make=weights(lambda raw: raw[:-1000])),
    search("weights cut short in their header", "", _WEIGHTS, make=weights(lambda raw: raw[:500])),
    search("weights with bytes too many", "", _WEIGHTS, make=weights(lambda raw: raw + bytes(64))),
    search(
        "weights with a header of 2^63 bytes", "", _WEIGHTS,
        make=weights(lambda r: struct.pack("<Q", 2**63) + r[8:]),
    ),
    search(
        "weights whose header is no JSON", "", _WEIGHTS, make=weights(lambda raw: raw[:8] + b"x" + raw[9:]),
    ),
    search("weights of a wrong shape", "", _WEIGHTS, _EMBEDDING, make=header(_reshape)),
    search("weights in integers", "", _WEIGHTS, _EMBEDDING, make=header(_retype)),
    search("weights that overlap", "", _WEIGHTS, make=header(_overlap)),
    search("weights beyond the end of the file", "", _WEIGHTS, make=header(_beyond)),
    search("weights without the embedding", "", "the shards lack model.embed_tokens", make=header(_lose)),
    search("weights of a layer too many", "", "model.layers.7", "config.json", make=header(_add_layer)),
    search(
        "an index that names a missing shard", "", "model/two.safetensors", "missing",
        make=index({_EMBEDDING: "two.safetensors"}),
    ),
    search(
        "an index that leads out of the folder", "", "index.json",
        make=index({_EMBEDDING: "../../x.safetensors"}),
    ),
    search(
        "an index that is no JSON", "", "index.json", make=content("model/model.safetensors.index.json", "{"),
    ),
    replace(
        search("weights that are NaN", "--no-export", "model", "NaN or infinite", make=weights(not_a_number)),
        slow=True, leaves=("out", "out/*"),  # found by the first stage, which the same command goes on with
    ),
)  # fmt: skip

TOKENIZERS: tuple[Case, ...] = (
    search("a checkpoint without tokenizer", "", _TOKENIZER, "missing", make=without(_TOKENIZER)),
    search("a tokenizer that is empty", "", _TOKENIZER, make=content(_TOKENIZER, "")),
    search("a tokenizer cut short", "", _TOKENIZER, make=content(_TOKENIZER, '{"model": {"type": "BPE"')),
    search("a tokenizer that is a list", "", _TOKENIZER, make=content(_TOKENIZER, "[]")),
    search("a tokenizer without a model", "", _TOKENIZER, make=content(_TOKENIZER, "{}")),
    search(
        "a tokenizer of a kind that GGUF has not", "", _TOKENIZER, "'WordPiece'", "--no-export",
        make=tokenizer(lambda t: t["model"].update(type="WordPiece")),
    ),
    search(
        "a tokenizer with more ids than the embedding has rows", "", _TOKENIZER,
        make=tokenizer(lambda t: t["model"]["vocab"].update(more=10**6)),
    ),
    search("a tokenizer without merges", "", _TOKENIZER, make=tokenizer(lambda t: t["model"].pop("merges"))),
    search(
        "a tokenizer that makes transformers' own code fail", "--no-export", "model", "tokenizer",
        make=tokenizer(lambda t: t.update(pre_tokenizer={"type": "Nonesuch"})),
    ),
    search(
        "no tokenizer where none is exported", "--no-export", _TOKENIZER, "missing", make=without(_TOKENIZER)
    ),
)  # fmt: skip

CASES = (*CONFIGS, *SHARDS, *TOKENIZERS)
