"""Qwen1.5-MoE and Qwen2-MoE: softmax router, one shared expert behind a sigmoid gate."""

from __future__ import annotations

from compression.families.attention import GroupedQuery
from compression.families.experts import GatedShared


class Qwen2Moe(GatedShared, GroupedQuery):
    model_type = "qwen2_moe"
    architecture = "qwen2moe"
    renormalises = False
    ties = False
    bias_field, biased, square = "qkv_bias", "qkv", True
    positive = ("moe_intermediate_size", "shared_expert_intermediate_size")
