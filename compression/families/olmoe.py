"""OLMoE: queries and keys normed over all heads at once, softmax router."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from compression.families.attention import GroupedQuery


class Olmoe(GroupedQuery):
    model_type = "olmoe"
    architecture = "olmoe"
    renormalises = False
    ties = False
    normed, norm_spans = True, "whole"
    square = own_keys = True

    @property
    def expert_width(self) -> int:
        return int(self.config.intermediate_size)

    def inexpressible(self) -> Iterator[str]:
        yield from super().inexpressible()
        if self.config.clip_qkv is not None:
            yield f"clip_qkv = {self.config.clip_qkv} (llama.cpp's olmoe does not clip after the norms)"

    @classmethod
    def config_of(cls, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        return super().config_of(metadata, shapes) | {"norm_topk_prob": False}
