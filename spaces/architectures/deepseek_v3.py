"""DeepSeek-V3: latent attention, sigmoid router with a selection bias, shared expert.

Tensor names and layouts are those of llama.cpp's `deepseek2` architecture. The
multi-token-prediction layer of the published checkpoint is left out, as every
llama.cpp conversion for decoding does.
"""

from __future__ import annotations

from typing import Any

from spaces.errors import UserError
from spaces.gguf_layout import Value
from spaces.inventory import Inventory, Tensor, estimated_tokenizer_bytes

ARCHITECTURE = "deepseek2"
_SIGMOID = 2  # gguf.ExpertGatingFuncType.SIGMOID


def _block(config: dict[str, Any], layer: int) -> list[Tensor]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    q_rank, kv_rank = config["q_lora_rank"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    experts, width = config["n_routed_experts"], config["moe_intermediate_size"]

    def tensor(role: str, *shape: int, suffix: str = "weight", **flags: bool) -> Tensor:
        return Tensor(f"blk.{layer}.{role}.{suffix}", shape, role, layer, **flags)

    tensors = [
        tensor("attn_norm", hidden, quantizable=False),
        tensor("attn_q_a", q_rank, hidden),
        tensor("attn_q_a_norm", q_rank, quantizable=False),
        tensor("attn_q_b", heads * (nope + rope), q_rank),
        tensor("attn_kv_a_mqa", kv_rank + rope, hidden),
        tensor("attn_kv_a_norm", kv_rank, quantizable=False),
        tensor("attn_k_b", heads, kv_rank, nope),
        tensor("attn_v_b", heads, value, kv_rank),
        tensor("attn_output", hidden, heads * value),
        tensor("ffn_norm", hidden, quantizable=False),
    ]
    if layer < config["first_k_dense_replace"]:
        dense = config["intermediate_size"]
        return [
            *tensors,
            tensor("ffn_gate", dense, hidden),
            tensor("ffn_up", dense, hidden),
            tensor("ffn_down", hidden, dense),
        ]
    shared = width * config["n_shared_experts"]
    return [
        *tensors,
        tensor("ffn_gate_inp", experts, hidden, per_expert=True, quantizable=False),
        tensor("exp_probs_b", experts, suffix="bias", per_expert=True, quantizable=False),
        tensor("ffn_gate_exps", experts, width, hidden, per_expert=True),
        tensor("ffn_up_exps", experts, width, hidden, per_expert=True),
        tensor("ffn_down_exps", experts, hidden, width, per_expert=True),
        tensor("ffn_gate_shexp", shared, hidden),
        tensor("ffn_up_shexp", shared, hidden),
        tensor("ffn_down_shexp", hidden, shared),
    ]


def metadata(config: dict[str, Any], name: str) -> dict[str, Value]:
    """The hyperparameters llama.cpp reads for `deepseek2`."""
    kv_rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    rope_parameters = config.get("rope_parameters") or config
    values: dict[str, Value] = {
        "context_length": Value("u32", config["max_position_embeddings"]),
        "embedding_length": Value("u32", config["hidden_size"]),
        "block_count": Value("u32", config["num_hidden_layers"]),
        "feed_forward_length": Value("u32", config["intermediate_size"]),
        "attention.head_count": Value("u32", config["num_attention_heads"]),
        "attention.head_count_kv": Value("u32", 1),
        "attention.layer_norm_rms_epsilon": Value("f32", config["rms_norm_eps"]),
        "attention.q_lora_rank": Value("u32", config["q_lora_rank"]),
        "attention.kv_lora_rank": Value("u32", kv_rank),
        "attention.key_length": Value("u32", kv_rank + rope),
        "attention.value_length": Value("u32", kv_rank),
        "attention.key_length_mla": Value("u32", config["qk_nope_head_dim"] + rope),
        "attention.value_length_mla": Value("u32", config["v_head_dim"]),
        "rope.dimension_count": Value("u32", rope),
        "rope.freq_base": Value("f32", float(rope_parameters["rope_theta"])),
        "leading_dense_block_count": Value("u32", config["first_k_dense_replace"]),
        "vocab_size": Value("u32", config["vocab_size"]),
        "expert_count": Value("u32", config["n_routed_experts"]),
        "expert_used_count": Value("u32", config["num_experts_per_tok"]),
        "expert_feed_forward_length": Value("u32", config["moe_intermediate_size"]),
        "expert_shared_count": Value("u32", config["n_shared_experts"]),
        "expert_weights_scale": Value("f32", config["routed_scaling_factor"]),
        "expert_weights_norm": Value("bool", config["norm_topk_prob"]),
        "expert_gating_func": Value("u32", _SIGMOID),
    }
    if config["n_group"] > 1:
        values["expert_group_count"] = Value("u32", config["n_group"])
        values["expert_group_used_count"] = Value("u32", config["topk_group"])
    general = {
        "general.architecture": Value("str", ARCHITECTURE),
        "general.type": Value("str", "model"),
        "general.name": Value("str", name),
        "general.quantization_version": Value("u32", 2),
    }
    return general | {f"{ARCHITECTURE}.{key}": value for key, value in values.items()}


_COUNTS = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
    "num_attention_heads", "n_shared_experts", "n_routed_experts", "n_group", "topk_group", "q_lora_rank",
    "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "max_position_embeddings",
)  # fmt: skip


def _check(config: dict[str, Any], name: str) -> None:
    """Refuses values no model of this family can have."""
    for field in _COUNTS:
        value = config[field]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{name}: config.json: {field} must be a positive whole number, got {value!r}")
    numbers = {
        "rms_norm_eps": config["rms_norm_eps"],
        "routed_scaling_factor": config["routed_scaling_factor"],
    }
    numbers["rope_theta"] = (config.get("rope_parameters") or config)["rope_theta"]
    for field, value in numbers.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise UserError(f"{name}: config.json: {field} must be a positive number, got {value!r}")
    experts, groups = config["n_routed_experts"], config["n_group"]
    if experts % groups or (groups > 1 and experts // groups < 2) or config["topk_group"] > groups:
        raise UserError(
            f"{name}: config.json: {experts} routed experts cannot be routed in {groups} groups of which "
            f"{config['topk_group']} are used; groups must be even and hold two experts or more"
        )


def describe(config: dict[str, Any], name: str) -> Inventory:
    """Inventory of a DeepSeek-V3 config; `KeyError` on a missing field."""
    _check(config, name)
    if config.get("scoring_func", "sigmoid") != "sigmoid":
        raise UserError(
            f"{name}: scoring_func must be 'sigmoid' for deepseek_v3, got {config['scoring_func']!r}"
        )
    layers, dense = config["num_hidden_layers"], config["first_k_dense_replace"]
    if not 0 < config["num_experts_per_tok"] <= config["n_routed_experts"] or dense >= layers:
        raise UserError(f"{name}: config.json has no routed experts that a token could reach")
    vocabulary, hidden = config["vocab_size"], config["hidden_size"]
    outer = [
        Tensor("token_embd.weight", (vocabulary, hidden), "token_embd", None),
        Tensor("output_norm.weight", (hidden,), "output_norm", None, quantizable=False),
        Tensor("output.weight", (vocabulary, hidden), "output", None),
    ]
    return Inventory(
        name=name,
        model_type="deepseek_v3",
        metadata=metadata(config, name),
        expert_count_key=f"{ARCHITECTURE}.expert_count",
        expert_used_key=f"{ARCHITECTURE}.expert_used_count",
        tensors=(*outer, *(t for layer in range(layers) for t in _block(config, layer))),
        layers=layers,
        moe_layers=tuple(range(dense, layers)),
        experts=config["n_routed_experts"],
        top_k=config["num_experts_per_tok"],
        groups=config["n_group"],
        kv_values=config["kv_lora_rank"] + config["qk_rope_head_dim"],
        vocabulary=vocabulary,
        hidden=hidden,
        heads=config["num_attention_heads"],
        context=config["max_position_embeddings"],
        tokenizer_bytes=estimated_tokenizer_bytes(vocabulary),
    )
