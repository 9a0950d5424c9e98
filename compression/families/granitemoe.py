"""Granite-MoE: llama's attention with muP's multipliers, softmax over the chosen experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from compression.families.attention import GroupedQuery
from compression.families.base import f32, shortest
from spaces.gguf_layout import Value

_MOE = "block_sparse_moe"
_MULTIPLIERS = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}


class GraniteMoe(GroupedQuery):
    model_type = "granitemoe"
    architecture = "granitemoe"
    expert_field = "num_local_experts"
    renormalises = True
    interleaved = True
    adds_output_bias = True
    router, experts = f"{_MOE}.router", f"{_MOE}.experts"
    old_routers = (f"{_MOE}.router.layer",)
    fused = ((f"{_MOE}.input_linear.weight", f"{_MOE}.output_linear.weight"),)

    @property
    def expert_width(self) -> int:
        return int(self.config.intermediate_size)

    @property
    def logit_divisor(self) -> float:
        return float(self.config.logits_scaling)

    def hyperparameters(self) -> dict[str, Value]:
        multipliers = {key: f32(getattr(self.config, field)) for field, key in _MULTIPLIERS.items()}
        return super().hyperparameters() | multipliers

    def inexpressible(self) -> Iterator[str]:
        yield from super().inexpressible()
        for field in _MULTIPLIERS:
            if not getattr(self.config, field):
                yield f"{field} = 0 (llama.cpp takes that for a default)"

    @classmethod
    def config_of(cls, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        fields = super().config_of(metadata, shapes)
        # What llama.cpp does without an entry, or with 0 in it.
        missing = {"attention.scale": fields["head_dim"] ** -0.5}
        return fields | {
            field: shortest(metadata.get(key) or missing.get(key, 1.0)) for field, key in _MULTIPLIERS.items()
        }

    @classmethod
    def reads(cls, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> bool:
        # Shared experts are granitemoeshared's.
        return super().reads(metadata, shapes) and "blk.0.ffn_gate_shexp.weight" not in shapes
