"""Inventories count DeepSeek-V3 as published, predict file sizes exactly, and refuse what is no MoE."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV3Config

from compression.families import describe, open_inventory
from spaces.errors import UserError
from spaces.gguf_layout import padded
from spaces.inventory import Inventory
from spaces.quant_types import quant_type
from tests.spaces import tiny
from tests.spaces.test_gguf_layout import write


@pytest.fixture(scope="module")
def deepseek() -> Inventory:
    return open_inventory("deepseek-v3")


def test_deepseek_v3_has_the_published_number_of_parameters(deepseek: Inventory) -> None:
    assert deepseek.parameters() == 671_026_419_200
    assert round(deepseek.parameters(kept=192) / 1e9, 1) == 507.5
    assert (deepseek.experts, deepseek.top_k, deepseek.groups) == (256, 8, 8)
    assert deepseek.moe_layers == tuple(range(3, 61))


def test_deepseek_v3_takes_1_34_terabytes_in_bf16(deepseek: Inventory) -> None:
    size = deepseek.file_bytes(deepseek.uniform_plan("BF16"))
    assert round(size / 1e12, 2) == 1.34
    # Two bytes a weight, and four for the few that stay F32.
    assert 2 * deepseek.parameters() < size < 2.001 * deepseek.parameters()


def test_latent_attention_caches_one_latent_and_one_rotary_key(deepseek: Inventory) -> None:
    assert deepseek.kv_cache_bytes(4096) == 61 * (512 + 64) * 4096 * 2
    assert deepseek.kv_cache_bytes(4096, bytes_per_value=1) * 2 == deepseek.kv_cache_bytes(4096)
    assert deepseek.kv_cache_bytes(0) == 0


def test_compute_buffer_grows_with_context_and_batch(deepseek: Inventory) -> None:
    assert deepseek.compute_buffer_bytes(8192) > deepseek.compute_buffer_bytes(4096) > 0
    assert deepseek.compute_buffer_bytes(4096, batch=1) < deepseek.compute_buffer_bytes(4096)


def test_tensor_names_are_those_of_llama_cpp(deepseek: Inventory) -> None:
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, deepseek.layers).mapping
    names = {name for _, name in known.values()}
    for tensor in deepseek.tensors:
        base = tensor.name.rsplit(".", 1)[0]
        assert base in names, tensor.name
    assert len(deepseek.by_name) == len(deepseek.tensors)


SEEDS = st.integers(0, 2**32).map(random.Random)
MODELS = {
    "plain": tiny.inventory(),
    "grouped": tiny.inventory(**tiny.GROUPED),
    "no dense layer": tiny.inventory(first_k_dense_replace=0),
}
NAMES = st.sampled_from(sorted(MODELS))


@settings(deadline=None, max_examples=15)
@given(NAMES, SEEDS)
def test_predicted_file_size_is_that_of_the_written_file(
    tmp_path_factory: pytest.TempPathFactory, name: str, rng: random.Random
) -> None:
    model = replace(MODELS[name], tokenizer_bytes=0)
    plan = tiny.random_plan(model, rng)
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    write(path, model.plan_metadata(plan), model.infos(plan))
    assert path.stat().st_size == model.file_bytes(plan)
    path.unlink()


@settings(deadline=None)
@given(NAMES, SEEDS)
def test_every_tensor_takes_its_rows_and_pruned_experts_take_nothing(name: str, rng: random.Random) -> None:
    model = MODELS[name]
    plan = tiny.random_plan(model, rng)
    types, kept = dict(plan.types), dict(plan.kept)
    for tensor, info in zip(model.tensors, model.infos(plan), strict=True):
        shape = tensor.shape
        if tensor.per_expert and tensor.layer is not None:
            shape = (kept[tensor.layer], *shape[1:])
        assert info.shape == shape
        row = quant_type(types.get(tensor.name, "F32")).row_bytes(shape[-1])
        assert info.size == math.prod(shape[:-1]) * row


@settings(deadline=None)
@given(NAMES, SEEDS)
def test_metadata_holds_numbers_where_layers_agree_and_arrays_where_they_differ(
    name: str, rng: random.Random
) -> None:
    model = MODELS[name]
    plan = tiny.random_plan(model, rng)
    metadata = model.plan_metadata(plan)
    for key, pairs in ((model.expert_count_key, plan.kept), (model.expert_used_key, plan.top_k)):
        value, by_layer = metadata[key].value, dict(pairs)
        if len(set(by_layer.values())) == 1:
            assert value in by_layer.values()
        else:
            assert value == tuple(by_layer.get(i, 0) for i in range(model.layers))


def test_the_tokenizer_counts_towards_the_file() -> None:
    model = tiny.inventory()
    plan = model.uniform_plan("Q4_K")
    bare = replace(model, tokenizer_bytes=0)
    assert bare.file_bytes(plan) < model.file_bytes(plan)
    assert model.file_bytes(plan) == bare.file_bytes(plan) + padded(model.tokenizer_bytes)


def test_a_uniform_plan_falls_back_where_rows_are_short() -> None:
    model = tiny.inventory()
    types = dict(model.uniform_plan("Q4_K", kept=4, top_k=1).types)
    assert types["blk.0.attn_k_b.weight"] == "Q5_0"
    assert {t for n, t in types.items() if "attn_k_b" not in n} == {"Q4_K"}
    assert set(dict(model.uniform_plan("Q4_K", kept=4, top_k=1).kept).values()) == {4}


REQUIRED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_experts_per_tok",
    "n_routed_experts", "n_shared_experts", "moe_intermediate_size", "kv_lora_rank", "qk_nope_head_dim",
    "qk_rope_head_dim", "v_head_dim",
)  # fmt: skip
OTHERS = tuple(k for k in tiny.CONFIG if k not in (*REQUIRED, "model_type", "scoring_func"))


@pytest.mark.parametrize("field", OTHERS)
def test_a_field_that_is_missing_has_transformers_default(field: str) -> None:
    config = {k: v for k, v in (tiny.CONFIG | tiny.GROUPED).items() if k != field}
    default = DeepseekV3Config().to_dict()
    value = default["rope_parameters"]["rope_theta"] if field == "rope_theta" else default[field]
    assert describe(config, "tiny") == describe({**config, field: value}, "tiny")


@pytest.mark.parametrize("field", REQUIRED)
def test_a_missing_field_is_named(field: str) -> None:
    config = {k: v for k, v in (tiny.CONFIG | tiny.GROUPED).items() if k != field}
    with pytest.raises(UserError, match=f"lacks '{field}'") as error:
        describe(config, "tiny")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "no model_type"),
        ({"model_type": 3}, "no model_type"),
        ({"model_type": "llama", "hidden_size": 4096}, "not a Mixture-of-Experts"),
        ({"model_type": "deepseek_v30", "n_routed_experts": 64}, "did you mean 'deepseek_v3'"),
        ({**tiny.CONFIG, "num_experts_per_tok": 0}, "no routed experts"),
        ({**tiny.CONFIG, "num_experts_per_tok": 9}, "no routed experts"),
        ({**tiny.CONFIG, "first_k_dense_replace": 4}, "no routed experts"),
    ],
)
def test_a_config_that_is_no_known_moe_is_refused_in_one_line(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        describe(config, "tiny")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "256"}, {"hidden_size": -1}, {"hidden_size": 256.5}, {"n_routed_experts": None},
        {"n_shared_experts": None}, {"n_group": 0}, {"n_group": 3}, {"n_group": 8}, {"rope_theta": None},
        {"rms_norm_eps": "small"}, {"vocab_size": 0}, {"num_hidden_layers": [4]},
        {"n_routed_experts": 1, "num_experts_per_tok": 1}, {"num_experts_per_tok": 1.5}, {"rope_theta": 0},
        {"rope_parameters": [1]}, {"rms_norm_eps": float("inf")}, {"tie_word_embeddings": "maybe"},
    ],
    ids=str,
)  # fmt: skip
def test_a_field_that_cannot_be_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        describe({**tiny.CONFIG, **changes}, "tiny")


def test_queries_need_no_low_rank() -> None:
    """As Moonlight-16B-A3B has it."""
    model = tiny.inventory(q_lora_rank=None)
    assert model.by_name["blk.1.attn_q.weight"].shape == (4 * (32 + 32), 256)
    assert not [name for name in model.by_name if "attn_q_" in name]


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '"text"', b"\xff\xfe\x00", "{}"])
def test_a_broken_config_file_is_refused_in_one_line_that_names_it(
    tmp_path: Path, content: str | bytes
) -> None:
    raw = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(UserError, match=r"config\.json") as error:
        open_inventory(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_config_file_of_brackets_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError):
        open_inventory(str(tmp_path))


def test_a_folder_is_a_target(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny.CONFIG))
    model = open_inventory(str(tmp_path))
    assert model.name == tmp_path.name
    assert model.tensors == tiny.inventory().tensors


@pytest.mark.parametrize(
    ("target", "message"),
    [("deepseekv3", "did you mean 'deepseek-v3'"), ("some/where/else", "no such model folder")],
)
def test_an_unknown_target_is_refused(target: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_inventory(target)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is this a model folder"):
        open_inventory(str(tmp_path))
