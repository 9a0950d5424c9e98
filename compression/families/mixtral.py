"""Mixtral: llama's attention, softmax over the chosen experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compression.families.attention import GroupedQuery

_OLD = "block_sparse_moe"


class Mixtral(GroupedQuery):
    model_type = "mixtral"
    architecture = "llama"
    expert_field = "num_local_experts"
    renormalises = True
    interleaved = True
    biased = ""
    old_routers = (f"{_OLD}.gate",)
    each = (
        (
            f"{_OLD}.experts.{{}}.w1.weight",
            f"{_OLD}.experts.{{}}.w3.weight",
            f"{_OLD}.experts.{{}}.w2.weight",
        ),
    )
    fused = ((f"{_OLD}.experts.gate_up_proj", f"{_OLD}.experts.down_proj"),)

    @property
    def expert_width(self) -> int:
        return int(self.config.intermediate_size)

    @classmethod
    def config_of(cls, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        return super().config_of(metadata, shapes) | {"sliding_window": None}
