"""What configs of a family may set: llama.cpp computes the same, or the GGUF is refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compression.checkpoint import Checkpoint, open_checkpoint
from compression.families import describe, family
from evaluators.llama_cpp import file_logits
from experiments import zoo
from experiments.zoo import YARN
from spaces.errors import UserError

WINDOWS = np.random.default_rng(1).integers(1, 8192, (2, 48))


def label(value: Any) -> str:
    """What pytest calls a parameter."""
    return value if isinstance(value, str) else ",".join(value)


def difference(checkpoint: Checkpoint, model: Any, folder: Path, windows: np.ndarray = WINDOWS) -> float:
    """How far llama.cpp's logits of a checkpoint's F32 file are from transformers'."""
    file = zoo.write_float(checkpoint, folder / "float.gguf")
    found = file_logits(file, windows, folder / "logits.npy")
    return float(np.abs(found - zoo.logits(model, windows)).max())


WIDER = {"original_max_position_embeddings": 512}

EXPRESSIBLE: list[tuple[str, dict[str, Any]]] = [
    ("deepseek_v2", {"q_lora_rank": 64}),
    ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 2}),
    ("deepseek_v2", {"routed_scaling_factor": 16.0}),
    ("deepseek_v2", {"rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.0}}),
    ("deepseek_v2", {"rope_parameters": YARN}),
    ("deepseek_v2", {"rope_parameters": {**YARN, "attention_factor": 1.0}}),
    ("deepseek_v3", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}),
    ("deepseek_v3", {"rope_parameters": {**YARN, "mscale_all_dim": 1.0, "attention_factor": 1.3}}),
    ("deepseek_v3", {"n_group": 1}),
    ("deepseek_v3", {"n_group": 2, "topk_group": 2}),
    ("deepseek_v3", {"norm_topk_prob": False}),
    ("deepseek_v3", {"q_lora_rank": None}),
    ("deepseek_v3", {"tie_word_embeddings": True}),
    ("dots1", {"n_group": 2, "topk_group": 1}),
    ("dots1", {"norm_topk_prob": False}),
    ("dots1", {"rope_parameters": YARN}),
    ("ernie4_5_moe", {"tie_word_embeddings": False, "head_dim": 32}),
    ("ernie4_5_moe", {"moe_num_shared_experts": 0, "moe_layer_start_index": 0}),
    ("ernie4_5_moe", {"moe_layer_start_index": 2}),
    ("glm4_moe", {"attention_bias": False, "use_qk_norm": False}),
    ("glm4_moe", {"n_group": 2, "topk_group": 1}),
    ("glm4_moe", {"n_group": 2, "topk_group": 2, "norm_topk_prob": False}),
    ("glm4_moe", {"n_shared_experts": 2, "first_k_dense_replace": 0, "tie_word_embeddings": True}),
    ("glm4_moe", {"rope_parameters": {**YARN, "partial_rotary_factor": 0.25}}),
    ("granitemoe", {"tie_word_embeddings": False, "attention_bias": True}),
    ("mixtral", {"tie_word_embeddings": True, "sliding_window": 512}),
    ("mixtral", {"head_dim": 128, "rope_parameters": YARN}),
    ("olmoe", {"rope_parameters": {**YARN, "attention_factor": 1.2}}),
    ("qwen2_moe", {"qkv_bias": False}),
    ("qwen3_moe", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    ("gpt_oss", {"rope_parameters": {**YARN, "attention_factor": 1.1}}),
    ("gpt_oss", {"rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}}),
    ("qwen3_next", {"full_attention_interval": 2, "linear_num_value_heads": 2}),
    (
        "qwen3_next",
        {"layer_types": ["linear_attention"] * 3 + ["full_attention"], "tie_word_embeddings": True},
    ),
]

# With what the refusal must say. Where llama.cpp takes the file nevertheless, its logits differ.
INEXPRESSIBLE: list[tuple[str, dict[str, Any], str]] = [
    ("dots1", {"num_key_value_heads": 2}, "num_key_value_heads = 2"),
    ("dots1", {"tie_word_embeddings": True}, "wants an output matrix"),
    ("dots1", {"attention_bias": True}, "attention_bias = True"),
    ("dots1", {"sliding_window": 16, "max_window_layers": 0}, "sliding_window = 16"),
    ("ernie4_5_moe", {"moe_layer_interval": 2}, "moe_layer_interval = 2"),
    ("ernie4_5_moe", {"moe_layer_end_index": 1}, "moe_layer_end_index = 1"),
    ("ernie4_5_moe", {"moe_norm_min": 0.9}, "moe_norm_min = 0.9"),
    ("granitemoe", {"embedding_multiplier": 0.0}, "embedding_multiplier = 0"),
    ("granitemoe", {"residual_multiplier": 0.0}, "residual_multiplier = 0"),
    ("mixtral", {"sliding_window": 16}, "sliding_window = 16"),
    ("olmoe", {"num_key_value_heads": 2}, "num_key_value_heads = 2"),
    ("olmoe", {"clip_qkv": 0.5}, "clip_qkv = 0.5"),
    ("olmoe", {"attention_bias": True}, "attention_bias = True"),
    ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob = True"),
    ("olmoe", {"tie_word_embeddings": True}, "wants an output matrix"),
    ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob = True"),
    ("qwen2_moe", {"decoder_sparse_step": 2}, "dense layers"),
    ("qwen2_moe", {"mlp_only_layers": [0]}, "dense layers"),
    ("qwen2_moe", {"head_dim": 128}, "4 heads of 128"),
    ("qwen2_moe", {"tie_word_embeddings": True}, "wants an output matrix"),
    ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 16}, "sliding_window = 16"),
    ("qwen3_moe", {"attention_bias": True}, "attention_bias = True"),
    ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob = False"),
    ("qwen3_moe", {"mlp_only_layers": [1]}, "dense layers"),
    ("qwen3_moe", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, "'linear'"),
    ("qwen3_moe", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}, "two best"),
    ("deepseek_v2", {"rope_parameters": {**YARN, **WIDER, "beta_fast": 4}}, "beta_fast = 4"),
    ("deepseek_v2", {"rope_parameters": {**YARN, "beta_slow": 0.5}}, "beta_slow = 0.5"),
    ("deepseek_v2", {"rope_parameters": {**YARN, "truncate": False}}, "rounds the range"),
    ("deepseek_v2", {"num_hidden_layers": 27, "q_lora_rank": 64}, "27 layers"),
    ("deepseek_v3", {"rope_interleave": False}, "rope_interleave = False"),
    ("deepseek_v3", {"attention_bias": True}, "attention_bias = True"),
    ("deepseek_v3", {"rope_parameters": {**YARN, "rope_type": "linear"}}, "'linear'"),
    ("gpt_oss", {"swiglu_limit": 0.5}, "swiglu_limit = 0.5"),
    ("gpt_oss", {"swiglu_alpha": 1.0}, "swiglu_alpha = 1.0"),
    ("gpt_oss", {"layer_types": ["full_attention"] * 3}, "layer_types"),
    ("gpt_oss", {"attention_bias": False}, "attention_bias = False"),
    ("gpt_oss", {"tie_word_embeddings": True}, "wants an output matrix"),
    ("qwen3_next", {"rms_norm_eps": 1.0}, "rms_norm_eps = 1.0"),
    ("qwen3_next", {"linear_value_head_dim": 64}, "linear_value_head_dim = 64"),
    ("qwen3_next", {"layer_types": ["full_attention"] * 2 + ["linear_attention"] * 2}, "every n-th"),
    ("qwen3_next", {"mlp_only_layers": [1]}, "dense layers"),
    ("qwen3_next", {"norm_topk_prob": False}, "norm_topk_prob = False"),
    ("qwen3_next", {"attention_bias": True}, "attention_bias = True"),
]


@pytest.mark.parametrize(
    ("name", "over"), EXPRESSIBLE, ids=lambda x: x if isinstance(x, str) else "-".join(x)
)
def test_option_is_computed_alike(name: str, over: dict[str, Any], tmp_path: Path) -> None:
    model = zoo.make(name, **over)
    checkpoint = open_checkpoint(zoo.save(model, tmp_path / name))
    assert checkpoint.family.refusals() == []
    assert difference(checkpoint, model, tmp_path) <= 1e-3


@pytest.mark.parametrize(
    ("name", "over", "reason"), INEXPRESSIBLE, ids=lambda x: "-".join(x) if isinstance(x, dict) else None
)
def test_option_is_refused(name: str, over: dict[str, Any], reason: str, tmp_path: Path) -> None:
    model = zoo.make(name, **over)
    checkpoint = open_checkpoint(zoo.save(model, tmp_path / name))
    assert reason in "; ".join(checkpoint.family.refusals())
    try:
        far = difference(checkpoint, model, tmp_path)
    except UserError:
        return  # llama.cpp does not load the file
    assert far > 1e-3


def test_what_transformers_does_not_compute_is_refused() -> None:
    for name, option in (
        ("deepseek_v2", {"norm_topk_prob": True}),
        ("deepseek_v3", {"scoring_func": "softmax"}),
    ):
        config = {**zoo.BASE, **zoo.FAMILIES[name], "model_type": name, **option}
        assert next(iter(option)) in " ".join(family(config, name).refusals())


def test_rounding_every_gpt_oss_file_has_is_named_but_not_refused(tmp_path: Path) -> None:
    model = zoo.make("gpt_oss", rope_parameters={**YARN, "truncate": False})
    checkpoint = open_checkpoint(zoo.save(model, tmp_path / "gpt_oss"))
    assert checkpoint.family.refusals() == []
    assert "rounds the range" in " ".join(checkpoint.family.approximations())
    assert difference(checkpoint, model, tmp_path) > 1e-3


@pytest.mark.parametrize(
    ("name", "over", "reason"),
    [
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 1}, "3 groups"),
        ("deepseek_v3", {"rope_parameters": {**YARN, "original_max_position_embeddings": -1}}, "original"),
        ("gpt_oss", {"sliding_window": None}, "sliding_window"),
        ("qwen3_next", {"linear_num_value_heads": 0}, "linear_num_value_heads"),
    ],
    ids=label,
)
def test_values_no_model_can_have_are_refused(name: str, over: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        describe({**zoo.BASE, **zoo.FAMILIES[name], "model_type": name, **over}, name)


def test_only_attention_layers_hold_keys_and_values() -> None:
    config = {**zoo.BASE, **zoo.FAMILIES["qwen3_next"], "model_type": "qwen3_next"}
    assert describe(config, "q").kv_values == 2 * 2 * 64
