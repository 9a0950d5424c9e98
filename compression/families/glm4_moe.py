"""GLM-4.5 and later: partial rotation, sigmoid router with a selection bias, shared experts.

The multi-token-prediction layers of the published checkpoints are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compression.families.attention import GroupedQuery
from compression.families.experts import Sigmoid


class Glm4Moe(Sigmoid, GroupedQuery):
    model_type = "glm4_moe"
    architecture = "glm4moe"
    biased = "qkv"
    second_norm = "post_attention_norm"

    @property
    def normed(self) -> bool:
        return bool(self.config.use_qk_norm)

    @property
    def rotary_size(self) -> int:
        return int(self.head_size * self.config.rope_parameters.get("partial_rotary_factor", 1.0))

    @classmethod
    def config_of(cls, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        fields = super().config_of(metadata, shapes)
        rotated = metadata.get("rope.dimension_count", fields["head_dim"]) / fields["head_dim"]
        fields["rope_parameters"] = fields["rope_parameters"] | {"partial_rotary_factor": rotated}
        return fields | {"use_qk_norm": "blk.0.attn_q_norm.weight" in shapes}
