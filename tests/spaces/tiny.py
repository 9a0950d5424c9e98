"""A small DeepSeek-V3-style model as the search sees it, and spaces on it."""

from __future__ import annotations

import random
from typing import Any

from compression.families import describe
from spaces.inventory import Inventory
from spaces.plan import Plan
from spaces.quant_types import ladder
from spaces.space import Space

CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v3", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512,
    "moe_intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "n_shared_experts": 1,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1, "q_lora_rank": 256, "kv_lora_rank": 256, "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32, "v_head_dim": 64, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}  # fmt: skip

GROUPED: dict[str, Any] = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}
"""Changes that make the model's routing group-limited."""


def inventory(**changes: Any) -> Inventory:
    """The model with some of its config changed."""
    return describe({**CONFIG, **changes}, "tiny")


def rankings(model: Inventory, seed: int = 0) -> dict[str, dict[int, tuple[int, ...]]]:
    """A random order of every layer's experts per criterion."""
    rng = random.Random(seed)
    everyone = range(model.experts)
    return {
        criterion: {layer: tuple(rng.sample(everyone, model.experts)) for layer in model.moe_layers}
        for criterion in ("reap", "mass", "paper")
    }


def space(runtime: str = "any", **changes: Any) -> Space:
    """The space of the model with some of its config changed."""
    model = inventory(**changes)
    return Space(model, rankings(model), runtime)


def random_params(of: Space, rng: random.Random) -> dict[str, Any]:
    """Every parameter drawn from its distribution."""
    return {name: rng.choice(d.choices) for name, d in of.distributions.items()}  # type: ignore[attr-defined]


def random_plan(model: Inventory, rng: random.Random) -> Plan:
    """Counts and types that differ from layer to layer."""
    per_group = model.experts // model.groups
    kept = {i: model.groups * rng.randint(model.least_per_group, per_group) for i in model.moe_layers}
    return Plan(
        kept=tuple(kept.items()),
        top_k=tuple((i, rng.randint(1, min(model.top_k, n))) for i, n in kept.items()),
        types=tuple((t.name, rng.choice(ladder(t.row))) for t in model.quantizable),
    )
