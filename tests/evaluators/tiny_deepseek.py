"""A small random DeepSeek-V3 and its GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

LAYERS, EXPERTS, TOP_K = 3, 8, 2
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the")]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = [*ALPHABET, *("".join(pair) for pair in MERGES), "<|end|>"]
CONFIG = DeepseekV3Config(
    vocab_size=len(TOKENS), hidden_size=256, intermediate_size=256, moe_intermediate_size=64,
    num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=4, n_shared_experts=1,
    n_routed_experts=EXPERTS, num_experts_per_tok=TOP_K, n_group=1, topk_group=1, first_k_dense_replace=1,
    kv_lora_rank=64, q_lora_rank=64, qk_rope_head_dim=32, qk_nope_head_dim=64, v_head_dim=64,
    norm_topk_prob=True, routed_scaling_factor=2.5, max_position_embeddings=128, initializer_range=0.08,
    tie_word_embeddings=False,
)  # fmt: skip


def tensors(model: DeepseekV3ForCausalLM) -> dict[str, np.ndarray]:
    """The model's weights under llama.cpp's names."""
    state = {name: value.float().numpy() for name, value in model.state_dict().items()}
    out = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    same = {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "attn_q_a": "self_attn.q_a_proj", "attn_q_a_norm": "self_attn.q_a_layernorm",
        "attn_q_b": "self_attn.q_b_proj", "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
        "attn_kv_a_norm": "self_attn.kv_a_layernorm", "attn_output": "self_attn.o_proj",
        "ffn_gate_inp": "mlp.gate", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj", "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
        "ffn_up_shexp": "mlp.shared_experts.up_proj", "ffn_down_shexp": "mlp.shared_experts.down_proj",
    }  # fmt: skip
    for layer in range(LAYERS):
        source, block = f"model.layers.{layer}.", f"blk.{layer}."
        for role, name in same.items():
            if f"{source}{name}.weight" in state:
                out[f"{block}{role}.weight"] = state[f"{source}{name}.weight"]
        latent = state[source + "self_attn.kv_b_proj.weight"].reshape(4, 64 + 64, -1)
        out[block + "attn_k_b.weight"] = latent[:, :64].transpose(0, 2, 1)
        out[block + "attn_v_b.weight"] = latent[:, 64:]
        if layer >= CONFIG.first_k_dense_replace:
            experts = state[source + "mlp.experts.gate_up_proj"]
            out[block + "ffn_gate_exps.weight"] = experts[:, :64]
            out[block + "ffn_up_exps.weight"] = experts[:, 64:]
            out[block + "ffn_down_exps.weight"] = state[source + "mlp.experts.down_proj"]
            out[block + "exp_probs_b.bias"] = state[source + "mlp.gate.e_score_correction_bias"]
    return out


def write_gguf(
    path: Path, model: DeepseekV3ForCausalLM, *, top_k: Any = TOP_K, tokenizer: bool = False
) -> Path:
    """Writes the model as F32; `top_k` may be a list, one per layer."""
    writer = gguf.GGUFWriter(path, "deepseek2")
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_rope_freq_base(CONFIG.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(CONFIG.qk_rope_head_dim)
    writer.add_q_lora_rank(CONFIG.q_lora_rank)
    writer.add_kv_lora_rank(CONFIG.kv_lora_rank)
    writer.add_key_length(CONFIG.kv_lora_rank + CONFIG.qk_rope_head_dim)
    writer.add_value_length(CONFIG.kv_lora_rank)
    writer.add_key_length_mla(CONFIG.qk_nope_head_dim + CONFIG.qk_rope_head_dim)
    writer.add_value_length_mla(CONFIG.v_head_dim)
    writer.add_leading_dense_block_count(CONFIG.first_k_dense_replace)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_shared_count(1)
    writer.add_expert_feed_forward_length(CONFIG.moe_intermediate_size)
    writer.add_expert_weights_scale(CONFIG.routed_scaling_factor)
    writer.add_expert_weights_norm(CONFIG.norm_topk_prob)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if isinstance(top_k, list):
        writer.add_array("deepseek2.expert_used_count", top_k)
    else:
        writer.add_expert_used_count(top_k)
    writer.add_tokenizer_model("gpt2" if tokenizer else "none")
    if tokenizer:
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(TOKENS)
        writer.add_token_types([gguf.TokenType.NORMAL] * (len(TOKENS) - 1) + [gguf.TokenType.CONTROL])
        writer.add_token_merges([" ".join(pair) for pair in MERGES])
    else:
        writer.add_vocab_size(CONFIG.vocab_size)
    for name, value in tensors(model).items():
        writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_model() -> DeepseekV3ForCausalLM:
    """A model whose norms and router biases are not the initial ones."""
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(CONFIG).float().eval()
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("e_score_correction_bias"):
            value.data.normal_(0, 0.1)
        elif "norm" in name:
            value.data.add_(0.1 * torch.randn_like(value))
    return model


def reference(model: DeepseekV3ForCausalLM, windows: np.ndarray) -> np.ndarray:
    """(n, length, vocabulary) logits by transformers."""
    with torch.inference_mode():
        return model(torch.from_numpy(windows)).logits.numpy()
