"""A tiny random model of every family, saved by transformers with the reference model's tokenizer."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compression.checkpoint import Checkpoint
from compression.families.base import Family
from spaces.gguf_layout import Value, header

REFERENCE = Path(__file__).resolve().parent / "reference_model/checkpoint"

BASE = {
    "vocab_size": 8192, "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 0,
    "eos_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "v_head_dim": 64,
    "num_key_value_heads": 4,
}  # fmt: skip

# The original context is shorter than the windows of most tests.
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0, "original_max_position_embeddings": 32,
    "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip

# What differs from BASE. Expert widths of 256 take every type, 96 only those of blocks of 32.
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {
        "intermediate_size": 512, "moe_intermediate_size": 96, "n_routed_experts": 8, "n_shared_experts": 2,
        "num_experts_per_tok": 3, "first_k_dense_replace": 1, **LATENT, "q_lora_rank": None,
        "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "deepseek_v3": {
        "intermediate_size": 512, "moe_intermediate_size": 256, "n_routed_experts": 8, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, **LATENT,
    },
    "gpt_oss": {
        "intermediate_size": 96, "num_local_experts": 8, "num_experts_per_tok": 3, "head_dim": 64,
        "sliding_window": 16, "rope_parameters": {**YARN, "truncate": True},
    },
    "dots1": {
        "intermediate_size": 512, "moe_intermediate_size": 96, "n_routed_experts": 8, "n_shared_experts": 2,
        "num_experts_per_tok": 3, "first_k_dense_replace": 1, "num_key_value_heads": 4, "head_dim": 32,
        "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    },
    "ernie4_5_moe": {
        "intermediate_size": 512, "moe_intermediate_size": 96, "moe_num_experts": 8, "moe_k": 3,
        "moe_num_shared_experts": 2, "tie_word_embeddings": True,
    },
    "glm4_moe": {
        "intermediate_size": 512, "moe_intermediate_size": 96, "n_routed_experts": 8, "n_shared_experts": 1,
        "num_experts_per_tok": 3, "first_k_dense_replace": 1, "attention_bias": True, "use_qk_norm": True,
        "head_dim": 128, "routed_scaling_factor": 1.5,
    },
    "granitemoe": {
        "intermediate_size": 96, "num_local_experts": 8, "num_experts_per_tok": 3,
        "tie_word_embeddings": True, "attention_multiplier": 0.015625, "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22, "logits_scaling": 6.0,
    },
    "mixtral": {
        "intermediate_size": 256, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None,
    },
    "olmoe": {"intermediate_size": 96, "num_experts": 8, "num_experts_per_tok": 3, "num_key_value_heads": 4},
    "qwen2_moe": {
        "intermediate_size": 512, "moe_intermediate_size": 96, "num_experts": 8, "num_experts_per_tok": 3,
        "shared_expert_intermediate_size": 160,
    },
    "qwen3_moe": {
        "intermediate_size": 512, "moe_intermediate_size": 96, "num_experts": 8, "num_experts_per_tok": 2,
        "head_dim": 64, "norm_topk_prob": True,
    },
    "qwen3_next": {
        "intermediate_size": 512, "moe_intermediate_size": 96, "num_experts": 8, "num_experts_per_tok": 3,
        "shared_expert_intermediate_size": 160, "head_dim": 64, "num_hidden_layers": 4,
        "full_attention_interval": 3, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_conv_kernel_dim": 4,
    },
}  # fmt: skip


# A block adds a fraction to what runs through a trained model. Were it the larger part, as with random
# weights of one scale, a router's near-tie that rounding decides would decide the token.
_UPDATE = 0.25
_ADDS = re.compile(r"(o_proj|out_proj|down_proj)(\.weight)?$")


def make(name: str, seed: int = 0, **over: Any) -> Any:
    """A random model in float32 whose norms, biases and buffers are not the initial ones."""
    from transformers import AutoConfig, AutoModelForCausalLM

    made = AutoConfig.for_model(**config(name, **over))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    # An embedding that is the output matrix too must leave logits of a size.
    stream = made.hidden_size**-0.5 if made.tie_word_embeddings else 1.0
    with torch.no_grad():
        for path, value in [*model.named_parameters(), *model.named_buffers()]:
            noise = torch.randn(value.shape, generator=generator)
            if "inv_freq" in path:
                continue
            if "e_score_correction_bias" in path:
                value.copy_(0.1 * noise)
            elif "embed_tokens" in path:
                value.copy_(noise * stream)
            elif value.ndim >= 2:
                value.copy_(noise * value.shape[-1] ** -0.5 * (_UPDATE * stream if _ADDS.search(path) else 1))
            else:
                value.add_(0.1 * noise)
    return model


def save(model: Any, folder: Path, **settings: Any) -> Path:
    """Saves a model with the reference tokenizer; `settings` go to `save_pretrained`."""
    model.save_pretrained(folder, **settings)
    file = folder / "config.json"
    if model.config.model_type == "deepseek_v3":
        # transformers leaves out what it has no field for; publishers' configs have it.
        file.write_text(json.dumps({**json.loads(file.read_text()), "scoring_func": "sigmoid"}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(REFERENCE / name, folder / name)
    return folder


def logits(model: Any, windows: np.ndarray) -> np.ndarray:
    """(n, length, vocabulary) logits by transformers."""
    with torch.inference_mode():
        out: np.ndarray = model(torch.from_numpy(windows.astype(np.int64)), use_cache=False).logits.numpy()
    return out


def log_softmax(x: np.ndarray) -> np.ndarray:
    """(..., vocabulary) logits to log probabilities, float64."""
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))


def config(name: str, **over: Any) -> dict[str, Any]:
    """The fields of a family's config.json."""
    return {**BASE, **FAMILIES[name], **over, "model_type": name}


Kept = Mapping[int, Sequence[int]]


def uneven(family: Family, seed: int = 0) -> Kept:
    """Experts to keep of every MoE layer: others in each, some five of eight, as many in every group."""
    generator = np.random.default_rng(seed)
    size = family.expert_count // family.groups
    few = max(family.least_per_group, (5 * size + 7) // 8)
    return {
        layer: [
            int(group * size + e)
            for group in range(family.groups)
            for e in sorted(generator.permutation(size)[:few])
        ]
        for layer in family.moe_layers
    }


def write_float(
    checkpoint: Checkpoint, path: Path, kept: Kept | None = None, top_k: int | None = None
) -> Path:
    """The model as an F32 GGUF without a vocabulary, straight from its parts.

    Args:
        checkpoint: The model.
        path: The file.
        kept: Experts that stay, by layer and as many in each; None: all.
        top_k: Experts a token takes, if not those of the model.
    """
    inventory = checkpoint.inventory
    count = None if kept is None else len(next(iter(kept.values())))
    plan = inventory.uniform_plan("F32", count, top_k)
    metadata = {**inventory.plan_metadata(plan), "tokenizer.ggml.model": Value("str", "none")}
    with path.open("wb") as stream:
        stream.write(header(metadata, inventory.infos(plan)))
        for part in checkpoint.family.parts:
            values = np.asarray(checkpoint.weights.read(part), np.float32)
            if kept is not None and part.tensor.per_expert and part.tensor.layer is not None:
                values = values[list(kept[part.tensor.layer])]
            data = np.ascontiguousarray(values).tobytes()
            stream.write(data + b"\0" * (-len(data) % 32))
    return path
