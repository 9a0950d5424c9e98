"""Qwen3-MoE: normed queries and keys, softmax router."""

from __future__ import annotations

from compression.families.attention import GroupedQuery
from compression.families.experts import Stepped


class Qwen3Moe(Stepped, GroupedQuery):
    model_type = "qwen3_moe"
    architecture = "qwen3moe"
    renormalises = True
    normed = True
    positive = ("moe_intermediate_size",)
