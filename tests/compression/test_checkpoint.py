"""A folder that is not a whole model is refused in one line that names the file."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compression.checkpoint import Checkpoint, load_model, load_tokenizer, open_checkpoint
from compression.families import describe
from compression.gguf_export import with_tokenizer
from spaces.inventory import read_config
from tests.compression.support import logits, refused

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DEEP = "[" * 100_000
Edit = Callable[[Path], object]


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that may be broken."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))


def write(name: str, content: str | bytes) -> Edit:
    raw = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(raw)


def remove(name: str) -> Edit:
    return lambda folder: (folder / name).unlink()


def cut(name: str, size: int) -> Edit:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def header(content: Any, body: bytes = b"") -> Edit:
    """A safetensors file with this header."""
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return write(WEIGHTS, struct.pack("<Q", len(raw)) + raw + body)


def one_tensor(**changes: Any) -> Edit:
    return header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changes}}, b"1234")


def config(**changes: Any) -> Edit:
    def edit(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return edit


def without(field: str) -> Edit:
    def edit(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        del values[field]
        (folder / "config.json").write_text(json.dumps(values))

    return edit


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Edit:
    def edit(folder: Path) -> None:
        values = load_file(folder / WEIGHTS)
        change(values)
        save_file(values, folder / WEIGHTS, metadata={"format": "pt"})

    return edit


def tokenizer(change: Callable[[Any], object]) -> Edit:
    def edit(folder: Path) -> None:
        values = json.loads((folder / "tokenizer.json").read_text())
        change(values)
        (folder / "tokenizer.json").write_text(json.dumps(values))

    return edit


BROKEN: list[Any] = [
    ("no config", remove("config.json"), "config.json"),
    ("config not JSON", write("config.json", "{"), "config.json"),
    ("config not text", write("config.json", b"\xff\xfe\0"), "config.json"),
    ("config no object", write("config.json", "[]"), "config.json"),
    ("no model type", without("model_type"), "model_type"),
    ("dense model", write("config.json", '{"model_type": "llama", "hidden_size": 8}'), "llama"),
    ("unknown family", config(model_type="mixtrel"), "did you mean 'mixtral'"),
    ("missing field", without("kv_lora_rank"), "kv_lora_rank"),
    ("no layer with experts", config(first_k_dense_replace=3), "experts"),
    ("no weights", remove(WEIGHTS), WEIGHTS),
    ("empty shard", write(WEIGHTS, b""), WEIGHTS),
    ("three bytes", write(WEIGHTS, b"abc"), WEIGHTS),
    ("truncated shard", cut(WEIGHTS, -100), WEIGHTS),
    ("half a shard", cut(WEIGHTS, 6_000_000), WEIGHTS),
    ("cut in the header", cut(WEIGHTS, 500), WEIGHTS),
    ("garbage shard", write(WEIGHTS, bytes(range(256)) * 100), WEIGHTS),
    ("huge header", write(WEIGHTS, struct.pack("<Q", 2**62) + b"{}"), WEIGHTS),
    ("header of zeros", write(WEIGHTS, bytes(4096)), WEIGHTS),
    ("header no object", header([1, 2]), WEIGHTS),
    ("header not JSON", header(b"{{{{"), WEIGHTS),
    ("tensor without offsets", header({"a": {"dtype": "F32", "shape": [1]}}), WEIGHTS),
    ("offsets before the start", one_tensor(data_offsets=[0, -1]), WEIGHTS),
    ("bytes after the end", header({}, b"1234"), WEIGHTS),
    pytest.param("rope is a list", config(rope_parameters=[1]), "config.json"),
    ("index not JSON", write(INDEX, "{"), INDEX),
    ("index no object", write(INDEX, "[]"), INDEX),
    ("index without map", write(INDEX, "{}"), INDEX),
    ("index map null", write(INDEX, '{"weight_map": null}'), INDEX),
    ("missing shard", write(INDEX, '{"weight_map": {"a": "two.safetensors"}}'), "two.safetensors"),
    ("shard is the folder", write(INDEX, '{"weight_map": {"a": "."}}'), INDEX),
    ("shard of another folder", write(INDEX, '{"weight_map": {"a": "../model/model.safetensors"}}'), INDEX),
    ("shard is a folder", lambda f: [(f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()], WEIGHTS),
    ("block size is text", config(quantization_config={"weight_block_size": "big"}), "weight_block_size"),
    ("block size of zero", config(quantization_config={"weight_block_size": [128, 0]}), "weight_block_size"),
    pytest.param("config nested deeply", write("config.json", DEEP), "config.json"),
    pytest.param("index nested deeply", write(INDEX, DEEP), INDEX),
    pytest.param("header nested deeply", header(DEEP.encode()), WEIGHTS),
    pytest.param("index of numbers", write(INDEX, '{"weight_map": {"a": 5}}'), INDEX),
    pytest.param("offset is text", one_tensor(data_offsets=[0, "4"]), WEIGHTS),
    pytest.param("offset null", one_tensor(data_offsets=[0, None]), WEIGHTS),
    pytest.param("count is text", config(n_routed_experts="8"), "n_routed_experts"),
    pytest.param("no groups", config(n_group=0), "0 groups"),
]  # fmt: skip


def _id(value: Any) -> str | None:
    return value.replace(" ", "-") if isinstance(value, str) else ""


@pytest.mark.parametrize(("what", "edit", "named"), BROKEN, ids=_id)
def test_a_broken_folder_is_refused_before_weights_are_read(
    folder: Path, what: str, edit: Edit, named: str
) -> None:
    edit(folder)
    refused(lambda: open_checkpoint(folder), named)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    refused(lambda: open_checkpoint(tmp_path / "nowhere"), tmp_path / "nowhere", "no such model folder")


def forget(name: str) -> Edit:
    return tensors(lambda values: values.pop(name))


def misshape(name: str) -> Edit:
    return tensors(lambda values: values.update({name: torch.zeros(3, 5, dtype=torch.bfloat16)}))


UNLOADABLE: list[Any] = [
    ("layers of another model", config(num_hidden_layers=4)),
    ("width of another model", config(hidden_size=512)),
    ("vocabulary of another model", config(vocab_size=5000)),
    ("fewer experts than the config", config(n_routed_experts=16)),
    ("an attention matrix gone", forget("model.layers.1.self_attn.o_proj.weight")),
    ("an expert gone", forget("model.layers.1.mlp.experts.3.up_proj.weight")),
    ("a matrix of another shape", misshape("model.layers.2.self_attn.q_a_proj.weight")),
    ("negative width", config(moe_intermediate_size=-256)),
    ("nothing but one tensor", one_tensor()),
    pytest.param("width is text", config(hidden_size="wide")),
    pytest.param("unknown dtype in a shard", one_tensor(dtype="Q7")),
    pytest.param("offsets not whole", one_tensor(data_offsets=[0, 4.0])),
]  # fmt: skip


@pytest.mark.parametrize(("what", "edit"), UNLOADABLE, ids=_id)
def test_weights_of_another_config_are_refused(folder: Path, what: str, edit: Edit) -> None:
    edit(folder)
    refused(lambda: load_model(open_checkpoint(folder)), folder)


def test_the_model_is_float32_and_gives_transformers_logits(
    tiny: Checkpoint, tiny_texts: dict[str, Any]
) -> None:
    model = load_model(tiny)
    assert {p.dtype for p in [*model.parameters(), *model.buffers()]} == {torch.float32}
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    windows = tiny_texts["search"].windows[:2]
    expected = AutoModelForCausalLM.from_pretrained(tiny.path, dtype=torch.float32).eval()
    found = logits(model, windows)
    assert 0.5 < found.std() < 2
    assert np.array_equal(found, logits(expected, windows))


def test_a_checkpoint_in_shards_is_the_same_model(folder: Path, tiny: Checkpoint) -> None:
    whole = load_file(folder / WEIGHTS)
    names = sorted(whole)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in parts.items():
        save_file({n: whole[n] for n in members}, folder / file, metadata={"format": "pt"})
    (folder / WEIGHTS).unlink()
    weight_map = {n: file for file, members in parts.items() for n in members}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    checkpoint = open_checkpoint(folder)
    model, expected = load_model(checkpoint), load_model(tiny)
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    (folder / "b.safetensors").unlink()
    refused(lambda: open_checkpoint(folder), folder / "b.safetensors", "missing")


def test_the_fingerprint_follows_config_and_weights(folder: Path) -> None:
    first = open_checkpoint(folder)
    assert open_checkpoint(folder).fingerprint == first.fingerprint
    (folder / "README.md").write_text("notes")
    assert open_checkpoint(folder).fingerprint == first.fingerprint
    raw = bytearray((folder / WEIGHTS).read_bytes())
    raw[-1] ^= 1
    (folder / WEIGHTS).write_bytes(raw)
    second = open_checkpoint(folder)
    assert second.fingerprint != first.fingerprint
    config(routed_scaling_factor=2.0)(folder)
    assert open_checkpoint(folder).fingerprint not in (first.fingerprint, second.fingerprint)


def test_the_path_is_absolute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert open_checkpoint(Path(folder.name)).path == folder.resolve()


BAD_TOKENIZERS: list[Any] = [
    ("missing", remove("tokenizer.json")),
    ("empty", write("tokenizer.json", "")),
    ("not JSON", write("tokenizer.json", "{")),
    ("no tokenizer", write("tokenizer.json", "{}")),
    ("a list", write("tokenizer.json", "[]")),
    pytest.param("no model", tokenizer(lambda t: t.update(model=None))),
    pytest.param("no vocabulary", tokenizer(lambda t: t["model"].pop("vocab"))),
    pytest.param("merges null", tokenizer(lambda t: t["model"].update(merges=None))),
    pytest.param("ids are text", tokenizer(lambda t: t["model"]["vocab"].update(zz="q"))),
    pytest.param("nested deeply", write("tokenizer.json", DEEP)),
    pytest.param("config not JSON", write("tokenizer_config.json", "{")),
    pytest.param("config a list", write("tokenizer_config.json", "[]")),
]  # fmt: skip


@pytest.mark.parametrize(("what", "edit"), BAD_TOKENIZERS, ids=_id)
def test_a_broken_tokenizer_is_refused_for_gguf(folder: Path, what: str, edit: Edit) -> None:
    edit(folder)
    refused(lambda: with_tokenizer(open_checkpoint(folder)), folder)


BAD_FOR_SCORING: list[Any] = [
    ("missing", remove("tokenizer.json")),
    ("empty", write("tokenizer.json", "")),
    ("not JSON", write("tokenizer.json", "{")),
    ("a list", write("tokenizer.json", "[]")),
    ("config not JSON", write("tokenizer_config.json", "{")),
    pytest.param("no model", tokenizer(lambda t: t.update(model=None))),
    pytest.param("ids are text", tokenizer(lambda t: t["model"]["vocab"].update(zz="q"))),
    pytest.param("config a list", write("tokenizer_config.json", "[]")),
]  # fmt: skip


@pytest.mark.parametrize(("what", "edit"), BAD_FOR_SCORING, ids=_id)
def test_a_broken_tokenizer_is_refused_for_scoring(folder: Path, what: str, edit: Edit) -> None:
    edit(folder)
    refused(lambda: load_tokenizer(folder), folder)


OTHER_KINDS: list[Any] = [
    ("unigram", lambda t: t["model"].update(type="Unigram"), "BPE"),
    ("another splitting rule", lambda t: t.update(pre_tokenizer={"type": "Whitespace"}), "pre-tokenizer"),
    ("no splitting rule", lambda t: t["pre_tokenizer"].update(use_regex=False), "pre-tokenizer"),
    ("a space in front", lambda t: t["pre_tokenizer"].update(add_prefix_space=True), "pre-tokenizer"),
    ("an id beyond the embedding", lambda t: t["model"]["vocab"].update(zz=4096), "4096"),
    pytest.param(
        "a negative id", lambda t: t["model"]["vocab"].update(zz=-5), "-5",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("what", "change", "named"), OTHER_KINDS, ids=_id)
def test_a_tokenizer_gguf_cannot_express_is_refused(
    folder: Path, what: str, change: Callable[[Any], object], named: str
) -> None:
    tokenizer(change)(folder)
    refused(lambda: with_tokenizer(open_checkpoint(folder)), "tokenizer.json", named)


UNLIKE_GGUF: list[Any] = [
    ({"rope_parameters": {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 4.0}}, "rope_type"),
    # The older spelling, which transformers follows too.
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_type"),
    ({"rope_scaling": "yarn", "rope_parameters": None}, "config.json"),
    ({"rope_interleave": False}, "rope_interleave"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"attention_bias": True}, "attention_bias"),
    ({"scoring_func": "softmax"}, "scoring_func"),
]


@pytest.mark.parametrize(("changes", "named"), UNLIKE_GGUF, ids=lambda c: next(iter(c)) if c else None)
def test_a_model_gguf_would_compute_differently_is_refused(
    folder: Path, changes: dict[str, Any], named: str
) -> None:
    config(**changes)(folder)
    refused(lambda: with_tokenizer(open_checkpoint(folder)), folder, named)


def test_a_model_no_gguf_can_express_is_still_opened(folder: Path) -> None:
    config(scoring_func="softmax")(folder)
    checkpoint = open_checkpoint(folder)
    assert np.isfinite(logits(load_model(checkpoint), np.arange(8)[None])).all()


def test_the_index_must_name_the_shard_that_holds_a_tensor(folder: Path) -> None:
    names = list(load_file(folder / WEIGHTS))
    right = dict.fromkeys(names, WEIGHTS)
    write(INDEX, json.dumps({"weight_map": right}))(folder)
    assert open_checkpoint(folder).inventory.layers == 3
    write(INDEX, json.dumps({"weight_map": {**right, "another.weight": WEIGHTS}}))(folder)
    refused(lambda: open_checkpoint(folder), INDEX, "another.weight")


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    whole = load_file(folder / WEIGHTS)
    name = "model.norm.weight"
    save_file({name: whole[name]}, folder / "b.safetensors")
    weight_map = {**dict.fromkeys(whole, WEIGHTS), name: "b.safetensors"}
    write(INDEX, json.dumps({"weight_map": weight_map}))(folder)
    refused(lambda: open_checkpoint(folder), name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(folder: Path, value: float) -> None:
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors(lambda values: values[name].view(-1)[5].fill_(value))(folder)
    checkpoint = open_checkpoint(folder)
    refused(lambda: load_model(checkpoint), folder, name, "NaN or infinite")


def test_describing_a_config_leaves_it_alone(folder: Path) -> None:
    config(rope_scaling={"type": "yarn", "factor": 4.0})(folder)
    about = read_config(folder)
    describe(about, "name")
    assert about == read_config(folder)
